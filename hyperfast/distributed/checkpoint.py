"""Checkpoints that any number of ranks writes and any other number reads.

A checkpoint is a folder: tensors as `torch.distributed.checkpoint` keeps them, to which every rank writes its
own rows, and everything else in one file. It is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hyperfast.distributed.agreement import (
    check_same,
    everywhere,
    first_difference,
    gather_values,
    is_joined,
    on_device_of,
    one_line,
    rank_in,
)
from hyperfast.distributed.rows import RowShard
from hyperfast.factored import is_stand_in, shard_of
from hyperfast.nn.generator import generators
from hyperfast.optim.factored_optimizer import state_shard

Tensors = dict[str, dict[str, Tensor]]
FORMAT, VERSION = "hyperfast-distributed-checkpoint", 1
METADATA, REST, TENSORS = ".metadata", "rest.pt", ".distcp"  # torch's, ours, the ending of torch's
SAVING, PREVIOUS = "saving-", "previous"  # what stands beside a checkpoint


def save(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **values: Any
) -> None:
    """Saves `model`, the state of `optimizer` and `values` as the checkpoint `folder`, which any number of
    ranks can `load`.

    Collective: all ranks call it, with a folder that all of them see; without a process group this process is
    the only rank. Every rank writes its own rows of sharded generators; all else, values too, is rank 0's.
    values: tensors and plain Python values, as `torch.load(weights_only=True)` reads them. model may be
    wrapped (DDP, torch.compile). All ranks are those of the process group of a sharded model or of DDP; a
    model that is not sharded and given without its DDP is that of all processes. An earlier checkpoint at
    `folder` goes when the new one is complete: whatever dies in between, `load` finds the one or the other.

    Raises ValueError, the same on every rank, with the earlier checkpoint unchanged: models or optimizers
    that differ between ranks, values of other types, a folder with other files in it or that not all ranks
    see, a full disk. Where a rank dies, the others get the process group's RuntimeError.
    """
    (model, group), folder = _unwrapped(model), Path(folder).resolve()
    first = rank_in(group) == 0
    with on_device_of(next(model.parameters(), None)), _named(folder, "not saved"):
        # a new name each time: network file systems remember for a while what a name stood for
        temporary = _beside(folder, SAVING + gather_values(uuid.uuid4().hex, group)[0])
        try:
            tensors, rest = everywhere(lambda: _state(model, optimizer), group)
            check_same(_described(tensors), group)
            everywhere(
                lambda: _prepare(folder, temporary, rest | {"values": values}) if first else None, group
            )
            everywhere(lambda: _check_seen(temporary), group)
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # of one rank: buffers may differ
            _run(dcp.save, tensors, group, storage_writer=dcp.FileSystemWriter(temporary), planner=planner)
            everywhere(lambda: _publish(folder, temporary) if first else None, group)
        except ValueError:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def load(
    folder: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Loads what `save` saved into `model` and `optimizer`, bit for bit, and returns the values, tensors on
    the CPU.

    Collective, by any number of ranks, those that `save` says: each reads its own rows of sharded generators,
    whether they were saved sharded or not, and a model that is not sharded reads all. Optimizer states that
    do not exist yet are made; those of another `state_dtype` are converted. Nothing changes before everything
    is read: for that long a rank has its tensors twice, once on the CPU. Metadata of torch's distributed
    checkpoints are a pickle: load none from people you do not trust.

    Raises ValueError, the same on every rank: no checkpoint there, a damaged one, one of another model or
    another optimizer.
    """
    (model, group), folder = _unwrapped(model), Path(folder).resolve()
    with on_device_of(next(model.parameters(), None)), _named(folder, "not loaded"):
        place, rest, tensors = everywhere(lambda: _targets(folder, model, optimizer), group)
        _run(dcp.load, tensors, group, storage_reader=dcp.FileSystemReader(place))
        if optimizer is not None:  # first: it may refuse options of the groups
            state = _optimizer_state(tensors["optimizer"], rest["optimizer"])
            everywhere(lambda: optimizer.load_state_dict(state), group)
        everywhere(lambda: model.load_state_dict(tensors["model"] | rest["model"]), group)
    return rest["values"]


