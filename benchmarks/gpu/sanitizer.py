"""compute-sanitizer on `benchmarks.gpu.smoke`: memcheck (out of bounds, misaligned) and racecheck (shared
memory) on the kernels of Triton and CUDA C++, all four at once."""

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

TOOLS = ("memcheck", "racecheck")
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


def run_tool(context: Context, program: Sequence[str], tool: str, engine: str) -> Verdict:
    log = context.out / f"sanitizer.{tool}.{engine}.log"
    command = [*program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "99"]
    if tool == "memcheck":  # calls of torch that fail and are handled are none of our business
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu.smoke", engine]
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
    return judge(tool, engine, log.read_text(errors="replace"), status)


def check(context: Context, program: Sequence[str], engines: Sequence[str]) -> None:
    """Both tools on the kernels of every engine."""
    pairs = [(tool, engine) for tool in TOOLS for engine in engines]
    with ThreadPoolExecutor(len(pairs)) as pool:
        verdicts = list(pool.map(lambda pair: run_tool(context, program, *pair), pairs))
    rows = [[v.tool, v.engine, v.ran, v.problem or "nothing found"] for v in verdicts]
    context.table("compute-sanitizer", ["tool", "engine", "runs", "found"], rows)
    for v in verdicts:
        if v.problem:
            context.fail(f"{v.tool}, {v.engine}: {v.problem}")
    clean = [f"{v.tool} {v.engine} ({v.ran} runs)" for v in verdicts if not v.problem]
    if clean:
        context.line(f"nothing found by {', '.join(clean)}")


def run(context: Context) -> None:
    check(context, [find_sanitizer()], ENGINES)
