"""compute-sanitizer on `benchmarks.gpu.smoke`: memcheck (out of bounds, misaligned) and racecheck (shared
memory) on the kernels of Triton and CUDA C++, all four at once.

Torch's kernels are left out by name: instrumented they take most of the time, and what is found in them is
not ours. A filter that leaves out everything would find nothing either, so beside the four an error is
planted for each engine, which memcheck must find with the same filter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.gpu.generators import ENGINES
from benchmarks.gpu.parts import ROOT, last_lines
from benchmarks.gpu.record import Context, Skipped
from benchmarks.gpu.smoke import PLANTED

TOOLS = ("memcheck", "racecheck")
# one is in the name of every kernel of ours; torch's own batch norm has others
KERNELS = (
    "generate_",
    "hyper_",
    "per_sample_",
    "sum_parts_",
    "batch_norm_relu",
    "batch_norm_s",
    "lstm_fwd",
    "lstm_bwd",
)
RESERVE = 3.0  # seconds of the part for reading the results


def find_sanitizer() -> str:
    """Its path; Skipped where there is none."""
    places = [os.environ.get("PATH", "")]
    places += [
        os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    if found is None:
        raise Skipped("compute-sanitizer was not found in PATH, CUDA_HOME and /usr/local/cuda/bin")
    return found


@dataclass
class Verdict:
    """Of one tool on one engine's kernels. problem: what is wrong, nothing if all is well."""

    tool: str
    engine: str
    ran: str
    problem: str


def judge(tool: str, engine: str, output: str, status: int | None) -> Verdict:
    """What the output says; status None: it was stopped."""
    ran = re.findall(r"(\d+) kernels ran", output)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", output)
    said = ran[-1] if ran else "0"
    if status is None:
        return Verdict(tool, engine, said, f"not done in time; last: {last_lines(output, 1)}")
    if not ran:
        return Verdict(tool, engine, said, f"the runs ended with status {status}: {last_lines(output)}")
    if not summaries:
        return Verdict(tool, engine, said, f"no summary, exit status {status}: {last_lines(output)}")
    clean = summaries[-1].startswith("0 errors" if tool == "memcheck" else "0 hazards")
    if not clean or status:
        first = re.search(r"={9} (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)(\S[^\n]*)", output)
        return Verdict(tool, engine, said, f"{summaries[-1]}; first: {first[1] if first else 'see the log'}")
    return Verdict(tool, engine, said, "")


def judge_planted(engine: str, output: str, status: int | None) -> Verdict:
    """Of the planted error, which is to be found."""
    if re.search(r"={9} Invalid __", output):
        return Verdict("memcheck", engine, PLANTED, "")
    said = "not done in time" if status is None else f"exit status {status}"
    problem = f"a planted error was not found, so the filter may leave out everything: {said}"
    return Verdict("memcheck", engine, PLANTED, f"{problem}: {last_lines(output)}")


def run_tool(
    context: Context, program: Sequence[str], tool: str, engine: str, planted: bool = False
) -> Verdict:
    log = context.out / f"sanitizer.{tool}.{engine}{'.' + PLANTED if planted else ''}.log"
    command = [*program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    for name in KERNELS:
        command += ["--kernel-name", f"kns={name}"]
    if tool == "memcheck":  # calls of torch that fail and are handled are none of our business
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu.smoke", *([PLANTED] if planted else []), engine]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    status: int | None = None
    with log.open("wb") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, timeout=max(context.remaining() - RESERVE, 1),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            pass
    output = log.read_text(errors="replace")
    return judge_planted(engine, output, status) if planted else judge(tool, engine, output, status)


def check(context: Context, program: Sequence[str], engines: Sequence[str]) -> None:
    """Both tools on the kernels of every engine, and a planted error for each engine."""
    runs = [(tool, engine, False) for tool in TOOLS for engine in engines]
    runs += [("memcheck", engine, True) for engine in engines]
    with ThreadPoolExecutor(len(runs)) as pool:
        verdicts = list(pool.map(lambda one: run_tool(context, program, *one), runs))
    fine = {PLANTED: "found, as it must be"}
    rows = [[v.tool, v.engine, v.ran, v.problem or fine.get(v.ran, "nothing found")] for v in verdicts]
    context.table("compute-sanitizer", ["tool", "engine", "runs", "found"], rows)
    for v in verdicts:
        if v.problem:
            context.fail(f"{v.tool}, {v.engine}: {v.problem}")
    clean = [f"{v.tool} {v.engine} ({v.ran} runs)" for v in verdicts if not v.problem and v.ran != PLANTED]
    if clean:
        context.line(f"nothing found by {', '.join(clean)}")


def run(context: Context) -> None:
    check(context, [find_sanitizer()], ENGINES)
