"""Optimizer states in bfloat16 and in 8 bits, decoded and coded again in registers.

hyperfast/states.py describes the formats and is the specification: the same operations in the same order, so
that without fused multiply-add every code and scale is that of the specification, bit for bit. bfloat16 is
read and written as 16 bits: the rounding is ours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyperfast import states
from hyperfast.kernels.segments import pointer

SIGNED_OFFSET = tl.constexpr(states.SIGNED_OFFSET)
UNSIGNED_OFFSET = tl.constexpr(states.UNSIGNED_OFFSET)
SHIFT = tl.constexpr(states.SHIFT)
SMALLEST_SCALED = tl.constexpr(states.SMALLEST_SCALED)
SIGNED_TOP = tl.constexpr(states.SIGNED_TOP)
UNSIGNED_TOP = tl.constexpr(states.UNSIGNED_TOP)
BELOW_TOP = tl.constexpr(states.BELOW_TOP)


@triton.jit
def random_bits(seed, index):
    """32 random bits for each index, as `states.random_bits`."""
    x = index.to(tl.uint32) * 0x9E3779B9 + seed
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    return x ^ (x >> 15)


@triton.jit
def decode_eight(codes, scale, SIGNED: tl.constexpr):
    """Values of 8-bit codes; scale: of a shape that broadcasts to theirs."""
    if SIGNED:
        magnitude = ((codes.to(tl.uint32) & 0x7F) << 20) + SIGNED_OFFSET
        magnitude = magnitude.to(tl.float32, bitcast=True) - SHIFT
        values = tl.where(codes >= 0x80, -magnitude, magnitude) * scale
    else:
        values = ((codes.to(tl.uint32) << 20) + UNSIGNED_OFFSET).to(tl.float32, bitcast=True) * scale
    return values


@triton.jit
def group_largest(values, GROUP: tl.constexpr):
    """Largest magnitude of every GROUP rows of values [BLOCK_N, BLOCK_K] or [BLOCK_N], NaN if there is one."""
    bits = values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF  # ordered as magnitudes are
    if len(values.shape) == 2:
        bits = tl.max(bits, 1)
    return tl.max(tl.reshape(bits, (bits.shape[0] // GROUP, GROUP)), 1).to(tl.float32, bitcast=True)


@triton.jit
def scale_and_inverse(largest, SIGNED: tl.constexpr):
    """What takes the largest code to the largest value of a group, and what takes values to codes."""
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    normal = largest > SMALLEST_SCALED
    inverse = tl.div_rn(1.0, tl.where(normal, largest, 1.0)) * (TOP * BELOW_TOP)
    return tl.where(normal, largest * (1 / TOP), 0.0), tl.where(normal, inverse, 0.0)


@triton.jit
def encode_eight(y, random, SIGNED: tl.constexpr):
    """Codes of y, values times the inverse of their group's scale, rounded at random."""
    bits = y.to(tl.uint32, bitcast=True)
    if SIGNED:
        magnitude = (tl.abs(y) + SHIFT).to(tl.uint32, bitcast=True) - SIGNED_OFFSET
        codes = ((magnitude + ((random << 8) & 0xFFFFF)) >> 20) | ((bits >> 24) & 0x80)
    else:
        codes = (tl.maximum(bits, UNSIGNED_OFFSET) - UNSIGNED_OFFSET + (random >> 12)) >> 20
    return codes.to(tl.uint8)


@triton.jit
def encode_sixteen(values, random, SIGNED: tl.constexpr):
    """bfloat16 as its bits, rounded at random."""
    up = random & 0xFFFF if SIGNED else random >> 16
    return ((values.to(tl.uint32, bitcast=True) + up) >> 16).to(tl.uint16)


@triton.jit
def load_state(
    row_ptr, field: tl.constexpr, first, offs, mask, in_n, SIGNED: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Values of a tile of the state whose address, and that of its scales, begin at a field of the row: offs
    [BLOCK_N, BLOCK_K], or [BLOCK_N] for K = 1, from row `first` on, a multiple of the GROUP that share a
    scale."""
    STORED: tl.constexpr = DTYPE if STORAGE == "plain" else (tl.uint8 if STORAGE == "8bit" else tl.uint16)
    ptr = pointer(row_ptr, field, STORED, MULTIPLE) + first * K
    codes = tl.load(ptr + offs, mask=mask, other=0, eviction_policy="evict_first")
    if STORAGE == "8bit":
        scales_ptr = pointer(row_ptr, field + 1, tl.float32) + first // GROUP
        scale = tl.load(scales_ptr + tl.arange(0, in_n.shape[0]) // GROUP, mask=in_n, other=0.0)
        if len(offs.shape) == 2:
            scale = scale[:, None]
        values = decode_eight(codes, scale, SIGNED)
    elif STORAGE == "bfloat16":
        values = (codes.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = codes.to(COMPUTE)
    return values


@triton.jit
def store_state(
    row_ptr, field: tl.constexpr, first, offs, mask, rows, values, random, SIGNED: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, STORAGE: tl.constexpr, DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """The way back. rows: how many from `first` on have scales to write."""
    STORED: tl.constexpr = DTYPE if STORAGE == "plain" else (tl.uint8 if STORAGE == "8bit" else tl.uint16)
    if STORAGE == "8bit":
        largest = group_largest(values, GROUP)
        scale, inverse = scale_and_inverse(largest, SIGNED)
        offs_g = tl.arange(0, largest.shape[0])
        scales_ptr = pointer(row_ptr, field + 1, tl.float32) + first // GROUP
        tl.store(scales_ptr + offs_g, scale, mask=offs_g * GROUP < rows)
        inverse = tl.broadcast_to(inverse[:, None], (largest.shape[0], GROUP))
        inverse = tl.reshape(inverse, (values.shape[0],))
        if len(offs.shape) == 2:
            inverse = inverse[:, None]
        codes = encode_eight(values * inverse, random, SIGNED)
    elif STORAGE == "bfloat16":
        codes = encode_sixteen(values, random, SIGNED)
    else:
        codes = values.to(DTYPE)
    ptr = pointer(row_ptr, field, STORED, MULTIPLE) + first * K
    tl.store(ptr + offs, codes, mask=mask, eviction_policy="evict_first")
