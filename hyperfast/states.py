"""Optimizer states beside float32 weights in bfloat16 and in 8 bits: the formats, coded in plain PyTorch.

This is the specification; csrc/cpu/state_storage.h does the same in registers. The mathematics of an update
stays float32: states are decoded, updated and coded again. A second moment with beta2 = 0.999 changes by 0.1
% of itself, below half of the last place of either format, so rounding to nearest would never let it fall:
values are rounded up or down at random such that they are right on average. The random numbers are a hash of
the element's index and a seed (the step and the parameter), so that a run is the same with any number of
threads and after a resume.

8 bits, block-wise as Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (ICLR 2022): groups of
`rows_per_scale(K)` rows share a float32 scale, which takes the largest magnitude of the group to the largest
code. A code is a small float that arithmetic decodes, without a table:

- signed (first moment, momentum): sign, 4 bits of exponent, 3 of fraction, shifted so that 0 is exact and the
  spacing near it even; largest to smallest magnitude 1.875 to 2^-18.
- unsigned (second moment): 5 bits of exponent, 3 of fraction, and no zero: 1.875 to 2^-31. What is smaller
  counts as 2^-31, so a moment that lives beside a large one cannot vanish and blow the update up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SIGNED_OFFSET, SHIFT, SIGNED_TOP = 0x38000000, 2.0**-15, 1.875 - 2.0**-15  # the bits of 2^-15
UNSIGNED_OFFSET, UNSIGNED_TOP = 0x30000000, 1.875  # the bits of 2^-31
SMALLEST_SCALED = 1e-36  # groups below count as zero: the inverse of their scale would overflow
BELOW_TOP = 1 - 2.0**-22  # keeps what is rounded up within the codes


class EightBit(NamedTuple):
    """A state in 8 bits: codes uint8 [N, K] or [N], scales float32 [number of groups] (`num_scales`)."""

    codes: Tensor
    scales: Tensor


State = Tensor | EightBit


def storage_of(state: State, dtype: torch.dtype) -> str:
    """How `state` is stored beside weights of `dtype`: "plain" (as they are), "bfloat16" or "8bit"."""
    if isinstance(state, EightBit):
        return "8bit"
    return "bfloat16" if state.dtype == torch.bfloat16 and dtype == torch.float32 else "plain"


def rows_per_scale(K: int) -> int:
    """Rows of K elements that share a scale: a power of two up to 32, together at most 256 elements or one
    row."""
    rows = 32
    while rows > 1 and rows * K > 256:
        rows //= 2
    return rows


def num_scales(shape: Sequence[int]) -> int:
    """Groups of a tensor [N, K] or [N] (K = 1)."""
    N, K = (*shape, 1)[:2]
    return -(-N // rows_per_scale(K))


def zeros(like: Tensor, storage: str) -> State:
    """A state of zeros for the parameter `like`."""
    if storage == "8bit":
        scales = torch.zeros(num_scales(like.shape), dtype=torch.float32, device=like.device)
        return EightBit(
            torch.zeros_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format), scales
        )
    dtype = torch.bfloat16 if storage == "bfloat16" else like.dtype
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)


def decode(state: State, signed: bool) -> Tensor:
    """The values of a state: float32 for a low-precision one, a plain tensor itself."""
    if not isinstance(state, EightBit):
        return state.float() if state.dtype == torch.bfloat16 else state
    codes, offset = state.codes.int(), SIGNED_OFFSET if signed else UNSIGNED_OFFSET
    magnitude = ((codes & 0x7F if signed else codes) << 20) + offset
    values = magnitude.view(torch.float32)
    if signed:
        values = torch.where(codes >= 0x80, SHIFT - values, values - SHIFT)
    return values * _per_element(state.scales, codes.shape)


def encode_(state: State, values: Tensor, signed: bool, random: Tensor | None = None) -> None:
    """Stores float32 `values`. random: 32 bits for each element, int64; None rounds to nearest."""
    if not isinstance(state, EightBit):
        up = 0x8000 if random is None else random & 0xFFFF if signed else random >> 16
        state.copy_(_signed32(_bits(values) + up >> 16 << 16).view(torch.float32))
        return
    top = SIGNED_TOP if signed else UNSIGNED_TOP
    largest = _groups(values).abs().amax(1)
    normal = largest > SMALLEST_SCALED
    state.scales.copy_(torch.where(normal, largest * (1 / top), 0.0))
    inverse = torch.where(normal, top * BELOW_TOP / largest, 0.0)
    y = values * _per_element(inverse, values.shape)
    if signed:
        up = 0x80000 if random is None else random << 8 & 0xFFFFF
        codes = _bits(y.abs() + SHIFT) - SIGNED_OFFSET + up >> 20
        codes = codes | (y.signbit().long() << 7)
    else:
        up = 0x80000 if random is None else random >> 12
        codes = _bits(y).clamp(min=UNSIGNED_OFFSET) - UNSIGNED_OFFSET + up >> 20
    state.codes.copy_(codes)


def random_bits(seed: int | Tensor, first: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """32 random bits, int64, for each element: a Weyl sequence over first + index from a seed that is random
    itself, mixed once. The first moment takes the lower, the second the higher of them."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device) + first
    x = (index & 0xFFFFFFFF) * 0x9E3779B9 + seed & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    return (x ^ x >> 15).view(shape)


def seeds(steps: Tensor, positions: Tensor) -> Tensor:
    """Of the rounding: 32 bits, int64 [L], from steps [L] (whole numbers, any dtype) and the parameters'
    positions int64 [L], the same on every device. Both in one word of 64 bits, which is multiplied, folded
    and multiplied again; the highest bits then depend on all of it."""
    x = torch.add(positions, steps.long(), alpha=1 << 32) * _odd(0x9E3779B97F4A7C15)
    return (x ^ x >> 32) * _odd(0xD6E8FEB86659FD93) >> 32 & 0xFFFFFFFF


def _odd(factor: int) -> int:
    """A factor of 64 bits as int64."""
    return factor - (1 << 64)


def converted(state: State, like: Tensor, storage: str, signed: bool) -> State:
    """`state` in another storage (to nearest), for the parameter `like`; itself if it is in that already."""
    plain = storage == "plain" and isinstance(state, Tensor) and state.dtype == like.dtype
    if plain or storage != "plain" and storage_of(state, torch.float32) == storage:
        return state
    values, made = decode(state, signed), zeros(like, storage)
    if storage == "plain":
        made.copy_(values)
    else:
        encode_(made, values.float(), signed)
    return made


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _signed32(bits: Tensor) -> Tensor:
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()


def _groups(values: Tensor) -> Tensor:
    """[number of groups, elements], padded with zeros."""
    N, K = (*values.shape, 1)[:2]
    rows = rows_per_scale(K)
    padded = values.new_zeros(num_scales(values.shape) * rows * K)
    padded[: values.numel()] = values.reshape(-1)
    return padded.view(-1, rows * K)


def _per_element(scales: Tensor, shape: Sequence[int]) -> Tensor:
    """A group's number beside each of its elements, broadcast over K."""
    N, K = (*shape, 1)[:2]
    rows = scales.repeat_interleave(rows_per_scale(K))[:N]
    return rows if len(shape) == 1 else rows.unsqueeze(1)
