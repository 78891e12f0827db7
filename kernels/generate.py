"""generate: w[n] = sum_k weight[n, k] z[k] + bias[n], for all layers of a network in one launch.

A program multiplies BLOCK_N rows of one layer with z and adds along K; layers of another K take a launch of
their own, since K is a compile-time constant. Floor: N K + 2 N elements moved, z is nothing. weight is read
once, so that its lines are the first to leave the caches; w is what the main network reads next. Sums in
float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from hyperfast.kernels.launch import TRITON_TYPES, Launch, compute_type
from hyperfast.kernels.rows import WARPS, by_layout, row_sums, row_tile, tile
from hyperfast.kernels.segments import check_aligned, find_segment, pointer, segments


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
    MULTIPLE: tl.constexpr,
):
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 5, BLOCK_L)
    weight_ptr = pointer(row_ptr, 0, DTYPE, MULTIPLE)
    bias_ptr = pointer(row_ptr, 1, DTYPE)
    z_ptr = pointer(row_ptr, 2, DTYPE)
    out_ptr = pointer(row_ptr, 3, DTYPE)
    N = tl.load(row_ptr + 4)
    N_bias = tl.where(tl.load(row_ptr + 1) == 0, 0, N)

    first = block.to(tl.int64) * BLOCK_N
    offs, mask = row_tile(N - first, K, BLOCK_K, BLOCK_N)
    offs_n, offs_k = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight_ptr += first * K
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
    z = tl.load(z_ptr + offs_k, mask=offs_k < K, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N_bias, other=0.0).to(COMPUTE)
    w = row_sums(weight, z) + bias
    tl.store(out_ptr + offs_n, w.to(DTYPE), mask=offs_n < N)


def launches(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Iterator[Launch]:
    """table: (weight [N, K], bias [N] or 0, z [K], out [N], N, K) for each layer, the first four as addresses
    of contiguous memory on `device`. ValueError for an address between elements."""
    check_aligned((address for row in table for address in row[:4]), dtype.itemsize)
    for (K, is_aligned), rows in by_layout(table).items():
        shape = tile(K)
        blocks = [triton.cdiv(row[4], shape["BLOCK_N"]) for row in rows]
        made = segments([row[:5] for row in rows], blocks, device)
        constants = shape | {"DTYPE": TRITON_TYPES[dtype], "COMPUTE": compute_type(dtype)}
        constants["MULTIPLE"] = 16 if is_aligned else 1
        arguments = made.arguments() | constants
        yield Launch(generate_fwd_kernel, (made.blocks,), arguments, num_warps=WARPS, fp_fusion=False)


def run(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Fills every `out`."""
    for launch in launches(table, dtype, device):
        launch.run()
