"""What all ranks must agree on: an error of one rank is raised on every rank, so that none waits for another.

Without a process group this process is the only rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_joined() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank_in(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if is_joined() else 0


def on_device_of(t: Tensor | None) -> AbstractContextManager[Any]:
    """Where values are exchanged: NCCL takes them through the current GPU, which is to be that of `t`."""
    return torch.cuda.device(t.device) if t is not None and t.is_cuda else nullcontext()


def gather_values(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, picklable, in the order of ranks."""
    if not is_joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def everywhere(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`work()`, on every rank. Where it raises on some, ValueError on all of them with the reason of the
    first."""
    made, fault = None, None
    try:
        made = work()
    except Exception as error:
        fault = error
    reasons = gather_values(None if fault is None else one_line(fault), group)
    failed = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        where = "" if len(failed) == len(reasons) else f"rank {failed[0]}: "
        raise ValueError(where + reasons[failed[0]]) from fault
    return made


def check_same(description: dict[str, str], group: dist.ProcessGroup | None = None) -> None:
    """ValueError with the first difference, the same on every rank, unless all give one description: what
    stands behind each name, in one order."""
    digest = hashlib.sha256(repr(list(description.items())).encode()).hexdigest()
    digests = gather_values(digest, group)
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, theirs in enumerate(digests) if theirs != digests[0])
    first, second = (gather_values(description, group)[rank] for rank in (0, other))
    raise ValueError(first_difference(first, second, "rank 0", f"rank {other}"))


def first_difference(one: dict[str, Any], two: dict[str, Any], name_one: str, name_two: str) -> str:
    """Where two descriptions differ, in words."""
    for name in [*one, *(name for name in two if name not in one)]:
        if name not in two:
            return f"{name} is in {name_one} and not in {name_two}"
        if name not in one:
            return f"{name} is in {name_two} and not in {name_one}"
        if one[name] != two[name]:
            return f"{name} is {one[name]} in {name_one}, {two[name]} in {name_two}"
    return f"{name_one} and {name_two} differ in the order of names"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
