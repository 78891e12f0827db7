"""The training step as one CUDA graph.

A step of `full` is a few hundred kernels, many of them shorter than the time in which a host launches one. A
graph launches them all in one call. What is captured is the whole step: forward, loss, backward, clipping,
optimizer, next weights and figures. It reads and writes the same memory at every replay, so the batch is
copied into buffers of the graph, the learning rate is a tensor on the device, and whoever replaces parameters
(load_state_dict) or the network captures anew.

Python runs during the capture alone. Random numbers stay those of an eager run: before each replay torch
writes seed and offset of the default generator to where the graph reads them, and counts the offset up by
what a step draws (CUDAGeneratorImpl.cpp, replay_prologue); `torch.manual_seed` between replays holds from the
next one on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from train.checkpoint import one_line

WARM_UP = 3  # eager steps before the capture, as torch's notes on CUDA graphs ask; they are the run's first

Step = Callable[[Tensor, Tensor], Tensor]  # input, target -> figures


class CaptureError(RuntimeError):
    """The step cannot be captured: one line that says why."""


class Recorder(Protocol):
    """What `GraphedStep` needs of a graph."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """work() before the capture, with its result."""

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """Records work() without doing it; the tensor into which every replay writes its result."""

    def replay(self) -> None:
        """Does what was recorded."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph` on a stream of its own, on which the warm-up runs too. It keeps the memory
    pool in which the captured step works."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        before = torch.cuda.current_stream(self.stream.device)
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):  # waits for the device first
                return work()
        finally:  # torch leaves its stream the current one where the capture fails
            torch.cuda.set_stream(before)

    def replay(self) -> None:
        self.graph.replay()


class GraphedStep:
    """`step` as a graph: the first WARM_UP calls run it eagerly, the next one captures it, and from then on
    calls replay.

    step: (input, target) -> figures, a new tensor on their device; all batches have one shape. It leaves no
    gradient behind, so that those of the graph lie in the graph's memory. The figures of a replay hold until
    the next one. seconds: what warm-up and capture took of the host's time: kernels are compiled, cuDNN
    chooses algorithms, the graph is made. Raises CaptureError.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self.step, self.recorder = step, recorder
        self.calls, self.seconds = 0, 0.0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._figures: Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._figures is not None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.captured:
            began = time.perf_counter()
            self.calls += 1
            if self.calls <= WARM_UP:
                figures = self.recorder.warm_up(lambda: self.step(x, y))
            else:
                self._capture(x, y)
            self.seconds += time.perf_counter() - began
            if not self.captured:
                return figures
        for buffer, batch in zip(self._buffers, (x, y), strict=True):
            if batch.shape != buffer.shape:  # copy_ would broadcast
                raise ValueError(f"batch must be {list(buffer.shape)} as captured, got {list(batch.shape)}")
            buffer.copy_(batch)
        self.recorder.replay()
        return self._figures

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self._buffers = x.clone(), y.clone()
        try:
            self._figures = self.recorder.capture(lambda: self.step(*self._buffers))
        except RuntimeError as error:  # CUDA errors and out of memory are of this kind
            first: BaseException = error  # ending a broken capture raises an error of its own
            while first.__context__ is not None:
                first = first.__context__
            raise CaptureError(one_line(first)) from error
