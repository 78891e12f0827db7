"""Sharded generators: every rank owns some rows of each generator, with the states of its optimizer.

The forward gathers w, N numbers of N K; the backward gives every rank the mean of dw over ranks, of its own
rows. Nobody but its owner reads or updates a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperfast import ops
from hyperfast.distributed.collectives import all_gather
from hyperfast.distributed.exchange import exchanged
from hyperfast.distributed.rows import RowShard
from hyperfast.nn.generator import (
    LinearGenerator,
    factored_,
    generate_together,
    generators,
    ignored_by_ddp,
    linear_generators,
)
from hyperfast.ops._library import autocast_dtype, has_tangent, is_transformed, no_autocast
from hyperfast.ops.next_weights import is_current, record

ALONE = 2**20  # bytes of a w that is gathered into its place; smaller ones share a message and are copied


def shard_(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Leaves each rank its own rows of weight [N, K] and bias [N] of every linear generator in `model`, heads
    of shared cores included, in place; returns `model`.

    The parameters stay the same objects, now [n, K] and [n], n about N / ranks (`generator.shard`), without
    gradients; an optimizer, one of `hyperfast.optim`, must not have stepped them before. Switches factored
    mode on. Embeddings, cores and generators smaller than what they make (two-layer, chunked) stay whole on
    every rank, for DDP like the main network. All ranks must call it, with equal values, before the model is
    wrapped in DDP over the same ranks; `hyperfast.distributed.data_parallel(model, shard_generators=True)`
    does it all, and gives DDP a communicator of its own.

    From then on a forward after a change of parameters is collective, and so is every backward: all ranks
    generate and use the same layers in the same order. Within `ddp.no_sync()` nothing but a first gather is
    sent; `zero_grad(set_to_none=True)` alone may touch gradients before the backward that sends. Refused are
    create_graph=True and torch.func; torch.compile has a graph break where weights are generated. Raises
    ValueError for a model that is sharded already, a rank that is not in the group, and what factored mode
    refuses.
    """
    linear = linear_generators(model)
    if any(g.shard is not None for g in linear):
        raise ValueError(
            "the model is sharded already: hyperfast.distributed.unshard_(model) is the way back"
        )
    for g in linear:
        if type(g).forward is not LinearGenerator.forward:
            raise ValueError(f"a {type(g).__name__} has a forward of its own, which would miss rows")
    shards = [RowShard.of(g.shapes[0].numel(), group) for g in linear]
    factored_(model)
    sharded = set()
    for g, shard in zip(linear, shards, strict=True):
        g.set_shard(shard, generate)
        for p in g.sharded_parameters():
            if id(p) not in sharded:  # generators may share it
                sharded.add(id(p))
                _replace(p, p.detach()[shard.own].clone())
    ignored_by_ddp(model)
    return model


def unshard_(model: nn.Module) -> nn.Module:
    """The way back from `shard_`: every rank gets all rows of every generator, in place, without gradients;
    returns `model`, still in factored mode. All ranks must call it. States of an optimizer stay sharded: save
    and load them (`hyperfast.distributed.save`)."""
    whole = set()
    for g in linear_generators(model):
        if g.shard is None:
            continue
        for p in g.sharded_parameters():
            if id(p) not in whole:
                whole.add(id(p))
                _replace(p, gather_rows(p.detach(), g.shard))
        g.set_shard(None, None)
    ignored_by_ddp(model)
    return model


@torch.no_grad()
def gather_weights(model: nn.Module) -> None:
    """Gathers the weights that the sharded generators of `model` make now, unless they are at hand, in
    autocast's dtype under autocast: a forward that follows, until something is updated, sends nothing, so
    that a rank may run it alone. All ranks must call it."""
    makers = (g for _, g in generators(model) if isinstance(g.z, nn.Parameter))  # not the heads of a core
    generate_together(g for g in makers if any(part.shard is not None for _, part in generators(g)))


