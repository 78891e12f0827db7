"""A layer in which every sample has generated weights of its own: the op, its backward, and autograd.

y_b = layer(x_b, w_b) with w_b = weight z_b + bias for z [B, K]. One op serves both layers: a linear layer of
T rows a sample is a 1x1 convolution of images [B, I, T, 1]. Where no kernels serve (K over 512, float16 on
the CPU, empty tensors, 2^30 rows) the reference expression runs, which makes all B N weights.

The Triton module has run(x, z, weight, bias, layer_bias, y, geometry) and run_backward(dy, x, z, weight,
bias, dx, dz, dweight, dbias, geometry). They fill y and dx (x's dtype, dense, x's layout), dz [B, K], dweight
[N, K] and dbias [N] (weight's dtype, contiguous); the last four may be None where not needed, bias and
layer_bias where there are none. x and dy have any strides, the rest is contiguous; geometry is
`Geometry.numbers`.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.ops import merged, per_sample_cpu
from hyperfast.ops._library import MAX_ROWS, generator_engine, library, no_autocast, triton_kernels
from hyperfast.ops.merged import LINEAR, Geometry, contiguous, layout_of, pad_uneven

# geometry: Geometry.flat. The gradients of weight [N, K] and bias [N] sum over the samples.
library.define(
    "per_sample_conv2d(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? layer_bias, int[] geometry) "
    "-> Tensor"
)
library.define(
    "per_sample_conv2d_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor? bias, int[] geometry, "
    "bool need_x, bool need_z, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _kernels(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[B, O, C / groups R S]; under autocast the product that uses them is in its dtype, not theirs."""
    with no_autocast([z]):
        w = F.linear(z, weight, bias).to(x.dtype)
    return w.view(len(x), geometry.outputs(x, weight), weight.shape[0] // geometry.outputs(x, weight))


def _as_groups(x: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """All samples as groups of one image [1, B C, H, W], and their kernels [B O, C / groups, R, S]."""
    return x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, x.shape[1] // geometry.groups, *geometry.kernel_size)


def expression(x, z, weight, bias, layer_bias, geometry: Geometry) -> Tensor:
    """The op in plain PyTorch."""
    if geometry != LINEAR and not len(x):
        return merged.expression(x, z.sum(0), weight, bias, layer_bias, geometry)
    w = _kernels(x, z, weight, bias, geometry)
    if geometry == LINEAR:
        y = (w @ x.flatten(2)).view(geometry.shape(x, weight))
    else:
        padded, padding = pad_uneven(x, geometry)
        images, kernels = _as_groups(padded, w, geometry)
        groups = len(x) * geometry.groups
        y = F.conv2d(images, kernels, None, geometry.stride, padding, geometry.dilation, groups)
        y = y.view(geometry.shape(x, weight))
    return y if layer_bias is None else y + layer_bias.to(y.dtype).view(-1, 1, 1)


def backward_expression(
    dy, x, z, weight, bias, geometry: Geometry, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw [B, N] in plain PyTorch, which can be differentiated again; None where not needed."""
    if geometry != LINEAR and not len(x):
        dx, _ = merged.backward_expression(dy, x, z.sum(0), weight, bias, geometry, need_x, False)
        return dx, weight.new_zeros(0, len(weight)) if need_w else None
    w = _kernels(x, z, weight, bias, geometry)
    if geometry == LINEAR:
        dy = dy.flatten(2)
        dx = (w.mT @ dy).view(x.shape) if need_x else None
        dw = dy @ x.flatten(2).mT if need_w else None
    else:
        padded, padding = pad_uneven(x, geometry)
        images, kernels = _as_groups(padded, w, geometry)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy.reshape(1, -1, *dy.shape[2:]), images, kernels, None, geometry.stride, padding,
            geometry.dilation, False, [0, 0], len(x) * geometry.groups, [need_x, need_w, False],
        )  # fmt: skip
        if need_x:
            top, left = (at - cut for at, cut in zip(geometry.padding[::2], padding, strict=True))
            dx = dx.view(*x.shape[:2], *dx.shape[2:])[..., top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dw.reshape(len(x), len(weight)).to(weight.dtype) if need_w else None


def _weight_gradients(dw: Tensor | None, z, weight, need_z: bool, need_weight: bool, need_bias: bool):
    """dz, dweight, dbias of dw [B, N]; None where not needed."""
    return (
        dw @ weight if need_z else None,
        dw.t() @ z if need_weight else None,
        dw.sum(0) if need_bias else None,
    )


@torch.library.impl(library, "per_sample_conv2d", "CompositeExplicitAutograd")
def _forward_reference(x, z, weight, bias, layer_bias, geometry):
    y = expression(x, z, weight, bias, layer_bias, Geometry.of(tuple(geometry)))
    return y.contiguous(memory_format=layout_of(x))


@torch.library.impl(library, "per_sample_conv2d_backward", "CompositeExplicitAutograd")
def _backward_reference(dy, x, z, weight, bias, geometry, *needed):
    need_x, need_w = needed[0], any(needed[1:])
    dx, dw = backward_expression(dy, x, z, weight, bias, Geometry.of(tuple(geometry)), need_x, need_w)
    gradients = _weight_gradients(dw, z, weight, *needed[1:])
    dx = dx.contiguous(memory_format=layout_of(x)) if need_x else x.new_empty(0)
    return dx, *(weight.new_empty(0) if g is None else g.contiguous() for g in gradients)


def _outputs_backward(x, z, weight, needed) -> list[Tensor | None]:
    """Memory for dx, dz, dweight, dbias; None where not needed."""
    return [
        torch.empty_like(x, memory_format=layout_of(x)) if needed[0] else None,
        torch.empty_like(z, memory_format=torch.contiguous_format) if needed[1] else None,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[2] else None,
        weight.new_empty(len(weight)) if needed[3] else None,
    ]


def _forward_triton(x, z, weight, bias, layer_bias, geometry):
    geometry = Geometry.of(tuple(geometry))
    y = torch.empty(geometry.shape(x, weight), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    generator = z.contiguous(), weight.contiguous(), contiguous(bias)
    triton_kernels("per_sample_conv2d").run(x, *generator, contiguous(layer_bias), y, geometry.numbers())
    return y


def _backward_triton(dy, x, z, weight, bias, geometry, *needed):
    made = _outputs_backward(x, z, weight, needed)
    generator = z.contiguous(), weight.contiguous(), contiguous(bias)
    numbers = Geometry.of(tuple(geometry)).numbers()
    triton_kernels("per_sample_conv2d").run_backward(dy, x, *generator, *made, numbers)
    likes = x, weight, weight, weight
    return tuple(like.new_empty(0) if t is None else t for t, like in zip(made, likes, strict=True))


def _engine(x: Tensor, weight: Tensor, geometry: list[int]) -> str:
    if not x.numel() or not weight.numel():
        return "reference"
    rows = max(x.numel() // x.shape[1], Geometry.of(tuple(geometry)).rows(x))
    engine = generator_engine([weight]) if rows < MAX_ROWS else "reference"
    return "reference" if engine == "cpu" and x.dtype != weight.dtype else engine


def separate_wins(x: Tensor, weight: Tensor, K: int, geometry: Geometry) -> bool:
    """Whether the reference expression beats the op. A GPU awaits measurement: the op."""
    return generator_engine([weight]) == "cpu" and per_sample_cpu.separate_wins(x, weight, K, geometry)


@torch.library.impl(library, "per_sample_conv2d", "CPU")
@torch.library.impl(library, "per_sample_conv2d", "CUDA")
def _forward_native(x, z, weight, bias, layer_bias, geometry):
    with no_autocast([x]):
        return _FORWARD[_engine(x, weight, geometry)](x, z, weight, bias, layer_bias, geometry)


@torch.library.impl(library, "per_sample_conv2d_backward", "CPU")
@torch.library.impl(library, "per_sample_conv2d_backward", "CUDA")
def _backward_native(dy, x, z, weight, bias, geometry, *needed):
    with no_autocast([x]):
        return _BACKWARD[_engine(x, weight, geometry)](dy, x, z, weight, bias, geometry, *needed)


_FORWARD = {"cpu": per_sample_cpu.forward, "triton": _forward_triton, "reference": _forward_reference}
_BACKWARD = {"cpu": per_sample_cpu.backward, "triton": _backward_triton, "reference": _backward_reference}


@torch.library.register_fake("hyperfast::per_sample_conv2d", lib=library)
def _forward_fake(x, z, weight, bias, layer_bias, geometry):
    shape = Geometry.of(tuple(geometry)).shape(x, weight)
    return x.new_empty(shape).contiguous(memory_format=layout_of(x))


@torch.library.register_fake("hyperfast::per_sample_conv2d_backward", lib=library)
def _backward_fake(dy, x, z, weight, bias, geometry, *needed):
    dx = x.new_empty(x.shape).contiguous(memory_format=layout_of(x)) if needed[0] else x.new_empty(0)
    shapes = z.shape, weight.shape, weight.shape[:1]
    return dx, *(weight.new_empty(s if need else 0) for s, need in zip(shapes, needed[1:], strict=True))


# the overloads themselves: finding them at each call costs microseconds
forward_op = torch.ops.hyperfast.per_sample_conv2d.default
_backward_op = torch.ops.hyperfast.per_sample_conv2d_backward.default


class PerSampleConv2dFunction(torch.autograd.Function):
    """A layer with weights generated for each sample; see `expression`."""

    @staticmethod
    def forward(x, z, weight, bias, layer_bias, geometry: Geometry):
        return forward_op(x, z, weight, bias, layer_bias, geometry.flat())

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, z, weight, bias, _, ctx.geometry = inputs
        ctx.save_for_backward(x, z, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, bias = ctx.saved_tensors
        *needed, need_layer_bias = ctx.needs_input_grad[:5]
        # create_graph and torch.func: a backward that can be differentiated again
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dw = backward_expression(dy, x, z, weight, bias, ctx.geometry, needed[0], any(needed[1:]))
            gradients = dx, *_weight_gradients(dw, z, weight, *needed[1:])
        else:
            made = _backward_op(dy, x, z, weight, bias, ctx.geometry.flat(), *needed)
            gradients = (g if need else None for g, need in zip(made, needed, strict=True))
        return *gradients, dy.sum((0, 2, 3), dtype=z.dtype) if need_layer_bias else None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, geometry = inputs

        def one(*tensors):
            return expression(*tensors, geometry)

        return torch.vmap(one, in_dims[:5])(*tensors), 0


# Function.apply asks for it at every call, which took 18 of 70 us
PerSampleConv2dFunction.forward.__signature__ = inspect.signature(PerSampleConv2dFunction.forward)