@contextlib.contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {what}, {error}") from error


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dist.ProcessGroup | None]:
    """Without DDP and torch.compile around it, in whatever order, and the group of the ranks that share it;
    None: all."""
    group = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, group = model.module, model.process_group
        elif hasattr(model, "_orig_mod"):  # asking for its class would import the compiler
            model = model._orig_mod
        else:
            break
    return model, next((g.shard.group for _, g in generators(model) if g.shard is not None), group)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[Tensors, dict[str, Any]]:
    """What there is to save: tensors of "model" and "optimizer" by name, and the rest."""
    state = model.state_dict()
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    tensors: Tensors = {"model": own}
    rest = {"format": FORMAT, "version": VERSION, "model": others, "optimizer": None}
    if optimizer is None:
        return tensors, rest
    tensors["optimizer"] = {}
    state, names, states = optimizer.state_dict(), _names(model, optimizer), {}
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    name_of = dict(zip(numbers, (name for group in names for name in group), strict=True))
    for i, found in state["state"].items():
        name = name_of[i]
        tensors["optimizer"] |= {f"{name}.{key}": t for key, t in found.items() if isinstance(t, Tensor)}
        states[name] = {key: None if isinstance(value, Tensor) else value for key, value in found.items()}
    groups = [group | {"params": own} for group, own in zip(state["param_groups"], names, strict=True)]
    rest["optimizer"] = {"kind": type(optimizer).__name__, "param_groups": groups, "states": states}
    return tensors, rest


def _described(tensors: Tensors) -> dict[str, str]:
    named = {f"{part}.{name}": t for part, of in tensors.items() for name, t in of.items()}
    return {name: f"{list(t.shape)} of {t.dtype}" for name, t in named.items()}


