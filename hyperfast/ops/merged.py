"""Generation merged with the layer that uses the weights: the op, its backward, and autograd.

One op serves both layers: a linear layer is a 1x1 convolution of 1x1 images. Where the kernels do not serve
(CUDA, float16, K over 512, empty tensors) the reference expression runs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.ops._library import _cpu, kernel_dtype, library, no_autocast


class Geometry(NamedTuple):
    """Of a convolution. padding: (top, bottom, left, right)."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output(self, size: torch.Size) -> tuple[int, int]:
        """(H', W') for images [B, C, H, W]."""
        top, bottom, left, right = self.padding
        padded = size[2] + top + bottom, size[3] + left + right
        reach = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return tuple((n - r) // s + 1 for n, r, s in zip(padded, reach, self.stride, strict=True))

    def outputs(self, x: Tensor, weight: Tensor) -> int:
        """Output channels: N / (C / groups R S)."""
        return weight.shape[0] * self.groups // (x.shape[1] * math.prod(self.kernel_size))

    def shape(self, x: Tensor, weight: Tensor) -> list[int]:
        return [x.shape[0], self.outputs(x, weight), *self.output(x.shape)]


_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
library.define(
    "hyper_conv2d(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? layer_bias, "
    f"{_GEOMETRY}) -> Tensor"
)
library.define(
    "hyper_conv2d_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, bool need_x, bool need_z, bool need_w) -> (Tensor, Tensor, Tensor)"
)


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of what a convolution of x returns."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _kernel(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    w = F.linear(z, weight, bias)
    return w.view(geometry.outputs(x, weight), x.shape[1] // geometry.groups, *geometry.kernel_size)


def _pad(x: Tensor, geometry: Geometry) -> Tensor:
    top, bottom, left, right = geometry.padding
    return F.pad(x, (left, right, top, bottom)) if any(geometry.padding) else x


def expression(x, z, weight, bias, layer_bias, geometry: Geometry) -> Tensor:
    """The op in plain PyTorch."""
    w = _kernel(x, z, weight, bias, geometry)
    x = _pad(x, geometry)
    return F.conv2d(x, w, layer_bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def backward_expression(
    dy, x, z, weight, bias, geometry: Geometry, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw [N] in plain PyTorch, which can be differentiated again; None where not needed."""
    w = _kernel(x, z, weight, bias, geometry)
    top, _, left, _ = geometry.padding
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, _pad(x, geometry), w, None, geometry.stride, [0, 0], geometry.dilation, False, [0, 0],
        geometry.groups, [need_x, need_w, False],
    )  # fmt: skip
    if need_x:
        dx = dx[..., top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dw.reshape(-1) if need_w else None


@torch.library.impl(library, "hyper_conv2d", "CompositeExplicitAutograd")
def _forward_reference(x, z, weight, bias, layer_bias, *geometry):
    geometry = Geometry(*geometry)
    with no_autocast([x]):
        y = expression(x, z, weight, bias, layer_bias, geometry)
    return y.contiguous(memory_format=_layout(x))


@torch.library.impl(library, "hyper_conv2d_backward", "CompositeExplicitAutograd")
def _backward_reference(dy, x, z, weight, bias, *options):
    geometry, (need_x, need_z, need_w) = Geometry(*options[:5]), options[5:]
    with no_autocast([x]):
        dx, dw = backward_expression(dy, x, z, weight, bias, geometry, need_x, need_z or need_w)
        dz = weight.t() @ dw if need_z else None
    return (
        dx.contiguous(memory_format=_layout(x)) if need_x else x.new_empty(0),
        dz if need_z else x.new_empty(0),
        dw.contiguous() if need_w else x.new_empty(0),
    )


class _Columns:
    """The columns of x: [groups, M, I padded to a multiple of 16] in the type computed with."""

    def __init__(self, x: Tensor, weight: Tensor, geometry: Geometry):
        self.compute = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        self.name = {torch.float32: "float32", torch.float64: "float64"}[self.compute]
        self.x, self.geometry = x, geometry
        self.out = geometry.output(x.shape)
        columns = x.shape[1] // geometry.groups * math.prod(geometry.kernel_size)
        rows, outputs = x.shape[0] * math.prod(self.out), geometry.outputs(x, weight) // geometry.groups
        self.sizes = (geometry.groups, rows, outputs, columns, weight.shape[1])
        self.padded = -(-columns // 16) * 16
        # a linear layer's rows are its columns
        self.plain = x.shape[2:] == (1, 1) and geometry == Geometry() and columns == self.padded

    def empty(self) -> Tensor:
        return torch.empty(self.sizes[0], self.sizes[1], self.padded, dtype=self.compute)

    def _run(self, kernel, image: Tensor, columns: Tensor) -> None:
        g = self.geometry
        kernel(
            image.data_ptr(), list(image.shape), list(image.stride()), columns.data_ptr(), g.kernel_size,
            self.out, g.stride, g.padding[::2], g.dilation, g.groups, self.name, torch.get_num_threads(),
        )  # fmt: skip

    def gather(self) -> Tensor:
        x = self.x.to(self.compute)
        if self.plain:
            return x.contiguous()
        columns = self.empty()
        self._run(_cpu.im2col, x, columns)
        return columns

    def scatter(self, columns: Tensor) -> Tensor:
        """The gradient of x from that of its columns, in the layout of x."""
        if self.plain:
            return columns.view(self.x.shape).to(self.x.dtype)
        image = torch.empty(self.x.shape, dtype=self.compute, memory_format=_layout(self.x))
        self._run(_cpu.col2im, image, columns)
        return image.to(self.x.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _served(dtype: str | None, *tensors: Tensor) -> bool:
    return dtype is not None and all(t.numel() for t in tensors)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.impl(library, "hyper_conv2d", "CPU")
def _forward_cpu(x, z, weight, bias, layer_bias, *options):
    dtype, geometry = kernel_dtype([weight]), Geometry(*map(_hashable, options))
    if not _served(dtype, x, weight):
        return _forward_reference(x, z, weight, bias, layer_bias, *options)
    columns = _Columns(x, weight, geometry)
    rows = columns.gather()
    weight, bias, z = _contiguous(weight, bias, z)
    layer_bias = None if layer_bias is None else layer_bias.to(columns.compute).contiguous()
    B, O, H, W = geometry.shape(x, weight)
    y = torch.empty(B, H, W, O, dtype=columns.compute)
    tensors = tuple(map(_address, (weight, bias, z, rows, layer_bias, y)))
    _cpu.hyper_linear(tensors, columns.sizes, dtype, torch.get_num_threads())
    if H * W == 1:
        return y.view(B, O, 1, 1).to(x.dtype)
    return y.permute(0, 3, 1, 2).to(x.dtype).contiguous(memory_format=_layout(x))


@torch.library.impl(library, "hyper_conv2d_backward", "CPU")
def _backward_cpu(dy, x, z, weight, bias, *options):
    dtype, geometry = kernel_dtype([weight]), Geometry(*map(_hashable, options[:5]))
    if not _served(dtype, x, weight, dy):
        return _backward_reference(dy, x, z, weight, bias, *options)
    need_x, need_z, need_w = options[5:]
    columns = _Columns(x, weight, geometry)
    rows, dcolumns = columns.gather(), columns.empty() if need_x else None
    weight, bias, z = _contiguous(weight, bias, z)
    dy = dy.permute(0, 2, 3, 1).to(columns.compute).contiguous()
    dz, dw = weight.new_empty(z.shape if need_z else 0), weight.new_empty(weight.shape[0] if need_w else 0)
    wanted = dcolumns, dz if need_z else None, dw if need_w else None
    tensors = tuple(map(_address, (weight, bias, z, rows, dy, *wanted)))
    _cpu.hyper_linear_backward(tensors, columns.sizes, dtype, torch.get_num_threads())
    return columns.scatter(dcolumns) if need_x else x.new_empty(0), dz, dw


def _hashable(option):
    return tuple(option) if isinstance(option, list) else option


@torch.library.register_fake("hyperfast::hyper_conv2d", lib=library)
def _forward_fake(x, z, weight, bias, layer_bias, *options):
    shape = Geometry(*options).shape(x, weight)
    return x.new_empty(shape).contiguous(memory_format=_layout(x))


@torch.library.register_fake("hyperfast::hyper_conv2d_backward", lib=library)
def _backward_fake(dy, x, z, weight, bias, *options):
    need_x, need_z, need_w = options[5:]
    dx = x.new_empty(x.shape).contiguous(memory_format=_layout(x)) if need_x else x.new_empty(0)
    return dx, x.new_empty(z.shape if need_z else 0), x.new_empty(weight.shape[0] if need_w else 0)


class HyperConv2dFunction(torch.autograd.Function):
    """A layer merged with the generation of its weight; see `expression`."""

    @staticmethod
    def forward(x, z, weight, bias, layer_bias, geometry: Geometry, factored: bool):
        return torch.ops.hyperfast.hyper_conv2d(x, z, weight, bias, layer_bias, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, z, weight, bias, _, ctx.geometry, ctx.factored = inputs
        ctx.save_for_backward(x, z, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, bias = ctx.saved_tensors
        need_x, need_z, need_weight, need_bias, need_layer_bias = ctx.needs_input_grad[:5]
        # create_graph and torch.func: a backward that can be differentiated again, dense weight gradients
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ctx.factored = ctx.factored and not again  # stays dense in the second backward through this node
        need_weight = need_weight and not ctx.factored
        need_w = need_weight or need_bias
        if again:
            dx, dw = backward_expression(dy, x, z, weight, bias, ctx.geometry, need_x, need_w or need_z)
            dz = weight.t() @ dw if need_z else None
        elif need_x or need_z or need_w:
            dx, dz, dw = torch.ops.hyperfast.hyper_conv2d_backward(
                dy, x, z, weight, bias, *ctx.geometry, need_x, need_z, need_w
            )
        return (
            dx if need_x else None,
            dz if need_z else None,
            torch.outer(dw, z) if need_weight else None,
            dw if need_bias else None,
            dy.sum((0, 2, 3)) if need_layer_bias else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, geometry, _ = inputs

        def one(*tensors):
            return expression(*tensors, geometry)

        return torch.vmap(one, in_dims[:5])(*tensors), 0
