"""Sharded generators: every rank owns some rows of each generator, with the states of its optimizer.

The forward gathers w, N numbers of N K; the backward gives every rank the mean of dw over ranks, of its own
rows. Nobody but its owner reads or updates a row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperfast.distributed.collectives import all_gather
from hyperfast.distributed.rows import RowShard
from hyperfast.nn.generator import LinearGenerator, factored_, generators, ignored_by_ddp


def shard_(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Leaves each rank its own rows of weight [N, K] and bias [N] of every linear generator in `model`, heads
    of shared cores included, in place; returns `model`.

    The parameters stay the same objects, now [n, K] and [n], n about N / ranks (`generator.shard`), without
    gradients: make the optimizer, one of `hyperfast.optim`, before its first step or after. Switches factored
    mode on. Embeddings, cores and generators smaller than what they make (two-layer, chunked) stay whole on
    every rank, for DDP like the main network. All ranks must call it, with equal values, before the model is
    wrapped in DDP; `hyperfast.distributed.data_parallel(model, shard_generators=True)` does it all. Raises
    ValueError for a model that is sharded already and what factored mode refuses.
    """
    linear = _linear_generators(model)
    if any(g.shard is not None for g in linear):
        raise ValueError(
            "the model is sharded already: hyperfast.distributed.unshard_(model) is the way back"
        )
    factored_(model)
    sharded = set()
    for g in linear:
        g.drop_next_weights()
        g.shard = RowShard.of(g.shapes[0].numel(), group)
        for p in g.sharded_parameters():
            if id(p) not in sharded:  # generators may share it
                sharded.add(id(p))
                _replace(p, p.detach()[g.shard.own].clone())
    ignored_by_ddp(model)
    return model


def unshard_(model: nn.Module) -> nn.Module:
    """The way back from `shard_`: every rank gets all rows of every generator, in place, without gradients;
    returns `model`, still in factored mode. All ranks must call it. States of an optimizer stay sharded: save
    and load them (`hyperfast.distributed.save`)."""
    whole = set()
    for g in _linear_generators(model):
        if g.shard is None:
            continue
        for p in g.sharded_parameters():
            if id(p) not in whole:
                whole.add(id(p))
                _replace(p, gather_rows(p.detach(), g.shard))
        g.drop_next_weights()
        g.shard = None
    ignored_by_ddp(model)
    return model


def gather_rows(own: Tensor, shard: RowShard) -> Tensor:
    """[rows, ...] of which `own` [n, ...] are this rank's. All ranks must call it."""
    whole = all_gather(_padded(own, shard), shard.group).flatten(0, 1)
    return whole if len(whole) == shard.rows else whole[: shard.rows].clone()


def _padded(own: Tensor, shard: RowShard) -> Tensor:
    """own [n, ...] as [chunk, ...]."""
    if len(own) == shard.chunk:
        return own
    padded = own.new_zeros(shard.chunk, *own.shape[1:])
    padded[: len(own)] = own
    return padded


def _replace(p: nn.Parameter, data: Tensor) -> None:
    p.grad = None
    p.data = data


def _linear_generators(model: nn.Module) -> list[LinearGenerator]:
    return [g for _, g in generators(model) if isinstance(g, LinearGenerator)]
