"""`batch_norm_relu_max_pool`: three layers of a convolutional network in two passes over the activations."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _DTYPES,
    _cpu,
    check_backend,
    check_dense,
    kernel_dtype,
    library,
    needs_function,
)

# statistics: float64 [2, C], mean and biased variance; given, or of x and returned. index: uint8 like y, the
# winner of each window, empty without with_index
library.define(
    "batch_norm_relu_max_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? statistics, float eps, int pool, "
    "bool with_index) -> (Tensor y, Tensor index, Tensor statistics)"
)
# given: the statistics do not depend on x; dx is empty without with_dx
library.define(
    "batch_norm_relu_max_pool_backward(Tensor dy, Tensor x, Tensor index, Tensor? weight, Tensor statistics, "
    "bool given, float eps, int pool, bool with_dx) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and hold weight, bias and their gradients in."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype


def _empty_outputs(x: Tensor, pool: int, with_index: bool) -> tuple[Tensor, Tensor]:
    B, C, H, W = x.shape
    shape, layout = (B, C, H // pool, W // pool), torch.channels_last
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if not with_index:
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    return y, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout)


def _sizes(x: Tensor, pool: int) -> tuple[int, ...]:
    B, C, H, W = x.shape
    return B, H, W, C, pool


@torch.library.impl(library, "batch_norm_relu_max_pool", "CPU")
def _forward_cpu(x, weight, bias, statistics, eps, pool, with_index):
    x, compute = x.contiguous(memory_format=torch.channels_last), _compute_dtype(x)
    y, index = _empty_outputs(x, pool, with_index)
    given = statistics is not None
    made = statistics.clone() if given else torch.empty(2, x.shape[1], dtype=torch.float64)
    weight, bias = (None if p is None else p.to(compute).contiguous() for p in (weight, bias))
    weight_address, bias_address = (0 if p is None else p.data_ptr() for p in (weight, bias))
    index_address = index.data_ptr() if with_index else 0
    _cpu.batch_norm(_sizes(x, pool), x.data_ptr(), weight_address, bias_address, made.data_ptr(), given, eps,
                    y.data_ptr(), index_address, kernel_dtype([x]), torch.get_num_threads())  # fmt: skip
    return y, index, made


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool", lib=library)
def _forward_fake(x, weight, bias, statistics, eps, pool, with_index):
    return *_empty_outputs(x, pool, with_index), x.new_empty(2, x.shape[1], dtype=torch.float64)


@torch.library.impl(library, "batch_norm_relu_max_pool_backward", "CPU")
def _backward_cpu(dy, x, index, weight, statistics, given, eps, pool, with_dx):
    x, dy, index = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, index))
    weight = None if weight is None else weight.to(_compute_dtype(x)).contiguous()
    dx, dweight, dbias = _backward_fake(dy, x, index, weight, statistics, given, eps, pool, with_dx)
    _cpu.batch_norm_backward(
        _sizes(x, pool), x.data_ptr(), dy.data_ptr(), index.data_ptr(), 0 if weight is None else weight.data_ptr(),
        statistics.data_ptr(), given, eps, dx.data_ptr() if with_dx else 0, dweight.data_ptr(), dbias.data_ptr(),
        kernel_dtype([x]), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool_backward", lib=library)
def _backward_fake(dy, x, index, weight, statistics, given, eps, pool, with_dx):
    dweight = torch.empty(x.shape[1], dtype=_compute_dtype(x), device=x.device)
    dx = torch.empty_like(x, memory_format=torch.channels_last) if with_dx else x.new_empty(0)
    return dx, dweight, torch.empty_like(dweight)


class BatchNormReLUMaxPool(torch.autograd.Function):
    """y, index, statistics of the op, y differentiable in x, weight and bias."""

    @staticmethod
    def forward(x, weight, bias, statistics, eps, pool):
        return torch.ops.hyperfast.batch_norm_relu_max_pool(x, weight, bias, statistics, eps, pool, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, statistics, ctx.eps, ctx.pool = inputs
        _, index, made = output
        ctx.given, ctx.dtypes = (
            statistics is not None,
            [None if p is None else p.dtype for p in (weight, bias)],
        )
        ctx.mark_non_differentiable(index, made)
        ctx.save_for_backward(x, weight, index, made)

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, index, statistics = ctx.saved_tensors
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph: differentiable again
            dx, dweight, dbias = reference.batch_norm_relu_max_pool_backward(
                dy, x, index, weight, statistics if ctx.given else None, ctx.eps, ctx.pool
            )
        else:
            dx, dweight, dbias = torch.ops.hyperfast.batch_norm_relu_max_pool_backward(
                dy, x, index, weight, statistics, ctx.given, ctx.eps, ctx.pool, ctx.needs_input_grad[0]
            )
        dparameters = (
            None if dtype is None else d.to(dtype)
            for d, dtype in zip((dweight, dbias), ctx.dtypes, strict=True)
        )
        return dx if ctx.needs_input_grad[0] else None, *dparameters, None, None, None


def _check(x: Tensor, training: bool, pool: int, **channels: Tensor | None) -> None:
    """ValueError or TypeError unless x is [B, C, H, W] floating point with room for a window and `channels` are
    [C]."""
    check_dense("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be floating point ({', '.join(_DTYPES.values())}), got {x.dtype}")
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"pool must be an integer of at least 1, got {pool!r}")
    if min(x.shape[2:]) < pool:
        raise ValueError(f"x must be at least {pool} x {pool} for pool {pool}, got shape {list(x.shape)}")
    wide = {x.dtype, torch.float32} if x.dtype.itemsize == 2 else {x.dtype}
    for name, tensor in channels.items():
        if tensor is None:
            continue
        check_dense(name, tensor)
        if list(tensor.shape) != [x.shape[1]]:
            raise ValueError(
                f"{name} must be [{x.shape[1]}] for x of shape {list(x.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in wide:
            raise TypeError(
                f"{name} must be {' or '.join(map(str, wide))} for x of {x.dtype}, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if (channels["running_mean"] is None) != (channels["running_var"] is None):
        raise ValueError("running_mean and running_var must both be tensors or both None")
    if not training and channels["running_mean"] is None:
        raise ValueError("running_mean and running_var must be tensors unless training")
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"x must have more than one value per channel when training, got shape {list(x.shape)}"
        )


def _has_kernel(x: Tensor, pool: int) -> bool:
    """Whether the kernels serve x: on the CPU, channels_last, windows of 1 or 2, not under torch.func."""
    if x.device.type != "cpu" or pool > 2 or x.numel() == 0 or kernel_dtype([x]) is None:
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def batch_norm_relu_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 2,
    *,
    backend: str = "auto",
) -> Tensor:
    """`F.max_pool2d(F.relu(F.batch_norm(x, ...)), pool)`: x [B, C, H, W] -> [B, C, H // pool, W // pool].

    The arguments before `pool` are those of `torch.nn.functional.batch_norm`: running_mean, running_var, weight,
    bias [C] or None; with `training` the statistics are those of x, and running statistics are updated in place.
    Rows and columns that fill no window count in the statistics alone; of equal maxima the first wins; NaN
    stays NaN. Kernels: float32, float64 and bfloat16 (statistics and sums in float32 and float64) in channels_last on the CPU,
    pool 1 or 2; everything else runs `hyperfast.reference`. Saved for the backward: x and a byte for each output.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices. Ioffe and Szegedy, "Batch normalization"
    (ICML 2015).
    """
    check_backend(backend)
    _check(x, training, pool, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if backend == "reference" or not _has_kernel(x, pool):
        return reference.batch_norm_relu_max_pool(
            x, running_mean, running_var, weight, bias, training, momentum, eps, pool
        )
    statistics = None if training else torch.stack((running_mean.detach(), running_var.detach())).double()
    if needs_function(x, weight, bias):
        y, _, made = BatchNormReLUMaxPool.apply(x, weight, bias, statistics, eps, pool)
    else:
        y, _, made = torch.ops.hyperfast.batch_norm_relu_max_pool(
            x, weight, bias, statistics, eps, pool, False
        )
    if training and running_mean is not None:
        _update_running(running_mean, running_var, made, momentum, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _update_running(
    running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float, n: int
) -> None:
    """running = (1 - momentum) running + momentum batch, the variance unbiased: n values per channel."""
    mean, var = statistics.detach()
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