def _optimizer_state(states: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    """The state dict that `_state` took apart."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    number_of = {name: i for i, name in enumerate(names)}
    state = {
        number_of[name]: {key: states.get(f"{name}.{key}", value) for key, value in found.items()}
        for name, found in saved["states"].items()
    }
    groups = [g | {"params": [number_of[name] for name in g["params"]]} for g in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters of each group, without those that are never saved."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [[p for p in group["params"] if not is_stand_in(p)] for group in optimizer.param_groups]
    for p in (p for group in groups for p in group):
        if id(p) not in name_of:
            raise ValueError(
                f"the optimizer trains a tensor {list(p.shape)} that is no parameter of the model"
            )
    return [[name_of[id(p)] for p in group] for group in groups]


def _targets(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[Path, dict[str, Any], Tensors]:
    """Where the checkpoint is, its rest, and tensors to read into, this rank's rows of sharded ones. Raises
    ValueError unless it fits."""
    place, metadata, rest = _opened(folder)
    stored = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    saved = {name[len("model.") :]: entry for name, entry in stored.items() if name.startswith("model.")}
    _check_model(model, saved, rest["model"])
    shards = _row_shards(model)
    tensors = {"model": {name: _empty(entry, shards.get(name), None) for name, entry in saved.items()}}
    if optimizer is not None:
        _check_optimizer(model, optimizer, rest["optimizer"])
        tensors["optimizer"] = {}
        for name, key in ((name, key) for name, keys in rest["optimizer"]["states"].items() for key in keys):
            entry = stored.get(f"optimizer.{name}.{key}")
            if entry is not None:
                p = model.get_parameter(name)
                rows = state_shard(shards.get(name), p, key)
                tensors["optimizer"][f"{name}.{key}"] = _empty(entry, rows, p)
    return place, rest, tensors


def _check_model(model: nn.Module, saved: dict[str, TensorStorageMetadata], others: dict[str, Any]) -> None:
    """ValueError unless tensors of such sizes, and others, are what the model's state dict has."""
    theirs = dict.fromkeys(others, "no tensor")
    theirs |= {name: str(list(entry.size)) for name, entry in saved.items()}
    ours = {
        name: str(list(value.shape)) if isinstance(value, Tensor) else "no tensor"
        for name, value in model.state_dict().items()
    }
    if ours != theirs:
        difference = first_difference(ours, theirs, "this model", "the checkpoint")
        raise ValueError(f"it is of another model: {difference}")


def _row_shards(model: nn.Module) -> dict[str, RowShard]:
    """By names of parameters of which this rank has some rows."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: shard for name, p in named if (shard := shard_of(p)) is not None}


def _empty(entry: TensorStorageMetadata, rows: RowShard | None, like: Tensor | None) -> Tensor:
    """On the CPU, to read `entry` into; these rows of it. Laid out as `like` where that has the same shape:
    kernels walk through a parameter and its states alike."""
    dtype = entry.properties.dtype
    if like is not None and like.shape == entry.size:
        return torch.empty_like(like, dtype=dtype, device="cpu")
    if rows is None or not entry.size:
        return torch.empty(entry.size, dtype=dtype)
    return rows.sharded(torch.empty(rows.stop - rows.start, *entry.size[1:], dtype=dtype))


def _check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None
) -> None:
    """ValueError unless the state `saved` is of such an optimizer of the same parameters."""
    kind = type(optimizer).__name__
    if saved is None:
        raise ValueError("it has no state of an optimizer")
    if saved["kind"] != kind:
        raise ValueError(f"it has the state of {saved['kind']}, the optimizer is {kind}")
    ours = _numbered(_names(model, optimizer))
    theirs = _numbered([group["params"] for group in saved["param_groups"]])
    if ours != theirs:
        difference = first_difference(ours, theirs, "this optimizer", "the checkpoint's")
        raise ValueError(f"it is of an optimizer of other parameters: {difference}")


def _numbered(groups: list[list[str]]) -> dict[str, str]:
    return {
        name: f"number {j} of group {i}" for i, group in enumerate(groups) for j, name in enumerate(group)
    }


def _opened(folder: Path) -> tuple[Path, Metadata, dict[str, Any]]:
    """Where the checkpoint is, its metadata and rest."""
    places = (folder, _beside(folder, PREVIOUS))  # the latter where a save died while moving
    place = next((place for place in places if (place / METADATA).is_file()), None)
    if place is None:
        there = "what is there is no checkpoint" if folder.exists() else "there is nothing"
        raise ValueError(f"{there} (or one whose first save never ended)")
    if not (place / REST).is_file():
        raise ValueError("it was not written by hyperfast.distributed.save")
    try:
        metadata = dcp.FileSystemReader(place).read_metadata()
        rest = torch.load(place / REST, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip raise their own on damaged input
        raise ValueError(f"it is damaged ({one_line(error)})") from error
    if not isinstance(rest, dict) or rest.get("format") != FORMAT:
        raise ValueError("it was not written by hyperfast.distributed.save")
    if rest["version"] != VERSION:
        raise ValueError(f"format version {rest['version']}, this program reads {VERSION}")
    return place, metadata, rest


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _prepare(folder: Path, temporary: Path, rest: dict[str, Any]) -> None:
    """Makes `temporary` with the rest in it. Raises ValueError where `folder` has files that moving it away
    would lose, and for values that would not load."""
    if folder.exists():
        others = [f.name for f in folder.iterdir() if not (f.name in (METADATA, REST) or f.suffix == TENSORS)]
        if others:
            raise ValueError(f"the folder has {min(others)} in it, which is no part of a checkpoint")
    for name, value in (rest["model"] | rest["values"]).items():
        _check_value(name, value)
    temporary.mkdir(parents=True)
    for left in folder.parent.iterdir():  # by a save that died
        if left.name.startswith(_beside(folder, SAVING).name) and left != temporary:
            shutil.rmtree(left)
    torch.save(rest, temporary / REST)


def _check_seen(temporary: Path) -> None:
    if not (temporary / REST).is_file():
        raise ValueError(f"{temporary.parent} is not the folder that rank 0 sees: all ranks must share it")


def _check_value(name: str, value: Any) -> None:
    try:
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"value {name} is none that torch.load(weights_only=True) reads: {one_line(error)}"
        ) from error


def _publish(folder: Path, temporary: Path) -> None:
    """Moves the complete checkpoint to its place."""
    previous = _beside(folder, PREVIOUS)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if folder.exists():
        if previous.exists():
            shutil.rmtree(previous)
        os.rename(folder, previous)
    os.rename(temporary, folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(action: Any, tensors: Tensors, group: dist.ProcessGroup | None, **options: Any) -> None:
    """torch's save or load; ValueError, on every rank, where it fails on one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is ")  # disabled: one process
            action(tensors, process_group=group, no_dist=not is_joined(), **options)
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        if not isinstance(reason, Exception):  # an interrupt
            raise reason from error
        where = f"rank {rank}: " if is_joined() else ""
        raise ValueError(where + one_line(reason)) from error
