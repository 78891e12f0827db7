"""Batch norm -> ReLU -> 2x2 max pool of `full`, forward and backward, all ways taking turns in one run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ways
from benchmarks.bench_step import check_values
from benchmarks.machine import COPY_BYTES, Copy, median, seconds
from benchmarks.workers import Comparison

LABELS = {
    "eager": "PyTorch as users write it, channels_last",
    "compiled": "the same, torch.compile",
    "hyperfast_untuned": "hyperfast",
    "eager_tuned": "PyTorch as users write it, channels_last, tuned allocator",
    "compiled_tuned": "the same, torch.compile, tuned allocator",
    "hyperfast": "hyperfast, tuned allocator",
}


def check_gradients() -> None:
    """Outputs and gradients of every layer equal those of torch's modules."""
    layers = zip(
        ways.pooled_layers("hyperfast"), ways.pooled_layers("eager"), ways.pooled_tensors(), strict=True
    )
    for ours, theirs, (x, dy) in layers:
        results = []
        for layer in (ours, theirs):
            y = layer(x)
            results.append((y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.timeout(600)
def bench_batch_norm_relu_max_pool(benchmark, report):
    """The five of a training step, batch 64."""
    check_gradients()
    copy, copies = Copy(), []
    with Comparison("pooled", ways.POOLED) as comparison:
        check_values(comparison, 2e-2)

        def one_round() -> None:
            copies.append(seconds(copy))
            comparison.round()

        benchmark.pedantic(one_round, rounds=12, warmup_rounds=1)
    bandwidth = COPY_BYTES / median(copies[1:])
    rows = []
    for way in comparison.names:
        base = "hyperfast" if ways.tuned_allocator(way) else "hyperfast_untuned"
        share = ways.pooled_bytes(ways.pooled_tensors()) / comparison.median(way) / bandwidth
        row = [
            f"{1e3 * comparison.median(way):.1f} ms",
            f"{comparison.ratio(way, base):.2f}",
            f"{100 * share:.0f} %",
        ]
        rows.append([LABELS[way], *row])
    header = ["way", "median", "times hyperfast with the same allocator", "floor's bytes at copy bandwidth"]
    report("batch norm + ReLU + max pool of `full`, forward and backward, batch 64, float32", header, rows)
    benchmark.extra_info |= {f"{way} / hyperfast": comparison.ratio(way) for way in ways.POOLED}
