"""Batches (inputs, targets) for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def take(batches: Iterable[Any], limit: int | None, repeat: bool = False) -> Iterator[Any]:
    """The first `limit` of `batches`, all for None. repeat: they begin again where they end, if they can be
    gone through again, as a list or a DataLoader. Raises ValueError for a limit below 1 and for no batches.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    empty = True
    for batch in islice(_again(batches) if repeat else batches, limit):
        empty = False
        yield batch
    if empty:
        raise ValueError("batches must have at least one batch, got none")


def on_device(model: nn.Module, batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """(inputs, targets), nested ones too, on the device of the model's first parameter or buffer, and fit for
    a backward wherever they were made."""
    tensors = chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))

    def moved(t: Tensor) -> Tensor:
        t = t.detach().to(device, non_blocking=True)
        return t.clone() if t.is_inference() else t

    inputs, targets = batch
    return tree_map_only(Tensor, moved, (inputs, targets))


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch
