"""One process for each way, taking turns: allocator settings and peak memory are each way's own, and drifts
of a shared machine meet all of them alike.

`python -m benchmarks.workers KIND WAY` is the process on the CPU: a line on stdin makes it do that many steps
and answer with seconds and value of each, and peak memory of the process so far in MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine, ways
from train.allocator import keep_freed_memory


class Worker:
    """A process that answers each line on its stdin with a line of JSON, for one way."""

    def __init__(self, way: str, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.way = way
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | dict(environment or {}),
        )  # fmt: skip

    def ask(self, request: str | int) -> None:
        """Asks and does not wait."""
        assert self.process.stdin
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()

    def answer(self, seconds: float | None = None) -> dict:
        """Of the last request. RuntimeError where the process has ended, TimeoutError after `seconds`."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"the process of {self.way!r} gave no answer in {seconds:.0f} s")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.way!r} ended with exit status {self.process.wait()}")
        return json.loads(answer)

    def steps(self, count: int, seconds: float | None = None) -> dict:
        """Does `count` steps; what the process says of them."""
        self.ask(count)
        return self.answer(seconds)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()


@dataclass
class Comparison:
    """Several ways, run in turns. seconds: way -> one per step; values: way -> what the first steps
    returned."""

    kind: str
    names: tuple[str, ...]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Comparison:
        self.workers = [self._worker(name) for name in self.names]
        for worker in self.workers:  # one at a time: compilers and first touches disturb nobody's timing
            self.values[worker.way] = worker.steps(3)["values"]
            self.seconds[worker.way] = []
        return self

    def _worker(self, way: str) -> Worker:
        command = [sys.executable, "-m", "benchmarks.workers", self.kind, way]
        return Worker(way, command, {"THP_MEM_ALLOC_ENABLE": str(int(ways.tuned_allocator(way)))})

    def __exit__(self, *_) -> None:
        for worker in self.workers:
            worker.close()

    def round(self) -> None:
        """Two timed steps of every way, after one that wakes its process up: caches, page tables, threads."""
        for worker in self.workers:
            answer = worker.steps(3)
            self.seconds[worker.way] += answer["seconds"][1:]
            self.peak_mib[worker.way] = answer["peak_mib"]

    def median(self, way: str) -> float:
        return machine.median(self.seconds[way])

    def ratio(self, way: str, base: str = "hyperfast") -> float:
        """How many times longer `way` takes than `base`: median over rounds of the paired ratios."""
        return machine.paired_ratio(self.seconds[way], self.seconds[base])


def main(kind: str, way: str) -> None:
    if ways.tuned_allocator(way):
        keep_freed_memory()
    kinds = {
        "whole": ways.whole,
        "whole_bf16": ways.whole_bf16,
        "part": ways.part,
        "pooled": ways.pooled,
        "wrn": ways.wrn,
    }
    step = kinds[kind](way)
    for line in sys.stdin:
        seconds, values = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            value = step()
            seconds.append(time.perf_counter() - start)
            values.append(float(value))
        print(json.dumps({"seconds": seconds, "values": values, "peak_mib": peak_mib()}), flush=True)


def peak_mib() -> float:
    """Peak memory of this process. Not getrusage's: that begins with what the parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Gives freed memory back, and begins to look for the peak anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main(*sys.argv[1:])
