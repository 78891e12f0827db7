"""`conv2d`: a convolution that does not multiply by the zeros of its padding where those are many.

On small images most taps of a padded 3 x 3 kernel fall outside: 5 of 9 at 2 x 2 pixels, 2.75 of 9 at 4 x 4.
There the convolution is a matrix product for each tap over the pixels the tap really meets, added up in place
("kn2row": Anderson, Vasudevan, Keane, Gregg, "Low-memory GEMM-based convolution algorithms for deep neural
networks", 2017), on torch's own matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from hyperfast.ops._library import library

PATHS = ("auto", "torch", "kn2row")
# Measured on two cores of an AVX-512 Xeon (benchmarks/bench_conv2d.py): beyond these the products are too
# small, or too few zeros are left out.
MAX_USEFUL_SHARE, MIN_CHANNELS, MIN_BATCH = 0.7, 256, 4

library.define(
    "conv2d_kn2row(Tensor x, Tensor weight, Tensor? bias, int[2] padding, int[2] dilation) -> Tensor"
)
library.define(
    "conv2d_kn2row_backward(Tensor dy, Tensor x, Tensor weight, int[2] padding, int[2] dilation, "
    "bool need_dx, bool need_dw) -> (Tensor, Tensor)"
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


def _pixels_last(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """[H, W, B, C] -> [B, C, H, W]."""
    return x.permute(2, 3, 0, 1).contiguous(memory_format=memory_format)


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for an x that is so and not contiguous: results are laid out like their input."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.impl(library, "conv2d_kn2row", "CompositeExplicitAutograd")
def _forward(x, weight, bias, padding, dilation):
    B, I, H, W = x.shape
    O, _, R, S = weight.shape
    height, width = _out_size(H, R, padding[0], dilation[0]), _out_size(W, S, padding[1], dilation[1])
    weight = weight.contiguous(memory_format=torch.channels_last)
    products, memory_format = _products(x, weight, padding, dilation), _memory_format(x)
    x, y = _pixels_first(x), x.new_empty(height, width, B, O)
    y.zero_() if bias is None else y.copy_(bias)
    for (r, s), into, out_of in products:
        y[into].view(-1, O).addmm_(x[out_of].view(-1, I), weight[:, :, r, s].t())
    return _pixels_last(y, memory_format)


@torch.library.register_fake("hyperfast::conv2d_kn2row", lib=library)
def _forward_fake(x, weight, bias, padding, dilation):
    out = [_out_size(*sizes) for sizes in zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True)]
    return x.new_empty(x.shape[0], weight.shape[0], *out).to(memory_format=_memory_format(x))


@torch.library.impl(library, "conv2d_kn2row_backward", "CompositeExplicitAutograd")
def _backward(dy, x, weight, padding, dilation, need_dx, need_dw):
    O, I, R, S = weight.shape
    weight = weight.contiguous(memory_format=torch.channels_last)
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    products, memory_format = _products(x, weight, padding, dilation), _memory_format(x)
    missed = {(r, s) for r in range(R) for s in range(S)}  # taps without a product yet
    dy, x = _pixels_first(dy), _pixels_first(x)
    dx = torch.zeros_like(x) if need_dx else x.new_empty(0)
    for (r, s), into, out_of in products:
        dy_matrix = dy[into].view(-1, O)
        if need_dx:
            dx[out_of].view(-1, I).addmm_(dy_matrix, weight[:, :, r, s])
        if need_dw:
            dw[:, :, r, s].addmm_(dy_matrix.t(), x[out_of].view(-1, I), beta=int((r, s) not in missed))
            missed.discard((r, s))
    for r, s in missed if need_dw else ():
        dw[:, :, r, s].zero_()
    return _pixels_last(dx, memory_format) if need_dx else dx, dw


@torch.library.register_fake("hyperfast::conv2d_kn2row_backward", lib=library)
def _backward_fake(dy, x, weight, padding, dilation, need_dx, need_dw):
    dx = torch.empty_like(x, memory_format=_memory_format(x)) if need_dx else x.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.channels_last) if need_dw else weight.new_empty(0)
    return dx, dw


class Conv2dKn2row(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, padding, dilation):
        return torch.ops.hyperfast.conv2d_kn2row(x, weight, bias, padding, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dw, need_dbias = ctx.needs_input_grad[:3]
        dbias = dy.sum((0, 2, 3)) if need_dbias else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a backward to differentiate again
            options = ([1, 1], ctx.padding, ctx.dilation, False, [0, 0], 1, [need_dx, need_dw, False])
            dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *options)
        else:
            dx, dw = torch.ops.hyperfast.conv2d_kn2row_backward(
                dy, x, weight, ctx.padding, ctx.dilation, need_dx, need_dw
            )
        return dx if need_dx else None, dw if need_dw else None, dbias, None, None

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, padding, dilation):
        def convolve(x, weight, bias):
            return F.conv2d(x, weight, bias, 1, padding, dilation)

        return torch.vmap(convolve, in_dims[:3])(x, weight, bias), 0


def _kn2row_can(x, weight, bias, stride, padding, dilation, groups) -> bool:
    """Whether kn2row serves this convolution: stride 1, one group, floating point on the CPU."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(
            isinstance(t, Tensor)
            and t.layout == torch.strided
            and t.device.type == "cpu"
            and t.dtype in (torch.float32, torch.float64)
            for t in tensors
        )
        and len({t.dtype for t in tensors}) == 1
        and (x.dim(), weight.dim()) == (4, 4)
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (stride, groups) == ((1, 1), 1)
        and not isinstance(padding, str)
        and min(padding) >= 0
        and min(dilation) >= 1
        and min(*x.shape, *weight.shape) > 0
        and all(_out_size(*s) > 0 for s in zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True))
    )


