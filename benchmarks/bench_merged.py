"""Generation merged with the layer against generating first, over sizes: where it wins and where it loses.

eager      as users write it: F.linear for the weights, then F.linear or F.conv2d
compiled   torch.compile of that
separate   ops.generate, then F.linear or F.conv2d: path="separate"
merged     path="merged"

Times of one call, all ways in turns in one process. With gradients ours are factored (no gradient of the
generator's weight is formed), as they are in training; eager and compiled form it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import interleaved, median, paired_ratio
from hyperfast import ops
from hyperfast.ops.hyper_layers import merged_wins

WAYS = ("eager", "compiled", "separate", "merged")


class Case(NamedTuple):
    """kernel 0: a linear layer of `rows` rows; else a convolution of one image of `rows` places."""

    rows: int
    inputs: int
    outputs: int
    K: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    kernel: int = 0

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * max(self.kernel, 1) ** 2

    def tensors(self) -> list[Tensor]:
        """x, z, weight, bias, layer_bias"""
        side = int(self.rows**0.5)
        x_shape = (1, self.inputs, side, side) if self.kernel else (self.rows, self.inputs)
        N = self.weights
        made = [torch.randn(s) for s in (x_shape, (self.K,), (N, self.K), (N,), (self.outputs,))]
        made[1:4] = [t * s for t, s in zip(made[1:4], (self.K**-0.5, self.inputs**-0.5, 0.01), strict=True)]
        return [t.to(self.dtype).requires_grad_(self.backward) for t in made]

    def label(self) -> list[str]:
        layer = f"conv {self.kernel}x{self.kernel}" if self.kernel else "linear"
        size = f"{self.inputs} -> {self.outputs}"
        what = "forward + backward" if self.backward else "forward"
        return [f"{layer} {size}", str(self.K), str(self.rows), str(self.dtype)[6:], what]


def linears(rows, dtype=torch.float32, backward=False):
    return [Case(m, 512, 1024, 16, dtype, backward) for m in rows]


CASES = {
    "linear": [
        *linears([1, 16, 64, 256]),
        *linears([1, 16, 256], torch.bfloat16),
        Case(16, 512, 1024, 16, torch.float64),
        Case(1, 512, 1024, 4),
        Case(16, 512, 1024, 64),
        Case(16, 4096, 10, 16),
        Case(16, 64, 64, 16),
    ],
    "convolution": [
        Case(16, 512, 512, 16, kernel=3),
        Case(16, 128, 256, 16, kernel=3),
        Case(64, 128, 256, 16, kernel=3),
        Case(64, 128, 256, 16, torch.bfloat16, kernel=3),
        Case(256, 64, 128, 16, kernel=3),
        Case(256, 64, 256, 16, kernel=1),
    ],
    "with gradients": [
        *linears([1, 16, 256], backward=True),
        *linears([16], torch.bfloat16, backward=True),
        Case(64, 128, 256, 16, backward=True, kernel=3),
    ],
}


def eager(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, layer_bias: Tensor, kernel: int) -> Tensor:
    w = F.linear(z, weight, bias)
    if kernel:
        return F.conv2d(x, w.view(-1, x.shape[1], kernel, kernel), layer_bias, padding=kernel // 2)
    return F.linear(x, w.view(-1, x.shape[1]), layer_bias)


def ours(path: str, case: Case):
    def call(*tensors) -> Tensor:
        if case.kernel:
            sizes = case.kernel, 1, case.kernel // 2
            return ops.hyper_conv2d(*tensors, *sizes, factored=case.backward, path=path)
        return ops.hyper_linear(*tensors, factored=case.backward, path=path)

    return call


def ways(case: Case) -> dict:
    """way -> a function that does one call and returns its result and, with gradients, that of z."""
    torch._dynamo.reset()
    tensors = case.tensors()
    compiled = torch.compile(eager, dynamic=False)
    functions = {
        "eager": lambda *t: eager(*t, case.kernel),
        "compiled": lambda *t: compiled(*t, case.kernel),
        "separate": ours("separate", case),
        "merged": ours("merged", case),
    }
    dy = torch.randn_like(functions["eager"](*tensors))

    def step(function):
        def run():
            if not case.backward:
                with torch.no_grad():
                    return [function(*tensors)]
            y = function(*tensors)
            return [y.detach(), *torch.autograd.grad(y, tensors, dy, allow_unused=True)[:2]]

        return run

    return {way: step(function) for way, function in functions.items()}


@pytest.mark.parametrize("group", CASES)
def bench_merged(benchmark, report, group):
    rows = []

    def measure() -> None:
        for case in CASES[group]:
            torch.manual_seed(0)
            functions = ways(case)
            tolerance = 0.1 if case.dtype == torch.bfloat16 else 1e-3
            for wanted, got in zip(functions["eager"](), functions["merged"](), strict=True):
                assert (got - wanted).norm() <= tolerance * wanted.norm()
            times = interleaved(functions, 25 if case.weights < 1_000_000 else 11)
            ratios = {way: paired_ratio(times[way], times["merged"]) for way in WAYS[:3]}
            weight = torch.empty(1, case.K, dtype=case.dtype)
            taken = merged_wins(case.rows, weight, case.backward, case.kernel > 0)
            cells = [f"{ratio:.2f}" for ratio in ratios.values()]
            path = "merged" if taken else "separate"
            rows.append([*case.label(), f"{1e6 * median(times['merged']):.0f} us", *cells, path])

    benchmark.pedantic(measure, rounds=1)
    header = ["layer", "K", "rows", "dtype", "what", "merged", *(f"{way} / merged" for way in WAYS[:3])]
    report(f"generation merged with the layer, {group}", [*header, "auto takes"], rows)
