"""How gradients behave: how far they tell the next ones, how rough they are, how many vanish or explode.

The measures with which Santurkar, Tsipras, Ilyas and Madry, "How does batch normalization help
optimization?" (NeurIPS 2018) look at a network. Gradients are those of the loss in what the model learns: its
parameters that require gradients, embeddings and generators of a hypernetwork among them. Each is taken at
parameters of its own, with buffers of its own, so the model's tensors are never written; those of one batch
meet the same random numbers, so that dropout makes no difference between them. The model is analysed in the
mode it is in: BatchNorm takes the statistics of the batch in training mode, its running ones in evaluation
mode. Up to four copies of the parameters are there at a time.

One pass after another: torch.func.vmap over the points took 1.1 times as long for two inputs and 1.5 times
for five points along the gradient (VGG-A, batch 64, two cores), since its gradients of convolutions are
grouped convolutions; it holds all points at once, and fused layers run plain PyTorch under it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.analysis.batches import Batch, Batches, Loss, evaluate, learned_parameters, on_device, take
from hyperfast.analysis.preserve import eagerly, preserved, same_random_numbers
from hyperfast.analysis.table import counted, records, shown, table
from hyperfast.nn import LinearGenerator

DISTANCES = tuple(0.5 * i / 9 for i in range(10))


@dataclass(frozen=True, eq=False)
class Predictiveness:
    """What `gradient_predictiveness` found; each tensor float64 [batches], on the CPU.

    norms: |g|, of the gradient; changes: |g' - g|, to that after a step; cosines: of g and g', 0 where one is
    zero.
    """

    step: float
    norms: Tensor
    changes: Tensor
    cosines: Tensor

    @property
    def batches(self) -> int:
        """On how many it stands."""
        return len(self.norms)

    @property
    def ratios(self) -> Tensor:
        """|g' - g| / |g|; NaN where g and g' are zero."""
        return self.changes / self.norms

    def rows(self) -> list[dict[str, float]]:
        """One for each batch."""
        columns = {"norm": self.norms, "change": self.changes, "ratio": self.ratios, "cosine": self.cosines}
        return records({"batch": range(self.batches), **columns})

    def to_markdown(self) -> str:
        figures = {
            "norm of the gradient": self.norms,
            f"norm of its change after a step of {self.step:g}": self.changes,
            "change / norm": self.ratios,
            "cosine to the gradient after the step": self.cosines,
        }
        return _summary(figures)


@dataclass(frozen=True, eq=False)
class MaxDifference:
    """What `max_gradient_difference` found: at each of `distances` the largest absolute change of an element
    of the gradient; float64 [distances], on the CPU."""

    distances: Tensor
    differences: Tensor
    batches: int = 1

    @property
    def average(self) -> float:
        """Over the distances."""
        return self.differences.mean().item()

    @property
    def farthest(self) -> float:
        """At the largest distance."""
        return self.differences[self.distances.argmax()].item()

    def rows(self) -> list[dict[str, float]]:
        """One for each distance."""
        return records({"distance": self.distances, "difference": self.differences})

    def to_markdown(self) -> str:
        rows = [[f"{row['distance']:.4g}", f"{row['difference']:.4g}"] for row in self.rows()]
        rows.append(["average", f"{self.average:.4g}"])
        return table([f"distance, {counted(self.batches)}", "largest change of the gradient"], rows)


@dataclass(frozen=True, eq=False)
class Smoothness:
    """What `gradient_smoothness` found; tensors float64 [batches], on the CPU.

    changes: |g' - g|, of the gradient when noise is added to the inputs; noise_norms: the mean norm of the
    noise of a sample. noise: its standard deviation.
    """

    noise: float
    seed: int
    changes: Tensor
    noise_norms: Tensor

    @property
    def batches(self) -> int:
        """On how many it stands."""
        return len(self.changes)

    @property
    def ratios(self) -> Tensor:
        """Change of the gradient over mean norm of the noise."""
        return self.changes / self.noise_norms

    @property
    def average(self) -> float:
        """Mean of `ratios`; the lower, the smoother."""
        return self.ratios.mean().item()

    def rows(self) -> list[dict[str, float]]:
        """One for each batch."""
        columns = {"change": self.changes, "noise_norm": self.noise_norms, "ratio": self.ratios}
        return records({"batch": range(self.batches), **columns})

    def to_markdown(self) -> str:
        figures = {
            "norm of the change of the gradient": self.changes,
            f"mean norm of the noise, std {self.noise:g}": self.noise_norms,
            "change / noise": self.ratios,
        }
        return _summary(figures)


@dataclass(frozen=True, eq=False)
class GradientHealth:
    """What `gradient_health` found, for P parameters under `names`, each with `sizes` elements; on the CPU.

    below, above: int64 [P], elements of the gradients of all batches whose absolute value is below the
    threshold `vanishing`, and not at most `exploding` (NaN is none). norms: float64 [batches, P], of each
    parameter's gradient.
    """

    vanishing: float
    exploding: float
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    below: Tensor
    above: Tensor
    norms: Tensor

    @property
    def batches(self) -> int:
        """On how many it stands."""
        return len(self.norms)

    @property
    def vanishing_share(self) -> float:
        """Of all elements of all gradients."""
        return self.below.sum().item() / (sum(self.sizes) * self.batches)

    @property
    def exploding_share(self) -> float:
        """Of all elements of all gradients."""
        return self.above.sum().item() / (sum(self.sizes) * self.batches)

    def layer_norms(self) -> dict[str, float]:
        """For each module with parameters, "" for the model itself: the norm of their gradients, mean over
        batches."""
        squares: dict[str, Tensor] = {}
        for name, norms in zip(self.names, self.norms.unbind(1), strict=True):
            layer = name.rpartition(".")[0]
            squares[layer] = squares.get(layer, 0) + norms.square()
        return {layer: total.sqrt().mean().item() for layer, total in squares.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One for each parameter: its name and size, shares, and the mean norm of its gradient."""
        elements = torch.tensor(self.sizes, dtype=torch.float64) * self.batches
        columns = {"parameter": self.names, "size": self.sizes}
        shares = {"vanishing": self.below / elements, "exploding": self.above / elements}
        return records(columns | shares | {"norm": self.norms.mean(0)})

    def to_markdown(self) -> str:
        total = {
            "parameter": "**all**",
            "size": sum(self.sizes),
            "vanishing": self.vanishing_share,
            "exploding": self.exploding_share,
            "norm": self.norms.square().sum(1).sqrt().mean().item(),
        }
        rows = [
            [
                row["parameter"],
                f"{row['size']:,}",
                f"{row['vanishing']:.2%}",
                f"{row['exploding']:.2%}",
                f"{row['norm']:.4g}",
            ]
            for row in [*self.rows(), total]
        ]
        shares = [f"below {self.vanishing:g}", f"above {self.exploding:g}"]
        return table([f"gradients of {counted(self.batches)}", "elements", *shares, "mean norm"], rows)


