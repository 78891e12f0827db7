"""Classification of images as a task of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import batches
from train.loop import derive_seed
from train.ranks import ALONE, Ranks
from train.task import ACCURACY, Forward, Metric, RunError, Task

EVAL_BATCH = 256
# Images augmented at once on a GPU. The published augmentation moves about 1 MB for each, by count, so 70 MB
# for a batch of 64, where the generators of `full` alone move 2240 MB in a step; crop and flip are 0.3 MB.
CHUNK = 4096
# images float [n, C, H, W], labels [n], images of a batch, generator -> images and targets float [n, classes]
Mix = Callable[[Tensor, Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class ImageData(Task):
    """uint8 images [n, C, H, W] and int64 labels [n] of the three parts, and what turns images into input.

    at_once: images augmented together, at least a batch: one on the CPU, where it stays in the cache.
    criterion: mean loss of a training step, of what the network gives and the target (`train.losses`); the
    cross-entropy is what evaluation reports whatever it is. mix: makes every training batch one of mixed
    images and soft targets.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    augment: Callable[[Tensor, torch.Generator], Tensor]  # uint8 [B, C, H, W] -> float32, training
    normalize: Callable[[Tensor], Tensor]  # the same without chance, evaluation
    at_once: int = 1
    criterion: nn.Module = nn.CrossEntropyLoss()
    mix: Mix | None = None

    metric: ClassVar[Metric] = ACCURACY
    unit: ClassVar[str] = "images"
    may_generate: ClassVar[bool] = True

    @property
    def steps_see(self) -> str:
        if self.mix is not None:
            text = "batches as trained on (augmented and mixed; right is the class with the larger share)"
        else:
            text = "batches as trained on (augmented where the recipe says so)"
        if not isinstance(self.criterion, nn.CrossEntropyLoss) or self.criterion.label_smoothing:
            text += ", the recipe's loss instead of the cross-entropy"
        return text

    def to(self, device: torch.device) -> ImageData:
        names = ("train", "validation", "test")
        parts = {name: tuple(t.to(device) for t in getattr(self, name)) for name in names}
        return replace(self, **parts, at_once=1 if device.type == "cpu" else CHUNK)

    def steps(self, batch_size: int) -> int:
        n = len(self.train[1])
        if batch_size > n:
            raise RunError(f"batch size {batch_size} is larger than the {n} training images")
        return n // batch_size

    def count(self, batch_size: int) -> int:
        return batch_size

    def batches(
        self, epoch: int, seed: int, batch_size: int, ranks: Ranks = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented, mixed; a partial last one is dropped."""
        images, labels = self.train
        own = ranks.own_batch(batch_size)
        order = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
        chance = torch.Generator(images.device).manual_seed(derive_seed(seed, epoch, "augment", ranks.rank))
        chunk = batch_size * max(1, self.at_once // own)
        for x, y in batches(images, labels, chunk, shuffle=order, drop_last=False):
            whole = len(y) // batch_size * batch_size
            if whole:
                x, y = (ranks.own_rows(t[:whole], batch_size) for t in (x, y))
                x = self.augment(x, chance)
                if self.mix is not None:
                    x, y = self.mix(x, y, own, chance)
                yield from zip(_layout(x).split(own), y.split(own), strict=True)

    def loss(self, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The criterion and correct answers: those of the class with the largest share of the target, where
        images are mixed. The logits come first where the network gives more for the criterion."""
        output = forward(x)
        logits, *more = output if isinstance(output, tuple) else (output,)
        labels = y if y.ndim == 1 else y.argmax(1)
        loss = self.criterion((logits.float(), *more) if more else logits.float(), y)
        return loss, (logits.detach().argmax(1) == labels).sum()

    def evaluate(
        self,
        forward: Forward,
        part: str,
        limit: int | None,
        check: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> tuple[float, float]:
        images, labels = (t if limit is None else t[: limit * EVAL_BATCH] for t in getattr(self, part))
        loss, correct, seen = 0.0, 0, 0
        for x, y in batches(images, labels, EVAL_BATCH * ranks.count, shuffle=None, drop_last=False):
            check()
            own = ranks.share(len(y))
            x, y = x[own], y[own]
            logits = forward(_layout(self.normalize(x))).float()
            loss = loss + F.cross_entropy(logits, y, reduction="sum")
            correct = correct + (logits.argmax(1) == y).sum()
            seen += len(y)
        loss, correct, seen = ranks.total(loss, correct, seen)
        return float(loss) / seen, self.metric.mean(int(correct), seen)


def _layout(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)
