"""The public ops as cases: valid arguments, and the float64 reference of what comes out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import ops, reference
from tests.fuzz.harness import KERNEL_DTYPES, Draw, OpCase, Output, computed_in, tensors_in

Arguments = dict[str, Any]


def sizes(draw: Draw, large: bool = False) -> list[tuple[int, int]]:
    if large:
        return [draw.large_size(), draw.generator_size()]
    return [draw.generator_size() for _ in range(draw.choice((0, 1, 1, 2, 2, 3)))]


def dtype(draw: Draw) -> torch.dtype:
    return torch.float16 if draw.chance(0.05) else draw.choice(KERNEL_DTYPES)


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(torch.float64, copy=True) for t in tensors]


def magnitude(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.abs() for t in double(tensors)]


def sum_scale(*parts: Tensor) -> Tensor:
    return sum(part.abs() for part in parts)


# ---- generate


def draw_generate(draw: Draw, large: bool = False) -> Arguments:
    kind, layers = dtype(draw), sizes(draw, large)
    arguments: Arguments = {
        "weights": [draw.normal(n, k, dtype=kind) for n, k in layers],
        "biases": [None if draw.chance(0.2) else draw.normal(n, dtype=kind) for n, _ in layers],
        "zs": [draw.normal(k, dtype=kind) for _, k in layers],
    }
    if draw.chance(0.2):
        arguments["next_weights"] = [draw.choice((None, draw.normal(n, dtype=kind))) for n, _ in layers]
    return arguments | {
        "factored": draw.chance(0.3),
        "backend": "reference" if draw.chance(0.1) else "auto",
        "context": draw.choice(("", "", "", "no_grad", "inference_mode", "autocast")),
    }


CONTEXTS: dict[str, Callable] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def leaves_of(columns: Sequence[Any]) -> list[Tensor]:
    return list({id(t): t for t in tensors_in(list(columns)) if t.requires_grad}.values())


def call_for_layers(op: Callable[..., Sequence[Tensor]], differentiable: tuple[str, ...]) -> Callable:
    """A call of `op`: what was made, the leaves, the gradients with respect to what was made, those of the
    leaves."""

    def call(draw: Draw, arguments: Arguments) -> tuple:
        arguments = dict(arguments)
        with CONTEXTS[arguments.pop("context")]():
            made = op(**arguments)
        used = [w for w in made if w.requires_grad and draw.chance(0.9)]
        seeds = [draw.normal(*w.shape, dtype=w.dtype) for w in used]
        leaves = leaves_of([arguments[name] for name in differentiable])
        if not used or not leaves:
            return made, [], [], []
        grads = torch.autograd.grad(used, leaves, seeds, allow_unused=True)
        of_made = {id(w): seed for w, seed in zip(used, seeds, strict=True)}
        return made, leaves, [of_made.get(id(w)) for w in made], grads

    return call


def generate_outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    made, leaves, dws, grads = result
    columns = [list(before[name]) for name in ("weights", "biases", "zs")]
    exact = reference.generate(*map(double, columns))
    scales = reference.generate(*map(magnitude, columns))
    computed = computed_in(columns[0], before["backend"])
    if before["backend"] == "reference" and before["context"] == "autocast":
        computed = torch.bfloat16
    outputs = [
        Output(f"w {i}", w, exact[i], scales[i], weight.shape[1] + 1, computed)
        for i, (w, weight) in enumerate(zip(made, columns[0], strict=True))
    ]
    if grads:
        outputs += gradient_outputs(arguments, leaves, dws, grads)
    return outputs


def gradient_outputs(arguments: Arguments, leaves, dws, grads) -> list[Output]:
    """The gradients by autograd through the reference in float64, and through the same of absolute values."""
    used = [i for i, dw in enumerate(dws) if dw is not None]
    expected = []
    for convert in (lambda t: t, Tensor.abs):
        twins: dict[int, Tensor] = {}

        def twin(t, convert=convert, twins=twins):
            if t is None:
                return None
            return twins.setdefault(id(t), convert(t.detach().double()).clone().requires_grad_())

        columns = [[twin(t) for t in arguments[name]] for name in ("weights", "biases", "zs")]
        made = reference.generate(*columns)
        seeds = [convert(dws[i].double()) for i in used]
        wanted = [twins[id(t)] for t in leaves]
        expected.append(torch.autograd.grad([made[i] for i in used], wanted, seeds, allow_unused=True))
    weights = {id(t) for t in arguments["weights"]} - {
        id(t) for t in (*arguments["biases"], *arguments["zs"])
    }
    outputs = []
    for leaf, got, exact, scale in zip(leaves, grads, *expected, strict=True):
        if arguments["factored"] and id(leaf) in weights:
            assert got is None, "a dense gradient in factored mode"
        elif exact is None or got is None:
            assert exact is None or not exact.count_nonzero(), "no gradient"
            assert got is None or not got.count_nonzero(), "a gradient of what was not used"
        else:
            terms = max((*leaf.shape, *(t.shape[0] for t in arguments["weights"])))
            computed = torch.bfloat16 if arguments["context"] == "autocast" else leaf.dtype
            outputs.append(Output(f"gradient of {list(leaf.shape)}", got, exact, scale, terms, computed))
    return outputs


# ---- generate_units


def draw_units(draw: Draw, large: bool = False) -> Arguments:
    kind, scale = dtype(draw), draw.choice((0.1, 1.0, 30.0))
    D = draw.choice((1, 2, 3, 4, 5, 15, 16, 17, 33, 0 if draw.chance(0.1) else 64))
    kernel = draw.choice(((), (1,), (3,), (1, 1), (3, 3), (2, 5), (5, 5), (1, 2, 3)))
    unit = (draw.choice((1, 2, 3, 5, 16)), draw.choice((1, 2, 3, 8, 16)), *kernel)
    layers = [(draw.choice((1, 2, 5)), draw.choice((1, 3, 4))) for _ in range(draw.choice((1, 2, 3, 5)))]
    if large:
        D, unit = draw.choice((4, 33, 64)), draw.choice(((16, 16, 3, 3), (8, 5, 3, 3)))
        layers.append((13, 11))
    shapes = [(m * unit[0], n * unit[1], *unit[2:]) for m, n in layers]
    size, units = math.prod(unit), sum(m * n for m, n in layers)
    rows = draw.choice([n for n in (1, 2, 3, 5, unit[1], size) if size % n == 0])
    return {
        "a": draw.normal(units * rows, D, dtype=kind, scale=scale),
        "weight": draw.normal(D, size // rows, dtype=kind, scale=1.0),
        "bias": None if draw.chance(0.3) else draw.normal(size // rows, dtype=kind, scale=scale),
        "shapes": shapes,
        "unit": unit,
        "l2": draw.choice((0.0, 0.0, 0.1, 3)),
        "channels_last": len(unit) == 4 and draw.chance(0.5),
        "backend": "reference" if draw.chance(0.1) else "auto",
        "context": draw.choice(("", "", "", "no_grad", "inference_mode", "autocast")),
    }


def units_outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    """w, and the gradients of the leaves from those of w and l2 w."""
    made, leaves, dws, grads = result
    shapes, unit = [tuple(shape) for shape in before["shapes"]], before["unit"]
    l2, dws, expected = float(before["l2"]), dws or [None] * len(made), []
    for convert in (lambda t: t, Tensor.abs):
        twins: dict[int, Tensor] = {}

        def twin(t, convert=convert, twins=twins):
            if t is None:
                return None
            return twins.setdefault(id(t), convert(t.detach().double()).clone().requires_grad_())

        columns = [twin(arguments[name]) for name in ("a", "weight", "bias")]
        ws = reference.generate_units(*columns, shapes, unit)
        seeds = [
            torch.zeros_like(w) if dw is None else convert(dw.double()) for w, dw in zip(ws, dws, strict=True)
        ]
        if l2:
            seeds = [seed + l2 * convert(w.double()) for seed, w in zip(seeds, made, strict=True)]
        wanted = torch.autograd.grad(ws, [twins[id(t)] for t in leaves], seeds) if leaves else []
        expected.append(([w.detach() for w in ws], wanted))
    (exact, exact_grads), (scales, grad_scales) = expected
    (P, D), C, kind = before["a"].shape, before["weight"].shape[1], before["a"].dtype
    kernel = before["backend"] == "auto" and kind in KERNEL_DTYPES and min(P, D, C) > 0
    computed = None if kernel else kind
    outputs = [Output(f"w {i}", w, exact[i], scales[i], D + 1, computed) for i, w in enumerate(made)]
    for leaf, *gradient in zip(leaves, grads, exact_grads, grad_scales, strict=True):
        outputs.append(Output(f"gradient of {list(leaf.shape)}", *gradient, P + C, computed))
    return outputs


# ---- generate_backward


def draw_backward(draw: Draw, large: bool = False) -> Arguments:
    kind, layers = dtype(draw), sizes(draw, large)
    return {
        "weights": [draw.normal(n, k, dtype=kind) for n, k in layers],
        "dws": [draw.normal(n, dtype=kind) for n, _ in layers],
    }


def backward_outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    dzs, norms = result
    weights, dws = list(before["weights"]), list(before["dws"])
    if not weights:
        return [Output("squared norms", norms, torch.zeros(0), torch.zeros(0))]
    exact, exact_norms = reference.generate_backward(double(weights), double(dws))
    scales, _ = reference.generate_backward(magnitude(weights), magnitude(dws))
    computed = computed_in(weights)
    terms = max(len(dw) for dw in dws)
    outputs = [Output("squared norms", norms, exact_norms, exact_norms, terms, computed and torch.float64)]
    for i, weight in enumerate(weights):
        outputs.append(Output(f"dz {i}", dzs[i], exact[i], scales[i], weight.shape[0], computed))
    return outputs


# ---- adamw_generate


def draw_coefficients(draw: Draw) -> ops.AdamWCoefficients:
    t, beta1, beta2 = (
        draw.choice((1, 2, 10, 1000)),
        draw.choice((0.0, 0.5, 0.9)),
        draw.choice((0.0, 0.9, 0.999)),
    )
    lr, weight_decay = draw.choice((0.0, 1e-3, 0.1)), draw.choice((0.0, 0.01, 2.0))
    eps = draw.choice((1e-8, 1e-3, 0.0))
    return ops.AdamWCoefficients(
        1 - lr * weight_decay, lr / (1 - beta1**t), beta1, beta2, math.sqrt(1 - beta2**t), eps
    )


def draw_adamw(draw: Draw, large: bool = False) -> Arguments:
    kind, layers = dtype(draw), sizes(draw, large)
    scale = 10 ** draw.uniform(-2, 2)
    trained = [not draw.chance(0.2) for _ in layers]

    def columns(make: Callable[..., Tensor], shape: Callable[[int, int], tuple], **options) -> list[Tensor]:
        return [make(*shape(n, k), dtype=kind, **options) for n, k in layers]

    def if_trained(tensors: list[Tensor]) -> list[Tensor | None]:
        return [t if yes else None for t, yes in zip(tensors, trained, strict=True)]

    return {
        "weights": columns(draw.normal, lambda n, k: (n, k)),
        "exp_avgs": columns(draw.normal, lambda n, k: (n, k), scale=scale),
        "exp_avg_sqs": columns(draw.positive, lambda n, k: (n, k)),
        "biases": columns(draw.normal, lambda n, k: (n,)),
        "bias_exp_avgs": if_trained(columns(draw.normal, lambda n, k: (n,), scale=scale)),
        "bias_exp_avg_sqs": if_trained(columns(draw.positive, lambda n, k: (n,))),
        "dws": columns(draw.normal, lambda n, k: (n,), scale=scale),
        "zs": columns(draw.normal, lambda n, k: (k,), scale=1.0),
        "new_zs": columns(draw.normal, lambda n, k: (k,), scale=1.0),
        "next_weights": columns(draw.normal, lambda n, k: (n,)),
        "coefficients": [draw_coefficients(draw) for _ in layers],
        "bias_coefficients": [draw_coefficients(draw) for _ in layers],
        "grad_scale": draw.choice((1.0, 0.1, 1)),
        "backend": "reference" if draw.chance(0.1) else "auto",
    }


WRITTEN = (
    "weights", "exp_avgs", "exp_avg_sqs", "biases", "bias_exp_avgs", "bias_exp_avg_sqs", "next_weights"
)  # fmt: skip


def adamw_scale(p: Tensor, m: Tensor, v: Tensor, g: Tensor, c: ops.AdamWCoefficients) -> list[Tensor]:
    """For the bounds: the new p, m and v with every difference a sum of absolute values."""
    kind, (p, m, v, g) = p.dtype, (t.detach().double() for t in (p, m, v, g))
    scale_m = m.abs() + (1 - c.beta1) * (g.abs() + m.abs())
    scale_v = c.beta2 * v.abs() + (1 - c.beta2) * g * g
    v = c.beta2 * v + (1 - c.beta2) * g * g
    scale_p = abs(c.decay) * p.abs() + c.step_size * scale_m / (v.sqrt() / c.bias_correction2_sqrt + c.eps)
    overflows = (scale_v > torch.finfo(kind).max / 4) & (kind != torch.float64)
    return [torch.where(overflows, torch.inf, scale_p), scale_m, scale_v]


def adamw_outputs(before: Arguments, arguments: Arguments, result: None) -> list[Output]:
    names = [*WRITTEN[:6], "dws", "zs", "new_zs", "next_weights", "coefficients", "bias_coefficients"]
    given = {name: list(before[name]) for name in names}
    for name in ("coefficients", "bias_coefficients"):
        nothing = [0.0] * 6  # of a bias that is not trained
        given[name] = [
            ops.AdamWCoefficients(*map(float, nothing if row is None else row)) for row in given[name]
        ]
    after = {name: list(arguments[name]) for name in WRITTEN}
    outputs = []
    computed = computed_in(given["weights"], before["backend"])
    for i, weight in enumerate(given["weights"]):
        half = computed in (torch.float16, torch.bfloat16)
        # many roundings to half precision are no right answer to compare with: the same ones are
        exact = {
            name: [t.clone() if isinstance(t, Tensor) and half else t if half else _double_one(t)]
            for name, (t,) in ((name, given[name][i : i + 1]) for name in names)
        }
        scale = float(before["grad_scale"])
        reference.adamw_generate(**exact, grad_scale=scale)
        g = given["dws"][i].double() * scale
        scales = adamw_scale(
            *(given[name][i] for name in WRITTEN[:3]),
            torch.outer(g, given["zs"][i].double()),
            given["coefficients"][i],
        )
        scales += [given["biases"][i].double().abs(), None, None]
        if given["bias_exp_avgs"][i] is not None:
            scales[3:] = adamw_scale(
                *(given[name][i] for name in WRITTEN[3:6]), g, given["bias_coefficients"][i]
            )
        for name, s in zip(WRITTEN[:6], scales, strict=True):
            if after[name][i] is not None:
                outputs.append(Output(f"{name} {i}", after[name][i], exact[name][0].double(), s, 4, computed))
        columns = [after["weights"][i]], [after["biases"][i]], [given["new_zs"][i]]
        (w,), (w_scale,) = (
            reference.generate(*map(double, columns)),
            reference.generate(*map(magnitude, columns)),
        )
        outputs.append(
            Output(f"next_weights {i}", after["next_weights"][i], w, w_scale, weight.shape[1] + 1, computed)
        )
    return outputs


def _double_one(t: Any) -> Any:
    return double([t])[0] if isinstance(t, Tensor) else t


GENERATOR_OPS: dict[str, OpCase] = {
    "generate": OpCase(
        draw_generate,
        call_for_layers(ops.generate, ("weights", "biases", "zs")),
        generate_outputs,
        draw_large=lambda d: draw_generate(d, True),
    ),
    "generate_units": OpCase(
        draw_units,
        call_for_layers(ops.generate_units, ("a", "weight", "bias")),
        units_outputs,
        draw_large=lambda d: draw_units(d, True),
    ),
    "generate_backward": OpCase(
        draw_backward,
        lambda draw, arguments: ops.generate_backward(**arguments),
        backward_outputs,
        draw_large=lambda d: draw_backward(d, True),
    ),
    "adamw_generate": OpCase(
        draw_adamw,
        lambda draw, arguments: ops.adamw_generate(**arguments),
        adamw_outputs,
        WRITTEN,
        lambda d: draw_adamw(d, True),
    ),
}
