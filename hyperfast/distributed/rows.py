"""Which rows of a generator a rank owns, and tensors of which it has those rows alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from hyperfast.distributed.agreement import check_same, gather_values, is_joined, on_device_of, rank_in
from hyperfast.distributed.collectives import all_gather

UNIT = 32  # a rank's rows begin at a multiple: whole groups of rows that share a scale (`hyperfast.states`)
BLOCK_BYTES = 1 << 27  # of a tensor that is gathered, written or read at a time


@dataclass(frozen=True)
class RowShard:
    """Rows `start` to `stop` of `rows`, those of rank `rank` of `ranks`: equal chunks of a multiple of `unit`
    rows, the last ones shorter or empty."""

    rows: int
    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None  # None: all ranks
    unit: int = UNIT

    @classmethod
    def of(cls, rows: int, group: dist.ProcessGroup | None = None) -> RowShard:
        """This rank's; ValueError where it is not in the group."""
        if (rank := dist.get_rank(group)) < 0:
            raise ValueError("this rank is not in the process group")
        return cls(rows, rank, dist.get_world_size(group), group)

    @property
    def chunk(self) -> int:
        return -(-self.rows // (self.ranks * self.unit)) * self.unit

    @property
    def start(self) -> int:
        return min(self.rank * self.chunk, self.rows)

    @property
    def stop(self) -> int:
        return min(self.start + self.chunk, self.rows)

    @property
    def own(self) -> slice:
        return slice(self.start, self.stop)

    def of_scales(self, rows_per_scale: int) -> RowShard:
        """The same in groups of `rows_per_scale` rows, a divisor of `unit`."""
        groups, left = divmod(self.unit, rows_per_scale)
        if left:
            raise ValueError(f"rows_per_scale must divide {self.unit}, got {rows_per_scale}")
        return replace(self, rows=-(-self.rows // rows_per_scale), unit=groups)

    def of_ranks(self, value: Tensor) -> Tensor:
        """[R] of a value [] of each rank. All ranks must call it."""
        return all_gather(value.reshape(1), self.group).view(-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowShard:
        return self  # a process group has no copies

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError("a model sharded over a process group of its own cannot be pickled")
        return RowShard, (self.rows, self.rank, self.ranks, None, self.unit)

    def sharded(self, local: Tensor) -> ShardedRows:
        """`local`, these rows of a tensor, as what a state dict holds of it."""
        return ShardedRows(local, self.rows, self.start, self.group)

    def take(self, value: Tensor) -> Tensor:
        """These rows of `value`: `ShardedRows` of just these, or a whole tensor, of which they are a copy, so
        that nothing keeps all rows alive. Raises ValueError for other rows."""
        if isinstance(value, ShardedRows):
            stop = value.start + len(value.local)
            if (value.rows, value.start, stop) != (self.rows, self.start, self.stop):
                raise ValueError(
                    f"rows {value.start} to {stop} of {value.rows} given, this rank has {self.start} to "
                    f"{self.stop} of {self.rows}"
                )
            return value.local
        if value.shape[:1] != (self.rows,):
            raise ValueError(f"{self.rows} rows wanted, got shape {list(value.shape)}")
        return value[self.own].clone()


class ShardedRows(Tensor):
    """A tensor [N, ...] of which this rank has rows `start` to `start + len(local)`, `local`, alone.

    What the state dicts of sharded models and their optimizers hold: `torch.distributed.checkpoint` saves it
    and loads into it, by any number of ranks; `whole` gathers it. Shape and dtype are those of the whole
    tensor. It can be detached, cloned and moved, and nothing is calculated with it (TypeError).
    """

    local: Tensor
    start: int
    group: dist.ProcessGroup | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, local: Tensor, rows: int, start: int, group: dist.ProcessGroup | None = None
    ) -> ShardedRows:
        if not 0 <= start <= start + len(local) <= rows:
            raise ValueError(f"rows {start} to {start + len(local)} are not rows of {rows}")
        shape = (rows, *local.shape[1:])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        made.local, made.start, made.group = local.detach(), start, group
        return made

    @property
    def rows(self) -> int:
        """Of the whole tensor."""
        return self.shape[0]

    def with_local(self, local: Tensor) -> ShardedRows:
        """The same rows with other values."""
        return ShardedRows(local, self.rows, self.start, self.group)

    def whole(self, to: int | None = None) -> Tensor | None:
        """The whole tensor on the CPU, on every rank, or on rank `to` of the group alone and None elsewhere.
        All ranks must call it. Raises ValueError as `hyperfast.distributed.whole` does."""
        return whole(self, to)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        stop = self.start + len(self.local)
        return f"ShardedRows(rows {self.start} to {stop} of {list(self.shape)}: {self.local})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRows:
        return memo.setdefault(id(self), self.with_local(self.local.clone()))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "rows of one rank cannot be pickled: save with hyperfast.distributed.save, or gather them with "
            "hyperfast.distributed.whole(state)"
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten.detach, aten.clone, aten._to_copy) and isinstance(args[0], cls):
            return args[0].with_local(func(args[0].local, *args[1:], **(kwargs or {})))
        raise TypeError(
            f"{func} needs whole tensors, and this rank has some rows of one: gather it with "
            "hyperfast.distributed.whole(state), or load it into a model sharded alike"
        )

    # The protocol of torch.distributed.checkpoint. Blocks are cut at the same rows of the whole tensor on
    # every rank, so that another number of ranks reads each once or twice and holds one beside its own rows.

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """First row and last row + 1 of each."""
        size, begin, stop = _rows_of_a_block(self.local), self.start, self.start + len(self.local)
        while begin < stop:
            end = min(stop, (begin // size + 1) * size)
            yield begin, end
            begin = end

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        rest = self.shape[1:]
        return [
            ChunkStorageMetadata(torch.Size((begin, *[0] * len(rest))), torch.Size((end - begin, *rest)))
            for begin, end in self._blocks()
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for begin, end in self._blocks():
            if begin == index.offset[0]:
                return self.local[begin - self.start : end - self.start]
        raise ValueError(f"{index.fqn}: no block of this rank begins at row {index.offset[0]}")


def _rows_of_a_block(local: Tensor, parts: int = 1) -> int:
    """parts: such blocks that are held at a time."""
    return max(1, BLOCK_BYTES // max(1, parts * local.element_size() * local.shape[1:].numel()))


def whole(state: Any, to: int | None = 0) -> Any:
    """`state`, nested dicts, lists and tuples, with whole tensors on the CPU in place of its `ShardedRows`:
    on rank `to` of their group and None on the others; to=None: on every rank.

    Collective: all ranks call it, with the state of one model. Tensors are gathered one after the other, a
    block of rows at a time, so that no GPU holds a whole one. Everything else in `state` stays what it is.
    Raises ValueError, the same on every rank, where names, shapes or dtypes differ between ranks and where
    their rows are not all of a tensor.
    """
    found = dict(_sharded_in(state, "state"))
    first = next(iter(found.values()), None)
    with on_device_of(None if first is None else first.local):
        gathered = _gather_all(found, to)
    group = None if first is None else first.group
    return _replaced(state, iter(gathered)) if to in (None, rank_in(group)) else None


def _gather_all(found: dict[str, ShardedRows], to: int | None) -> list[Tensor | None]:
    group = next(iter(found.values())).group if found else None
    check_same({path: f"{list(rows.shape)} of {rows.dtype}" for path, rows in found.items()}, group)
    ranks = gather_values([(rows.start, len(rows.local)) for rows in found.values()], group)
    spans = dict(zip(found, zip(*ranks, strict=True), strict=True))
    for path, rows in found.items():
        _check_spans(path, spans[path], rows.rows)
    return [_gather(rows, spans[path], to) for path, rows in found.items()]


def _sharded_in(state: Any, path: str) -> Iterator[tuple[str, ShardedRows]]:
    """(path, rows) in the order of `_replaced`."""
    if isinstance(state, ShardedRows):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _sharded_in(value, f"{path}[{key!r}]")
    elif type(state) in (list, tuple):
        for i, value in enumerate(state):
            yield from _sharded_in(value, f"{path}[{i}]")


def _replaced(state: Any, gathered: Iterator[Tensor]) -> Any:
    if isinstance(state, ShardedRows):
        return next(gathered)
    if isinstance(state, dict):
        made = copy.copy(state)  # a state dict has attributes
        made.update((key, _replaced(value, gathered)) for key, value in state.items())
        return made
    if type(state) in (list, tuple):
        return type(state)(_replaced(value, gathered) for value in state)
    return state


def _check_spans(path: str, spans: Sequence[tuple[int, int]], rows: int) -> None:
    """ValueError unless the ranks' (first row, number of rows) are all rows of a tensor, each once."""
    reached = 0
    for start, length in sorted(span for span in spans if span[1]):
        if start != reached:
            break
        reached += length
    else:
        if reached == rows:
            return
    held = ", ".join(f"{start} to {start + length}" for start, length in spans)
    raise ValueError(f"{path}: the ranks have rows {held}, not all {rows} rows of one tensor")


def _gather(rows: ShardedRows, spans: Sequence[tuple[int, int]], to: int | None) -> Tensor | None:
    """The whole tensor on the CPU of rank `to` of the group, or of all. As bytes, so any dtype travels."""
    group, local, receives = rows.group, rows.local, to in (None, rank_in(rows.group))
    out = torch.empty(rows.shape, dtype=rows.dtype, device="cpu") if receives else None
    if not is_joined():
        return out.copy_(local)
    if local.is_cpu and dist.get_backend(group) == dist.Backend.NCCL:
        local = local.cuda()
    size, longest = _rows_of_a_block(local, len(spans)), max(length for _, length in spans)
    for begin in range(0, longest, size):
        part = local.new_zeros(min(size, longest - begin), *local.shape[1:])
        part[: max(0, len(local) - begin)] = local[begin : begin + len(part)]
        parts = [torch.empty_like(part) for _ in spans] if receives else None
        _exchange(part, parts, to, group)
        for (start, length), got in zip(spans, parts or (), strict=receives):
            kept = min(len(got), length - begin)
            if kept > 0:
                out[start + begin : start + begin + kept] = got[:kept]
    return out


def _exchange(
    part: Tensor, parts: list[Tensor] | None, to: int | None, group: dist.ProcessGroup | None
) -> None:
    """Every rank's `part` into `parts` of rank `to`, or of all."""
    part, parts = _bytes(part), parts and [_bytes(got) for got in parts]
    if to is None:
        dist.all_gather(parts, part, group=group)
    else:
        dist.gather(part, parts, group=group, group_dst=to)


def _bytes(t: Tensor) -> Tensor:
    """A view of contiguous `t` of at least one dimension."""
    return t.view(-1).view(torch.uint8)
