"""The training step of `full` on two processes of one thread each, connected by gloo: DDP on the eager model,
the best that DDP does, factored gradients, sharded generators; with what a rank sends and holds."""

from __future__ import annotations

import pytest
import torch

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
COUNTED = [("factored", 1), *((way, ranks) for way in ("best", "factored", "sharded") for ranks in (2, 4))]
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
    rows.append([f"main network {1e3 * main:.0f} ms; {memory / 1e9:.1f} GB/s copied, {network / 1e9:.2f} "
                 "GB/s sent by a rank", *[""] * 6])  # fmt: skip
    header = ["way", "median step", "times data parallel", "times sharded", "predicted"]
    header += ["sent by a rank in a step", "peak memory of a process"]
    report(f"training step of `full`, {RANKS} ranks of one thread, batch {BATCH} of both, gloo", header, rows)


def planned(way: str, ranks: int = RANKS) -> Plan | None:
    if way not in PLANNED:
        return None
    with torch.device("meta"):
        model = build_model("full")
    made = plans(model, ranks, gradient_as_bucket_view=way != "eager")
    return next(p for p in made if p.way == PLANNED[way])


@pytest.mark.timeout(900)
def bench_sent_and_held(benchmark, report):
    """What one of 2 and 4 ranks sends in a step and holds after it, against one process and the plan."""
    answers = {}

    def measure() -> None:
        for way, ranks in COUNTED:
            workers = Ranks(way, ranks)
            answers[way, ranks] = workers.steps(3)
            workers.close()

    benchmark.pedantic(measure, rounds=1)
    rows, whole = [], sum(answers["factored", 1]["held"].values())
    for (way, ranks), answer in answers.items():
        plan, held = planned(way, ranks), answer["held"]
        assert answer["sent"] == pytest.approx(plan.sent, rel=0.01), (way, ranks)
        for name, nbytes in held.items():
            assert nbytes == pytest.approx(getattr(plan, name), rel=0.01), (way, ranks, name)
        sent = [f"{nbytes / 1e6:.2f}" if ranks > 1 else "" for nbytes in (answer["sent"], plan.sent)]
        parts = [f"{held[name] / MIB:.0f}" for name in ("parameters", "states", "weights", "gradients")]
        total = sum(held.values())
        all_of_it = [f"{total / MIB:.0f}", f"{total / whole:.2f}", f"{answer['peak_mib']:.0f}"]
        rows.append([LABELS[way], str(ranks), *sent, *parts, *all_of_it])
    header = ["way", "ranks", "sent, MB", "planned", "parameters, MiB", "states", "generated weights"]
    header += ["gradients", "all", "of one process", "peak of the process"]
    report("what one rank sends and holds, `full`", header, rows)
    benchmark.extra_info |= {f"{way}, {ranks} ranks": a["sent"] for (way, ranks), a in answers.items()}
