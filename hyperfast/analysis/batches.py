"""What analyses take: batches (inputs, targets), a loss, a model that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hyperfast.factored import is_stand_in

Batch = tuple[Any, Any]
Batches = Iterable[Batch]
Loss = Callable[[Any, Any], Tensor]


def take(batches: Batches, limit: int | None, repeat: bool = False) -> Iterator[Batch]:
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


def on_device(model: nn.Module, batch: Batch) -> Batch:
    """(inputs, targets), nested ones too, on the device of the model's first parameter or buffer, and fit for
    a backward wherever they were made. Raises ValueError for what is no such pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"a batch must be a pair (inputs, targets), a single one [(inputs, targets)], got {got}"
        )
    tensors = chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))

    def moved(t: Tensor) -> Tensor:
        t = t.detach().to(device, non_blocking=device.type != "cpu")  # the CPU would read before it is there
        return t.clone() if t.is_inference() else t

    inputs, targets = batch
    return tree_map_only(Tensor, moved, (inputs, targets))


def evaluate(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    """loss(model(inputs), targets), a scalar. Raises ValueError for a loss that is not one number."""
    inputs, targets = batch
    value = loss(model(inputs), targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss(output, target) must be a tensor of one number, got {got}")
    return value.reshape(())


def learned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name. Raises ValueError where there is none."""
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad and not is_stand_in(p)}
    if not learned:
        raise ValueError("model must have a parameter that requires a gradient, it has none")
    return learned


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch
