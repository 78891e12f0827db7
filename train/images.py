"""Classification of images as a task of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data import batches
from train.loop import derive_seed
from train.task import ACCURACY, Forward, Metric, RunError, Task

EVAL_BATCH = 256
# Images augmented at once on a GPU. The published augmentation moves about 1 MB for each, by count, so 70 MB
# for a batch of 64, where the generators of `full` alone move 2240 MB in a step; crop and flip are 0.3 MB.
CHUNK = 4096


@dataclass
class ImageData(Task):
    """uint8 images [n, C, H, W] and int64 labels [n] of the three parts, and what turns images into input.

    at_once: images augmented together, at least a batch: one on the CPU, where it stays in the cache.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor]  # uint8 [B, C, H, W] -> float32, training
    normalize: Callable[[Tensor], Tensor]  # the same without chance, evaluation
    at_once: int = 1

    metric: ClassVar[Metric] = ACCURACY
    unit: ClassVar[str] = "images"
    steps_see: ClassVar[str] = "batches as trained on (augmented where the recipe says so)"
    may_generate: ClassVar[bool] = True

    def to(self, device: torch.device) -> ImageData:
        parts = [(x.to(device), y.to(device)) for x, y in (self.train, self.validation, self.test)]
        return ImageData(*parts, self.augment, self.normalize, 1 if device.type == "cpu" else CHUNK)

    def steps(self, batch_size: int) -> int:
        n = len(self.train[1])
        if batch_size > n:
            raise RunError(f"batch size {batch_size} is larger than the {n} training images")
        return n // batch_size

    def count(self, batch_size: int) -> int:
        return batch_size

    def batches(self, epoch: int, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented; a partial last one is dropped."""
        images, labels = self.train
        order = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
        chance = torch.Generator(images.device).manual_seed(derive_seed(seed, epoch, "augment"))
        chunk = batch_size * max(1, self.at_once // batch_size)
        for x, y in batches(images, labels, chunk, shuffle=order, drop_last=False):
            whole = len(y) // batch_size * batch_size
            if whole:
                x = _layout(self.augment(x[:whole], chance))
                yield from zip(x.split(batch_size), y[:whole].split(batch_size), strict=True)

    def loss(self, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correct answers."""
        logits = forward(x)
        return F.cross_entropy(logits.float(), y), (logits.detach().argmax(1) == y).sum()

    def evaluate(
        self, forward: Forward, part: str, limit: int | None, check: Callable[[], None]
    ) -> tuple[float, float]:
        images, labels = getattr(self, part)
        loss, correct, seen = 0.0, 0, 0
        for i, (x, y) in enumerate(batches(images, labels, EVAL_BATCH, shuffle=None, drop_last=False)):
            if i == limit:
                break
            check()
            logits = forward(_layout(self.normalize(x))).float()
            loss = loss + F.cross_entropy(logits, y, reduction="sum")
            correct = correct + (logits.argmax(1) == y).sum()
            seen += len(y)
        return float(loss) / seen, self.metric.mean(int(correct), seen)


def _layout(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)
