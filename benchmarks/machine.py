"""What the machine is and what it can: the roofs that times are held against."""

from __future__ import annotations

import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyperfast import info

COPY_BYTES = 640_000_000  # read and written by one copy: far beyond any cache


def describe_machine() -> str:
    """One line: processor, threads, instruction set, versions, date."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    isa = info.collect()["cpu"].get("isa", "no CPU kernels")
    return (
        f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {isa}; "
        f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Copy:
    """Copies of an array that fits no cache, to be called in the same rounds as what is held against it."""

    def __init__(self) -> None:
        self.source = torch.ones(COPY_BYTES // 8)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in every round; each round calls all of them once, after one that is not
    counted."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def paired_ratio(slower: list[float], faster: list[float]) -> float:
    """Median over rounds of slower / faster."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def peak_bytes(function: Callable[[], Sequence[Tensor]]) -> int:
    """The most that one call holds at a time, beyond its results."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        results = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - sum(t.nbytes for t in results)
