"""What the generators of a model cost: parameters, and the work of generating and of a training step.

Work is that of the least that has to be done. A generation reads every parameter once and writes every
generated weight once; flops are two for each multiplication and addition of its products, in the order in
which they are written (`two_layer` multiplies its two matrices first where that is cheaper), without
elementwise work. The backward of a product makes the gradients of both factors, four; with a factored
gradient only that of z, two. A training step of Adam or AdamW writes every generated weight and reads its
gradient dw, 2 N elements, and moves for each element of

- a linear generator's weight in factored mode 7 elements: it is read for dz, then read and written with both
  moments in the pass that makes the next weights (28 bytes in float32); 8 where the next weights cannot be
  made, since the forward then reads it too;
- every other parameter 13: read in the forward and in the backward, its gradient written, read for the norm
  and scaled in place, then parameter and moments read and written and the gradient read (52 bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from hyperfast.analysis.table import table
from hyperfast.factored import Factors, trained_parameters, whole_numel
from hyperfast.nn import Generator, named_weights
from hyperfast.nn.generator import generators

FACTORED, GENERATES, DENSE = 7, 8, 13  # elements moved for each one in a training step
WRITTEN_AND_READ = 2  # a generated weight and its gradient


@dataclass(frozen=True)
class Cost:
    """Of one generated layer, of the parameters that several layers share, or of all.

    kind: the generator's class. embeddings, z_dim: number and size of its z. generated: weights made.
    embedding: entries of z. parameters: those that serve this layer alone, z included. Flops and bytes of one
    generation (`forward_`) and of a training step with Adam or AdamW (`step_`); None where the kind of
    generator does not give its products. next_weights: the optimizer makes them, so the forward of a training
    step copies N numbers and reads no generator.
    """

    name: str
    kind: str = ""
    embeddings: int = 0
    z_dim: int | None = None
    generated: int = 0
    embedding: int = 0
    parameters: int = 0
    forward_flops: int | None = 0
    forward_bytes: int = 0
    step_flops: int | None = 0
    step_bytes: int = 0
    next_weights: bool | None = None

    @property
    def generator(self) -> int:
        """Parameters without z."""
        return self.parameters - self.embedding

    @property
    def ratio(self) -> float:
        """Parameters for each generated weight; NaN where none are generated."""
        return self.parameters / self.generated if self.generated else math.nan


@dataclass(frozen=True)
class CostReport:
    """Costs by layer, of what groups of layers share (counted once, and in no layer), and of all."""

    layers: tuple[Cost, ...]
    shared: tuple[Cost, ...]
    total: Cost

    def rows(self) -> list[dict[str, Any]]:
        """The fields of `Cost` and its `generator` and `ratio`, for layers, shared parts and the total."""
        costs = [*self.layers, *self.shared, self.total]
        return [asdict(cost) | {"generator": cost.generator, "ratio": cost.ratio} for cost in costs]

    def to_markdown(self) -> str:
        """One table; Mflop are 10^6 flops, MB 2^20 bytes."""
        rows = [_cells(cost) for cost in (*self.layers, *self.shared)]
        rows.append([f"**{cell}**" if cell else "" for cell in _cells(self.total)])
        header = ["layer", "generator", "embeddings", "generated weights", "parameters", "ratio"]
        header += ["generation, Mflop", "MB", "training step, Mflop", "MB", "next weights"]
        return table(header, rows)


def generator_costs(model: nn.Module) -> CostReport:
    """Parameters and work of every generator of `model`, as the module says; nothing is run.

    Layers have the names of `hyperfast.nn.named_weights`. What several layers use is counted once, in a row
    of their own. Every generator is taken to be trained, and to generate once in a step;
    of sharded ones these are the sums over ranks.
    """
    generated = list(named_weights(model))
    users: dict[nn.Parameter, list[str]] = {}
    for name, generator, index in generated:
        for p in _parameters(generator, index):
            users.setdefault(p, []).append(name)
    layers = tuple(
        _layer(name, generator, index, [p for p, names in users.items() if names == [name]])
        for name, generator, index in generated
    )
    elements = {id(p): n for _, generator, _ in generated for p, n in _elements(generator)}
    groups: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for p, names in users.items():
        if len(names) > 1:
            groups.setdefault(tuple(names), []).append(p)
    shared = tuple(
        Cost(
            f"shared by {', '.join(names) if len(names) < 4 else f'{len(names)} layers'}",
            parameters=_count(own),
            forward_bytes=sum(map(_nbytes, own)),
            step_bytes=sum(_nbytes(p) * elements[id(p)] for p in own),
        )
        for names, own in groups.items()
    )
    return CostReport(layers, shared, _sum([*layers, *shared]))


def _parameters(generator: Generator, index: int) -> Iterator[nn.Parameter]:
    """The parameters, z apart, that weight `index` needs."""
    maps = generator.affine_maps()
    if maps[index]:
        yield from dict.fromkeys(p for m in maps[index] for p in (m.weight, m.bias) if p is not None)
    else:
        yield from (p for p in trained_parameters(generator) if p is not generator.z)


def _factors(generator: Generator) -> list[Factors]:
    """Of the generator and those it is made of."""
    return [f for _, own in generators(generator) for f in own.factors()]


def _elements(generator: Generator) -> Iterator[tuple[nn.Parameter, int]]:
    """What a training step moves for each element of its parameters."""
    factored = {id(f.weight): FACTORED if f.z_is_parameter else GENERATES for f in _factors(generator)}
    return ((p, factored.get(id(p), DENSE)) for p in trained_parameters(generator))


def _layer(name: str, generator: Generator, index: int, own: list[nn.Parameter]) -> Cost:
    z, n = generator.embeddings()[index], math.prod(generator.shapes[index])
    factors = _factors(generator)
    factored = {id(f.weight) for f in factors}
    elements = {id(p): count for p, count in _elements(generator)}
    products = [(2 * m.rows * whole_numel(m.weight), id(m.weight)) for m in generator.affine_maps()[index]]
    is_trained = isinstance(generator.z, nn.Parameter)
    return Cost(
        name,
        type(generator).__name__,
        embeddings=len(z),
        z_dim=z.shape[1],
        generated=n,
        embedding=z.numel() if is_trained else 0,
        parameters=_count(own) + (z.numel() if is_trained else 0),
        forward_flops=sum(flops for flops, _ in products) if products else None,
        forward_bytes=sum(map(_nbytes, own)) + (z.numel() + n) * z.element_size(),
        step_flops=sum(flops * (2 if key in factored else 3) for flops, key in products) or None,
        step_bytes=sum(_nbytes(p) * elements[id(p)] for p in own)
        + (DENSE * z.numel() + WRITTEN_AND_READ * n) * z.element_size(),
        next_weights=bool(factors) and all(f.z_is_parameter for f in factors),
    )


def _nbytes(p: nn.Parameter) -> int:
    return whole_numel(p) * p.element_size()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(whole_numel(p) for p in parameters)


def _sum(costs: list[Cost]) -> Cost:
    total: dict[str, Any] = {"name": "all"}
    for field in fields(Cost):
        values = [getattr(cost, field.name) for cost in costs]
        if field.name not in ("name", "kind", "z_dim", "next_weights"):
            total[field.name] = None if None in values else sum(values)
    return Cost(**total)


def _cells(cost: Cost) -> list[str]:
    def number(value: int | None, unit: int) -> str:
        amount = (value or 0) / unit
        return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}" if amount else ""

    next_weights = "" if cost.next_weights is None else "yes" if cost.next_weights else "no"
    return [
        cost.name,
        cost.kind,
        f"{cost.embeddings} x {cost.z_dim}" if cost.z_dim else str(cost.embeddings or ""),
        f"{cost.generated:,}" if cost.generated else "",
        f"{cost.parameters:,}",
        "" if math.isnan(cost.ratio) else f"{cost.ratio:.2f}",
        number(cost.forward_flops, 10**6),
        number(cost.forward_bytes, 2**20),
        number(cost.step_flops, 10**6),
        number(cost.step_bytes, 2**20),
        next_weights,
    ]
