"""`batch_norm_relu_max_pool`: three layers of a convolutional network in two passes over the activations, or
the end of a residual block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _DTYPES,
    MAX_ROWS,
    _cpu,
    address,
    check_backend,
    check_dense,
    check_memory,
    dtype_name,
    engine,
    is_transformed,
    library,
    needs_function,
    triton_kernels,
)

# mean, var: given statistics, else those of x. running_mean, running_var: moved towards mean and unbiased
# variance of x; num_batches: counted up. statistics: float64 [2, C], mean and biased variance. index: uint8
# like y, the winner of each window; empty without with_index. residual: like x, pool 1, CPU.
library.define(
    "batch_norm_relu_max_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches, float momentum, float eps, "
    "int pool, bool with_index, Tensor? residual=None) -> (Tensor y, Tensor index, Tensor statistics)"
)
# given: the statistics do not depend on x; dx is empty without with_dx, dresidual without with_dresidual,
# which needs with_dx
library.define(
    "batch_norm_relu_max_pool_backward(Tensor dy, Tensor x, Tensor index, Tensor? weight, Tensor statistics, "
    "bool given, float eps, int pool, bool with_dx, bool with_dresidual=False) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and hold the gradients of weight and bias in."""
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def _contiguous(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> Iterator[Tensor | None]:
    """[C] each, in `dtype` if given; optional arguments come lazily negated if they are."""
    for t in tensors:
        as_is = t is None or t.is_contiguous() and t.dtype == (dtype or t.dtype) and not t.is_neg()
        yield t if as_is else t.to(dtype or t.dtype).contiguous().resolve_neg()


def _sizes(x: Tensor, pool: int) -> tuple[int, ...]:
    B, C, H, W = x.shape
    return B, H, W, C, pool


@torch.library.impl(library, "batch_norm_relu_max_pool", "CPU")
@torch.library.impl(library, "batch_norm_relu_max_pool", "CUDA")
def _forward(
    x, weight, bias, mean, var, running_mean, running_var, num_batches, momentum, eps, pool, with_index,
    residual=None,
):  # fmt: skip
    x = x.contiguous(memory_format=torch.channels_last)
    y, index, statistics = _forward_fake(x, *[None] * 7, momentum, eps, pool, with_index)
    updated = running_mean, running_var, num_batches
    if engine(x) == "triton":
        vectors = _contiguous(weight, bias, mean, var)
        outputs = statistics, y, index if with_index else None
        kernels = triton_kernels("batch_norm_relu_max_pool")
        kernels.run(x, *vectors, *updated, momentum, eps, pool, *outputs)
    else:
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        _forward_cpu(x, weight, bias, residual, mean, var, updated, momentum, eps, pool, y, index, statistics)
    # kernels do not: autograd must notice that saved tensors were overwritten
    if changed := [t for t in updated if t is not None and not t.is_inference()]:
        torch.autograd.graph.increment_version(changed)
    return y, index, statistics


def _forward_cpu(
    x, weight, bias, residual, mean, var, updated, momentum, eps, pool, y, index, statistics
):  # fmt: skip
    weight, bias = _contiguous(weight, bias, dtype=_compute_dtype(x))
    if mean is not None:
        statistics.copy_(torch.stack((mean, var)))
    addresses = [address(t) for t in (x, weight, bias, residual, statistics)]
    outputs = y.data_ptr(), address(index), [address(t) for t in updated], momentum
    stored = dtype_name(x if updated[0] is None else updated[0])
    _cpu.batch_norm(
        _sizes(x, pool), *addresses, mean is not None, eps, *outputs, stored, dtype_name(x),
        torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool", lib=library)
def _forward_fake(
    x, weight, bias, mean, var, running_mean, running_var, num_batches, momentum, eps, pool, with_index,
    residual=None,
):  # fmt: skip
    B, C, H, W = x.shape
    shape, layout = (B, C, H // pool, W // pool), torch.channels_last
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    index = torch.empty_like(y, dtype=torch.uint8) if with_index else x.new_empty(0, dtype=torch.uint8)
    return y, index, x.new_empty((2, C), dtype=torch.float64)


@torch.library.impl(library, "batch_norm_relu_max_pool_backward", "CPU")
@torch.library.impl(library, "batch_norm_relu_max_pool_backward", "CUDA")
def _backward(dy, x, index, weight, statistics, given, eps, pool, with_dx, with_dresidual=False):
    x, dy, index = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, index))
    options = given, eps, pool, with_dx, with_dresidual
    dx, dweight, dbias, dresidual = _backward_fake(dy, x, index, weight, statistics, *options)
    if engine(x) == "triton":
        (weight,) = _contiguous(weight)
        inputs = dy, x, index, weight, statistics, given, eps, pool
        kernels = triton_kernels("batch_norm_relu_max_pool")
        kernels.run_backward(*inputs, dx if with_dx else None, dweight, dbias)
        return dx, dweight, dbias, dresidual
    (weight,) = _contiguous(weight, dtype=_compute_dtype(x))
    inputs = [address(t) for t in (x, dy, index, weight, statistics)]
    outputs = [address(t) for t in (dx, dresidual, dweight, dbias)]
    threads = torch.get_num_threads()
    _cpu.batch_norm_backward(_sizes(x, pool), *inputs, given, eps, *outputs, dtype_name(x), threads)
    return dx, dweight, dbias, dresidual


@torch.library.register_fake("hyperfast::batch_norm_relu_max_pool_backward", lib=library)
def _backward_fake(dy, x, index, weight, statistics, given, eps, pool, with_dx, with_dresidual=False):
    dweight = torch.empty(x.shape[1], dtype=_compute_dtype(x), device=x.device)
    dx, dresidual = (
        torch.empty_like(x, memory_format=torch.channels_last) if wanted else x.new_empty(0)
        for wanted in (with_dx, with_dresidual)
    )
    return dx, dweight, torch.empty_like(dweight), dresidual


class BatchNormReLUMaxPool(torch.autograd.Function):
    """y of the op, differentiable in x, weight, bias and residual; running statistics are updated and no
    inputs of the graph.

    No setup_context: it costs 40 us a call, and under torch.func the reference runs.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, residual, mean, var, running_mean, running_var, num_batches, momentum, eps, pool
    ):
        y, index, statistics = torch.ops.hyperfast.batch_norm_relu_max_pool(
            x, weight, bias, mean, var, running_mean, running_var, num_batches, momentum, eps, pool, True,
            residual,
        )  # fmt: skip
        ctx.given, ctx.eps, ctx.pool = mean is not None, eps, pool
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.save_for_backward(x, weight, index, statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, index, statistics = ctx.saved_tensors
        with_dx, _, _, with_dresidual = ctx.needs_input_grad[:4]
        if (
            torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # create_graph: differentiable again
            dx, dweight, dbias = reference.batch_norm_relu_max_pool_backward(
                dy, x, index, weight, statistics if ctx.given else None, ctx.eps, ctx.pool
            )
            dresidual = torch.where(index == 0, dy, 0) if with_dresidual else None
        else:
            options = ctx.given, ctx.eps, ctx.pool, with_dx or with_dresidual, with_dresidual
            dx, dweight, dbias, dresidual = torch.ops.hyperfast.batch_norm_relu_max_pool_backward(
                dy, x, index, weight, statistics, *options
            )
        dparameters = (
            d if d.dtype == dtype else None if dtype is None else d.to(dtype)
            for d, dtype in zip((dweight, dbias), ctx.dtypes, strict=True)
        )
        dx, dresidual = (dx if with_dx else None), (dresidual if with_dresidual else None)
        return dx, *dparameters, dresidual, *[None] * 8


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


def _check_count(count: Tensor | None, x: Tensor) -> None:
    """ValueError or TypeError unless `count` is None or one int64 beside x."""
    if count is None:
        return
    check_dense("num_batches_tracked", count)
    if count.dtype != torch.int64:
        raise TypeError(f"num_batches_tracked must be torch.int64, got {count.dtype}")
    if count.dim():
        raise ValueError(f"num_batches_tracked must be [], got {list(count.shape)}")
    if count.device != x.device:
        raise ValueError(f"num_batches_tracked must be on {x.device} like x, got {count.device}")


def _check_residual(residual: Tensor | None, x: Tensor) -> None:
    """ValueError or TypeError unless `residual` is None or like x, under autocast in another dtype than
    float64 if x is."""
    if residual is None:
        return
    check_dense("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} like x, got shape {list(residual.shape)}")
    narrow = all(t.dtype.is_floating_point and t.dtype.itemsize <= 4 for t in (x, residual))
    if residual.dtype != x.dtype and not (narrow and _is_autocast(x)):
        raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _has_kernel(x: Tensor, pool: int, with_residual: bool) -> bool:
    """Whether the kernels serve x: on the CPU or a GPU, windows of 1 or 2, a residual on the CPU with windows
    of 1, not under torch.func."""
    if pool > 2 or x.numel() == 0 or is_transformed():
        return False
    served = engine(x)
    if with_residual:
        return served == "cpu" and pool == 1
    return served == "cpu" or served == "triton" and x.numel() // x.shape[1] <= MAX_ROWS


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
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`F.max_pool2d(F.relu(F.batch_norm(x, ...)), pool)`: x [B, C, H, W] -> [B, C, H // pool, W // pool].

    residual: like x, added before the ReLU, as at the end of a residual block. Under autocast, where layers
    differ in dtype, it is converted to x's.

    The arguments before `pool` are those of `torch.nn.functional.batch_norm`: running_mean, running_var,
    weight, bias [C] or None; with `training` the statistics are those of x, and running statistics are
    updated in place, num_batches_tracked (int64 []) counted up. Rows and columns that fill no window count
    in the statistics alone; of equal maxima the first wins; NaN stays NaN. Kernels, pool 1 or 2: float32,
    float64 and bfloat16 on the CPU, float16 too on a GPU (half precision: statistics in float32 or more, and
    windows are compared before rounding), with a residual on the CPU and pool 1; everything else runs
    `hyperfast.reference`. They work in
    channels_last: other layouts are converted, and y back (on the CPU still four times as fast as torch's
    modules in NCHW). Saved for the backward: x and a byte for each output. Raises
    ValueError or TypeError for wrong shapes, dtypes or devices. Ioffe and Szegedy, "Batch normalization"
    (ICML 2015).
    """
    check_backend(backend)
    momentum, eps = float(momentum), float(eps)
    _check(x, training, pool, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_count(num_batches_tracked, x)
    _check_residual(residual, x)
    residual = None if residual is None else residual.to(x.dtype)
    # running statistics are constants, whatever they are marked as
    running_mean, running_var = (None if t is None else t.detach() for t in (running_mean, running_var))
    with_function = needs_function(x, weight, bias, running_mean, running_var, residual)
    if backend == "reference" or not _has_kernel(x, pool, residual is not None):
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        # torch's own backward in channels_last reads weight and running_var as if they were contiguous
        running_mean, running_var, weight, bias = (
            None if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias)
        )
        return reference.batch_norm_relu_max_pool(
            x, running_mean, running_var, weight, bias, training, momentum, eps, pool, residual
        )
    keep_layout = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    x = x.contiguous(memory_format=torch.channels_last)
    given = (None, None) if training else (running_mean, running_var)
    updated = (running_mean, running_var) if training else (None, None)
    arguments = (*given, *updated, num_batches_tracked, momentum, eps, pool)
    if with_function:
        y = BatchNormReLUMaxPool.apply(x, weight, bias, residual, *arguments)
    else:
        op = torch.ops.hyperfast.batch_norm_relu_max_pool
        y, _, _ = op(x, weight, bias, *arguments, False, residual)
    return y if keep_layout else y.contiguous()