def gradient_predictiveness(
    model: nn.Module,
    batches: Batches,
    loss: Loss = F.cross_entropy,
    step: float = 0.1,
    limit: int | None = 50,
) -> Predictiveness:
    """How well the gradient tells that after a step along it: for each batch |g(p - step g) - g(p)| with
    g(p), the gradient of the batch's loss at the parameters p. The smaller, the better. Beside it |g|, the
    ratio of the two, and the cosine.

    batches: (inputs, targets), of which at most `limit` are taken (None: all), moved to the model's device;
    loss(model(inputs), targets): one number. The model is left as it was. Raises ValueError without batches
    or parameters that learn, and for a loss of more than one number. Santurkar et al. (2018), section 3.
    """
    with _gradients_of(model, loss) as gradient:
        found = []
        for batch in take(batches, limit):
            batch = on_device(model, batch)
            with same_random_numbers(model):
                before = gradient(batch)
            after = gradient(batch, torch._foreach_sub(gradient.parameters, before, alpha=step))
            norm = _norm(before)
            product = norm * _norm(after)
            cosine = torch.where(product == 0, 0.0, _dot(before, after) / product)
            found.append(torch.stack([norm, _change(before, after), cosine]))
        return Predictiveness(step, *_columns(found))


def max_gradient_difference(
    model: nn.Module,
    batch: Batch,
    loss: Loss = F.cross_entropy,
    distances: Sequence[float] = DISTANCES,
) -> MaxDifference:
    """How far single elements of the gradient change along it: for each distance d the largest
    |g_i(p - d u) - g_i(p)| over all elements i, where u is the gradient g(p) with every parameter's part
    normalised to 1 (and zero where that part is zero).

    batch: (inputs, targets); the rest as in `gradient_predictiveness`. distances: 10 from 0 to 0.5, if not
    given. Raises ValueError without distances. After the effective smoothness of Santurkar et al. (2018),
    section 3, which is another number: the largest l2 norm of the change over the distance.
    """
    distances = [float(distance) for distance in distances]
    if not distances:
        raise ValueError("distances must be at least one number, got none")
    with _gradients_of(model, loss) as gradient:
        batch = on_device(model, batch)
        with same_random_numbers(model):
            before = gradient(batch)
        norms = [torch.linalg.vector_norm(g) for g in before]
        scales = [torch.where(norm > 0, 1 / norm, 0.0) for norm in norms]
        found = []
        for distance in distances:
            with same_random_numbers(model):
                moved = [
                    p - g * (distance * scale)
                    for p, g, scale in zip(gradient.parameters, before, scales, strict=True)
                ]
                after = gradient(batch, moved)
            changes = [torch.linalg.vector_norm(b - a, torch.inf) for a, b in zip(before, after, strict=True)]
            found.append(_together(changes).max().double())
        return MaxDifference(torch.tensor(distances, dtype=torch.float64), torch.stack(found).cpu())


