"""`conv2d`: a convolution that does not multiply by the zeros of its padding where those are many.

On small images most taps of a padded 3 x 3 kernel fall outside: 5 of 9 at 2 x 2 pixels, 2.75 of 9 at 4 x 4.
There the convolution is a matrix product for each tap over the pixels the tap really meets, added up in place
("kn2row": Anderson, Vasudevan, Keane, Gregg, "Low-memory GEMM-based convolution algorithms for deep neural
networks", 2017), on torch's own matrix products. And where a CPU multiplies bfloat16 slower than float32,
bfloat16 tensors are multiplied in float32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from hyperfast.ops._library import library, no_autocast

PATHS = ("auto", "torch", "kn2row", "float32")
# Measured on two cores of an AVX-512 Xeon (benchmarks/bench_conv2d.py): beyond these the products are too
# small, or too few zeros are left out.
MAX_USEFUL_SHARE, MIN_CHANNELS, MIN_BATCH = 0.7, 256, 4

_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, int groups, bool kn2row"
library.define(f"conv2d(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor")
library.define(
    f"conv2d_backward(Tensor dy, Tensor x, Tensor weight, {_OPTIONS}, bool need_dx, bool need_dw) "
    "-> (Tensor, Tensor)"
)


def _out_size(size: int, taps: int, padding: int, dilation: int) -> int:
    return size + 2 * padding - dilation * (taps - 1)


def _overlaps(size: int, taps: int, padding: int, dilation: int) -> Iterator[tuple[int, int, int, int]]:
    """(tap, first output pixel, end, shift) of every tap that meets the image: output pixel p takes input
    pixel p + shift."""
    for tap in range(taps):
        shift = tap * dilation - padding
        begin, end = max(0, -shift), min(_out_size(size, taps, padding, dilation), size - shift)
        if begin < end:
            yield tap, begin, end, shift


def useful_share(size: int, taps: int, padding: int, dilation: int = 1) -> float:
    """The share of a stride-1 convolution's products, along one dimension, that do not meet the padding."""
    products = sum(end - begin for _, begin, end, _ in _overlaps(size, taps, padding, dilation))
    return products / (taps * _out_size(size, taps, padding, dilation))


Region = tuple[slice, slice]  # rows, columns: one row, or whole rows, so that its pixels are one matrix


def _products(
    x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, int], Region, Region]]:
    """(tap (r, s), output pixels, input pixels) of every matrix product."""
    H, W = x.shape[2:]
    R, S = weight.shape[2:]
    width = _out_size(W, S, padding[1], dilation[1])
    columns = list(_overlaps(W, S, padding[1], dilation[1]))
    for r, top, bottom, down in _overlaps(H, R, padding[0], dilation[0]):
        for s, begin, end, right in columns:
            step = bottom - top if end - begin == W == width else 1
            for row in range(top, bottom, step):
                into = slice(row, row + step), slice(begin, end)
                yield (r, s), into, (slice(row + down, row + down + step), slice(begin + right, end + right))


def _pixels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] -> contiguous [H, W, B, C]."""
    return x.permute(2, 3, 0, 1).contiguous()


def _kn2row(x: Tensor, weight: Tensor, bias: Tensor | None, padding, dilation) -> Tensor:
    B, I, H, W = x.shape
    O, _, R, S = weight.shape
    height, width = _out_size(H, R, padding[0], dilation[0]), _out_size(W, S, padding[1], dilation[1])
    weight = weight.contiguous(memory_format=torch.channels_last)
    products = _products(x, weight, padding, dilation)
    x, y = _pixels_first(x), x.new_empty(height, width, B, O)
    y.zero_() if bias is None else y.copy_(bias)
    for (r, s), into, out_of in products:
        y[into].view(-1, O).addmm_(x[out_of].view(-1, I), weight[:, :, r, s].t())
    return y.permute(2, 3, 0, 1)


def _kn2row_backward(
    dy, x, weight, padding, dilation, need_dx, need_dw
) -> tuple[Tensor | None, Tensor | None]:
    O, I, R, S = weight.shape
    weight = weight.contiguous(memory_format=torch.channels_last)
    dw = torch.empty_like(weight) if need_dw else None
    products = _products(x, weight, padding, dilation)
    missed = {(r, s) for r in range(R) for s in range(S)}  # taps without a product yet
    dy, x = _pixels_first(dy), _pixels_first(x)
    dx = torch.zeros_like(x) if need_dx else None
    for (r, s), into, out_of in products:
        dy_matrix = dy[into].view(-1, O)
        if dx is not None:
            dx[out_of].view(-1, I).addmm_(dy_matrix, weight[:, :, r, s])
        if dw is not None:
            dw[:, :, r, s].addmm_(dy_matrix.t(), x[out_of].view(-1, I), beta=int((r, s) not in missed))
            missed.discard((r, s))
    for r, s in missed if dw is not None else ():
        dw[:, :, r, s].zero_()
    return None if dx is None else dx.permute(2, 3, 0, 1), dw


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for an x that is so and not contiguous: results are laid out like their input."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _like(result: Tensor, x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`result` in the dtype of x and in `memory_format`."""
    return result.to(x.dtype).contiguous(memory_format=memory_format)


