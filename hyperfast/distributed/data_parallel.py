"""Data parallel: every rank has the whole model and a part of the batch, gradients are averaged.

`torch.nn.parallel.DistributedDataParallel` does the work. A generator in factored mode sends dw, the gradient
of its bias, N numbers for N K, and the factored weight gradient dw outer z is its mean too, for z is the same
on all ranks.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import JoinHook
from torch.nn.parallel import DistributedDataParallel

from hyperfast.distributed.agreement import check_same, is_joined, on_device_of
from hyperfast.distributed.sharding import shard_
from hyperfast.factored import whole_shape
from hyperfast.nn.generator import factored_, generators, ignored_by_ddp, invalidate, linear_generators

REFUSED = {
    "mixed_precision": "use torch.autocast",
    "device_mesh": "give its group",
    "process_group": "call it group",
    "delay_all_reduce_named_params": "DDP's buckets are sent in the order of the backward",
}


def data_parallel(
    model: nn.Module,
    *,
    shard_generators: bool = False,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> DistributedDataParallel:
    """`model`, wrapped to train on all ranks of `group` (None: all there are), each with its own part of the
    batch: gradients are means over ranks. All ranks must call it, on the device where they train.

    Generators stay dense or factored as they are (`hyperfast.factored_`). Factored ones send dw [N] instead
    of a gradient [N, K], while the backward still runs. shard_generators: each rank keeps N / ranks rows of
    every linear generator and their optimizer's states (`hyperfast.distributed.shard_`, which may also have
    been called before). Make the optimizer afterwards, of `model`.

    All ranks start from the values of the first one, unless `init_sync=False`. options: those of
    DistributedDataParallel. Batches of different sizes need `with ddp.join()`, which sharded generators
    refuse.

    Raises RuntimeError without a process group; ValueError, the same one on all ranks, where their models or
    arguments differ, for a model that is wrapped already, and for options that do not go with generators
    (`REFUSED`).
    """
    if not is_joined():
        raise RuntimeError(
            "data_parallel needs a process group: run the program by torchrun and call "
            "torch.distributed.init_process_group first"
        )
    for name, instead in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"data_parallel takes no {name}: {instead}")
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError("the model, or a part of it, is in a DistributedDataParallel already")
    with on_device_of(next(model.parameters(), None)):
        _check_equal(_description(model, options | {"shard_generators": shard_generators}), group)
        if shard_generators:
            factored_(model)
        if options.get("init_sync", True):
            _broadcast_factored(model, group, 0)
    if shard_generators:
        shard_(model, group)
    ignored_by_ddp(model)
    linear = linear_generators(model)
    for generator in linear:
        generator.early = True
    if any(generator.shard is not None for generator in linear):
        with on_device_of(next(model.parameters(), None)):
            group = _communicator(group)
    return DataParallel(model, process_group=group, **options)


class DataParallel(DistributedDataParallel):
    """What `data_parallel` returns: DistributedDataParallel whose `join` keeps factored weights equal too."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        if any(g.shard is not None for g in linear_generators(self.module)):
            raise RuntimeError(
                "ranks with sharded generators cannot join: each needs the others' rows in every forward; "
                "give all ranks the same number of batches"
            )
        return _JoinHook(self, super().join_hook(**kwargs))


class _JoinHook(JoinHook):
    """DDP's, which at the end gives all ranks the model of one of the last; its factored weights as well,
    which DDP ignores."""

    def __init__(self, model: DataParallel, ddp: JoinHook):
        self.model, self.ddp = model, ddp

    def main_hook(self) -> None:
        self.ddp.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.ddp.post_hook(is_last_joiner)
        group = self.model.process_group
        rank = dist.get_rank(group) if is_last_joiner else -1
        last = torch.tensor(rank, device=self.model.join_device)
        dist.all_reduce(last, dist.ReduceOp.MAX, group=group)
        _broadcast_factored(self.model.module, group, int(last))


_communicators: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _communicator(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Another group of the ranks of `group`, for DDP's messages, one for all models: where ranks use other
    layers, DDP's buckets and those of rows are ready in another order, and the messages of one group must
    have the same on all ranks."""
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    part = len(ranks) < dist.get_world_size()
    if part and dist.group.WORLD.bound_device_id is not None:
        return group  # NCCL would split the communicator of all ranks, and the others are not here
    if group not in _communicators:
        backend = group._get_backend(group._device_types[0])
        backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        _communicators[group] = dist.new_group(
            ranks,
            timeout=backend.options._timeout,
            backend=dist.get_backend_config(group),
            use_local_synchronization=part,
        )
    return _communicators[group]


def _broadcast_factored(model: nn.Module, group: dist.ProcessGroup | None, source: int) -> None:
    """Gives all ranks of the group the factored generators of one of them."""
    whole = [g for g in linear_generators(model) if g.factored and g.shard is None]
    for p in {id(p): p for g in whole for p in g.sharded_parameters()}.values():
        values = p.detach().contiguous()
        dist.broadcast(values, group=group, group_src=source)
        if not p.is_contiguous():
            p.detach().copy_(values)
    invalidate(model)


def _description(model: nn.Module, arguments: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all ranks, in words, by name."""
    named = {"model": type(model).__name__}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        kind = ("trained" if t.requires_grad else "frozen") if isinstance(t, nn.Parameter) else "buffer"
        layout = f"strides {list(t.stride())}, on {t.device.type}"
        named[f"parameter {name}"] = f"{kind}, {t.dtype} {list(whole_shape(t))}, {layout}"
    for name, g in generators(model):
        modes = f"factored={g.factored}, sharded={g.shard is not None}, l2={g.l2}"
        named[f"generator {name}"] = f"{type(g).__name__} of {[tuple(shape) for shape in g.shapes]}, {modes}"
    plain = {k: v for k, v in arguments.items() if isinstance(v, (bool, int, float, str))}
    return named | {f"argument {name}": repr(value) for name, value in sorted(plain.items())}


def _check_equal(described: dict[str, str], group: dist.ProcessGroup | None) -> None:
    try:
        check_same(described, group)
    except ValueError as error:
        raise ValueError(f"ranks must have equal models and arguments: {error}") from None
