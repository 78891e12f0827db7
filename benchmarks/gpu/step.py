"""The whole training step of `full`, every way in a process of its own, all taking turns.

First the losses of the first steps must be those of eager PyTorch; then rounds of the same steps are timed by
the device's clock.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.bench_optim import moved
from benchmarks.gpu.parts import one_line
from benchmarks.gpu.record import Context
from benchmarks.gpu.step_ways import WAYS, Sizes
from benchmarks.gpu.timing import COPIED, Copy, in_turns
from benchmarks.machine import median, paired_ratio
from benchmarks.plain import NUM_GENERATED
from benchmarks.workers import Worker

TOLERANCE = 3e-2  # of a loss, relative: bfloat16 and float32 differ by up to 1.3 % in the first steps
MEASURING = 25.0  # seconds of the part that belong to the rounds
ALONE = 40.0  # seconds of the preparation kept for each way that is prepared alone
CHOOSING = 30.0  # seconds a way may keep the others waiting while it is built or cuDNN chooses
NOT_READY = "not ready in time"
FORMATS = {None: "float32", torch.bfloat16: "bfloat16", "8bit": "8 bits"}


@dataclass
class Comparison:
    """What came of the ways. seconds: one for each round. prepared: the workers' answers. missing: why a way
    has no seconds."""

    prepared: dict[str, dict] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)

    def ratio(self, way: str, base: str) -> float | None:
        """How many times longer `way` takes than `base`; None where one was not measured in every round."""
        a, b = self.seconds.get(way, []), self.seconds.get(base, [])
        return paired_ratio(a, b) if a and len(a) == len(b) else None

    def best_plain(self) -> str | None:
        """The fastest of PyTorch's own ways."""
        plain = [way for way, found in self.seconds.items() if WAYS[way].plain and found]
        return min(plain, key=lambda way: median(self.seconds[way]), default=None)


def start(names: Sequence[str], device: torch.device, sizes: Sizes) -> dict[str, Worker]:
    options = json.dumps({**asdict(sizes), "device": str(device)})
    module = "benchmarks.gpu.step_worker"
    return {name: Worker(name, [sys.executable, "-m", module, name, options]) for name in names}


class Late(Exception):
    """A worker has not answered yet."""


def prepare(context: Context, workers: dict[str, Worker], seconds: float) -> Comparison:
    """Makes all ways ready and leaves out those that fail or are late.

    All are built at once. Then, one after the other, cuDNN chooses algorithms by timing them; ways that are
    compiled come first, since the others wait for them. Compilers then work at once, on the CPU, and the ways
    that choose among kernels by timing them have the last seconds alone, or with those that are late.
    """
    found, end = Comparison(), time.monotonic() + seconds
    for worker in workers.values():
        tell(worker, "build")
    for way in sorted(workers, key=lambda way: (WAYS[way].alone, not WAYS[way].compile_mode)):
        try:
            ask(workers[way], CHOOSING)
            ask(workers[way], CHOOSING, "choose")
        except (Late, RuntimeError) as problem:
            drop(context, workers, found, way, str(problem))
        else:
            if not WAYS[way].alone:
                tell(workers[way], "prepare")

    def gather(ways: Sequence[str], until: float, request: str | None = None) -> list[str]:
        late = []
        for way in ways:
            try:
                found.prepared[way] = ask(workers[way], max(until - time.monotonic(), 0.5), request)
            except Late:
                late.append(way)
            except RuntimeError as problem:
                drop(context, workers, found, way, str(problem))
        return late

    alone = [way for way in workers if WAYS[way].alone]
    late = gather([way for way in workers if way not in alone], end - ALONE * len(alone))
    for way in [*gather(alone, end, "prepare"), *gather(late, end)]:
        drop(context, workers, found, way, NOT_READY, fail=not WAYS[way].alone)
    return found


def drop(
    context: Context, workers: dict[str, Worker], found: Comparison, way: str, why: str, fail: bool = True
) -> None:
    """A way is not measured any more; fail: something does not work."""
    if fail:
        context.fail(f"{way}: {why}")
    found.missing[way] = why
    found.seconds.pop(way, None)
    workers.pop(way).kill()


def tell(worker: Worker, request: str | int) -> None:
    """Asks and does not wait; one that has ended says so when its answer is read."""
    with contextlib.suppress(OSError):
        worker.ask(request)


def ask(worker: Worker, seconds: float, request: str | int | None = None) -> dict:
    """The worker's answer, to `request` or to what it was asked before. Late, or RuntimeError in one line."""
    if request is not None:
        tell(worker, request)
    try:
        said = worker.answer(seconds)
    except TimeoutError as problem:
        raise Late(str(problem)) from problem
    except (OSError, ValueError) as problem:
        raise RuntimeError(one_line(problem)) from problem
    if "error" in said:
        raise RuntimeError(said["error"])
    return said


def check(context: Context, workers: dict[str, Worker], found: Comparison) -> None:
    """Leaves out the ways whose first losses are not eager's."""
    wanted = found.prepared.get("eager", {}).get("values")
    if wanted is None:
        context.fail("without eager PyTorch nothing can be checked")
        return
    for way, said in list(found.prepared.items()):
        got = said["values"]
        if not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(got, wanted, strict=True)):
            why = f"computes something else: losses {numbers(got)}, eager's {numbers(wanted)}"
            drop(context, workers, found, way, why)
            del found.prepared[way]


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:.4f}" for v in values)


