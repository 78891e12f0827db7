"""Triton kernels, imported as hyperfast.kernels: one module for each op.

A module's `launches(...)` takes the addresses and sizes that the CPU kernels take and returns the `Launch`es
that do the op; its `@triton.jit` functions are named `<op>_fwd_kernel` and `<op>_bwd_kernel`.
"""
