"""Tiles of whole rows of a generator [N, K]: what generate, generate_backward and update_generate share.

A program takes BLOCK_N rows at a time, 16 elements for each of its threads (fewer where K < 4), four float4
loads in flight. A thread holds 16 bytes of a row side by side where the weight's address and the rows' size are
multiples of 16; where they are not it loads what they are multiples of, down to single elements (odd K). A K
that is no power of two leaves lanes idle.

update_generate must make the weights that generate would make, bit for bit. Both sum with `row_sums`, and what
decides how a row lies over threads, and so the order of the sums, is a property of the layer alone: K, dtype
and whether the weight's address is a multiple of 16. Both compile without fused multiply-add, which a compiler
would place differently in the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

ELEMENTS = 4096  # of a tile, 16 for each thread
WARPS = 8


def tile(K: int, elements: int = ELEMENTS) -> dict[str, int]:
    """K and the tile [BLOCK_N, BLOCK_K] for it as a kernel's arguments."""
    BLOCK_K = triton.next_power_of_2(K)
    return {"K": K, "BLOCK_K": BLOCK_K, "BLOCK_N": min(elements // BLOCK_K, elements // 4)}


def by_layout(table: Sequence[tuple[int, ...]]) -> dict[tuple[int, bool], list[tuple[int, ...]]]:
    """Rows (weight, ..., N, K) by their K and whether the weight's address is a multiple of 16: each a launch
    of its own. Without those of N = 0."""
    found: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
    for row in table:
        if row[-2]:
            found.setdefault((row[-1], row[0] % 16 == 0), []).append(row)
    return found


@triton.jit
def row_tile(rows, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets [BLOCK_N, BLOCK_K] from the tile's first row, int32, and which are inside of [rows, K]; rows: how
    many are left from there."""
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_n = (offs_n < rows)[:, None]
    mask = in_n if BLOCK_K == K else in_n & (offs_k < K)[None, :]
    return offs_n[:, None] * K + offs_k[None, :], mask


@triton.jit
def row_sums(weight, z):
    """sum_k weight[n, k] z[k]"""
    return tl.sum(weight * z[None, :], 1)
