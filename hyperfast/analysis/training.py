"""Short trainings that tell how a model takes learning rates, and leave it as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hyperfast.analysis.batches import Batches, Loss, evaluate, learned_parameters, on_device, take
from hyperfast.analysis.preserve import preserved
from hyperfast.analysis.table import counted, records, table

DIVERGED = 4.0  # times the lowest smoothed loss

MakeOptimizer = Callable[[list[Tensor], float], Optimizer]


@dataclass(frozen=True, eq=False)
class LRRange:
    """Losses of a training whose learning rate grows with every step.

    rates, losses, smoothed float64 [steps]: losses[i] is that of a batch before its step with rates[i], which
    shows in losses[i + 1]; inf where it was not finite. lowest: the rate at which the smoothed loss is
    lowest. diverged: the rate at which training stopped since it diverged, None where it did not.

    suggestion: the rate of steepest descent, None where the loss nowhere falls. Up to the lowest smoothed
    loss, the slope is that of an average to both sides, with weights (1 - smoothing)^distance, over the
    logarithm of the rate, by central differences: `smoothed`, which looks back only, lags by about
    1 / smoothing steps and at first follows single batches.
    """

    rates: Tensor
    losses: Tensor
    smoothed: Tensor
    suggestion: float | None
    lowest: float
    diverged: float | None

    @property
    def batches(self) -> int:
        """One for each step."""
        return len(self.rates)

    def rows(self) -> list[dict[str, float]]:
        """For each step: step, rate, loss, smoothed."""
        columns = {"rate": self.rates, "loss": self.losses, "smoothed": self.smoothed}
        return records({"step": range(self.batches), **columns})

    def to_markdown(self) -> str:
        """The rates that it found, in a table."""

        def shown(rate: float | None) -> str:
            return "none" if rate is None else f"{rate:.3g}"

        tested = f"{self.rates[0]:.3g} to {self.rates[-1]:.3g} in {self.batches} steps"
        rows = [
            ["suggestion: steepest descent", shown(self.suggestion)],
            ["lowest smoothed loss", shown(self.lowest)],
            ["training diverged at", shown(self.diverged)],
            ["rates tested, one batch each", tested],
        ]
        return table(["", "learning rate"], rows)


def lr_range_test(
    model: nn.Module,
    batches: Batches,
    optimizer: MakeOptimizer = torch.optim.SGD,
    loss: Loss = F.cross_entropy,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.05,
) -> LRRange:
    """Trains `model` for `steps` with a learning rate that grows geometrically from `low` to `high`: Smith,
    "Cyclical learning rates for training neural networks" (2017), section 3.3.

    batches: (inputs, targets), one a step; they begin again where they end. optimizer(parameters, lr) makes
    one for the rate `low`; every group's rate then grows by the same factor. One of `hyperfast.optim` takes
    the model: `lambda _, lr: hyperfast.optim.AdamW(model, lr=lr)`. loss(output, target): a scalar. smoothing:
    weight of the newest loss in the running average, which is corrected for its start; 1 smooths nothing.

    Stops at a loss that is not finite, and where the smoothed loss is above both 4 times its lowest and the
    first loss. Trains in training mode, dropout included, whatever mode its modules are in; the model is the
    same afterwards (`preserved`). Raises ValueError for no batches, a loss of more than one number, nothing
    to learn, fewer than 2 steps, rates that do not grow from above 0, and a smoothing outside (0, 1].
    """
    if steps < 2 or not 0 < low < high or not 0 < smoothing <= 1:
        got = f"got steps {steps}, low {low}, high {high}, smoothing {smoothing}"
        raise ValueError(f"steps must be at least 2, 0 < low < high, 0 < smoothing <= 1, {got}")
    rates = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64).tolist()
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, None
    with preserved(model):
        for value in _train(model, batches, optimizer, loss, rates):
            average = (1 - smoothing) * average + smoothing * value
            losses.append(value)
            smoothed.append(average / (1 - (1 - smoothing) ** len(losses)))
            best = min(smoothed)
            if value == math.inf or smoothed[-1] > max(best + (DIVERGED - 1) * abs(best), smoothed[0]):
                diverged = rates[len(losses) - 1]
                break
    used = rates[: len(losses)]
    lowest = used[smoothed.index(min(smoothed))]
    columns = (torch.tensor(column, dtype=torch.float64) for column in (used, losses, smoothed))
    return LRRange(*columns, _steepest(used, losses[: 1 + used.index(lowest)], smoothing), lowest, diverged)


def _steepest(rates: Sequence[float], losses: Sequence[float], smoothing: float) -> float | None:
    """`LRRange.suggestion`; the rates are at equal distances in the logarithm."""
    if len(losses) < 3:
        return None
    step = torch.arange(len(losses), dtype=torch.float64)
    weights = (1 - smoothing) ** (step - step.unsqueeze(1)).abs()
    average = weights @ torch.tensor(losses, dtype=torch.float64) / weights.sum(1)
    slope, place = (average[2:] - average[:-2]).min(0)
    return rates[1 + int(place)] if slope < 0 else None


@dataclass(frozen=True, eq=False)
class LossLandscape:
    """Losses of trainings from one start, on the same batches, with a learning rate each.

    losses float64 [rates, steps]: losses[r, i] is that of batch i before its step with rates[r]; inf from
    where a training has diverged, which then stopped. The band at a step goes from the lowest to the highest
    of those that are finite, as a picture shows it: where trainings diverged it is that of the others, and
    NaN where all have. Its mean `width` is inf then.
    """

    rates: tuple[float, ...]
    losses: Tensor

    @property
    def batches(self) -> int:
        """One for each step."""
        return self.losses.shape[1]

    @property
    def diverged(self) -> dict[float, int]:
        """The step of the first loss that is not finite, by rate, where there is one."""
        steps = self.losses.isfinite().sum(1).tolist()
        return {rate: step for rate, step in zip(self.rates, steps, strict=True) if step < self.batches}

    def band(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest finite loss at each step, float64 [steps]."""
        finite = self.losses.isfinite()
        low = self.losses.amin(0)
        high = self.losses.masked_fill(~finite, -math.inf).amax(0)
        none = ~finite.any(0)
        return low.masked_fill(none, math.nan), high.masked_fill(none, math.nan)

    @property
    def width(self) -> float:
        """Mean over the steps of highest less lowest loss; inf where a training diverged."""
        low, high = self.band()
        return math.inf if self.diverged else (high - low).mean().item()

    def rows(self) -> list[dict[str, float]]:
        """For each step: step, loss_RATE for each rate, low and high of the band."""
        losses = {f"loss_{rate:g}": own for rate, own in zip(self.rates, self.losses, strict=True)}
        low, high = self.band()
        return records({"step": range(self.batches)} | losses | {"low": low, "high": high})

    def to_markdown(self) -> str:
        """A table of the trainings, and the band in a sentence."""
        diverged = self.diverged
        rows = []
        for rate, losses in zip(self.rates, self.losses, strict=True):
            figures = (losses[0], losses.min(), losses[-1])
            rows.append([f"{rate:g}", *(f"{x:.4g}" for x in figures), diverged.get(rate, "")])
        header = ["learning rate", "first loss", "lowest", f"at step {self.batches - 1}", "diverged at step"]
        text = f"Band of the losses over {len(self.rates)} learning rates: mean width {self.width:.4g} over "
        text += f"{counted(self.batches)}, one a step."
        return f"{table(header, rows)}\n\n{text}"


