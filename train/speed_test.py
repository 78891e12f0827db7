"""How fast a trained network answers, and how well: `python -m train.cifar10 --speed-test --model-path FILE`.

A hypernetwork is measured in three ways: making its kernels in every batch, making them once, and frozen into
the plain network that it is then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperfast
from train import checkpoint
from train.checkpoint import CheckpointError
from train.command import set_up_device
from train.data import batches
from train.graph import WARM_UP, CudaGraph
from train.images import ImageData
from train.loop import autocast
from train.models.wrn import build_wrn, model_of, rename_published_
from train.report import table

PASS = 10  # batches that are timed together
PASSES = 7
Forward = Callable[[Tensor], Tensor]


def load(path: Path, fused: bool) -> tuple[str, nn.Module]:
    """The network in `path` and its name. Raises CheckpointError for a file without one of these."""
    state = checkpoint.load_weights(path)
    rename_published_(state)
    name = model_of(state)
    if name is None:
        raise CheckpointError(f"{path}: weights of another model, none of this command's")
    model = build_wrn(name, fused=fused)
    checkpoint.load_model(model, state, path)
    return name, model.eval()


def ways(model: nn.Module) -> dict[str, Forward]:
    """What is timed."""
    if not isinstance(model, hyperfast.nn.HyperModule):
        return {"plain network": model}
    kernels = model.generate()
    return {
        "kernels generated in every batch": model,
        "kernels generated once": lambda x: torch.func.functional_call(model.module, kernels, (x,)),
        "frozen": hyperfast.freeze(model).to(memory_format=torch.channels_last),
    }


class Timer:
    """Seconds of `work`, without what is not yet done before it; on a GPU one CUDA graph of it if asked."""

    def __init__(self, work: Callable[[], Tensor], device: torch.device, graphed: bool):
        self.work, self.device = work, device
        if graphed:
            graph = CudaGraph(device)
            for _ in range(WARM_UP):
                graph.warm_up(work)
            graph.capture(work)
            self.work = graph.replay

    def __call__(self, count: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            self.work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(timers: dict[str, Timer], count: int) -> dict[str, list[float]]:
    """Seconds of each of PASSES passes of `count` calls, the timers taking turns, after one that is not
    counted."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for name in [*timers, *(name for _ in range(PASSES) for name in timers)]:
        seconds[name].append(timers[name](count))
    return {name: values[1:] for name, values in seconds.items()}


def accuracy(forward: Forward, data: ImageData, args: argparse.Namespace) -> float:
    """On the test images, in percent; --eval-batches limits them."""
    correct = seen = 0
    images, labels = data.test
    for i, (x, y) in enumerate(batches(images, labels, args.batch_size, shuffle=None, drop_last=False)):
        if i == args.eval_batches:
            break
        correct = correct + (forward(_input(data, x)).argmax(1) == y).sum()
        seen += len(y)
    return 100 * int(correct) / seen


def run(args: argparse.Namespace, load_data: Callable[[], ImageData]) -> dict[str, dict[str, float]]:
    """Measures --model-path and prints a table; returns it: images/s and accuracy by way.

    Images are on the device and normalised beforehand. Raises RunError, CheckpointError, DataError.
    """
    set_up_device(args)
    device = torch.device(args.device)
    name, model = load(args.model_path, args.fused)
    if args.wanted_model not in (None, name):
        raise CheckpointError(f"--model {args.wanted_model}: {args.model_path} is {name}")
    model = model.to(device, memory_format=torch.channels_last)
    data = load_data().to(device)
    x = _input(data, data.test[0][: args.batch_size])
    with torch.inference_mode(), autocast(device, args.precision):
        forwards = ways(model)
        timers = {way: Timer(lambda f=f: f(x), device, args.cuda_graph) for way, f in forwards.items()}
        seconds = interleaved(timers, PASS)
        results = {
            way: {
                "images_per_second": PASS * len(x) / statistics.median(seconds[way]),
                "accuracy": accuracy(forward, data, args),
            }
            for way, forward in forwards.items()
        }
        rows = [
            [way, f"{r['images_per_second']:.0f}", f"{r['accuracy']:.2f} %"] for way, r in results.items()
        ]
        print(f"{name} ({args.model_path}), batches of {len(x)}, {args.precision}, {_machine(device)}\n")
        print(table(["", "images/s", "test accuracy"], rows))
        print("\nimages/s: of images that are on the device and normalised beforehand.")
        if args.eval_batches is not None:
            total = len(data.test[1])
            seen = min(args.eval_batches * args.batch_size, total)
            print(f"Test accuracy on the first {seen} of {total} images only.")
        if isinstance(model, hyperfast.nn.HyperModule):
            once = Timer(lambda: list(model.generate().values())[-1], device, args.cuda_graph)
            made = statistics.median(interleaved({"": once}, PASS)[""]) / PASS
            print(f"\nGenerating all kernels: {1000 * made:.3f} ms")
            results["generation"] = {"seconds": made}
    return results


def _input(data: ImageData, images: Tensor) -> Tensor:
    return data.normalize(images).to(memory_format=torch.channels_last)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
