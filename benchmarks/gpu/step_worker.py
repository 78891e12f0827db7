"""`python -m benchmarks.gpu.step_worker WAY SIZES`: one way to do the step, in a process of its own.

SIZES: JSON, `step_ways.Sizes` and the device. On stdin, in this order: "build" makes the network; "choose"
lets cuDNN time its algorithms; "prepare" makes the step ready and returns the losses of its first calls; a
number does that many steps. Each answer is a line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.gpu.parts import one_line
from benchmarks.gpu.step_ways import WAYS, Sizes, Step, batches, build, choose_algorithms
from benchmarks.gpu.timing import Mark, synchronize
from train.graph import WARM_UP, CudaGraph, GraphedStep

CHECKED = WARM_UP + 3  # steps whose losses are compared: eager ones, then replays


class StepRunner:
    """One way at work."""

    def __init__(self, name: str, device: torch.device, sizes: Sizes):
        self.name, self.device, self.sizes = name, device, sizes
        self.way = WAYS[name]

    def build(self) -> dict[str, Any]:
        self.first = batches(self.name, self.device, self.sizes, CHECKED)
        self.model, step = build(self.name, self.device, self.sizes)
        self.model.train()
        graph = self.way.graph and self.device.type == "cuda"
        self.step: Step = GraphedStep(step, CudaGraph(self.device)) if graph else step
        return {}

    def choose(self) -> dict[str, Any]:
        choose_algorithms(self.name, self.model, *self.first[0])
        synchronize(self.device)
        return {}

    def prepare(self) -> dict[str, Any]:
        """values: losses of the first steps. MiB at the peak of steps after the warm-up, the capture among
        them, since replays allocate nothing: allocated by tensors, and reserved by torch."""
        values = [float(self.step(*batch)) for batch in self.first[:WARM_UP]]
        self._forget_peaks()
        values += [float(self.step(*batch)) for batch in self.first[WARM_UP:]]
        return {"values": values, **self._peaks()}

    def _forget_peaks(self) -> None:
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peaks(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {"allocated_mib": 0.0, "reserved_mib": 0.0}
        allocated = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        return {"allocated_mib": allocated / 2**20, "reserved_mib": reserved / 2**20}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of a step, the mean of `count`."""
        synchronize(self.device)
        start = Mark(self.device)
        loss: Tensor = torch.zeros(())
        for _ in range(count):
            loss = self.step(*self.first[0])
        end = Mark(self.device)
        synchronize(self.device)
        return {"seconds": start.until(end) / count, "loss": float(loss)}


def answer(runner: StepRunner, request: str) -> dict[str, Any]:
    """What the process says; {"error": ...} where it did not work."""
    requests = {"build": runner.build, "choose": runner.choose, "prepare": runner.prepare}
    try:
        return requests[request]() if request in requests else runner.steps(int(request))
    except Exception as problem:
        traceback.print_exc()
        return {"error": one_line(problem)}


def own_stdout() -> TextIO:
    """The stdout of the answers; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main(way: str, options: str) -> None:
    answers = own_stdout()
    values = json.loads(options)
    device = torch.device(values.pop("device"))
    runner = StepRunner(way, device, Sizes(**values))
    for line in sys.stdin:
        print(json.dumps(answer(runner, line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
