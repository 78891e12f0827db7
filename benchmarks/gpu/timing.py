"""Times of work on a GPU: replays of CUDA graphs between events, all ways in turns.

A graph takes the launches' cost on the CPU out of the numbers, for plain PyTorch as for ours. On the CPU,
where the tests of this package run, graphs are plain calls and events are a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from train.graph import CudaGraph

T = TypeVar("T")
Calls = dict[str, Callable[[], object]]
COPIED = 1 << 30  # bytes of the array whose copy is the roof; a copy reads and writes it


def graph_of(function: Callable[[], T], device: torch.device, warm_ups: int = 3) -> Callable[[], T]:
    """`function` as a CUDA graph, after calls in which compilers, allocators and caches do their work. The
    result of a replay is that of the capture, rewritten."""
    if device.type != "cuda":
        for _ in range(warm_ups):
            function()
        return function
    with torch.cuda.device(device):
        graph = CudaGraph(device)
        for _ in range(warm_ups):
            graph.warm_up(function)
        made = graph.capture(function)

    def replay() -> T:
        graph.replay()
        return made

    return replay


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Mark:
    """A point in the work of a device."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.seconds = time.perf_counter()

    def until(self, later: Mark) -> float:
        """Seconds of the device between the two; both must have been passed."""
        if self.event is None:
            return later.seconds - self.seconds
        return self.event.elapsed_time(later.event) / 1e3


def in_turns(calls: Calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds that do not count. The calls are queued without
    waiting: what is timed is the device."""
    marks: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in calls}
    for _ in range(2 + rounds):
        for name, call in calls.items():
            start = Mark(device)
            call()
            marks[name].append((start, Mark(device)))
    synchronize(device)
    return {name: [a.until(b) for a, b in pairs[2:]] for name, pairs in marks.items()}


def graphs_in_turns(calls: Calls, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """`in_turns` of graphs of the calls."""
    return in_turns({name: graph_of(call, device) for name, call in calls.items()}, device, rounds)


class Copy:
    """Copies of an array that fits no cache, to be timed among what is held against it."""

    def __init__(self, device: torch.device, size: int = COPIED):
        self.moved = 2 * size
        self.source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> Tensor:
        return self.target.copy_(self.source)


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache; 1 MiB where torch does not tell."""
    if device.type != "cuda":
        return 1 << 20
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def sets_beyond_cache(size: int, device: torch.device, most: int = 64) -> int:
    """How many sets of `size` bytes to go through in turns, so that none is found in the cache when its turn
    comes: together three times the cache."""
    return max(1, min(most, -(-3 * l2_bytes(device) // max(size, 1))))


def one_after_the_other(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """One call that makes all of them."""

    def run() -> None:
        for call in calls:
            call()

    return run
