"""Weights of which every sample of a batch has its own, in the place of a layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast import ops
from hyperfast.ops._library import autocast_dtype, no_autocast


class PerSampleWeight(Tensor):
    """A weight [*shape] for each of B samples, which stands where a layer has its one weight.

    `F.linear`, `F.conv1d` to `conv3d` and `F.conv_transpose1d` to `3d`, called with it as weight or as bias
    by any module, compute sample b of their input [B, ...] with the weight of sample b, without a loop:
    linear layers and convolutions in one and two dimensions on `ops.hyper_linear` and `ops.hyper_conv2d`,
    others as groups of one convolution. Shape, dtype, device and strides are those of one sample's weight, a
    gradient is required where what makes it requires one; anything else raises TypeError. A generator makes
    it from z with a batch dimension; `generated` and `ready` do it by hand. It holds B embeddings or B
    weights and no numbers of its own.
    """

    z: Tensor | None  # [B, K]
    generator: tuple[Tensor, Tensor | None] | None  # weight [N, K], bias [N]
    weights: Tensor | None  # [B, *shape]
    path: str

    @classmethod
    def generated(
        cls, shape: Sequence[int], weight: Tensor, bias: Tensor | None, z: Tensor, path: str = "auto"
    ) -> PerSampleWeight:
        """w_b = weight z_b + bias viewed as `shape`: weight [N, K], bias [N] or None, z [B, K]. path: as in
        `ops.hyper_linear`."""
        return cls._of(weight, shape, z=z, generator=(weight, bias), weights=None, path=path)

    @classmethod
    def ready(cls, weights: Tensor) -> PerSampleWeight:
        """weights [B, *shape]."""
        return cls._of(weights, weights.shape[1:], z=None, generator=None, weights=weights, path="auto")

    @classmethod
    def _of(cls, like: Tensor, shape: Sequence[int], **parts: Any) -> PerSampleWeight:
        made = like.detach().new_empty(()).expand(tuple(shape)).as_subclass(cls)
        for name, part in parts.items():
            setattr(made, name, part)
        return made

    @property
    def requires_grad(self) -> bool:
        parts = self.z, self.weights, *(self.generator or ())
        return any(part is not None and part.requires_grad for part in parts)

    @property
    def samples(self) -> int:
        return len(self.weights if self.z is None else self.z)

    def dense(self) -> Tensor:
        """All weights, [B, *shape], in autocast's dtype under autocast."""
        if self.weights is not None:
            return self.weights
        with no_autocast([self.z]):  # as in `ops.generate`
            w = F.linear(self.z, *self.generator)
        return w.to(autocast_dtype(w) or w.dtype).view(self.samples, *self.shape)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None):
        if func in _LAYERS:
            return _LAYERS[func](func, *args, **(kwargs or {}))
        if func in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _STRIDES:
            return func(torch.empty(args[0].shape, device="meta"), *args[1:], **(kwargs or {}))
        raise TypeError(
            f"{_name_of(func)} is not computed with weights for each sample (PerSampleWeight): linear "
            "layers, convolutions and transposed convolutions in 1 to 3 dimensions are"
        )

    def __repr__(self) -> str:
        kind = "ready" if self.z is None else "generated"
        return f"PerSampleWeight({tuple(self.shape)}, {self.samples} samples, {kind})"

    __hash__ = object.__hash__


def _name_of(func: Callable) -> str:
    """The name of what __torch_function__ was given; an attribute's is that of its descriptor."""
    descriptor = getattr(func, "__self__", None)
    descriptor = getattr(descriptor, "fget", descriptor)  # a property of Python
    named = descriptor if getattr(func, "__name__", "") in ("__get__", "__set__") else func
    return getattr(named, "__name__", str(func))


