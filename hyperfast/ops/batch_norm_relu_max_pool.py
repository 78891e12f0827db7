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
    check_memory,
    dtype_name,
    engine,
    is_transformed,
    library,
    needs_function,
)

# statistics: float64 [2, C], mean and biased variance; given, or of x. index: uint8 like y, the winner of
# each window; empty without with_index. batch: [2, C], mean and unbiased variance of x; empty where
# statistics are given.
library.define(
    "batch_norm_relu_max_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? statistics, float eps, "
    "int pool, bool with_index) -> (Tensor y, Tensor index, Tensor statistics, Tensor batch)"
)
# given: the statistics do not depend on x; dx is empty without with_dx
library.define(
    "batch_norm_relu_max_pool_backward(Tensor dy, Tensor x, Tensor index, Tensor? weight, Tensor statistics, "
    "bool given, float eps, int pool, bool with_dx) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and hold weight, bias and their gradients in."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype


def _forward_outputs(x: Tensor, pool: int, given: bool, with_index: bool) -> tuple[Tensor, ...]:
    """y, index, statistics and batch, uninitialised."""
    B, C, H, W = x.shape
    shape, device, layout = (B, C, H // pool, W // pool), x.device, torch.channels_last
    y = torch.empty(shape, dtype=x.dtype, device=device, memory_format=layout)
    if with_index:
        index = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=layout)
    else:
        index = torch.empty(0, dtype=torch.uint8, device=device)
    statistics = torch.empty(2, C, dtype=torch.float64, device=device)
    return y, index, statistics, torch.empty(0 if given else (2, C), dtype=_compute_dtype(x), device=device)


def _sizes(x: Tensor, pool: int) -> tuple[int, ...]:
    B, C, H, W = x.shape
    return B, H, W, C, pool


def _address(tensor: Tensor | None) -> int:
    """0 for what is not wanted: None or empty."""
    return 0 if tensor is None else tensor.data_ptr()


@torch.library.impl(library, "batch_norm_relu_max_pool", "CPU")
def _forward_cpu(x, weight, bias, statistics, eps, pool, with_index):
    given, compute = statistics is not None, _compute_dtype(x)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = (None if p is None else p.to(compute).contiguous() for p in (weight, bias))
    y, index, made, batch = _forward_outputs(x, pool, given, with_index)
    if given:
        made.copy_(statistics)
    addresses = [_address(t) for t in (x, weight, bias, made, batch)]
    threads = torch.get_num_threads()
    _cpu.batch_norm(_sizes(x, pool), *addresses, eps, y.data_ptr(), _address(index), dtype_name(x), threads)
    return y, index, made, batch


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool", lib=library)
def _forward_fake(x, weight, bias, statistics, eps, pool, with_index):
    return _forward_outputs(x, pool, statistics is not None, with_index)


@torch.library.impl(library, "batch_norm_relu_max_pool_backward", "CPU")
def _backward_cpu(dy, x, index, weight, statistics, given, eps, pool, with_dx):
    x, dy, index = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, index))
    weight = None if weight is None else weight.to(_compute_dtype(x)).contiguous()
    dx, dweight, dbias = _backward_fake(dy, x, index, weight, statistics, given, eps, pool, with_dx)
    inputs = [_address(t) for t in (x, dy, index, weight, statistics)]
    outputs = [_address(t) for t in (dx, dweight, dbias)]
    threads = torch.get_num_threads()
    _cpu.batch_norm_backward(_sizes(x, pool), *inputs, given, eps, *outputs, dtype_name(x), threads)
    return dx, dweight, dbias


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool_backward", lib=library)
def _backward_fake(dy, x, index, weight, statistics, given, eps, pool, with_dx):
    dweight = torch.empty(x.shape[1], dtype=_compute_dtype(x), device=x.device)
    dx = torch.empty_like(x, memory_format=torch.channels_last) if with_dx else x.new_empty(0)
    return dx, dweight, torch.empty_like(dweight)