def gradient_smoothness(
    model: nn.Module,
    batches: Batches,
    loss: Loss = F.cross_entropy,
    noise: float = 0.01,
    limit: int | None = 10,
    seed: int = 0,
) -> Smoothness:
    """How far the gradient changes when noise is added to the inputs: for each batch
    |g(x + e) - g(x)| / mean_b |e_b| with the gradient g in the parameters and noise e of independent normal
    numbers of mean 0 and standard deviation `noise`, e_b that of sample b. Where samples do not meet in the
    network, as they do in batch norm, it is at most the largest Lipschitz constant of one sample's gradient.
    e is what was added after rounding to the dtype of the inputs.

    inputs: a floating-point tensor [B, ...]; the noise comes from `seed`, the same on every device. The rest
    as in `gradient_predictiveness`. Raises TypeError for other inputs, ValueError for noise that is not above
    0.
    """
    if not noise > 0:
        raise ValueError(f"noise must be above 0, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    with _gradients_of(model, loss) as gradient:
        found = []
        for batch in take(batches, limit):
            inputs, targets = on_device(model, batch)
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
                raise TypeError(f"inputs must be a floating-point tensor to add noise to, got {kind}")
            noisy = inputs + (noise * torch.randn(inputs.shape, generator=generator)).to(inputs)
            e = (noisy.double() - inputs.double()).reshape(len(inputs), -1)  # of bfloat16 hardly that drawn
            sizes = torch.linalg.vector_norm(e, dim=1)
            with same_random_numbers(model):
                before = gradient((inputs, targets))
            after = gradient((noisy, targets))
            found.append(_together([_change(before, after), sizes.mean()]))
        return Smoothness(noise, seed, *_columns(found))


def gradient_health(
    model: nn.Module,
    batches: Batches,
    loss: Loss = F.cross_entropy,
    vanishing: float = 1e-7,
    exploding: float = 1.0,
    limit: int | None = 10,
) -> GradientHealth:
    """Shares of elements of the gradient that are smaller than `vanishing` and larger than `exploding`, in
    absolute value, for each parameter and in all, over the gradients of all batches; and norms. A parameter
    that the loss does not depend on has the gradient zero. The rest as in `gradient_predictiveness`."""
    with _gradients_of(model, loss) as gradient:
        below, above, norms = [], [], []
        for batch in take(batches, limit):
            sizes = [g.abs() for g in gradient(on_device(model, batch))]
            below.append(_together([(size < vanishing).sum() for size in sizes]))
            above.append(_together([(~(size <= exploding)).sum() for size in sizes]))
            norms.append(_together([torch.linalg.vector_norm(size, dtype=torch.float64) for size in sizes]))
        return GradientHealth(
            vanishing,
            exploding,
            tuple(map(shown, gradient.names)),
            tuple(p.numel() for p in gradient.parameters),
            torch.stack(below).sum(0).cpu(),
            torch.stack(above).sum(0).cpu(),
            torch.stack(norms).cpu(),
        )


class _Pass(nn.Module):
    """Forward and backward in one: activation checkpoints, which run parts of the model again in the
    backward, then meet the parameters of the forward."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.losses = (loss,)  # a module of its own it may be, but no part of the model

    def forward(self, batch: Batch, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        value = evaluate(self.model, self.losses[0], batch)
        return torch.autograd.grad(value, parameters, materialize_grads=True)


class _Gradients:
    """gradient(batch, parameters): the gradient at those parameters, by default the model's own, with copies
    of its buffers."""

    def __init__(self, model: nn.Module, loss: Loss):
        learned = learned_parameters(model)
        self.names = tuple(learned)
        self.parameters = [p.detach() for p in learned.values()]
        self.model, self.run = model, _Pass(model, loss)

    def __call__(self, batch: Batch, parameters: Sequence[Tensor] | None = None) -> list[Tensor]:
        given = self.parameters if parameters is None else parameters
        leaves = [p.detach().requires_grad_() for p in given]
        state = dict(zip(self.names, leaves, strict=True))
        state |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        state = {f"model.{name}": tensor for name, tensor in state.items()}
        try:
            return list(torch.func.functional_call(self.run, state, (batch, leaves)))
        finally:
            torch.clear_autocast_cache()  # would keep these leaves in half precision as long as it is on


@contextmanager
def _gradients_of(model: nn.Module, loss: Loss) -> Iterator[_Gradients]:
    """Within it the model is `preserved` and runs without being compiled."""
    with preserved(model), eagerly(model):
        for module in model.modules():
            if isinstance(module, LinearGenerator):
                module.factored = False  # gradients of their weights are made, as of any other
        yield _Gradients(model, loss)


def _together(numbers: Sequence[Tensor]) -> Tensor:
    """As one tensor, on the device of the first: parameters may be on several."""
    return torch.stack([n.to(numbers[0].device) for n in numbers])


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of all as one vector, in float64; one tensor of an iterator is there at a time."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(_together(norms))


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    return _norm(b - a for a, b in zip(before, after, strict=True))


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    products = [torch.dot(a.reshape(-1), b.reshape(-1)).double() for a, b in zip(first, second, strict=True)]
    return _together(products).sum()


def _columns(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.stack(list(rows)).double().cpu().unbind(1)


def _summary(figures: dict[str, Tensor]) -> str:
    """Mean, standard deviation (population) and extremes over the batches."""
    batches = len(next(iter(figures.values())))
    rows = [
        [name, *(f"{v.item():.4g}" for v in (x.mean(), x.std(correction=0), x.min(), x.max()))]
        for name, x in figures.items()
    ]
    return table([counted(batches), "mean", "std", "min", "max"], rows)
