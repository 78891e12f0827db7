"""The training step of the hyper WRN-40-1 against the loop over its 242 embeddings and its plain twin, all
ways taking turns in one run."""

from __future__ import annotations

import pytest

from benchmarks import ways
from benchmarks.workers import Comparison

LABELS = {
    "loop": "loop over embeddings, as the public code",
    "loop_channels_last_tuned": "the loop, channels_last, fused Adam, tuned allocator",
    "batched_tuned": "batched generation in plain PyTorch, channels_last, fused Adam, tuned allocator",
    "batched_compiled_tuned": "the same, torch.compile",
    "plain": "plain WRN-40-1, main network and optimizer as hyperfast's",
    "hyperfast": "hyperfast",
}


@pytest.mark.timeout(600)
def bench_step(benchmark, report):
    """forward, backward, Adam; batch 32, float32."""
    with Comparison("wrn", ways.WRN) as comparison:
        wanted = pytest.approx(comparison.values["loop"][:2], rel=5e-3)
        for way in ways.WRN:  # the same network and batch: the same losses until Adam has amplified rounding
            assert way == "plain" or comparison.values[way][:2] == wanted, way
        benchmark.pedantic(comparison.round, rounds=8, warmup_rounds=1)
        rows = [
            [LABELS[way], f"{1e3 * comparison.median(way):.0f} ms", f"{comparison.ratio(way):.2f}"]
            + [f"{comparison.peak_mib[way]:.0f} MiB"]
            for way in ways.WRN
        ]
    header = ["way", "median step", "times hyperfast", "peak memory of the process"]
    report("training step of the hyper WRN-40-1, batch 32, float32", header, rows)
    benchmark.extra_info |= {f"{way} / hyperfast": comparison.ratio(way) for way in ways.WRN}
