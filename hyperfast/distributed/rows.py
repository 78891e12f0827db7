"""Which rows of a generator a rank owns, and tensors of which it has those rows alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfast.distributed.collectives import all_gather

UNIT = 32  # a rank's rows begin at a multiple: whole groups of rows that share a scale (`hyperfast.states`)


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


@dataclass(frozen=True, eq=False)
class ShardedRows:
    """A tensor [N, ...] of which this rank has rows `start` to `start + len(local)` alone.

    What the state dicts of sharded models and their optimizers hold: `torch.distributed.checkpoint` saves it
    and loads into it, by any number of ranks; `whole` gathers it.
    """

    local: Tensor
    rows: int
    start: int
    group: dist.ProcessGroup | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size((self.rows, *self.local.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def whole(self, to: int | None = None) -> Tensor | None:
        """The whole tensor on the CPU, on every rank, or on rank `to` of the group alone and None elsewhere.
        All ranks must call it."""
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "rows of one rank cannot be pickled: save with hyperfast.distributed.save, or gather them with "
            "hyperfast.distributed.whole(state)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRows:
        return ShardedRows(self.local.clone(), self.rows, self.start, self.group)
