"""Optimizers from dw to the weights of the next forward, against torch's fused ones on dense gradients.

One round of a way: the gradient of every generator from dw and z, the optimizer's step, and the weights
that the next forward needs. torch forms dw outer z, steps and generates; hyperfast does it in one pass, with
states in float32, bfloat16 or 8 bits. All take turns in one process, over eight layers of together 20 million
weights (K = 16), which no cache holds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from benchmarks.machine import COPY_BYTES, Copy, interleaved, median, paired_ratio
from hyperfast.nn import LinearGenerator

ELEMENTS, LAYERS, K = 20_000_000, 8, 16
STATES = {"float32": None, "bfloat16": torch.bfloat16, "8 bits": "8bit"}
OPTIMIZERS = {
    "AdamW": (hyperfast.optim.AdamW, torch.optim.AdamW, {"lr": 1e-3}, 2),
    "Adam": (hyperfast.optim.Adam, torch.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-4}, 2),
    "SGD": (hyperfast.optim.SGD, torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, 1),
}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "8 bits": 1 + 4 / 256}  # 16 rows of 16 share a scale


def moved(states: int, storage: str) -> float:
    """Bytes of a pass for each generator weight: weight and states read and written, and a K-th of that for
    the bias, with dw read and w written. 32 elements of a bias share a scale."""
    bias_state = STATE_BYTES[storage] + (4 / 32 - 4 / 256 if storage == "8 bits" else 0)
    return 8 + 2 * states * STATE_BYTES[storage] + (16 + 2 * states * bias_state) / K


def generators() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(LinearGenerator((ELEMENTS // LAYERS // K,), K) for _ in range(LAYERS))


def ours(kind: type, options: dict, state_dtype, dws: list[torch.Tensor]):
    made = hyperfast.factored_(generators())
    optimizer = kind(made, **options, state_dtype=state_dtype)
    for g, dw in zip(made, dws, strict=True):
        g.bias.grad, g.z.grad = dw.clone(), torch.ones(K)

    def step() -> list[torch.Tensor]:
        optimizer.step()
        return [g.next_weights()[0] for g in made]

    return step


def theirs(kind: type, options: dict, dws: list[torch.Tensor]):
    made = generators()
    optimizer = kind(made.parameters(), **options, fused=True)
    for g, dw in zip(made, dws, strict=True):
        g.weight.grad, g.bias.grad, g.z.grad = torch.empty_like(g.weight), dw.clone(), torch.ones(K)

    @torch.no_grad()
    def step() -> list[torch.Tensor]:
        for g in made:
            torch.outer(g.bias.grad, g.z, out=g.weight.grad)
        optimizer.step()
        return [F.linear(g.z, g.weight, g.bias) for g in made]

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def bench_optimizer(benchmark, report, name):
    kind, torch_kind, options, count = OPTIMIZERS[name]
    dws = [torch.randn(ELEMENTS // LAYERS // K) * 1e-3 for _ in range(LAYERS)]
    steps = {storage: ours(kind, options, dtype, dws) for storage, dtype in STATES.items()}
    steps["torch"] = theirs(torch_kind, options, dws)
    first = {way: step() for way, step in steps.items()}  # no state yet: all storages do the same
    for way, made in first.items():
        for a, b in zip(made, first["torch"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{way} computes something else")
    times = {}
    benchmark.pedantic(lambda: times.update(interleaved({**steps, "copy": Copy()}, 9)), rounds=1)
    bandwidth = COPY_BYTES / median(times["copy"])
    rows = []
    for storage in STATES:
        size = moved(count, storage)
        share = size * ELEMENTS / median(times[storage]) / bandwidth
        ratio = paired_ratio(times["torch"], times[storage])
        rows.append([
            f"hyperfast, {storage}", f"{1e3 * median(times[storage]):.1f} ms", f"{size:.1f}",
            f"{100 * size / moved(count, 'float32'):.0f} %", f"{ratio:.2f}", f"{100 * share:.0f} %",
        ])  # fmt: skip
    rows.append(["torch, fused, dense", f"{1e3 * median(times['torch']):.1f} ms", "", "", "1.00", ""])
    header = ["states", "step", "bytes a weight", "of float32's", "torch / this", "copy bandwidth"]
    report(f"{name}, from dw to the next weights, K = {K}, 20 M weights", header, rows)
    benchmark.extra_info |= {f"torch / {s}": paired_ratio(times["torch"], times[s]) for s in STATES}
