"""The op over sequences as a case: drawn arguments, and the float64 reference of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hyperfast import ops, reference
from hyperfast.reference import HyperCell
from tests.fuzz.harness import Draw, OpCase, Output, Unsized, roundoff
from tests.fuzz.ops import CONTEXTS, dtype

Arguments = dict[str, Any]
LISTS = (list, tuple, Unsized)
# torch makes their gradients
PRODUCTS = ("x", "weight_ih", "weight_hh", *(f"hyper {i}" for i in range(5)))


def draw_lstm(draw: Draw, large: bool = False) -> Arguments:
    kind, M = dtype(draw), draw.choice((0, 0, 1, 2, 5, 7, 8, 16, 17))
    H, Z, T = draw.choice((1, 2, 3, 5, 8, 15, 16, 17, 33)), draw.choice((1, 2, 4, 5)), draw.randint(1, 4)
    sizes = sorted((draw.choice((1, 2, 3, 5, 8)) for _ in range(T)), reverse=True)
    if large:
        sizes, H, M = [9, 9, 8, 4], draw.choice((65, 129)), draw.choice((0, 37))
    elif draw.chance(0.05):
        sizes = []
    N, B = sum(sizes), sizes[0] if sizes else 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return draw.normal(*shape, dtype=kind, scale=scale)

    def norms(n: int) -> list[Tensor] | None:
        return [normal(4 * n), normal(4 * n), normal(n), normal(n)] if n and draw.chance(0.5) else None

    I = draw.choice((1, 3, 8))
    hyper = [normal(4 * M, I + H, scale=H**-0.5), normal(4 * M, M, scale=0.3), normal(4 * M)]
    hyper += [normal(12 * Z, M, scale=0.3), normal(12 * Z), normal(12, H, Z, scale=Z**-0.5)] if M else []
    return {
        "x": normal(N, I),
        "state": [normal(B, n) for n in ((H, H, M, M) if M else (H, H))],
        "weight_ih": normal(4 * H, I, scale=I**-0.5),
        "weight_hh": normal(4 * H, H, scale=H**-0.5),
        "bias": normal(4 * H),
        "norms": norms(H),
        "hyper": hyper if M else None,
        "hyper_norms": norms(M),
        "batch_sizes": None if len(set(sizes)) == 1 and draw.chance(0.5) else tuple(sizes),
        "key": (draw.randint(-(2**63), 2**63 - 1),),
        "dropout": draw.choice((0.0, 0.0, 0.3)),
        "eps": draw.choice((1e-5, 1e-3)),
        "backend": "reference" if draw.chance(0.1) else "auto",
        "context": draw.choice(("", "", "", "no_grad", "inference_mode")),
    }


def differentiable(arguments: Arguments) -> Iterator[tuple[str, Tensor]]:
    for name in ("x", "state", "weight_ih", "weight_hh", "bias", "norms", "hyper", "hyper_norms"):
        value = arguments[name]
        if isinstance(value, LISTS):
            yield from ((f"{name} {i}", t) for i, t in enumerate(value) if isinstance(t, Tensor))
        elif isinstance(value, Tensor):
            yield name, value


def run(op: Callable, arguments: Arguments, **options: Any) -> list[Tensor]:
    """h of every step and the last state."""
    given = dict(arguments)
    hyper, norms = given.pop("hyper"), given.pop("hyper_norms")
    if hyper is not None:
        given["hyper"] = HyperCell(*hyper, norms)
    if given["batch_sizes"] is not None:
        given["batch_sizes"] = torch.tensor(given["batch_sizes"], dtype=torch.int64)
    given["key"] = torch.tensor(given["key"])
    output, last = op(**given, **options)
    return [output, *(s for s in last if s is not None)]


def call(draw: Draw, arguments: Arguments) -> tuple[list, list, dict[str, Tensor]]:
    """What was made, the gradients with respect to it, and those of what needs one."""
    given = {name: value for name, value in arguments.items() if name != "context"}
    with CONTEXTS[arguments["context"]]():
        made = run(ops.lstm, given)
    leaves = {name: t for name, t in differentiable(arguments) if t.requires_grad}
    if not leaves or not made[1].requires_grad:
        return made, [], {}
    seeds = [draw.normal(*m.shape, dtype=m.dtype, scale=1.0) for m in made]
    return made, seeds, dict(zip(leaves, gradients(made, list(leaves.values()), seeds), strict=True))


def gradients(made: list[Tensor], leaves: list[Tensor], seeds: list[Tensor]) -> tuple[Tensor | None, ...]:
    used = [(m, d.to(m.dtype)) for m, d in zip(made, seeds, strict=True) if m.requires_grad]
    outputs, seeds = zip(*used, strict=True)
    return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


def expected(
    arguments: Arguments,
    seeds: list[Tensor],
    names: dict,
    kind: torch.dtype,
    noise: torch.Generator | None = None,
) -> list[Tensor]:
    """What the reference makes in `kind`, and its gradients of `names`; with noise of inputs that differ by a
    few units of roundoff."""
    twins: dict[int, Tensor] = {}

    def twin(value: Any) -> Any:
        if isinstance(value, Tensor):
            t = value.detach().double()
            if noise is not None:
                t = t * (1 + 4 * roundoff(kind) * torch.randn(t.shape, generator=noise, dtype=t.dtype))
            return twins.setdefault(id(value), t.to(kind, copy=True).requires_grad_())
        return [twin(item) for item in value] if isinstance(value, LISTS) else value

    given = {name: twin(value) for name, value in arguments.items()}
    given |= {"dropout": float(given["dropout"]), "eps": float(given["eps"])}
    for name in ("backend", "context"):
        del given[name]
    given["state"] = reference.LSTMState(*given["state"])
    for name in ("norms", "hyper_norms"):
        given[name] = None if given[name] is None else reference.Norms(*given[name])
    made = run(reference.lstm, given)
    leaves = [twins[id(t)] for name, t in differentiable(arguments) if name in names]
    grads = gradients(made, leaves, seeds) if leaves else ()
    grads = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))
    return [*(m.detach() for m in made), *grads]


def outputs(before: Arguments, arguments: Arguments, result: tuple) -> list[Output]:
    """Rounding grows through a recurrence, and in a layer norm of near numbers, as no sum of absolute values
    says: `scale` is the largest element and what the reference loses in float32, in units of its roundoff, on
    inputs that differ by some of them."""
    made, seeds, grads = result
    computed = torch.float64 if arguments["x"].dtype == torch.float64 else torch.float32
    exact = expected(arguments, seeds, grads, torch.float64)
    noise = torch.Generator().manual_seed(0)
    plain = zip(*(expected(arguments, seeds, grads, torch.float32, noise) for _ in range(2)), strict=True)
    names = [*(f"output {i}" for i in range(len(made))), *grads]
    by_torch = arguments["backend"] == "reference" or not len(made[0])
    infinite = any(t.isinf().any() for _, t in differentiable(arguments))
    results = []
    for name, got, e, ps in zip(names, [*made, *grads.values()], exact, plain, strict=True):
        if (
            infinite and got is not None
        ):  # a sigmoid of it is 0 or next to it; times infinity again, that shows
            e = torch.where(e.isfinite(), e, got.detach().double())
        finite = e.isfinite()
        lost = torch.stack([(p.double() - e)[finite].abs() for p in ps])
        largest = e[finite].abs().max().item() if finite.any() else 0.0
        units = lost.max().item() / roundoff(torch.float32) if lost.numel() else 0.0
        scale = e.abs() + largest + units + 1
        if not lost.isfinite().all():
            scale = torch.full_like(scale, torch.inf)
        own = computed if by_torch or name in PRODUCTS else None
        results.append(Output(name, torch.zeros_like(e) if got is None else got, e, scale, 8, own))
    return results


LSTM_OPS: dict[str, OpCase] = {
    "lstm": OpCase(draw_lstm, call, outputs, draw_large=lambda d: draw_lstm(d, True)),
}
