"""The training step of `full`, whole and the generators' part of it, all ways taking turns in one run."""

from __future__ import annotations

import pytest

from benchmarks import ways
from benchmarks.machine import COPY_BYTES, Copy, median, seconds
from benchmarks.plain import NUM_GENERATED
from benchmarks.workers import Comparison

# read weight for dz; read and write weight, exp_avg and exp_avg_sq: float32, K = 16
STEP_BYTES = 28 * 16 * NUM_GENERATED
LABELS = {
    "eager": "PyTorch as users write it",
    "channels_last": "channels_last, fused AdamW",
    "compiled": "channels_last, fused AdamW, torch.compile",
    "channels_last_tuned": "channels_last, fused AdamW, tuned allocator",
    "compiled_tuned": "channels_last, fused AdamW, torch.compile, tuned allocator",
    "factored_reference": "torch.compile of our factored reference",
    "hyperfast": "hyperfast",
    "hyperfast_compiled": "hyperfast under torch.compile",
}


def check_values(comparison: Comparison, tolerance: float) -> None:
    """Every way computes the same: what its first steps returned, against eager."""
    wanted = comparison.values["eager"]
    for way, values in comparison.values.items():
        assert values == pytest.approx(wanted, rel=tolerance), f"{way} computes something else"


def rows_of(comparison: Comparison, base: str) -> list[list[str]]:
    return [
        [LABELS[way], f"{1e3 * comparison.median(way):.0f} ms", f"{comparison.ratio(way, base):.2f}"]
        + [f"{comparison.peak_mib[way]:.0f} MiB"]
        for way in comparison.names
    ]


HEADER = ["way", "median step", "times hyperfast", "peak memory of the process"]


@pytest.mark.timeout(600)
def bench_generator_part(benchmark, report):
    """generate + backward + clip + AdamW."""
    copy, copies = Copy(), []
    with Comparison("part", ways.PART) as comparison:
        check_values(comparison, 1e-4)

        def one_round() -> None:
            copies.append(seconds(copy))
            comparison.round()

        benchmark.pedantic(one_round, rounds=8, warmup_rounds=1)
        bandwidth = COPY_BYTES / median(copies[1:])
        share = STEP_BYTES / comparison.median("hyperfast") / bandwidth
        rows = rows_of(comparison, "hyperfast")
    rows.append([f"copy: {bandwidth / 1e9:.1f} GB/s", "", f"hyperfast moves {STEP_BYTES / 1e9:.2f} GB: "
                 f"{100 * share:.0f} % of copy bandwidth", ""])  # fmt: skip
    report("generate + backward + clip + AdamW of `full`, float32", HEADER, rows)
    benchmark.extra_info |= {f"{way} / hyperfast": comparison.ratio(way) for way in ways.PART}
    benchmark.extra_info["copy bandwidth share"] = share


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind,names,tolerance,precision",
    [("whole", ways.WHOLE, 5e-3, "float32"), ("whole_bf16", ways.WHOLE_BF16, 2e-2, "bfloat16 autocast")],
    ids=["float32", "bfloat16"],
)
def bench_whole_step(benchmark, report, kind, names, tolerance, precision):
    """forward, backward, clip, AdamW, batch 64."""
    with Comparison(kind, names) as comparison:
        check_values(comparison, tolerance)
        benchmark.pedantic(comparison.round, rounds=8, warmup_rounds=1)
        rows = rows_of(comparison, "hyperfast")
    report(f"training step of `full`, batch 64, {precision}", HEADER, rows)
    benchmark.extra_info |= {f"{way} / hyperfast": comparison.ratio(way) for way in names}
    benchmark.extra_info |= {f"{way} peak MiB": peak for way, peak in comparison.peak_mib.items()}