def measure(
    context: Context, workers: dict[str, Worker], found: Comparison, device: torch.device, rounds: int,
    steps: int, copied: int,
) -> None:  # fmt: skip
    """Rounds in which every way does `steps` steps, after one that does not count; fewer where time runs
    out."""
    copy = Copy(device, copied)
    for number in range(1 + rounds):
        began = time.monotonic()
        bandwidth = copy.moved / median(in_turns({"copy": copy}, device, 3)["copy"])
        for way in list(workers):
            try:
                said = ask(workers[way], max(context.remaining() - 3, 1.0), steps)
            except (Late, RuntimeError) as problem:
                drop(context, workers, found, way, f"in round {number}: {problem}")
                continue
            if number:
                found.seconds.setdefault(way, []).append(said["seconds"])
        if number:
            found.bandwidths.append(bandwidth)
            report(context, found)
        if context.remaining() < 4 + 2 * (time.monotonic() - began):
            break


def bytes_of_generators(way: str) -> float:
    """What the step must read and write for the generators, states as the way stores them: dz's pass, the
    update, the next weights; K = 16."""
    return (moved(2, FORMATS[WAYS[way].state_dtype]) + 4 + 4 / 16) * 16 * NUM_GENERATED


def report(context: Context, found: Comparison) -> None:
    """Table and facts of the rounds so far."""
    best, bandwidth = found.best_plain(), median(found.bandwidths or [0.0])
    rows, lines = [], []
    for way, seconds in found.seconds.items():
        said, ratio = found.prepared[way], found.ratio(way, "hyperfast")
        time_of = f"{1e3 * median(seconds):.3f} ms"
        times = f"{ratio:.2f}" if ratio else "-"
        peaks = [f"{said['allocated_mib']:.0f} MiB", f"{said['reserved_mib']:.0f} MiB"]
        share = ""
        if way.startswith("hyperfast"):
            share = f"{100 * bytes_of_generators(way) / median(seconds) / bandwidth:.0f} %"
        label = WAYS[way].label + (" (the best of PyTorch)" if way == best else "")
        rows.append([label, time_of, times, *peaks, share])
        lines.append(f"{time_of}, {times:>5} x hyperfast, peak {peaks[0]}: {label}")
    for way, why in found.missing.items():
        rows.append([WAYS[way].label, why, *["-"] * 3, ""])
        lines.append(f"{why}: {WAYS[way].label}")
    header = ["way", "median step", "times hyperfast", "peak allocated", "peak reserved",
              "generators' bytes at copy bandwidth, of the step"]  # fmt: skip
    context.record.lines = lines
    context.table("Training step of `full`, batch 64, dropout 0, all ways in turns", header, rows)
    context.fact(
        step_seconds={way: median(seconds) for way, seconds in found.seconds.items()},
        step_copy_bytes_per_second=bandwidth, best_plain=best, rounds=len(found.bandwidths),
        against_eager=found.ratio("eager", "hyperfast"),
        against_best=found.ratio(best, "hyperfast") if best else None,
        against_best_8bit=found.ratio(best, "hyperfast_8bit") if best else None,
        against_factored_reference=found.ratio("factored_reference", "hyperfast"),
        memory=of_memory(found, "hyperfast"), memory_8bit=of_memory(found, "hyperfast_8bit"),
        goal_words=goal_words(found),
    )  # fmt: skip


def goal_words(found: Comparison) -> dict[str, str]:
    """What the goals' numbers are held against, and which ways are missing in them."""

    def lost(*ways: str) -> str:
        return "; ".join(f"{way} {found.missing[way]}" for way in ways if way in found.missing)

    words = {"against_eager": lost("eager", "hyperfast")}
    words |= {"memory": lost("fused", "hyperfast"), "memory_8bit": lost("fused", "hyperfast_8bit")}
    without = lost(*(way for way in WAYS if WAYS[way].plain))
    against = f"against {found.best_plain() or 'nothing'}" + (f", without {without}" if without else "")
    for fact, way in (("against_best", "hyperfast"), ("against_best_8bit", "hyperfast_8bit")):
        words[fact] = lost(way) or against
    return words


def of_memory(found: Comparison, way: str) -> float | None:
    """Its peak over that of eager PyTorch with fused AdamW."""
    peaks = [found.prepared.get(name, {}).get("allocated_mib") for name in (way, "fused")]
    return peaks[0] / peaks[1] if all(peaks) else None


def compare(
    context: Context, device: torch.device, names: Sequence[str], sizes: Sizes, rounds: int, steps: int,
    copied: int = COPIED,
) -> Comparison:  # fmt: skip
    """Starts, prepares, checks and measures the ways; ends their processes."""
    workers = start(names, device, sizes)
    started = list(workers.values())
    try:
        found = prepare(context, workers, context.remaining() - MEASURING)
        context.fact(prepared=found.prepared)
        check(context, workers, found)
        measure(context, workers, found, device, rounds, steps, copied)
    finally:
        for worker in started:
            worker.kill()
    report(context, found)
    if "hyperfast" not in found.seconds:
        context.fail("hyperfast was not measured")
    return found


def run(context: Context) -> None:
    compare(context, torch.device("cuda"), list(WAYS), Sizes(), rounds=12, steps=20)