def loss_landscape(
    model: nn.Module,
    batches: Batches,
    rates: Sequence[float] = (0.001, 0.005, 0.01, 0.05),
    optimizer: MakeOptimizer = torch.optim.SGD,
    loss: Loss = F.cross_entropy,
    steps: int = 100,
) -> LossLandscape:
    """Trains `model` once for each of `rates`, from the same start, with the same random numbers and on the
    same batches in the same order: how far apart the losses go says how much the choice of a step size
    matters, after Santurkar, Tsipras, Ilyas and Madry, "How does batch normalization help optimization?"
    (2018).

    batches: (inputs, targets), one a step; they begin again where they end, and `steps` of them are held in
    memory until all trainings are done, as they came and not copied: what gives them must not write into
    them later. optimizer(parameters, lr) makes one for each rate, as in `lr_range_test`. loss(output,
    target): a scalar. A training stops at a loss that is not finite. Trains in training mode, dropout
    included, whatever mode its modules are in; the model is the same afterwards (`preserved`). Raises
    ValueError for no batches, a loss of more than one number, nothing to learn, no rates, equal rates, and
    fewer than 1 steps.
    """
    rates = tuple(map(float, rates))
    if not rates or len(set(rates)) < len(rates) or steps < 1:
        raise ValueError(f"rates must be given and different, steps at least 1, got {rates}, {steps}")
    with preserved(model):  # loaders draw random numbers
        held = list(take(batches, steps, repeat=True))
    losses = []
    for rate in rates:
        with preserved(model):
            own = list(_train(model, held, optimizer, loss, [rate] * len(held)))
        losses.append(own + [math.inf] * (len(held) - len(own)))
    return LossLandscape(rates, torch.tensor(losses, dtype=torch.float64))


def _train(
    model: nn.Module, batches: Batches, optimizer: MakeOptimizer, loss: Loss, rates: Sequence[float]
) -> Iterator[float]:
    """The loss of every step before it is made, as many as rates and batches allow, in training mode; after
    one that is not finite, which comes as inf, no more. Changes the model."""
    model.train()
    stepping = optimizer(list(learned_parameters(model).values()), rates[0])
    first = [group["lr"] for group in stepping.param_groups]
    for rate, batch in zip(rates, take(batches, len(rates), repeat=True), strict=False):
        for group, lr in zip(stepping.param_groups, first, strict=True):
            group["lr"] = lr * (rate / rates[0])
        stepping.zero_grad()
        value = evaluate(model, loss, on_device(model, batch))
        number = value.item()
        if not math.isfinite(number):
            yield math.inf
            return
        value.backward()
        stepping.step()
        yield number
