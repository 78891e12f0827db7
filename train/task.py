"""What a command gives the loop (`train.loop`) beside the network: data, loss, and the figure that counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.ranks import Ranks

Row = dict[str, Any]  # one epoch: plain ints and floats by column name; times in seconds
Forward = Callable[..., Any]  # the network in the run's precision


class RunError(ValueError):
    """The run cannot start or go on: one line for the user."""


@dataclass(frozen=True)
class Metric:
    """The figure that says how good a network is and chooses the best epoch: `scale` times a mean score.

    name: of its columns, as in validation_accuracy. words, unit, digits: how it is called and written.
    of_loss: it is the loss in another unit and has no curve beside that one.
    """

    name: str
    words: str
    unit: str
    digits: int
    scale: float
    larger_is_better: bool = True
    of_loss: bool = False

    def mean(self, score: float, count: int) -> float:
        """The figure of `count` images or characters with this sum of scores."""
        return self.scale * score / count

    def better(self, a: float, b: float) -> bool:
        return a > b if self.larger_is_better else a < b

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f} {self.unit}".rstrip()

    def of(self, row: Row, part: str) -> float:
        """The figure of "train", "validation" or "test" after an epoch."""
        return row[f"{part}_{self.name}"]

    def cell(self, row: Row, part: str) -> str:
        """The same as text, empty where there is no such part."""
        return self.text(self.of(row, part)) if f"{part}_{self.name}" in row else ""

    @property
    def axis(self) -> str:
        return f"{self.words} ({self.unit})" if self.unit else self.words


ACCURACY = Metric("accuracy", "accuracy", "%", 2, 100)


class Task(ABC):
    """What is learned from which data.

    metric: what counts. unit: what a step goes through, as in images_per_second. parts: evaluated after every
    epoch; "validation", the first, chooses the best one, the last is what the run reports. steps_see: what
    the figures of a step are measured on, in words. may_generate: whether its networks may have generated
    layers, so that reports tell generated parameters from others and give the dtype of the fused states.
    """

    metric: Metric
    unit: str
    parts: tuple[str, ...] = ("validation", "test")
    steps_see: str = "batches as trained on"
    may_generate: bool = False

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same with its data on `device`."""

    @abstractmethod
    def steps(self, batch_size: int) -> int:
        """Of an epoch. Raises RunError or DataError where there are none."""

    @abstractmethod
    def count(self, batch_size: int) -> int:
        """Images or characters of a step."""

    @abstractmethod
    def batches(
        self, epoch: int, seed: int, batch_size: int, ranks: Ranks
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Input and target of the steps of an epoch, all of one shape, by `seed` and `epoch` alone: this
        rank's rows of batches that do not depend on how many ranks there are. What is carried from step to
        step begins anew, in the same memory."""

    @abstractmethod
    def loss(self, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a step and its sum of scores, both on the device, which is not waited for. It may be
        part of a CUDA graph: what it keeps for the next step it writes into the memory where it found it."""

    @abstractmethod
    def evaluate(
        self, forward: Forward, part: str, limit: int | None, check: Callable[[], None], ranks: Ranks
    ) -> tuple[float, float]:
        """Mean loss and figure of a part, or of its first `limit` batches; each rank takes its share, in the
        same number of forwards, and all get the same figures. check: called before each."""

    def keep(self) -> dict[str, Any]:
        """What checkpoints must hold for the network to be used later, plain values by name."""
        return {}
