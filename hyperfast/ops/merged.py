"""Generation merged with the layer that uses the weights: the op, its backward, and autograd.

One op serves both layers: a linear layer is a 1x1 convolution of 1x1 images. Where no kernels serve (K over
512, float16 on the CPU, empty tensors, 2^30 rows) the reference expression runs. x, and with it y, dy and dx,
may have another dtype than the rest under autocast; the C++ kernels take one dtype.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.ops._library import (
    MAX_ROWS,
    _cpu,
    _cuda,
    address,
    dtype_name,
    generator_engine,
    library,
    no_autocast,
    triton_kernels,
)


class Geometry(NamedTuple):
    """Of a convolution. padding: (top, bottom, left, right)."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def numbers(self) -> tuple[int, ...]:
        """R, S, stride (2), padding (4), dilation (2), groups."""
        return (*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups)

    def flat(self) -> tuple[int, ...]:
        """What the ops take: the eleven numbers, or none for a linear layer."""
        return () if self == LINEAR else self.numbers()

    @staticmethod
    def of(flat: tuple[int, ...]) -> Geometry:
        return Geometry(flat[:2], flat[2:4], flat[4:8], flat[8:10], flat[10]) if flat else LINEAR

    def output(self, size: torch.Size) -> tuple[int, int]:
        """(H', W') for images [B, C, H, W]."""
        top, bottom, left, right = self.padding
        padded = size[2] + top + bottom, size[3] + left + right
        reach = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return tuple((n - r) // s + 1 for n, r, s in zip(padded, reach, self.stride, strict=True))

    def rows(self, x: Tensor) -> int:
        """B H' W'."""
        return x.shape[0] * math.prod(self.output(x.shape))

    def outputs(self, x: Tensor, weight: Tensor) -> int:
        """Output channels: N / (C / groups R S)."""
        return weight.shape[0] * self.groups // (x.shape[1] * math.prod(self.kernel_size))

    def shape(self, x: Tensor, weight: Tensor) -> list[int]:
        return [x.shape[0], self.outputs(x, weight), *self.output(x.shape)]


LINEAR = Geometry()
_COMPUTE = {"bfloat16": torch.float32}  # the type the kernels take x, y and their gradients in; else the same
# geometry: Geometry.flat
library.define(
    "hyper_conv2d(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? layer_bias, int[] geometry) "
    "-> Tensor"
)
library.define(
    "hyper_conv2d_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor? bias, int[] geometry, "
    "bool need_x, bool need_z, bool need_w) -> (Tensor, Tensor, Tensor)"
)


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of what a convolution of x returns."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _kernel(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    w = F.linear(z, weight, bias).to(x.dtype)
    return w.view(geometry.outputs(x, weight), x.shape[1] // geometry.groups, *geometry.kernel_size)


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    top, bottom, left, right = geometry.padding
    return F.pad(x, (left, right, top, bottom)) if any(geometry.padding) else x


def pad_uneven(x: Tensor, geometry: Geometry) -> tuple[Tensor, list[int]]:
    """x, padded where both sides differ, and the padding that is left to a convolution."""
    top, bottom, left, right = geometry.padding
    return (x, [top, left]) if (top, left) == (bottom, right) else (pad(x, geometry), [0, 0])


def expression(x, z, weight, bias, layer_bias, geometry: Geometry) -> Tensor:
    """The op in plain PyTorch."""
    w = _kernel(x, z, weight, bias, geometry)
    x = pad(x, geometry)
    layer_bias = None if layer_bias is None else layer_bias.to(x.dtype)
    return F.conv2d(x, w, layer_bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def backward_expression(
    dy, x, z, weight, bias, geometry: Geometry, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw [N] in plain PyTorch, which can be differentiated again; None where not needed."""
    w = _kernel(x, z, weight, bias, geometry)
    top, _, left, _ = geometry.padding
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, pad(x, geometry), w, None, geometry.stride, [0, 0], geometry.dilation, False, [0, 0],
        geometry.groups, [need_x, need_w, False],
    )  # fmt: skip
    if need_x:
        dx = dx[..., top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dw.reshape(-1).to(weight.dtype) if need_w else None


@torch.library.impl(library, "hyper_conv2d", "CompositeExplicitAutograd")
def _forward_reference(x, z, weight, bias, layer_bias, geometry):
    with no_autocast([x]):
        y = expression(x, z, weight, bias, layer_bias, Geometry.of(tuple(geometry)))
    return y.contiguous(memory_format=layout_of(x))


@torch.library.impl(library, "hyper_conv2d_backward", "CompositeExplicitAutograd")
def _backward_reference(dy, x, z, weight, bias, geometry, need_x, need_z, need_w):
    geometry = Geometry.of(tuple(geometry))
    with no_autocast([x]):
        dx, dw = backward_expression(dy, x, z, weight, bias, geometry, need_x, need_z or need_w)
        dz = weight.t() @ dw if need_z else None
    return (
        dx.contiguous(memory_format=layout_of(x)) if need_x else x.new_empty(0),
        dz if need_z else weight.new_empty(0),
        dw.contiguous() if need_w else weight.new_empty(0),
    )


class _Plan(NamedTuple):
    """What the kernels are told of one call; it depends on shapes alone."""

    geometry: Geometry
    sizes: tuple[int, int, int, int, int]  # groups, rows, outputs and columns of a group, K
    padded: int  # columns of a group, a multiple of 16
    out: tuple[int, int]  # H', W'
    plain: bool  # the rows of x are its columns, as in a linear layer


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, weight_shape: torch.Size, flat: tuple[int, ...]) -> _Plan:
    geometry = Geometry.of(flat)
    out = geometry.output(shape)
    columns = shape[1] // geometry.groups * math.prod(geometry.kernel_size)
    N, K = weight_shape
    sizes = geometry.groups, shape[0] * math.prod(out), N // (columns * geometry.groups), columns, K
    padded = -(-columns // 16) * 16
    plain = shape[2:] == (1, 1) and geometry == LINEAR and columns == padded
    return _Plan(geometry, sizes, padded, out, plain)


def _columns_kernel(kernel, image: Tensor, columns: Tensor, plan: _Plan) -> None:
    g = plan.geometry
    kernel(
        image.data_ptr(), image.shape, image.stride(), columns.data_ptr(), g.kernel_size, plan.out, g.stride,
        g.padding[::2], g.dilation, g.groups, str(image.dtype)[6:], torch.get_num_threads(),
    )  # fmt: skip


def _gather(x: Tensor, compute: torch.dtype, plan: _Plan) -> Tensor:
    """The columns of x: [groups, M, padded I] in the type computed with."""
    x = x.to(compute)
    if plan.plain:
        return x.contiguous()
    columns = torch.empty(*plan.sizes[:2], plan.padded, dtype=compute)
    _columns_kernel(_cpu.im2col, x, columns, plan)
    return columns


def _scatter(columns: Tensor, x: Tensor, plan: _Plan) -> Tensor:
    """The gradient of x from that of its columns, in the layout of x."""
    if plan.plain:
        return columns.view(x.shape).to(x.dtype)
    image = torch.empty(x.shape, dtype=columns.dtype, memory_format=layout_of(x))
    _columns_kernel(_cpu.col2im, image, columns, plan)
    return image.to(x.dtype)


def contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _forward_cpu(x, z, weight, bias, layer_bias, geometry):
    dtype = dtype_name(weight)
    plan, compute = _plan(x.shape, weight.shape, tuple(geometry)), _COMPUTE.get(dtype, x.dtype)
    columns = _gather(x, compute, plan)
    weight, bias, z = weight.contiguous(), contiguous(bias), z.contiguous()
    layer_bias = contiguous(layer_bias, compute)
    groups, rows, outputs, *_ = plan.sizes
    y = torch.empty(rows, groups * outputs, dtype=compute)
    addresses = weight.data_ptr(), address(bias), z.data_ptr(), columns.data_ptr(), address(layer_bias)
    _cpu.hyper_linear((*addresses, y.data_ptr()), plan.sizes, dtype, torch.get_num_threads())
    if plan.out == (1, 1):
        return y.view(*y.shape, 1, 1).to(x.dtype)
    y = y.view(x.shape[0], *plan.out, -1).permute(0, 3, 1, 2)
    return y.to(x.dtype).contiguous(memory_format=layout_of(x))


def _backward_cpu(dy, x, z, weight, bias, geometry, need_x, need_z, need_w):
    dtype = dtype_name(weight)
    plan, compute = _plan(x.shape, weight.shape, tuple(geometry)), _COMPUTE.get(dtype, x.dtype)
    columns = _gather(x, compute, plan)
    dcolumns = columns.new_empty(*plan.sizes[:2], plan.padded) if need_x else None
    weight, bias, z = weight.contiguous(), contiguous(bias), z.contiguous()
    dy = dy.transpose(0, 1).to(compute).contiguous()  # [outputs, rows]
    dz, dw = weight.new_empty(z.shape if need_z else 0), weight.new_empty(weight.shape[0] if need_w else 0)
    wanted = dcolumns, dz if need_z else None, dw if need_w else None
    tensors = [address(t) for t in (weight, bias, z, columns, dy, *wanted)]
    _cpu.hyper_linear_backward(tensors, plan.sizes, dtype, torch.get_num_threads())
    return _scatter(dcolumns, x, plan) if need_x else x.new_empty(0), dz, dw


def _forward_triton(x, z, weight, bias, layer_bias, geometry):
    geometry = Geometry.of(tuple(geometry))
    y = torch.empty(geometry.shape(x, weight), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    generator = z.contiguous(), weight.contiguous(), contiguous(bias)
    triton_kernels("hyper_conv2d").run(x, *generator, contiguous(layer_bias), y, geometry.numbers())
    return y


def _backward_triton(dy, x, z, weight, bias, geometry, need_x, need_z, need_w):
    dx = torch.empty_like(x, memory_format=layout_of(x)) if need_x else None
    dz, dw = z.new_empty(z.shape) if need_z else None, weight.new_empty(len(weight)) if need_w else None
    generator = z.contiguous(), weight.contiguous(), contiguous(bias)
    numbers = Geometry.of(tuple(geometry)).numbers()
    triton_kernels("hyper_conv2d").run_backward(dy, x, *generator, dx, dz, dw, numbers)
    made = (dx, x), (dz, weight), (dw, weight)
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor, like in made)


def _forward_cuda(x, z, weight, bias, layer_bias, geometry):
    sizes, dtype = (len(x), weight.shape[0] // x.shape[1], *x.shape[1:2], weight.shape[1]), dtype_name(weight)
    x, z, weight, bias, layer_bias = map(contiguous, (x, z, weight, bias, layer_bias))
    y = x.new_empty(len(x), sizes[1], 1, 1)
    scratch = x.new_empty(_cuda.hyper_linear_scratch(sizes, dtype), dtype=torch.float32)
    addresses = [address(t) for t in (weight, bias, z, x, layer_bias, y, scratch)]
    with torch.cuda.device(x.device):
        _cuda.hyper_linear(addresses, sizes, dtype, torch.cuda.current_stream().cuda_stream)
    return y


def cuda_serves(rows: int, weight: Tensor, geometry: Geometry = LINEAR) -> bool:
    """Whether the CUDA C++ kernel serves: linear layers of few rows in float32 or less."""
    return geometry == LINEAR and weight.dtype != torch.float64 and rows <= _cuda.MAX_ROWS


def _engine(x: Tensor, weight: Tensor, geometry: list[int], cuda: str = "") -> str:
    if not x.numel() or not weight.numel():
        return "reference"
    geometry = Geometry.of(tuple(geometry))
    rows = max(x.numel() // x.shape[1], geometry.rows(x))
    engine = generator_engine([weight], cuda) if rows < MAX_ROWS else "reference"
    if engine == "cuda":
        fits = x.shape[2:] == (1, 1) and x.dtype == weight.dtype and cuda_serves(rows, weight, geometry)
        return engine if fits else "reference"
    return engine


@torch.library.impl(library, "hyper_conv2d", "CPU")
@torch.library.impl(library, "hyper_conv2d", "CUDA")
def _forward_native(x, z, weight, bias, layer_bias, geometry):
    forward = _FORWARD[_engine(x, weight, geometry, cuda="hyper_linear")]
    return forward(x, z, weight, bias, layer_bias, geometry)


@torch.library.impl(library, "hyper_conv2d_backward", "CPU")
@torch.library.impl(library, "hyper_conv2d_backward", "CUDA")
def _backward_native(dy, x, z, weight, bias, geometry, need_x, need_z, need_w):
    backward = _BACKWARD[_engine(x, weight, geometry)]
    return backward(dy, x, z, weight, bias, geometry, need_x, need_z, need_w)


_FORWARD = {
    "cpu": _forward_cpu,
    "triton": _forward_triton,
    "cuda": _forward_cuda,
    "reference": _forward_reference,
}
_BACKWARD = {"cpu": _backward_cpu, "triton": _backward_triton, "reference": _backward_reference}


@torch.library.register_fake("hyperfast::hyper_conv2d", lib=library)
def _forward_fake(x, z, weight, bias, layer_bias, geometry):
    shape = Geometry.of(tuple(geometry)).shape(x, weight)
    return x.new_empty(shape).contiguous(memory_format=layout_of(x))


@torch.library.register_fake("hyperfast::hyper_conv2d_backward", lib=library)
def _backward_fake(dy, x, z, weight, bias, geometry, need_x, need_z, need_w):
    dx = x.new_empty(x.shape).contiguous(memory_format=layout_of(x)) if need_x else x.new_empty(0)
    return dx, weight.new_empty(z.shape if need_z else 0), weight.new_empty(weight.shape[0] if need_w else 0)


# the overloads themselves: finding them at each call costs microseconds
forward_op = torch.ops.hyperfast.hyper_conv2d.default
_backward_op = torch.ops.hyperfast.hyper_conv2d_backward.default


class HyperConv2dFunction(torch.autograd.Function):
    """A layer merged with the generation of its weight; see `expression`."""

    @staticmethod
    def forward(x, z, weight, bias, layer_bias, geometry: Geometry, factored: bool):
        return forward_op(x, z, weight, bias, layer_bias, geometry.flat())

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
            dx, dz, dw = _backward_op(dy, x, z, weight, bias, ctx.geometry.flat(), need_x, need_z, need_w)
        return (
            dx if need_x else None,
            dz if need_z else None,
            torch.outer(dw, z) if need_weight else None,
            dw if need_bias else None,
            dy.sum((0, 2, 3), dtype=z.dtype) if need_layer_bias else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, geometry, _ = inputs

        def one(*tensors):
            return expression(*tensors, geometry)

        return torch.vmap(one, in_dims[:5])(*tensors), 0


# Function.apply asks for it at every call, which took 18 of 70 us
HyperConv2dFunction.forward.__signature__ = inspect.signature(HyperConv2dFunction.forward)
