"""All kernels of Hyper Wide ResNet 40-1 and 40-2 (Ha et al.) from their embeddings, forward and backward.

From z, w2, b2, w1, b1 to the 36 weights, and from their gradients to those of all five parameters; units of
16 x 16 x 3 x 3, z and hidden size 64, float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.machine import interleaved, median, paired_ratio
from hyperfast.ops.generate_units import product_first, two_layer

UNIT = (16, 16, 3, 3)
K = D = 64
C = 144


def shapes_of(widening: int) -> list[tuple[int, ...]]:
    """Kernels of Wide ResNet 40-`widening`: three stages of six blocks of two."""
    made, channels = [], 16
    for stage in (16, 32, 64):
        for _ in range(12):
            made.append((stage * widening, channels, 3, 3))
            channels = stage * widening
    return made


def tiles(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0] // UNIT[0], shape[1] // UNIT[1]


def loop(shapes: list[tuple[int, ...]], zs: list[Tensor], w2, b2, w1, b1) -> list[Tensor]:
    """As public PyTorch code of Ha et al.'s network does it: unit by unit, then torch.cat."""

    def unit(z: Tensor) -> Tensor:
        a = (torch.matmul(z, w2) + b2).view(UNIT[1], D)
        return (torch.matmul(a, w1) + b1).view(UNIT)

    made, at = [], iter(zs)
    for shape in shapes:
        rows, across = tiles(shape)
        made.append(
            torch.cat([torch.cat([unit(next(at)) for _ in range(across)], dim=1) for _ in range(rows)], dim=0)
        )
    return made


def laid_out(shapes: list[tuple[int, ...]], units: Tensor) -> list[Tensor]:
    """Layers of one shape permuted and copied together."""
    groups = [(shape, len(list(group))) for shape, group in itertools.groupby(shapes)]
    made: list[Tensor] = []
    parts = units.split([count * tiles(shape)[0] * tiles(shape)[1] for shape, count in groups])
    for (shape, count), part in zip(groups, parts, strict=True):
        blocks = part.view(count, *tiles(shape), *UNIT)
        made += blocks.transpose(2, 3).reshape(count, *shape).unbind()
    return made


def batched(shapes: list[tuple[int, ...]], z, w2, b2, w1, b1) -> list[Tensor]:
    """Two matrix products over all embeddings."""
    a = torch.addmm(b2, z, w2).view(-1, D)
    return laid_out(shapes, torch.addmm(b1, a, w1).view(-1, *UNIT))


def reassociated(shapes: list[tuple[int, ...]], z, w2, b2, w1, b1) -> list[Tensor]:
    """The order of products that hyperfast takes, in plain PyTorch."""
    if not product_first(*z.shape, D, C):
        return batched(shapes, z, w2, b2, w1, b1)
    weight = (w2.view(-1, D) @ w1).view(K, -1)
    bias = torch.addmm(b1, b2.view(-1, D), w1).view(-1)
    return laid_out(shapes, torch.addmm(bias, z, weight).view(-1, *UNIT))


def products(shapes: list[tuple[int, ...]]) -> tuple[Callable[[], None], float]:
    """The bare matrix products of `reassociated`, forward and backward, and their flops."""
    E = sum(rows * across for rows, across in map(tiles, shapes))
    R = UNIT[1]
    first, second = (K * R, D, C), (E, K, R * C)
    if not product_first(E, K, D, C):
        first, second = (E, K, R * D), (E * R, D, C)
    sizes = [(m, k, n) for m, k, n in (first, second)]
    sizes += [(m, n, k) for m, k, n in sizes] + [(k, m, n) for m, k, n in sizes]
    tensors = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in sizes]

    def run() -> None:
        for a, b, out in tensors:
            torch.mm(a, b, out=out)

    return run, sum(2.0 * m * k * n for m, k, n in sizes)


def with_gradients(function: Callable, shapes, tensors: list, dws: list[Tensor]) -> Callable:
    leaves = [t for given in tensors for t in (given if isinstance(given, list) else [given])]

    def step() -> list[Tensor]:
        made = function(shapes, *tensors)
        return [*made, *torch.autograd.grad(made, leaves, dws)]

    return step


@pytest.mark.parametrize("widening", [1, 2])
def bench_units(benchmark, report, widening):
    torch.manual_seed(0)
    shapes = shapes_of(widening)
    E = sum(rows * across for rows, across in map(tiles, shapes))
    z, w2, w1 = torch.randn(E, K), torch.randn(K, UNIT[1] * D) / 8, torch.randn(D, C) / 8
    parameters = [z, w2, torch.randn(UNIT[1] * D), w1, torch.randn(C)]
    parameters = [p.requires_grad_() for p in parameters]
    zs = [row.clone().requires_grad_() for row in z.detach()]
    dws = [torch.randn(shape) for shape in shapes]
    steps = {
        "loop": with_gradients(loop, shapes, [zs, *parameters[1:]], dws),
        "batched": with_gradients(batched, shapes, parameters, dws),
        "reassociated": with_gradients(reassociated, shapes, parameters, dws),
        "compiled": with_gradients(torch.compile(reassociated, dynamic=False), shapes, parameters, dws),
        "hyperfast": with_gradients(
            lambda shapes, *tensors: two_layer(*tensors, shapes, UNIT), shapes, parameters, dws
        ),
    }
    expected = steps["batched"]()
    for name, step in steps.items():
        made = step()
        if name == "loop":
            made[len(shapes) : len(shapes) + E] = [torch.stack(made[len(shapes) : len(shapes) + E])]
        for a, b in zip(made, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    bare, flops = products(shapes)
    times: dict[str, list[float]] = {}

    def rounds() -> None:
        times.update(interleaved({**steps, "products": bare}, 15))

    benchmark.pedantic(rounds, rounds=1)
    ours = median(times["hyperfast"])
    ratios = {way: paired_ratio(times[way], times["hyperfast"]) for way in steps if way != "hyperfast"}
    share = paired_ratio(times["products"], times["hyperfast"])
    row = [f"{1e3 * ours:.2f} ms", *(f"{ratio:.2f}" for ratio in ratios.values())]
    row += [f"{100 * share:.0f} %", f"{flops / ours / 1e9:.0f} GFLOPS"]
    header = ["hyperfast", *(f"{way} / hyperfast" for way in ratios), "bare products / hyperfast", "rate"]
    report(f"kernels of Hyper WRN-40-{widening}, {E} embeddings, forward + backward", header, [row])
    benchmark.extra_info |= {f"{way} / hyperfast": ratio for way, ratio in ratios.items()}
    benchmark.extra_info["share of the bare products"] = share