@torch.compiler.disable  # a graph break: whether to gather depends on what changed since the last time
def generate(batch: Sequence[LinearGenerator]) -> list[Tensor]:
    """The weights of sharded generators of one kind, device and process group, in the shapes of their layers.

    What the ranks gathered is kept, and used again until weight, bias or z change; the results are views of
    it. Raises ValueError within a transform of torch.func and for parameters that are not the rank's rows,
    RuntimeError where the process group, or the rank in it, is not the one the generators were sharded for,
    or DDP is over other ranks.
    """
    whole, dtype = _whole(batch), autocast_dtype(batch[0].weight)
    trained = [t for g in batch for t in (g.gradient_bias, g.z)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        return exchanged(batch, whole, dtype, _sends(batch[0]))
    return [w.to(dtype or w.dtype).view(g.shapes[0]) for g, w in zip(batch, whole, strict=True)]


class Gathered:
    """w [N] of a sharded generator, as all ranks have it. sends: whether the backward of the last forward
    sends its gradient."""

    def __init__(self, w: Tensor, g: LinearGenerator):
        self.w, self.version, self.sends = w, w._version, True
        record(w, *g.made_from())

    def is_current(self, g: LinearGenerator, dtype: torch.dtype) -> bool:
        """Whether `g` makes it now, and it serves where `dtype` is wanted."""
        untouched = self.w._version == self.version and self.w.dtype in (dtype, g.weight.dtype)
        return untouched and is_current(self.w, *g.made_from())


def _whole(batch: Sequence[LinearGenerator]) -> list[Tensor]:
    """w [N] of each, gathered where there is none that holds: in autocast's dtype, but in that of the
    parameters for L2, which adds it to the gradient."""
    for g in batch:
        _check(g)
    own = batch[0].weight
    dtype = own.dtype if any(g.l2 for g in batch) else autocast_dtype(own) or own.dtype
    stale = [g for g in batch if g.gathered is None or not g.gathered.is_current(g, dtype)]
    if stale:
        _gather(stale, dtype)
    return [g.gathered.w for g in batch]


def _gather(batch: Sequence[LinearGenerator], dtype: torch.dtype) -> None:
    """Makes the own rows, or copies those the optimizer left, and gathers the others."""
    for g in batch:
        g.gathered = None  # memory for the new one
    columns = zip(*((g.weight, g.gradient_bias, g.z, g.next_weight) for g in batch), strict=True)
    weights, biases, zs, next_weights = columns
    with torch.inference_mode(False), torch.no_grad(), no_autocast(weights):
        options = {"next_weights": next_weights, "factored": True, "backend": batch[0].backend}
        own = ops.generate(weights, biases, zs, **options)
        parts = [_padded(w.to(dtype), g.shard) for w, g in zip(own, batch, strict=True)]
        large = [g.shard.rows * part.element_size() >= ALONE for g, part in zip(batch, parts, strict=True)]
        messages = [[i] for i, alone in enumerate(large) if alone]
        messages.append([i for i, alone in enumerate(large) if not alone])
        for message in filter(None, messages):
            part = parts[message[0]] if len(message) == 1 else torch.cat([parts[i] for i in message])
            whole = all_gather(part, batch[0].shard.group)  # [R, n]
            sizes = [len(parts[i]) for i in message]
            for i, rows in zip(message, whole.split(sizes, dim=1), strict=True):
                g = batch[i]
                g.gathered = Gathered(rows.reshape(-1)[: g.shard.rows], g)


def _check(g: LinearGenerator) -> None:
    shard = g.shard
    group, owner = shard.group, (shard.rank, shard.ranks)
    if not dist.is_initialized() or (dist.get_rank(group), dist.get_world_size(group)) != owner:
        raise RuntimeError(f"this generator has the rows of rank {shard.rank} of a group of {shard.ranks}")
    if is_transformed() or has_tangent(g.weight, g.gradient_bias, g.z):
        raise ValueError("a sharded generator works in no transform of torch.func: unshard_(model) first")
    if len(g.weight) != shard.stop - shard.start or len(g.gradient_bias) != len(g.weight):
        raise ValueError(
            f"weight and bias must be rows {shard.start} to {shard.stop} of {shard.rows}, got shapes "
            f"{list(g.weight.shape)} and {list(g.gradient_bias.shape)}"
        )


_same_ranks: WeakKeyDictionary[nn.Module, set[dist.ProcessGroup | None]] = WeakKeyDictionary()


def _check_ranks(ddp: nn.parallel.DistributedDataParallel, group: dist.ProcessGroup | None) -> None:
    """RuntimeError unless DDP is over the ranks of `group`; compares them once."""
    if group in (same := _same_ranks.setdefault(ddp, set())):
        return
    theirs, ours = (set(dist.get_process_group_ranks(g)) for g in (ddp.process_group, group))
    if theirs != ours:
        raise RuntimeError(
            f"DDP is over ranks {sorted(theirs)}, and generators in it are sharded over {sorted(ours)}: both "
            "must be the same"
        )
    same.add(group)


def _sends(g: LinearGenerator) -> bool:
    """As DDP takes it: whether this forward runs outside of its `no_sync`. An activation checkpoint that runs
    a forward again, in the backward, does as the first."""
    ddp, gathered = nn.parallel.DistributedDataParallel._get_active_ddp_module(), g.gathered
    if ddp is not None:
        _check_ranks(ddp, g.shard.group)
    if ddp is not None or torch._C._current_graph_task_id() == -1:
        gathered.sends = ddp is None or ddp.require_backward_grad_sync
    return gathered.sends


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
