"""Triton kernels, imported as hyperfast.kernels."""
