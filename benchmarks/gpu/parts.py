"""The parts and the processes they run in."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.record import Context, Record, Skipped

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """`run(context)` of a module, in a process of its own that has so many seconds."""

    name: str
    seconds: float
    what: str
    module: str = ""

    def module_name(self) -> str:
        return self.module or f"benchmarks.gpu.{self.name}"


PARTS = (
    Part(
        "build", 60, "compile what is missing or old; what was built; registers and shared memory of kernels"
    ),
    Part("tests", 75, "the tests that need a GPU"),
    Part("sanitizer", 55, "compute-sanitizer, memcheck and racecheck, on small runs of every kernel"),
    Part("machine", 15, "copy bandwidth, peak of matrix products, cost of a launch in a CUDA graph"),
    Part("ops", 65, "every op by Triton, CUDA C++ and torch.compile"),
    Part("lstm", 60, "HyperLSTM over a sequence against cuDNN's LSTM and the loops of PyTorch"),
    Part("step", 115, "the whole training step of `full`, all ways in turns"),
    Part("train", 65, "`full` to 54.16 % test accuracy"),
)


@dataclass
class Outcome:
    """status: ok, failed, timeout or skipped. why: one line for anything but ok."""

    part: Part
    status: str
    seconds: float
    why: str = ""
    record: Record = field(default_factory=Record)


def run_in_process(part: Part, out: Path, data: Path | None = None) -> Outcome:
    """Runs a part in a process group of its own and ends all of it: at its time limit, after an interruption,
    or when it is done. Output goes to out/NAME.log."""
    log, record_path = out / f"{part.name}.log", out / f"{part.name}.json"
    record_path.unlink(missing_ok=True)
    arguments = [part.name, str(part.seconds), part.module_name(), str(out), str(data or "")]
    command = [sys.executable, "-m", "benchmarks.gpu.parts", *arguments]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status: int | None = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    return _outcome(part, status, time.monotonic() - start, Record.load(record_path), log)


def _outcome(part: Part, status: int | None, seconds: float, record: Record, log: Path) -> Outcome:
    said = last_lines(log.read_text(errors="replace"))
    if status is None:
        why = f"stopped after its {part.seconds:.0f} s" + (f"; last: {said}" if said else "")
        return Outcome(part, "timeout", seconds, "; ".join([*record.failures, why]), record)
    if record.failures:
        return Outcome(part, "failed", seconds, "; ".join(record.failures), record)
    if status:
        ended = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        return Outcome(part, "failed", seconds, f"{ended}: {said}", record)
    if record.skipped:
        return Outcome(part, "skipped", seconds, record.skipped, record)
    return Outcome(part, "ok", seconds, "", record)


def last_lines(text: str, count: int = 2) -> str:
    """The last lines that say something, as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])


def end_group(process: subprocess.Popen, patience: float = 3.0) -> None:
    """Ends every process of the group that `process` leads: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def one_line(error: BaseException) -> str:
    """Kind and message of an error, the message's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main(name: str, seconds: str, module: str, out: str, data: str) -> int:
    """The part itself, in this process; exit status."""
    context = Context(name, Path(out), float(seconds), Path(data) if data else None)
    try:
        importlib.import_module(module).run(context)
    except Skipped as reason:
        context.skip(str(reason))
    except Exception as error:
        traceback.print_exc()
        context.fail(one_line(error))
    return 1 if context.record.failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
