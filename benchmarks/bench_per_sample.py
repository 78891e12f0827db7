"""Weights for each sample: hyper_linear and hyper_conv2d with z [B, K] against what plain PyTorch does.

eager             as users write it: B weights by einsum, then bmm, or samples as groups of one convolution
compiled          torch.compile of that
compiled expand   torch.compile of the better order for few rows: (x outer z) times the generator as it is
hyperfast         ops.hyper_linear, ops.hyper_conv2d

Times of one call with all gradients, all ways in turns in one process. Memory: the most that torch holds at a
time beyond what it held before and beyond the results, which every way returns: y and five gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import interleaved, median, paired_ratio, peak_bytes
from hyperfast import ops

MIB = 2**20


class Case(NamedTuple):
    """kernel 0: a linear layer of `rows` rows a sample (0: x is [B, I]); else a convolution of images of
    `rows` x `rows`."""

    B: int
    rows: int
    inputs: int
    outputs: int
    K: int = 16
    kernel: int = 0

    def tensors(self) -> list[Tensor]:
        """x, z, weight, bias, layer_bias"""
        unit = self.inputs * max(self.kernel, 1) ** 2
        middle = (self.rows,) if self.rows else ()
        x_shape = (
            (self.B, self.inputs, self.rows, self.rows) if self.kernel else (self.B, *middle, self.inputs)
        )
        N = self.outputs * unit
        made = [torch.randn(s) for s in (x_shape, (self.B, self.K), (N, self.K), (N,), (self.outputs,))]
        scales = 1, self.K**-0.5, unit**-0.5, 0.01, 1
        return [(t * scale).requires_grad_() for t, scale in zip(made, scales, strict=True)]

    def label(self) -> list[str]:
        sizes = f"{self.inputs} -> {self.outputs}"
        if self.kernel:
            return [f"conv {self.kernel}x{self.kernel} {sizes}", f"{self.rows} x {self.rows}", str(self.B)]
        return [f"linear {sizes}", str(self.rows or 1), str(self.B)]


CASES = {
    "linear": [
        Case(64, 0, 512, 512),
        Case(64, 4, 512, 512),
        Case(64, 16, 512, 512),
        Case(64, 64, 512, 512),
        Case(256, 0, 256, 256, K=64),
    ],
    "convolution": [
        Case(32, 16, 64, 64, kernel=3),
        Case(32, 8, 128, 128, kernel=3),
        Case(32, 16, 64, 64, kernel=1),
    ],
}


def eager(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, layer_bias: Tensor, kernel: int) -> Tensor:
    w = torch.einsum("nk,bk->bn", weight, z) + bias
    if kernel:
        B, I, H, W = x.shape
        images, kernels = x.view(1, B * I, H, W), w.view(-1, I, kernel, kernel)
        y = F.conv2d(images, kernels, padding=kernel // 2, groups=B).view(B, -1, H, W)
        return y + layer_bias.view(-1, 1, 1)
    rows = x if x.dim() == 3 else x.unsqueeze(1)
    return (rows @ w.view(len(x), -1, x.shape[-1]).mT + layer_bias).view(*x.shape[:-1], -1)


def expand(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, layer_bias: Tensor, kernel: int) -> Tensor:
    outputs, inputs = len(layer_bias), x.shape[-1]
    zs = z.view(len(z), *[1] * (x.dim() - 1), -1)
    products = (x.unsqueeze(-1) * zs).flatten(-2)
    return products @ weight.view(outputs, -1).t() + x @ bias.view(outputs, inputs).t() + layer_bias


def ours(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, layer_bias: Tensor, kernel: int) -> Tensor:
    if kernel:
        return ops.hyper_conv2d(x, z, weight, bias, layer_bias, kernel, padding=kernel // 2)
    return ops.hyper_linear(x, z, weight, bias, layer_bias)


def ways(case: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """way -> a function that does one forward and backward and returns y and the five gradients."""
    torch._dynamo.reset()
    tensors = case.tensors()
    functions = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    if not case.kernel and case.rows <= 4:
        functions["compiled expand"] = torch.compile(expand, dynamic=False)
    functions["hyperfast"] = ours
    dy = torch.randn_like(eager(*tensors, case.kernel))

    def step(function):
        def run():
            y = function(*tensors, case.kernel)
            return [y.detach(), *torch.autograd.grad(y, tensors, dy)]

        return run

    return {way: step(function) for way, function in functions.items()}


@pytest.mark.parametrize("group", CASES)
def bench_per_sample(benchmark, report, group):
    rows = []

    def measure() -> None:
        for case in CASES[group]:
            torch.manual_seed(0)
            functions = ways(case)
            wanted = functions["eager"]()
            for way in functions:
                for a, b in zip(functions[way](), wanted, strict=True):
                    assert (a - b).norm() <= 1e-4 * b.norm(), way
            del wanted
            times = interleaved(functions, 9)
            peaks = {way: peak_bytes(function) for way, function in functions.items()}
            cells = []
            for way in ("eager", "compiled", "compiled expand"):
                if way in functions:
                    ratio = paired_ratio(times[way], times["hyperfast"])
                    cells.append(f"{ratio:.2f}, {peaks[way] / MIB:.0f} MiB")
                else:
                    cells.append("")
            own = f"{1e3 * median(times['hyperfast']):.1f} ms, {peaks['hyperfast'] / MIB:.1f} MiB"
            rows.append([*case.label(), str(case.K), own, *cells])

    benchmark.pedantic(measure, rounds=1)
    header = ["layer", "rows a sample", "B", "K", "hyperfast"]
    others = [f"{way}: times ours, memory" for way in ("eager", "compiled", "compiled expand")]
    report(f"weights for each sample, forward + backward, {group}", [*header, *others], rows)
