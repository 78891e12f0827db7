"""`hyper_linear` and `hyper_conv2d`: layers with generated weights, and the choice between merging generation
with the layer and generating first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from hyperfast.ops import per_sample
from hyperfast.ops._library import (
    autocast_dtype,
    check_dense,
    check_generators,
    check_like,
    generator_engine,
    needs_function,
)
from hyperfast.ops.conv2d import conv2d
from hyperfast.ops.generate import generate
from hyperfast.ops.merged import LINEAR, Geometry, HyperConv2dFunction, cuda_serves, forward_op

PATHS = ("auto", "merged", "separate")


def merged_wins(rows: int, weight: Tensor, needs_grad: bool, convolution: bool = False) -> bool:
    """Whether merging generation with a layer of `rows` rows (B, or B H' W') beats generating first.

    The measured rule (benchmarks/bench_merged.py): on the CPU up to 64 rows, 256 in bfloat16, a quarter of
    that in a convolution. Beyond, oneDNN's product is worth more than what merging saves. Never with
    gradients: merging wins there only up to about 16 rows, and the forwards of a training must not depend, in
    the last bit, on whether the optimizer left the next weights.

    On a GPU by arithmetic, which awaits measurement (kernels/hyper_conv2d.py): merging saves 2 N of N (K + 3)
    elements. Up to 8 rows it saves a launch too. Then the sum over the columns is cut into parts, 8 bytes
    for each part, row and output: what merging saves is used up at 64 rows of a 512 -> 1024 layer in float32,
    at 32 in half precision. Without tensor cores (float64, K over 64) 9 rows read the generator twice. The
    CUDA C++ kernel, which serves where Triton does not, is for linear layers alone, up to 64 rows.
    """
    engine = "reference" if needs_grad else generator_engine([weight], cuda="hyper_linear")
    if engine == "cpu":
        limit = 256 if weight.dtype == torch.bfloat16 else 64
        return rows <= (limit // 4 if convolution else limit)
    if engine == "cuda":
        return not convolution and cuda_serves(rows, weight)
    has_cores = weight.dtype != torch.float64 and weight.shape[1] <= 64
    return engine == "triton" and rows <= (32 if has_cores else 8)


def hyper_linear(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    layer_bias: Tensor | None = None,
    *,
    factored: bool = False,
    path: str = "auto",
) -> Tensor:
    """A linear layer on generated weights: y = x w^T + layer_bias, w = weight z + bias viewed as [O, I].

    x [..., I], z [K], weight [O I, K], bias [O I] or None, layer_bias [O] or None, all of one floating dtype
    -> [..., O]. path: "merged" makes the weights a tile at a time, in cache, and reads the generator once in
    the forward and once in the backward; "separate" is `generate`, then `F.linear`; "auto" is the faster by
    `merged_wins`. factored: no gradient of weight is formed; it is dw outer z, and dw is the gradient of
    bias. Under autocast x may have another floating dtype, and the result has autocast's.

    z [B, K] with x [B, ..., I]: every sample has weights of its own, w_b = weight z_b + bias, without a loop
    over samples (`hyperfast.ops.per_sample`). "merged" never holds all B N of them, "separate" makes them in
    plain PyTorch; "auto" is the faster by `per_sample.separate_wins`. factored is refused: the gradient of
    weight has rank B, dense it is smaller.

    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    _check_x(x, weight, lambda dim: dim >= 1, "[..., I]")
    _check_generator(x, z, weight, bias, layer_bias, x.shape[-1], "I")
    if z.dim() == 2:
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        images = rows.transpose(1, 2).unsqueeze(3)  # [B, I, T, 1]
        y = _per_sample(images, z, weight, bias, layer_bias, LINEAR, factored, path)
        return y.squeeze(3).transpose(1, 2).reshape(*x.shape[:-1], y.shape[1])
    needs_grad = needs_function(x, z, weight, bias, layer_bias)
    if not _merge(path, x.numel() // x.shape[-1], weight, needs_grad):
        (w,) = generate([weight], [bias], [z], factored=factored)
        return F.linear(x, w.view(-1, x.shape[-1]), layer_bias)
    images = x.reshape(-1, x.shape[-1], 1, 1)
    y = _merged(images, z, weight, bias, layer_bias, LINEAR, factored, needs_grad)
    return y.view(*x.shape[:-1], y.shape[1])


def hyper_conv2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_bias: Tensor | None,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    factored: bool = False,
    path: str = "auto",
) -> Tensor:
    """A convolution with a generated kernel [O, I/groups, R, S], as `F.conv2d` computes it.

    x [B, I, H, W], z [K], weight [O I/groups R S, K], bias [O I/groups R S] or None, layer_bias [O] or None
    -> [B, O, H', W'], in channels_last if x is. z [B, K]: a kernel for each sample. kernel_size: (R, S),
    which N alone does not tell. padding: int, pair, "same" or "valid". factored, path, dtypes and errors as
    in `hyper_linear`; "separate" is `generate`, then `conv2d`.
    """
    _check_x(x, weight, lambda dim: dim == 4, "[B, I, H, W]")
    geometry = geometry_of(x, kernel_size, stride, padding, dilation, groups)
    unit = x.shape[1] // groups * math.prod(geometry.kernel_size)
    _check_generator(x, z, weight, bias, layer_bias, unit, "I / groups R S", groups)
    if z.dim() == 2:
        return _per_sample(x, z, weight, bias, layer_bias, geometry, factored, path)
    needs_grad = needs_function(x, z, weight, bias, layer_bias)
    if _merge(path, geometry.rows(x), weight, needs_grad, convolution=True):
        return _merged(x, z, weight, bias, layer_bias, geometry, factored, needs_grad)
    (w,) = generate([weight], [bias], [z], factored=factored)
    w = w.view(-1, x.shape[1] // groups, *geometry.kernel_size)
    return conv2d(x, w, layer_bias, stride, padding, dilation, groups)


def _check_path(path: str) -> None:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")


def _merge(path: str, *rule, **options) -> bool:
    _check_path(path)
    return path == "merged" or path == "auto" and merged_wins(*rule, **options)


def _merged(x, z, weight, bias, layer_bias, geometry: Geometry, factored: bool, needs_grad: bool) -> Tensor:
    tensors = x, z, weight, bias, layer_bias
    if needs_grad:
        return _in_autocast(lambda *t: HyperConv2dFunction.apply(*t, geometry, factored), *tensors)
    return _in_autocast(lambda *t: forward_op(*t, geometry.flat()), *tensors)


def _per_sample(x, z, weight, bias, layer_bias, geometry: Geometry, factored: bool, path: str) -> Tensor:
    _check_path(path)
    if factored:
        raise ValueError(
            f"factored must be False for z {list(z.shape)}: the gradient of weight has rank {len(z)}"
        )
    tensors = x, z, weight, bias, layer_bias
    needs_grad = needs_function(*tensors)
    if path == "auto" and per_sample.separate_wins(x, weight, z.shape[1], geometry):
        path = "separate"
    if path == "separate":
        return _in_autocast(lambda *t: per_sample.expression(*t, geometry), *tensors)
    if needs_grad:
        return _in_autocast(lambda *t: per_sample.PerSampleConv2dFunction.apply(*t, geometry), *tensors)
    return _in_autocast(lambda *t: per_sample.forward_op(*t, geometry.flat()), *tensors)


def _in_autocast(function, x: Tensor, z: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    """function(x, z, weight, ...) with the dtypes that autocast asks for."""
    dtype = autocast_dtype(weight)
    if dtype is not None:  # the Triton kernels multiply in autocast's dtype, what they generate in float32
        x = x.to(dtype if generator_engine([weight]) == "triton" else weight.dtype)
    tensors = x, z, weight, *rest
    if torch.compiler.is_compiling():  # as in `generate`: a tensor given twice
        tensors = (None if t is None else t.view_as(t) for t in tensors)
    y = function(*tensors)
    return y if dtype is None else y.to(dtype)


def _check_x(x: Tensor, weight: Tensor, good_dim, shape: str) -> None:
    """TypeError or ValueError unless x fits a layer on generated weights of weight's dtype and device."""
    check_dense("x", x)
    check_dense("weight", weight)
    if not good_dim(x.dim()):
        raise ValueError(f"x must be {shape}, got shape {list(x.shape)}")
    # autocast leaves float64 alone
    cast = autocast_dtype(weight) and x.dtype.is_floating_point and x.dtype != torch.float64
    if x.dtype != weight.dtype and not cast:
        raise TypeError(f"x must be {weight.dtype} like weight, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device} like weight, got {x.device}")


def _check_generator(x, z, weight, bias, layer_bias, unit: int, what: str, groups: int = 1) -> None:
    """ValueError or TypeError unless weight makes outputs of `unit` weights each, in `groups` equal groups,
    from z [K], or [B, K] for the B samples of x."""
    if isinstance(z, Tensor) and z.dim() == 2:
        check_generators([weight], bias=([bias], "N?"))
        check_dense("z", z)
        if x.dim() < 2 or x.shape[0] != z.shape[0]:
            got = f"got z {list(z.shape)}, x {list(x.shape)}"
            raise ValueError(f"z [B, K] must have a row for each of the B samples of x, {got}")
        check_like("z", z, weight, [z.shape[0], weight.shape[1]])
    else:
        check_generators([weight], bias=([bias], "N?"), z=([z], "K"))
    if unit < 1 or weight.shape[0] < 1 or weight.shape[0] % (unit * groups):
        of = f" and of groups {groups}" if groups > 1 else ""
        raise ValueError(
            f"weight must be [N, K] with N a multiple of {what} = {unit}{of}, got {list(weight.shape)}"
        )
    if layer_bias is not None:
        check_dense("layer_bias", layer_bias)
        check_like("layer_bias", layer_bias, weight, [weight.shape[0] // unit])


def _pair_of(name: str, value, least: int) -> tuple[int, int]:
    pair = _pair(value)
    if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"{name} must be an int or a pair of at least {least}, got {value!r}")
    return tuple(pair)


def geometry_of(x: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Geometry:
    """The arguments of a convolution of x, checked; ValueError naming the one that is wrong."""
    kernel_size, stride = _pair_of("kernel_size", kernel_size, 1), _pair_of("stride", stride, 1)
    dilation = _pair_of("dilation", dilation, 1)
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups!r}")
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got {stride}')
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        pads = tuple(n for t in total for n in (t // 2, t - t // 2))
    elif padding == "valid":
        pads = (0, 0, 0, 0)
    elif isinstance(padding, str):
        raise ValueError(f'padding must be a size, "same" or "valid", got {padding!r}')
    else:
        vertical, horizontal = _pair_of("padding", padding, 0)
        pads = (vertical, vertical, horizontal, horizontal)
    geometry = Geometry(kernel_size, stride, pads, dilation, groups)
    if min(geometry.output(x.shape)) < 1:
        raise ValueError(
            f"x of shape {list(x.shape)} is smaller than kernel_size {kernel_size} with padding {padding}, "
            f"dilation {dilation}"
        )
    return geometry
