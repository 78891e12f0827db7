"""`hyper_linear` and `hyper_conv2d`: layers with generated weights, and the choice between merging generation
with the layer and generating first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

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

    On a GPU by arithmetic, which awaits measurement: merging saves a launch and 2 N of N (K + 3) elements, and
    a second block of rows would read the generator again, N K elements. So up to one block of rows: 128 on
    tensor cores, half of that in a convolution, whose gathering costs about as many loads then as the
    generator; float32 without TF32 up to 8 K rows, beyond which its product takes longer than the reading
    (2 rows operations against 4 K bytes a weight, at 25 TFLOP/s and 3.35 TB/s, with a margin of two); 8 rows
    where the kernels do not use tensor cores (float64, K over 64). The CUDA C++ kernel, which serves where
    Triton does not, is for linear layers alone, up to 64 rows.
    """
    engine = "reference" if needs_grad else generator_engine([weight], cuda="hyper_linear")
    if engine == "cpu":
        limit = 256 if weight.dtype == torch.bfloat16 else 64
        return rows <= (limit // 4 if convolution else limit)
    if engine == "cuda":
        return not convolution and cuda_serves(rows, weight)
    return engine == "triton" and rows <= _gpu_rows(weight, convolution)


def _gpu_rows(weight: Tensor, convolution: bool) -> int:
    K = weight.shape[1]
    if weight.dtype == torch.float64 or K > 64:
        return 8
    limit = 64 if convolution else 128
    return min(limit, max(8, 8 * K)) if weight.dtype == torch.float32 else limit


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
    bias. Under autocast x may have another floating dtype, and the result has autocast's. Raises ValueError
    or TypeError for wrong shapes, dtypes or devices.
    """
    _check_x(x, weight, lambda dim: dim >= 1, "[..., I]")
    _check_generator(z, weight, bias, layer_bias, x.shape[-1], "I")
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
    -> [B, O, H', W'], in channels_last if x is. kernel_size: (R, S), which N alone does not tell. padding:
    int, pair, "same" or "valid". factored, path, dtypes and errors as in `hyper_linear`; "separate" is
    `generate`, then `conv2d`.
    """
    _check_x(x, weight, lambda dim: dim == 4, "[B, I, H, W]")
    geometry = geometry_of(x, kernel_size, stride, padding, dilation, groups)
    unit = x.shape[1] // groups * math.prod(geometry.kernel_size)
    _check_generator(z, weight, bias, layer_bias, unit, "I / groups R S", groups)
    needs_grad = needs_function(x, z, weight, bias, layer_bias)
    if _merge(path, geometry.rows(x), weight, needs_grad, convolution=True):
        return _merged(x, z, weight, bias, layer_bias, geometry, factored, needs_grad)
    (w,) = generate([weight], [bias], [z], factored=factored)
    w = w.view(-1, x.shape[1] // groups, *geometry.kernel_size)
    return conv2d(x, w, layer_bias, stride, padding, dilation, groups)


def _merge(path: str, *rule, **options) -> bool:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    return path == "merged" or path == "auto" and merged_wins(*rule, **options)


def _merged(x, z, weight, bias, layer_bias, geometry: Geometry, factored: bool, needs_grad: bool) -> Tensor:
    dtype = autocast_dtype(weight)
    if dtype is not None:  # the Triton kernels multiply in autocast's dtype, what they generate in float32
        x = x.to(dtype if generator_engine([weight]) == "triton" else weight.dtype)
    tensors = x, z, weight, bias, layer_bias
    if needs_grad:
        if torch.compiler.is_compiling():  # as in `generate`: a tensor given twice
            tensors = (None if t is None else t.view_as(t) for t in tensors)
        y = HyperConv2dFunction.apply(*tensors, geometry, factored)
    else:
        y = forward_op(*tensors, geometry.flat())
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


def _check_generator(z, weight, bias, layer_bias, unit: int, what: str, groups: int = 1) -> None:
    """ValueError or TypeError unless weight makes outputs of `unit` weights each, in `groups` equal
    groups."""
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