def _check_batch(x: Tensor, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if isinstance(parameter, PerSampleWeight) and (x.dim() < 2 or len(x) != parameter.samples):
            raise ValueError(
                f"the weights are those of {parameter.samples} samples, the input has shape {list(x.shape)}"
            )


def _with_bias(y: Tensor, bias: PerSampleWeight | None, channels: int) -> Tensor:
    """y + the bias of each sample along dimension `channels`."""
    if bias is None:
        return y
    shape = [1] * y.dim()
    shape[0], shape[channels] = bias.samples, bias.shape[0]
    return y + bias.dense().to(y.dtype).view(shape)


def _split_bias(bias: Tensor | None) -> tuple[Tensor | None, PerSampleWeight | None]:
    """(the bias all samples share, the bias of each sample); one of them at least is None."""
    return (None, bias) if isinstance(bias, PerSampleWeight) else (bias, None)


def _linear(func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_batch(input, weight, bias)
    bias, own_bias = _split_bias(bias)
    if not isinstance(weight, PerSampleWeight):
        y = func(input, weight, bias)
    elif weight.z is not None:
        y = ops.hyper_linear(input, weight.z, *weight.generator, bias, path=weight.path)
    else:
        y = torch.einsum("b...i,boi->b...o", input, weight.weights)
        y = y if bias is None else y + bias.to(y.dtype)
    return _with_bias(y, own_bias, -1)


def _convolution(
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    _check_batch(input, weight, bias)
    bias, own_bias = _split_bias(bias)
    is_generated = isinstance(weight, PerSampleWeight) and weight.z is not None
    if is_generated and input.dim() == weight.dim() and input.dim() in (3, 4):
        y = _generated_convolution(input, weight, bias, stride, padding, dilation, groups)
    else:
        y = _grouped(func, input, weight, bias, groups, stride=stride, padding=padding, dilation=dilation)
    return _with_bias(y, own_bias, 1)


def _generated_convolution(input, weight, bias, stride, padding, dilation, groups: int) -> Tensor:
    """conv2d, or conv1d as a convolution of images of one row."""
    if input.dim() == 4:
        options = tuple(weight.shape[2:]), stride, padding, dilation, groups
        return ops.hyper_conv2d(input, weight.z, *weight.generator, bias, *options, path=weight.path)

    def pair(row: int, option):
        return option if isinstance(option, str) else (row, option if isinstance(option, int) else option[0])

    options = (1, weight.shape[2]), pair(1, stride), pair(0, padding), pair(1, dilation), groups
    images = input.unsqueeze(2)
    return ops.hyper_conv2d(images, weight.z, *weight.generator, bias, *options, path=weight.path).squeeze(2)


def _transposed(
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    _check_batch(input, weight, bias)
    bias, own_bias = _split_bias(bias)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    return _with_bias(_grouped(func, input, weight, bias, groups, **options), own_bias, 1)


def _grouped(func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **options):
    """A convolution of any kind; the samples of a weight for each are groups of one convolution."""
    if not isinstance(weight, PerSampleWeight):
        return func(input, weight, bias, groups=groups, **options)
    if input.dim() != weight.dim():
        raise ValueError(f"the input must have {weight.dim()} dimensions, got shape {list(input.shape)}")
    w = weight.dense()
    if not len(w):
        return func(input, w.sum(0), bias, groups=groups, **options)
    images = input.reshape(1, -1, *input.shape[2:])
    y = func(images, w.flatten(0, 1), None, groups=len(w) * groups, **options)
    y = y.view(len(w), -1, *y.shape[2:])
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


_LAYERS = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
}
_ATTRIBUTES = (
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_sparse",
    "itemsize", "layout", "ndim", "shape", "_version",
)  # fmt: skip
_METHODS = (
    "dim", "element_size", "is_complex", "is_floating_point", "is_inference", "is_signed", "numel", "size",
)  # fmt: skip
_READS = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {
    getattr(Tensor, name) for name in _METHODS
}
_STRIDES = {Tensor.stride, Tensor.is_contiguous}  # of a weight that had memory
