"""generate: w[n] = sum_k weight[n, k] z[k] + bias[n], for all layers of a network in one launch.

A block multiplies BLOCK_N rows of one layer with z and adds along K; layers of another K take a launch of
their own, since K is a compile-time constant. Floor: N K + 2 N elements moved, z is nothing. Sums in float32,
float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from hyperfast.kernels.launch import TRITON_TYPES, Launch, compute_type
from hyperfast.kernels.segments import by_size, find_segment, pointer, segments

ELEMENTS = 4096  # of weight for a block: four float4 loads in flight for each of 256 threads


@triton.jit
def generate_fwd_kernel(
    rows_ptr,
    starts_ptr,
    L,
    BLOCK_L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 5, BLOCK_L)
    weight_ptr = pointer(row_ptr, 0, DTYPE, ALIGNED)
    bias_ptr = pointer(row_ptr, 1, DTYPE, ALIGNED)
    z_ptr = pointer(row_ptr, 2, DTYPE, False)
    out_ptr = pointer(row_ptr, 3, DTYPE, ALIGNED)
    N = tl.load(row_ptr + 4)
    N_bias = tl.where(tl.load(row_ptr + 1) == 0, 0, N)

    offs_n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n, in_k = offs_n < N, offs_k < K
    mask = in_n[:, None] if BLOCK_K == K else in_n[:, None] & in_k[None, :]
    weight = tl.load(weight_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask, other=0.0).to(COMPUTE)
    z = tl.load(z_ptr + offs_k, mask=in_k, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N_bias, other=0.0).to(COMPUTE)
    w = tl.sum(weight * z[None, :], 1) + bias
    tl.store(out_ptr + offs_n, w.to(DTYPE), mask=in_n)


def launches(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Iterator[Launch]:
    """table: (weight [N, K], bias [N] or 0, z [K], out [N], N, K) for each layer, the first four as addresses
    of contiguous memory on `device`."""
    for K, rows in by_size(table).items():
        BLOCK_K = triton.next_power_of_2(K)
        BLOCK_N = max(1, ELEMENTS // BLOCK_K)
        aligned = all(address % 16 == 0 for row in rows for address in (row[0], row[1], row[3]))
        made = segments([row[:5] for row in rows], [triton.cdiv(row[4], BLOCK_N) for row in rows], device)
        constants = {"K": K, "BLOCK_K": BLOCK_K, "BLOCK_N": BLOCK_N, "ALIGNED": aligned}
        constants |= {"DTYPE": TRITON_TYPES[dtype], "COMPUTE": compute_type(dtype)}
        yield Launch(generate_fwd_kernel, (made.blocks,), made.arguments() | constants, num_warps=8)


def run(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Fills every `out`."""
    for launch in launches(table, dtype, device):
        launch.run()