def _wide(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.dtype == torch.bfloat16 else t


@torch.library.impl(library, "conv2d", "CompositeExplicitAutograd")
def _conv2d(x, weight, bias, stride, padding, dilation, groups, kn2row):
    tensors = [_wide(t) for t in (x, weight, bias)]
    with no_autocast([x]):
        y = (
            _kn2row(*tensors, padding, dilation)
            if kn2row
            else F.conv2d(*tensors, stride, padding, dilation, groups)
        )
    return _like(y, x, _memory_format(x))


@torch.library.register_fake("hyperfast::conv2d", lib=library)
def _conv2d_fake(x, weight, bias, stride, padding, dilation, groups, kn2row):
    sizes = zip(x.shape[2:], weight.shape[2:], padding, dilation, stride, strict=True)
    out = [(_out_size(*size) - 1) // step + 1 for *size, step in sizes]
    return x.new_empty(x.shape[0], weight.shape[0], *out).to(memory_format=_memory_format(x))


@torch.library.impl(library, "conv2d_backward", "CompositeExplicitAutograd")
def _conv2d_backward(dy, x, weight, stride, padding, dilation, groups, kn2row, need_dx, need_dw):
    tensors = [_wide(t) for t in (dy, x, weight)]
    with no_autocast([x]):
        if kn2row:
            dx, dw = _kn2row_backward(*tensors, padding, dilation, need_dx, need_dw)
        else:
            options = (stride, padding, dilation, False, [0, 0], groups, [need_dx, need_dw, False])
            dx, dw, _ = torch.ops.aten.convolution_backward(*tensors, None, *options)
    dx = _like(dx, x, _memory_format(x)) if need_dx else x.new_empty(0)
    return dx, _like(dw, weight, _memory_format(weight)) if need_dw else weight.new_empty(0)


@torch.library.register_fake("hyperfast::conv2d_backward", lib=library)
def _conv2d_backward_fake(dy, x, weight, stride, padding, dilation, groups, kn2row, need_dx, need_dw):
    made = (torch.empty_like(t, memory_format=_memory_format(t)) for t in (x, weight))
    return tuple(t if need else t.new_empty(0) for t, need in zip(made, (need_dx, need_dw), strict=True))


class Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, stride, padding, dilation, groups, kn2row):
        return torch.ops.hyperfast.conv2d(x, weight, bias, stride, padding, dilation, groups, kn2row)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dw, need_dbias = ctx.needs_input_grad[:3]
        dbias = dy.sum((0, 2, 3)) if need_dbias else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a backward to differentiate again
            stride, padding, dilation, groups, _ = ctx.options
            options = (stride, padding, dilation, False, [0, 0], groups, [need_dx, need_dw, False])
            dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *options)
        else:
            dx, dw = torch.ops.hyperfast.conv2d_backward(dy, x, weight, *ctx.options, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, dbias, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, *options):
        return torch.vmap(lambda *t: F.conv2d(*t, *options[:4]), in_dims[:3])(x, weight, bias), 0


def _is_dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and x.dim() == 4


