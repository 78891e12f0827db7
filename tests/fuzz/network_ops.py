"""The ops of the main network as cases: layers on generated weights, convolution, batch norm with ReLU and
max pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast import ops, reference
from tests.fuzz.harness import KERNEL_DTYPES, Draw, OpCase, Output
from tests.fuzz.ops import CONTEXTS, dtype

Arguments = dict[str, Any]


def call_with_gradients(op: Callable[..., Tensor], differentiable: tuple[str, ...]) -> Callable:
    """(y, dy, {name: gradient}) of `op`, dy None where nothing needs a gradient."""

    def call(draw: Draw, arguments: Arguments) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
        arguments = dict(arguments)
        with CONTEXTS[arguments.pop("context")]():
            y = op(**arguments)
        leaves = {
            name: t
            for name in differentiable
            if isinstance(t := arguments.get(name), Tensor) and t.requires_grad
        }
        if not y.requires_grad or not leaves:
            return y, None, {}
        dy = draw.normal(*y.shape, dtype=y.dtype, scale=1.0)
        grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
        return y, dy, dict(zip(leaves, grads, strict=True))

    return call


def in_double(t: Any, convert: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    return convert(t.detach().to(torch.float64, copy=True)) if isinstance(t, Tensor) else t


# ---- hyper_linear and hyper_conv2d

TENSORS = ("x", "z", "weight", "bias", "layer_bias")


def draw_tensors(draw: Draw, x: tuple[int, ...], outputs: int, unit: int, K: int) -> Arguments:
    kind, scale, n = dtype(draw), draw.choice((0.1, 1.0, 30.0)), outputs * unit
    return {
        "x": draw.normal(*x, dtype=kind, scale=scale),
        "z": draw.normal(K, dtype=kind, scale=1.0),
        "weight": draw.normal(n, K, dtype=kind, scale=scale),
        "bias": None if draw.chance(0.3) else draw.normal(n, dtype=kind, scale=scale),
        "layer_bias": None if draw.chance(0.3) else draw.normal(outputs, dtype=kind, scale=scale),
    }


def draw_options(draw: Draw) -> Arguments:
    return {
        "factored": draw.chance(0.3),
        "path": draw.choice(("auto", "merged", "merged", "separate")),
        "context": draw.choice(("", "", "", "no_grad", "inference_mode", "autocast")),
    }


def draw_K(draw: Draw) -> int:
    return draw.choice((1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 64, 0 if draw.chance(0.2) else 5, 600))


def draw_hyper_linear(draw: Draw, large: bool = False) -> Arguments:
    inputs, outputs = draw.choice((1, 2, 5, 15, 16, 17, 31, 48, 65)), draw.choice((1, 2, 3, 7, 16, 33))
    rows = [draw.choice((1, 2, 3, 4, 7, 16, 17)) for _ in range(draw.choice((0, 1, 1, 2)))]
    if draw.chance(0.1) and rows:
        rows[0] = draw.choice((0, 300))
    K = draw_K(draw)
    if large:
        inputs, outputs, rows, K = draw.choice((127, 512)), draw.choice((129, 256)), [5], 16
    return draw_tensors(draw, (*rows, inputs), outputs, inputs, K) | draw_options(draw)


def draw_hyper_conv2d(draw: Draw, large: bool = False) -> Arguments:
    groups, kernel = draw.choice((1, 1, 2, 3)), (draw.choice((1, 2, 3)), draw.choice((1, 3, 4)))
    inputs, outputs = groups * draw.choice((1, 2, 5)), groups * draw.choice((1, 3, 4))
    if large:
        inputs, outputs = groups * 32, groups * 32
    image = (draw.choice((1, 2, 3)), inputs, draw.choice((7, 8, 9)), draw.choice((7, 10)))
    if draw.chance(0.05):
        image = (0, *image[1:])
    unit = inputs // groups * kernel[0] * kernel[1]
    padding = draw.choice((0, 1, 3, (0, 2), "valid", "same"))
    return (
        draw_tensors(draw, image, outputs, unit, 16 if large else draw_K(draw))
        | {
            "kernel_size": draw.choice((kernel, kernel[0])) if kernel[0] == kernel[1] else kernel,
            "stride": 1 if padding == "same" else draw.choice((1, 2, (2, 1), 5)),
            "padding": padding,
            "dilation": draw.choice((1, 1, 2, (1, 2))),
            "groups": groups,
        }
        | draw_options(draw)
    )


def with_samples(draw_case: Callable[..., Arguments]) -> Callable[..., Arguments]:
    """The same layer with an embedding for each sample of at least one."""

    def draw_samples(draw: Draw, large: bool = False) -> Arguments:
        arguments = draw_case(draw, large)
        x, z = arguments["x"], arguments["z"]
        if x.dim() == 1 or "kernel_size" in arguments and not len(x):
            shape = (draw.choice((1, 2, 5)), *x.shape[x.dim() > 1 :])
            x = arguments["x"] = draw.normal(*shape, dtype=x.dtype, scale=1.0)
        z = draw.normal(len(x), len(z), dtype=z.dtype, scale=1.0)
        return arguments | {"z": z, "factored": False}

    return draw_samples


def hyper_reference(arguments: Arguments) -> Tensor:
    given = {name: arguments[name] for name in TENSORS}
    if "kernel_size" not in arguments:
        return reference.hyper_linear(**given)
    size = arguments["kernel_size"]
    options = {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
    return reference.hyper_conv2d(
        **given, kernel_size=(size, size) if isinstance(size, int) else size, **options
    )


def hyper_outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    y, dy, grads = result
    expected = []
    for convert in (lambda t: t, Tensor.abs):
        twin = {name: in_double(value, convert) for name, value in before.items()}
        leaves = [twin[name].requires_grad_() for name in grads]
        made = hyper_reference(twin)
        wanted = torch.autograd.grad(made, leaves, in_double(dy, convert), allow_unused=True) if grads else ()
        expected.append((made.detach(), *wanted))
    if "kernel_size" in before:  # whether what is not finite meets the zeros of the padding is left open
        y_exact = torch.where(expected[0][0].isfinite(), expected[0][0], y.detach().double())
        expected[0] = (y_exact, *expected[0][1:])
    x, weight = before["x"], before["weight"]
    computed = (
        torch.bfloat16 if before["context"] == "autocast" and weight.dtype == torch.float32 else weight.dtype
    )
    terms = weight.shape[1] + weight.shape[0] // max(y.shape[-1 if "kernel_size" not in before else 1], 1) + 2
    outputs = [Output("y", y, *(made[0] for made in expected), terms, computed)]
    for i, (name, grad) in enumerate(grads.items()):
        if name == "weight" and before["factored"]:
            assert grad is None, "a dense gradient in factored mode"
            continue
        assert grad is not None, f"no gradient of {name}"
        sums = terms + weight.shape[0] + x.numel() + dy.numel()
        outputs.append(Output(f"d {name}", grad, *(made[1 + i] for made in expected), sums, computed))
    return outputs


# ---- batch_norm_relu_max_pool


def draw_batch_norm(draw: Draw, large: bool = False) -> Arguments:
    kind = dtype(draw)
    parameter_kind = torch.float32 if kind.itemsize == 2 and draw.chance(0.7) else kind
    pool = draw.choice((1, 2, 2, 2, 3))
    shape = [draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3, 7, 8, 15, 16, 17, 33, 65)),
             draw.choice((3, 4, 5, 8)), draw.choice((3, 4, 6, 7))]  # fmt: skip
    if large:
        shape, pool = [9, draw.choice((33, 64, 512)), draw.choice((8, 17)), 16], draw.choice((1, 2))
    x = draw.normal(*shape, dtype=kind, scale=draw.choice((0.1, 1.0, 10.0)))
    x = x + draw.choice((0.0, 0.0, 5.0))
    if draw.chance(0.8) or large:
        x = x.contiguous(memory_format=torch.channels_last)
    C = shape[1]

    def channels(make: Callable, probability: float, **options) -> Tensor | None:
        return make(C, dtype=parameter_kind, **options) if draw.chance(probability) else None

    training, tracked = draw.chance(0.6), draw.chance(0.8)
    return {
        "x": x,
        "running_mean": channels(draw.normal, 1, scale=1.0) if tracked or not training else None,
        "running_var": channels(draw.positive, 1) if tracked or not training else None,
        "weight": channels(draw.normal, 0.8, scale=1.0),
        "bias": channels(draw.normal, 0.8, scale=0.5),
        "training": training,
        "momentum": draw.choice((0.1, 0.0, 1.0, 0.5)),
        "eps": draw.choice((1e-5, 1e-3)),
        "pool": pool,
        "backend": "reference" if draw.chance(0.1) else "auto",
        "context": draw.choice(("", "", "", "no_grad", "inference_mode")),
    }


def channelwise(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1)


def batch_norm_outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    y, dy, grads = result
    twin = {name: in_double(value) for name, value in before.items()}
    for name in ("backend", "context"):
        del twin[name]
    twin |= {
        "training": bool(twin["training"]),
        "eps": float(twin["eps"]),
        "momentum": float(twin["momentum"]),
    }
    x, training, pool = twin["x"], twin["training"], twin["pool"]
    n = x.numel() // max(x.shape[1], 1)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if not training:
        mean, var = twin["running_mean"].clone(), twin["running_var"].clone()
    inverse = (var + twin["eps"]).rsqrt()
    weight = torch.ones_like(mean) if twin["weight"] is None else twin["weight"]
    bias = torch.zeros_like(mean) if twin["bias"] is None else twin["bias"]
    largest = x.abs().amax((0, 2, 3), keepdim=True)[0]  # the kernel subtracts a value of x first
    reach = (largest + channelwise(mean.abs())).expand(x.shape)  # of x - mean: what rounds
    scale = reach * channelwise((inverse * weight).abs()) + channelwise(bias.abs())
    overflows = var > torch.finfo(before["x"].dtype).max / 4  # in torch's statistics
    scale = torch.where(channelwise(overflows), torch.inf, scale)
    leaves = [twin[name].requires_grad_() for name in grads]
    exact = reference.batch_norm_relu_max_pool(**twin)
    kernel = before["backend"] == "auto" and pool <= 2 and before["x"].dtype in KERNEL_DTYPES
    kernel = kernel and before["x"].is_contiguous(memory_format=torch.channels_last)
    computed = None if kernel else before["x"].dtype
    pooled = F.max_pool2d(scale, pool) if pool > 1 else scale
    # statistics are float64: beside float32 and bfloat16 their sums are exact
    terms = 64 + n if x.dtype == before["x"].dtype else 16
    outputs = [Output("y", y, exact.detach(), pooled, terms, computed)]
    if training and before["running_mean"] is not None:
        tracked = {"running_mean": mean.abs() + x.abs().mean((0, 2, 3)), "running_var": var + mean**2 / n}
        for name, magnitude in tracked.items():
            scale = before[name].double().abs() + 2 * magnitude
            outputs.append(
                Output(name, arguments[name], twin[name], scale, terms, computed or arguments[name].dtype)
            )
    if not grads:
        return outputs
    wanted = torch.autograd.grad(exact, leaves, dy.double())
    # g: dy at the winners; then the sums of the reference's backward with absolute values
    normed = (
        channelwise(inverse * weight) * (x.detach() - channelwise(mean)) + channelwise(bias)
    ).requires_grad_()
    picked = F.relu(F.max_pool2d(normed, pool) if pool > 1 else normed)
    (g,) = torch.autograd.grad(picked, normed, dy.double().abs())
    xhat = reach * channelwise(inverse)
    dweight, dbias = (g * xhat).sum((0, 2, 3)), g.sum((0, 2, 3))
    dx = g
    if training:
        dx = g + channelwise(dbias) / n + xhat * channelwise(dweight) / n
    dx = dx + 0 * reach  # not where the mean is not finite
    scales = {"x": dx * channelwise((inverse * weight).abs()), "weight": dweight, "bias": dbias}
    for name, exact_gradient in zip(grads, wanted, strict=True):
        outputs.append(Output(f"d {name}", grads[name], exact_gradient, scales[name].detach(), n, computed))
    return outputs


NETWORK_OPS: dict[str, OpCase] = {
    "hyper_linear": OpCase(
        draw_hyper_linear,
        call_with_gradients(ops.hyper_linear, TENSORS),
        hyper_outputs,
        draw_large=lambda d: draw_hyper_linear(d, True),
    ),
    "hyper_conv2d": OpCase(
        draw_hyper_conv2d,
        call_with_gradients(ops.hyper_conv2d, TENSORS),
        hyper_outputs,
        draw_large=lambda d: draw_hyper_conv2d(d, True),
    ),
    "per_sample_linear": OpCase(
        with_samples(draw_hyper_linear),
        call_with_gradients(ops.hyper_linear, TENSORS),
        hyper_outputs,
        draw_large=lambda d: with_samples(draw_hyper_linear)(d, True),
    ),
    "per_sample_conv2d": OpCase(
        with_samples(draw_hyper_conv2d),
        call_with_gradients(ops.hyper_conv2d, TENSORS),
        hyper_outputs,
        draw_large=lambda d: with_samples(draw_hyper_conv2d)(d, True),
    ),
    "batch_norm_relu_max_pool": OpCase(
        draw_batch_norm,
        call_with_gradients(ops.batch_norm_relu_max_pool, ("x", "weight", "bias")),
        batch_norm_outputs,
        ("running_mean", "running_var"),
        lambda d: draw_batch_norm(d, True),
    ),
}
