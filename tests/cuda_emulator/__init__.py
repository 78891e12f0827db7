"""CUDA kernels compiled by g++ and run on the CPU: see emulator.h."""