def _kn2row_wins(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """The measured rule: channels for large products, a batch for many rows, and zeros worth leaving out."""
    (B, I, H, W), (O, _, R, S) = x.shape, weight.shape
    share = useful_share(H, R, padding[0], dilation[0]) * useful_share(W, S, padding[1], dilation[1])
    return min(I, O) >= MIN_CHANNELS and B >= MIN_BATCH and share <= MAX_USEFUL_SHARE


def _describe(x: object) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


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
    """`torch.nn.functional.conv2d`, faster on the CPU where padding is a large part of the work.

    x [B, I, H, W], weight [O, I / groups, R, S], bias [O] -> [B, O, H', W']. path: "torch" is `F.conv2d`;
    "kn2row" is one matrix product for each tap (CPU, float32 and float64, stride 1, one group, sizes as
    padding; the result is laid out like x); "auto" takes kn2row where it was measured faster: at least 256
    channels, a batch of 4 and at most 70 % of the products outside the padding. Raises ValueError for an
    unknown path and for kn2row where it cannot serve.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    stride, dilation = tuple(_pair(stride)), tuple(_pair(dilation))
    padding = padding if isinstance(padding, str) else tuple(_pair(padding))
    autocast = torch.is_autocast_enabled(x.device.type) if isinstance(x, Tensor) and not x.is_meta else False
    can = path != "torch" and not autocast and _kn2row_can(x, weight, bias, stride, padding, dilation, groups)
    if path == "kn2row" and not can:
        raise ValueError(
            "kn2row needs float32 or float64 on the CPU without autocast, stride 1, one group and sizes as "
            f"padding; got x {_describe(x)}, weight {_describe(weight)}, stride {stride}, padding {padding}, "
            f"dilation {dilation}, groups {groups}, autocast {autocast}"
        )
    if can and (path == "kn2row" or _kn2row_wins(x, weight, padding, dilation)):
        return Conv2dKn2row.apply(x, weight, bias, padding, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