class BatchNormReLUMaxPool(torch.autograd.Function):
    """y and batch of the op, y differentiable in x, weight and bias.

    No setup_context: it costs 40 us a call, and under torch.func the reference runs.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, statistics, eps, pool):
        op = torch.ops.hyperfast.batch_norm_relu_max_pool
        y, index, made, batch = op(x, weight, bias, statistics, eps, pool, True)
        ctx.given, ctx.eps, ctx.pool = statistics is not None, eps, pool
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.mark_non_differentiable(batch)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, index, made)
        return y, batch

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 6
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
    """ValueError or TypeError unless x is [B, C, H, W] floating point with room for a window and `channels`
    are [C]."""
    check_dense("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be floating point ({', '.join(_DTYPES.values())}), got {x.dtype}")
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"pool must be an integer of at least 1, got {pool!r}")
    if min(x.shape[2:]) < pool:
        raise ValueError(f"x must be at least {pool} x {pool} for pool {pool}, got shape {list(x.shape)}")
    shape, dtypes = x.shape[1:2], (x.dtype, torch.float32 if x.dtype.itemsize == 2 else x.dtype)
    for name, tensor in channels.items():
        if tensor is None:
            continue
        check_dense(name, tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for x of shape {list(x.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {dtypes[1]} for x of {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    given = {name: t for name, t in channels.items() if t is not None}
    if len({t.dtype for t in given.values()}) > 1:
        kinds = ", ".join(f"{name} {t.dtype}" for name, t in given.items())
        raise TypeError(f"running statistics, weight and bias must have one dtype, got {kinds}")
    running = [(name, given.pop(name)) for name in ("running_mean", "running_var") if name in given]
    if training and running and not torch.compiler.is_compiling() and not is_transformed():
        check_memory(running, (("x", x), *given.items()))
    if (channels["running_mean"] is None) != (channels["running_var"] is None):
        raise ValueError("running_mean and running_var must both be tensors or both None")
    if not training and channels["running_mean"] is None:
        raise ValueError("running_mean and running_var must be tensors unless training")
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"x must have more than one value per channel when training, got shape {list(x.shape)}"
        )


def _has_kernel(x: Tensor, pool: int) -> bool:
    """Whether the kernels serve x: on the CPU, windows of 1 or 2, not under torch.func."""
    return pool <= 2 and x.numel() > 0 and engine(x) == "cpu" and not is_transformed()


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

    The arguments before `pool` are those of `torch.nn.functional.batch_norm`: running_mean, running_var,
    weight, bias [C] or None; with `training` the statistics are those of x, and running statistics are
    updated in place. Rows and columns that fill no window count in the statistics alone; of equal maxima the
    first wins; NaN stays NaN. Kernels: float32, float64 and bfloat16 (then float32 parameters and
    statistics, and windows are compared before rounding) on the CPU, pool 1 or 2; everything else runs
    `hyperfast.reference`. They work in channels_last: other layouts are converted, and y back (still four
    times as fast as torch's modules in NCHW). Saved for the backward: x and a byte for each output. Raises
    ValueError or TypeError for wrong shapes, dtypes or devices. Ioffe and Szegedy, "Batch normalization"
    (ICML 2015).
    """
    check_backend(backend)
    momentum, eps = float(momentum), float(eps)
    _check(x, training, pool, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    # running statistics are constants, whatever they are marked as
    running_mean, running_var = (None if t is None else t.detach() for t in (running_mean, running_var))
    with_function = needs_function(x, weight, bias, running_mean, running_var)
    if backend == "reference" or not _has_kernel(x, pool):
        # torch's own backward in channels_last reads weight and running_var as if they were contiguous
        running_mean, running_var, weight, bias = (
            None if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias)
        )
        return reference.batch_norm_relu_max_pool(
            x, running_mean, running_var, weight, bias, training, momentum, eps, pool
        )
    keep_layout = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    x = x.contiguous(memory_format=torch.channels_last)
    statistics = None if training else torch.stack((running_mean, running_var)).double()
    if with_function:
        y, batch = BatchNormReLUMaxPool.apply(x, weight, bias, statistics, eps, pool)
    else:
        op = torch.ops.hyperfast.batch_norm_relu_max_pool
        y, _, _, batch = op(x, weight, bias, statistics, eps, pool, False)
    if training and running_mean is not None:
        for running, made in zip((running_mean, running_var), batch.unbind(), strict=True):
            running.lerp_(made.to(running.dtype), momentum)
    return y if keep_layout else y.contiguous()
