"""generate_backward: dz[k] = sum_n weight[n, k] dw[n] and |dw|^2, for all layers of a network.

The gradient of weight is dw outer z: rank one, never formed. Floor: the N K elements of weight are read once.

A program sums a chunk of 65,536 elements, sixteen tiles one after another, and leaves K + 1 partial sums in
float64, at K = 16 0.05 % of the bytes it read. `full` has 1,300 chunks, an H100 room for 660 programs (48
registers, 256 threads). A second launch, of one small program for each layer and 32 columns, adds them up.
Loads are not pipelined through shared memory: each thread has four float4 in flight, an SM 80 KiB, where its
share of 3.35 TB/s times a latency of 0.7 us is 18 KiB. Whether other chunks or tiles do better awaits a GPU.

dz adds N terms: a lane adds at most 64 in the compute type before lanes are added in pairs, all else is in
float64, so are the squares of dw. The order depends on N and K alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from hyperfast.kernels.launch import TRITON_TYPES, Launch, compute_type
from hyperfast.kernels.rows import WARPS, by_layout, row_tile, tile
from hyperfast.kernels.segments import check_aligned, find_segment, pointer, segments

TILES = 16  # of a chunk
BLOCK_J, BLOCK_C = 32, 128  # columns and chunks that a program of the second launch takes at a time


@triton.jit
def generate_bwd_kernel(
    rows_ptr,
    starts_ptr,
    L,
    partials_ptr,
    BLOCK_L: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    row_ptr, chunk = find_segment(rows_ptr, starts_ptr, L, 4, BLOCK_L)
    weight_ptr = pointer(row_ptr, 0, DTYPE, MULTIPLE)
    dw_ptr = pointer(row_ptr, 1, DTYPE)
    partials_ptr += tl.load(row_ptr + 2) + chunk.to(tl.int64) * (K + 1)
    N = tl.load(row_ptr + 3)

    dz = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    begin = chunk.to(tl.int64) * (TILES * BLOCK_N)
    for first in range(begin, tl.minimum(begin + TILES * BLOCK_N, N), BLOCK_N):
        offs, mask = row_tile(N - first, K, BLOCK_K, BLOCK_N)
        tile_ptr = weight_ptr + first * K + offs
        weight = tl.load(tile_ptr, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        offs_n = first + tl.arange(0, BLOCK_N)
        dw = tl.load(dw_ptr + offs_n, mask=offs_n < N, other=0.0)
        dz += weight * dw.to(COMPUTE)[:, None]
        squares += dw.to(tl.float64) * dw.to(tl.float64)
    offs_k = tl.arange(0, BLOCK_K)
    tl.store(partials_ptr + offs_k, tl.sum(dz, 0).to(tl.float64), mask=offs_k < K)
    tl.store(partials_ptr + K, tl.sum(squares, 0))


@triton.jit
def generate_bwd_sum_kernel(
    rows_ptr,
    starts_ptr,
    L,
    partials_ptr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 5, BLOCK_L)
    dz_ptr = pointer(row_ptr, 0, DTYPE)
    norm_ptr = pointer(row_ptr, 1, tl.float64)
    partials_ptr += tl.load(row_ptr + 2)
    chunks, K = tl.load(row_ptr + 3), tl.load(row_ptr + 4)

    offs_j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = tl.zeros((BLOCK_C, BLOCK_J), tl.float64)
    for first in range(0, chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (offs_c < chunks)[:, None] & (offs_j <= K)[None, :]
        sums += tl.load(partials_ptr + offs_c[:, None] * (K + 1) + offs_j[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    tl.store(dz_ptr + offs_j, total.to(COMPUTE).to(DTYPE), mask=offs_j < K)
    tl.store(norm_ptr + offs_j * 0, total, mask=offs_j == K)


def launches(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Iterator[Launch]:
    """table: (weight [N, K], dw [N], dz [K], squared norm, N, K) for each layer, the first four as addresses of
    contiguous memory on `device`, of `dtype` but for the norm, one float64. ValueError for an address between
    elements."""
    check_aligned((address for row in table for address in row[:3]), dtype.itemsize)
    check_aligned((row[3] for row in table), 8)
    chunks = [triton.cdiv(row[4], TILES * tile(row[5])["BLOCK_N"]) for row in table]
    sizes = [count * (row[5] + 1) for count, row in zip(chunks, table, strict=True)]
    offsets = [0, *itertools.accumulate(sizes)]
    partials = {"partials_ptr": torch.empty(offsets[-1], dtype=torch.float64, device=device)}
    types = {"DTYPE": TRITON_TYPES[dtype], "COMPUTE": compute_type(dtype)}

    found = [(*row[:2], offset, count, *row[4:]) for row, offset, count in zip(table, offsets, chunks)]
    for (K, is_aligned), rows in by_layout(found).items():
        made = segments([(*row[:3], row[4]) for row in rows], [row[3] for row in rows], device)
        constants = tile(K) | types | {"TILES": TILES, "MULTIPLE": 16 if is_aligned else 1}
        arguments = made.arguments() | partials | constants
        yield Launch(generate_bwd_kernel, (made.blocks,), arguments, num_warps=WARPS)

    rows = [(*row[2:4], offset, count, row[5]) for row, offset, count in zip(table, offsets, chunks)]
    made = segments(rows, [triton.cdiv(row[4] + 1, BLOCK_J) for row in rows], device)
    constants = {"BLOCK_C": BLOCK_C, "BLOCK_J": BLOCK_J} | types
    arguments = made.arguments() | partials | constants
    yield Launch(generate_bwd_sum_kernel, (made.blocks,), arguments, num_warps=WARPS)


def run(table: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Fills every dz and squared norm."""
    for launch in launches(table, dtype, device):
        launch.run()