def _is_served(x, weight, bias, stride, padding, dilation, groups) -> bool:
    """Whether our op takes this convolution at all; what it does not take, torch computes or refuses."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
        and _is_dense(x)
        and _is_dense(weight)
        and len({t.dtype for t in tensors}) == 1
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and x.shape[1] == weight.shape[1] * groups
        and weight.shape[0] % groups == 0
        and (bias is None or bias.shape == weight.shape[:1])
        and not isinstance(padding, str)
        and min(padding) >= 0
        and min(*dilation, *stride) >= 1
        and min(*x.shape, *weight.shape) > 0
        and all(_out_size(*s) > 0 for s in zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True))
    )


def _kn2row_wins(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> bool:
    """The measured rule: channels for large products, a batch for many rows, and zeros worth leaving out."""
    (B, I, H, W), (O, _, R, S) = x.shape, weight.shape
    if stride != (1, 1) or groups != 1 or min(I, O) < MIN_CHANNELS or B < MIN_BATCH:
        return False
    share = useful_share(H, R, padding[0], dilation[0]) * useful_share(W, S, padding[1], dilation[1])
    return share <= MAX_USEFUL_SHARE


@torch.compiler.assume_constant_result
def bf16_products_are_slow() -> bool:
    """Whether this CPU multiplies bfloat16 matrices slower than float32 ones: it has no bfloat16
    instructions, or is an Intel one with VDPBF16PS alone, without AMX (measured: 165 against 314 GFLOPS)."""
    return _lacks_fast_bf16()


@functools.cache
def _lacks_fast_bf16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        return False
    flags = found[1].split()
    return "amx_bf16" not in flags and ("GenuineIntel" in text or "avx512_bf16" not in flags)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    path: str = "auto",
) -> Tensor:
    """`torch.nn.functional.conv2d`, faster on the CPU where padding or bfloat16 is a large part of the work.

    x [B, I, H, W], weight [O, I / groups, R, S], bias [O] -> [B, O, H', W'], in autocast's dtype under
    autocast. path: "torch" is `F.conv2d`. "kn2row" is one matrix product for each tap (stride 1, one group).
    "float32" multiplies bfloat16 tensors in float32, by torch's convolution. Both serve float32, float64 and
    bfloat16 on the CPU with sizes as padding, and lay the result out like x. "auto" takes what was measured
    faster: kn2row from 256 channels and a batch of 4 on where at least 30 % of the products meet the padding,
    float32 where the CPU's bfloat16 products are slower. Raises ValueError for an unknown path and for one
    that cannot serve.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    stride, dilation = tuple(_pair(stride)), tuple(_pair(dilation))
    padding = padding if isinstance(padding, str) else tuple(_pair(padding))
    options = (stride, padding, dilation, groups)
    if _is_dense(x) and _is_dense(weight) and _memory_format(x) == torch.channels_last:
        # once here instead of once in torch's forward and once in its backward
        weight = weight.contiguous(memory_format=torch.channels_last)
    if path in ("auto", "torch") and isinstance(x, Tensor) and x.device.type != "cpu":
        return F.conv2d(x, weight, bias, *options)
    tensors = _cast_by_autocast(x, weight, bias)
    served = path != "torch" and _is_served(*tensors, *options)
    possible = path in ("auto", "torch") or served and (path == "float32" or (stride, groups) == ((1, 1), 1))
    if not possible:
        raise ValueError(
            f"path {path!r} does not serve x {_describe(x)}, weight {_describe(weight)}, stride {stride}, "
            f"padding {padding}, dilation {dilation}, groups {groups}"
        )
    if served:
        in_float32 = tensors[0].dtype == torch.bfloat16 and (path != "auto" or bf16_products_are_slow())
        fast = in_float32 or tensors[0].dtype != torch.bfloat16
        kn2row = path == "kn2row" or path == "auto" and fast and _kn2row_wins(*tensors[:2], *options)
        if kn2row or in_float32:
            return Conv2d.apply(*tensors, *options, kn2row)
    return F.conv2d(x, weight, bias, *options)


def _cast_by_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors]


def _describe(x: object) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
