"""The next character of a text as a task of the loop."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.checkpoint import CheckpointError
from train.loop import derive_seed
from train.ranks import ALONE, Ranks
from train.task import Forward, Metric, Task
from train.text import IGNORED, Text, Vocabulary, evaluation_streams, streams

BPC = Metric("bpc", "bits per character", "", 3, 1 / math.log(2), larger_is_better=False, of_loss=True)
EVAL_BATCH = 64  # passages of a part, whatever the training's batch size


class TextData(Task):
    """Truncated backpropagation through time: a step is B passages of T = length characters, each the
    continuation of the one in its row of the step before, whose last state is where it begins.

    An epoch begins with a state of zeros, and at another place of the text's beginning, so that its last
    characters, which fill no step, are not the same ones each time. A score is a sum of losses in nats.
    """

    metric = BPC
    unit = "characters"

    def __init__(self, text: Text, length: int):
        self.text, self.length = text, length
        self.parts = ("validation",) if text.test is None else ("validation", "test")
        self._state: tuple[Tensor, ...] | None = None  # its memory is that of all steps

    def to(self, device: torch.device) -> TextData:
        tokens = {part: getattr(self.text, part).to(device) for part in ("train", *self.parts)}
        return TextData(dataclasses.replace(self.text, **tokens), self.length)

    def steps(self, batch_size: int) -> int:
        return len(streams(self.text.train, batch_size, self.length))

    def count(self, batch_size: int) -> int:
        return batch_size * self.length

    def batches(
        self, epoch: int, seed: int, batch_size: int, ranks: Ranks = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        tokens, own = self.text.train, ranks.share(batch_size)
        places = streams(tokens, batch_size, self.length).unused + 1
        for kept in self._state or ():
            kept.zero_()
        rows = streams(tokens, batch_size, self.length, derive_seed(seed, epoch, "order") % places)
        return ((x[own], y[own]) for x, y in rows)

    def loss(self, forward: Forward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy. The state goes in as a copy: backward needs it when the next one is in its place."""
        state = None if self._state is None else tuple(s.clone() for s in self._state)
        logits, after = forward(x, state)
        if self._state is None:
            self._state = tuple(s.detach().clone() for s in after)
        for kept, new in zip(self._state, after, strict=True):
            kept.copy_(new.detach())
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        return loss, loss.detach() * y.numel()

    def evaluate(
        self,
        forward: Forward,
        part: str,
        limit: int | None,
        check: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> tuple[float, float]:
        """Every character but a part's first, which nothing goes before, is predicted once, from all that is
        before it in its passage, T characters at least (`evaluation_streams`)."""
        state, loss, seen = None, 0.0, 0
        for x, y in self._evaluation(part, limit):
            check()
            own = ranks.share(len(x))
            if not len(x[own]):
                continue
            logits, state = forward(x[own], state)
            y = y[own].flatten()
            nats = F.cross_entropy(logits.float().flatten(0, 1), y, ignore_index=IGNORED, reduction="sum")
            loss = loss + nats.double()
            seen = seen + (y != IGNORED).sum()
        loss, seen = ranks.total(loss, seen)
        return float(loss) / int(seen), self.metric.mean(float(loss), int(seen))

    def targets(self, part: str, limit: int | None) -> int:
        """How many characters `evaluate` predicts."""
        return sum(int((y != IGNORED).sum()) for _, y in self._evaluation(part, limit))

    def _evaluation(self, part: str, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        tokens = getattr(self.text, part)
        return itertools.islice(evaluation_streams(tokens, EVAL_BATCH, self.length), limit)

    @property
    def checksum(self) -> int:
        """Of the tokens of all parts, one after the other: it tells another text, not another split."""
        checksum = 0
        for part in ("train", *self.parts):
            checksum = zlib.crc32(getattr(self.text, part).cpu().numpy().tobytes(), checksum)
        return checksum

    def keep(self) -> dict[str, Any]:
        return {"vocabulary": self.text.vocabulary.to_list()}


def vocabulary_of(state: dict[str, Any], path: Path) -> Vocabulary:
    """That of the checkpoint `state` from `path`. Raises CheckpointError where it has none."""
    try:
        return Vocabulary(state["vocabulary"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint of a character language model: {error}") from error
