"""`full` to the published accuracy, by the training command itself."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.parts import ROOT, last_lines
from benchmarks.gpu.record import Context, Skipped
from benchmarks.gpu.report import NOT_REACHED

TARGET = 54.16  # percent of the test images, published for `full`
OPTIONS = ("--fused", "--recipe", "fast", "--precision", "bf16", "--target-accuracy", str(TARGET))
OPTIONS += ("--save-every", "1000")  # last.pt, 1 GB, at the end alone
MEMORY = Path("/dev/shm")
CHECKPOINTS = 4 << 30  # bytes for last.pt and best.pt, each with the file that takes its place


def find_data(given: Path | None) -> Path:
    """The folder of the data; Skipped where there is none, since nothing is downloaded here."""
    where = given or os.environ.get("HYPERFAST_DATA")
    if not where:
        raise Skipped("no data: give --data DIR or set HYPERFAST_DATA")
    folder = Path(where).expanduser().resolve()
    if not folder.is_dir():
        raise Skipped(f"no data: {folder} is not a folder")
    return folder


def workplace(out: Path) -> Path:
    """Where checkpoints are written: in memory where there is room, since a disk that is waited for at every
    better epoch is none of the training; `out` otherwise."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        return out
    return MEMORY if shutil.disk_usage(MEMORY).free >= CHECKPOINTS else out


def train(context: Context, options: Sequence[str]) -> None:
    """Runs the command; keeps in DIR/run all it wrote but checkpoints."""
    kept = context.out / "run"
    shutil.rmtree(kept, ignore_errors=True)  # an earlier run of this benchmark
    where = workplace(context.out)
    with tempfile.TemporaryDirectory(prefix="hyperfast-", dir=where, ignore_cleanup_errors=True) as name:
        folder = Path(name) / "run"
        run_command(context, options, folder)
        if folder.is_dir():
            shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("*.pt", ".*.tmp"))


def run_command(context: Context, options: Sequence[str], folder: Path) -> None:
    """Runs the command and reads what it left in `folder`, also where it was stopped."""
    command = [sys.executable, "-m", "train.cifar100", *options, "--out", str(folder)]
    context.fact(command=f"python -m train.cifar100 {' '.join(options)}")
    log = context.out / "train.output.log"
    status: int | None = None
    with log.open("wb") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                timeout=max(context.remaining() - 3, 1),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            pass
    rows = read_metrics(folder / "metrics.csv")
    if rows:
        report(context, rows)
    if status is None:
        context.fail("stopped before it was done")
    elif status:
        context.fail(f"exit status {status}: {last_lines(log.read_text(errors='replace'), 1)}")
    elif not rows:
        context.fail("no epoch was recorded")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """A row of numbers for each epoch."""
    if not path.exists():
        return []
    with path.open() as file:
        return [{name: float(v) for name, v in row.items() if v} for row in csv.DictReader(file)]


def report(context: Context, rows: Sequence[dict[str, float]]) -> None:
    """Seconds of training (evaluation is beside them) until the target, or how far it came."""
    reached = next((i for i, row in enumerate(rows) if row["test_accuracy"] >= TARGET), None)
    until = rows if reached is None else rows[: reached + 1]
    seconds, evaluation = (sum(row[name] for row in until) for name in ("seconds", "evaluation_seconds"))
    best = max(row["test_accuracy"] for row in until)
    context.fact(train_epochs=len(until), train_best_accuracy=best, train_seconds=seconds)
    context.fact(train_evaluation_seconds=evaluation)
    if reached is not None:
        context.fact(seconds_to_target=seconds)
    else:
        context.fact(goal_words={"seconds_to_target": f"{NOT_REACHED} (best {best:.2f} %)"})
    startup = sum(row.get("startup_seconds", 0.0) for row in until)
    context.fact(train_startup_seconds=startup)
    result = f"{seconds:.1f} s of training ({startup:.1f} s of them until the step was captured), "
    result += f"{len(until)} epochs, {evaluation:.1f} s of evaluation beside it"
    goal = f"{best:.2f} % of test images" + ("" if reached is not None else f", {TARGET} % was not reached")
    context.line(f"{goal}: {result}")
    cells = [
        [
            f"{row['epoch']:.0f}",
            f"{row['train_loss']:.3f}",
            f"{row['test_accuracy']:.2f} %",
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]
    context.table("Training `full`", ["epoch", "train loss", "test accuracy", "seconds of training"], cells)


def run(context: Context) -> None:
    folder = find_data(context.data)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes too
    train(context, [*OPTIONS, "--data", str(folder)])
