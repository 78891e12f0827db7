"""The training step of `full` on two processes of one thread each, connected by gloo: DDP on the eager model,
the best that DDP does, factored gradients, sharded generators; with what a rank sends and holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.ranks import COPIED, PROBES, Ranks, RanksComparison
from benchmarks.ways import BATCH
from hyperfast.distributed.plan import Plan, plans
from train.models import build_model

LABELS = {
    "eager": "DDP as users write it (default AdamW)",
    "best": "DDP, channels_last, fused AdamW, gradient_as_bucket_view, tuned allocator",
    "best_bf16": "the same, gradients compressed to bfloat16",
    "factored": "hyperfast, data parallel",
    "sharded": "hyperfast, sharded generators",
}
PLANNED = {"eager": "dense", "best": "dense", "factored": "factored", "sharded": "sharded"}
RANKS = 2
MIB = 2**20


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "ways",
    [("eager", "factored", "sharded"), ("best", "best_bf16", "factored", "sharded")],
    ids=["eager", "best"],
)
def bench_step(benchmark, report, ways):
    """forward, backward, clip, AdamW. Two comparisons, since all ways at once need 20 GB of memory."""
    with RanksComparison(str(RANKS), (*ways, *PROBES)) as comparison:
        for way in ways:  # the same network, batch and dropout
            assert comparison.values[way] == pytest.approx(comparison.values["factored"], rel=2e-2), way
        benchmark.pedantic(comparison.round, rounds=5)
        main = comparison.median("main")
        memory = 2 * COPIED / comparison.median("memory")
        network = COPIED / comparison.median("network")  # what an all-reduce between two sends
        rows = []
        for way in ways:
            sent, plan = comparison.answer(way)["sent"], planned(way)
            assert plan is None or sent == pytest.approx(plan.sent, rel=0.01), way
            predicted = plan and plan.seconds(network, memory, main)
            rows.append([
                LABELS[way], f"{1e3 * comparison.median(way):.0f} ms",
                f"{comparison.ratio(way, 'factored'):.2f}", f"{comparison.ratio(way, 'sharded'):.2f}",
                f"{1e3 * predicted:.0f} ms" if predicted else "", f"{sent / 1e6:.2f} MB",
                f"{comparison.peak_mib[way]:.0f} MiB",
            ])  # fmt: skip
        benchmark.extra_info |= {f"{way} / factored": comparison.ratio(way, "factored") for way in ways}
    rows.append([f"main network {1e3 * main:.0f} ms; {memory / 1e9:.1f} GB/s copied and {network / 1e9:.2f} "
                 "GB/s sent by a rank", *[""] * 6])  # fmt: skip
    header = ["way", "median step", "times data parallel", "times sharded", "predicted"]
    header += ["sent by a rank in a step", "peak memory of a process"]
    report(f"training step of `full`, {RANKS} ranks of one thread, batch {BATCH} of both, gloo", header, rows)


def planned(way: str) -> Plan | None:
    if way not in PLANNED:
        return None
    made = plans(shape_of_full(), RANKS, gradient_as_bucket_view=way != "eager")
    return next(p for p in made if p.way == PLANNED[way])


def shape_of_full() -> nn.Module:
    with torch.device("meta"):
        return build_model("full")


@pytest.mark.timeout(600)
def bench_memory(benchmark, report):
    """What the first rank holds after a step: one process, then sharded over 2 and 4."""
    answers = {}

    def measure() -> None:
        for way, ranks in (("factored", 1), ("sharded", 2), ("sharded", 4)):
            workers = Ranks(way, ranks)
            answers[ranks] = workers.steps(3)
            workers.close()

    benchmark.pedantic(measure, rounds=1)
    assert answers[2]["values"] == pytest.approx(answers[1]["values"], rel=0.2)  # other dropout
    model = shape_of_full()
    rows, whole = [], sum(answers[1]["held"].values())
    for ranks, answer in answers.items():
        plan, held = plans(model, ranks)[1 if ranks == 1 else 2], answer["held"]
        for name, nbytes in held.items():
            assert nbytes == pytest.approx(getattr(plan, name), rel=0.01), (ranks, name)
        parts = [f"{held[name] / MIB:.0f}" for name in ("parameters", "states", "weights", "gradients")]
        total = sum(held.values())
        rows.append(
            [str(ranks), *parts, f"{total / MIB:.0f}", f"{total / whole:.2f}", f"{answer['peak_mib']:.0f}"]
        )
    header = ["ranks", "parameters, MiB", "states", "generated weights", "gradients", "all", "of one process"]
    report("memory of a rank, `full`, sharded", [*header, "peak of the process"], rows)
    benchmark.extra_info |= {f"{row[0]} ranks": row[-2] for row in rows}
