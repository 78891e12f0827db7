"""The table through which one launch serves all layers of a network.

A row is what a kernel must know of one layer: addresses and sizes, int64. Blocks of the launch are dealt out
to the layers in order; `starts` is the first block of each, and a block finds its layer with `find_segment`.

Tables of the same contents are made once: parameters stay where they are from step to step. The copy to the
device does not wait. While a CUDA graph is captured the copy becomes a node of the graph, which reads the
host's table at every replay: those lie in pinned memory that is never given back.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CACHED = 256  # tables


class Segments(NamedTuple):
    """rows: int64 [L, fields]; starts: int32 [L]; blocks: of the whole launch."""

    rows: Tensor
    starts: Tensor
    blocks: int

    def arguments(self) -> dict[str, object]:
        """The first arguments of every kernel over segments."""
        L = len(self.starts)
        return {
            "rows_ptr": self.rows,
            "starts_ptr": self.starts,
            "L": L,
            "BLOCK_L": triton.next_power_of_2(L),
        }


_cache: OrderedDict[tuple, Segments] = OrderedDict()


class _Staging:
    """Pinned host memory for the tables of captured graphs: none can be allocated during a capture."""

    SIZE = 1 << 18  # int64: 2 MiB, some hundred graphs

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.used = 0

    def prepare(self) -> None:
        if self.memory is None:
            with torch.inference_mode(False):  # whatever the first caller is in, captures write to it
                self.memory = torch.empty(self.SIZE, dtype=torch.int64, device="cpu", pin_memory=True)

    def take(self, count: int) -> Tensor:
        """`count` numbers that nobody else gets; RuntimeError where there are none."""
        if self.memory is None:
            raise RuntimeError("hyperfast: do one step on this GPU before capturing a CUDA graph of it")
        if self.used + count > self.SIZE:
            raise RuntimeError(f"hyperfast: the tables of captured CUDA graphs exceed {8 * self.SIZE} bytes")
        self.used += count
        return self.memory[self.used - count : self.used]


_staging = _Staging()


def segments(rows: Sequence[Sequence[int]], blocks: Sequence[int], device: torch.device) -> Segments:
    """The table of `rows` on `device`; blocks: how many each row takes, 0 for a layer
    without rows."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return _made(rows, blocks, device, _staging.take)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = (device, stream, tuple(map(tuple, rows)), tuple(blocks))
    if (found := _cache.get(key)) is not None:
        _cache.move_to_end(key)
        return found
    if on_gpu:
        _staging.prepare()
    made = _made(
        rows, blocks, device, lambda n: torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
    )
    _cache[key] = made
    if len(_cache) > CACHED:
        _cache.popitem(last=False)
    return made


def _made(rows, blocks, device, host_memory: Callable[[int], Tensor]) -> Segments:
    L, fields = len(rows), len(rows[0])
    starts = [0, *itertools.accumulate(blocks)]
    host = host_memory(L * fields + (L + 1) // 2)  # the rows, then the starts as halves of int64
    host[: L * fields] = torch.tensor([number for row in rows for number in row], device="cpu")
    host[L * fields :].view(torch.int32)[:L] = torch.tensor(starts[:L], dtype=torch.int32, device="cpu")
    table = host.to(device, non_blocking=True)
    return Segments(
        table[: L * fields].view(L, fields), table[L * fields :].view(torch.int32)[:L], starts[-1]
    )


def check_aligned(addresses: Iterable[int], size: int) -> None:
    """ValueError for an address (0: none) that is no multiple of `size`, the bytes of an element: kernels
    read elements where elements may lie."""
    for address in addresses:
        if address % size:
            raise ValueError(
                f"a tensor begins at an address that is no multiple of its elements' {size} bytes: clone() it"
            )


@triton.jit
def find_segment(rows_ptr, starts_ptr, L, FIELDS: tl.constexpr, BLOCK_L: tl.constexpr):
    """(pointer to the row, number of this block among those of its layer)"""
    pid = tl.program_id(0)
    offs_l = tl.arange(0, BLOCK_L)
    starts = tl.load(starts_ptr + offs_l, mask=offs_l < L, other=2147483647)
    i = tl.sum((starts <= pid).to(tl.int32)) - 1
    first = tl.max(tl.where(starts <= pid, starts, 0))
    return rows_ptr + i * FIELDS, pid - first


@triton.jit
def pointer(row_ptr, field: tl.constexpr, dtype: tl.constexpr, multiple: tl.constexpr = 1):
    """The address in a field of the row, a multiple of that many bytes: what one load may take."""
    address = tl.load(row_ptr + field).to(tl.pointer_type(dtype))
    if multiple > 1:
        address = tl.multiple_of(address, multiple)
    return address
