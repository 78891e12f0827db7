"""The tests that need a GPU: all of tests/kernels, and those marked `gpu` elsewhere.

A process for each file, some at a time: most of the time goes into compiling kernels, on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.parts import ROOT, last_lines
from benchmarks.gpu.record import Context

AT_ONCE = 8
ON_A_GPU = ("mark.gpu", "cuda_kernels")  # in a file's text; the fixture's parameters carry the mark
RESERVE = 4.0  # seconds of the part for reading the results


@dataclass
class Result:
    """Of one file. failures: names of tests with the first line of what they said."""

    file: str
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


def files(root: Path) -> list[tuple[str, str]]:
    """(file, its marks in pytest's words)"""
    kernels = sorted((root / "tests" / "kernels").glob("test_*.py"))
    marked = [
        path
        for path in sorted((root / "tests").rglob("test_*.py"))
        if path not in kernels and any(word in path.read_text() for word in ON_A_GPU)
    ]
    found = [(path, "not slow") for path in kernels] + [(path, "gpu and not slow") for path in marked]
    return [(path.relative_to(root).as_posix(), marks) for path, marks in found]


def run_file(file: str, marks: str, root: Path, out: Path, seconds: float) -> Result:
    """pytest on one file; its output goes to `out`."""
    if seconds <= 0:
        return Result(file, failures=[f"{file}: there was no time left to start it"])
    name = file.replace("/", ".").removesuffix(".py")
    report, log = out / f"{name}.xml", out / f"{name}.log"
    report.unlink(missing_ok=True)
    parallel = ["-n", "3"] if importlib.util.find_spec("xdist") else []
    arguments = ["-q", *parallel, "-p", "no:cacheprovider", "-m", marks, f"--junitxml={report}", file]
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *arguments], cwd=root, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said = last_lines(log.read_text(errors="replace"), 1)
            return Result(file, failures=[f"{file}: not done in time: {said}"])
    if not report.exists():
        said = last_lines(log.read_text(errors="replace"))
        return Result(file, failures=[f"{file}: pytest ended with status {done.returncode}: {said}"])
    return read_report(file, report)


def read_report(file: str, report: Path) -> Result:
    """What pytest wrote as JUnit XML."""
    result = Result(file)
    for case in ElementTree.parse(report).iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            said = (problem.get("message") or "").strip().splitlines() or [problem.tag]
            result.failures.append(f"{file}::{case.get('name')}: {said[0]}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    return result


def run_files(context: Context, chosen: Sequence[tuple[str, str]], root: Path, at_once: int) -> None:
    """Runs them and says how many tests passed, failed and were skipped."""
    folder = context.out / "tests"
    folder.mkdir(exist_ok=True)

    def one(pair: tuple[str, str]) -> Result:
        return run_file(*pair, root, folder, context.remaining() - RESERVE)

    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(one, chosen))
    passed, skipped = sum(r.passed for r in results), sum(r.skipped for r in results)
    failures = [line for r in results for line in r.failures]
    rows = [[r.file, str(r.passed), str(len(r.failures)), str(r.skipped)] for r in results]
    context.table("Tests", ["file", "passed", "failed", "skipped"], rows)
    context.fact(tests_passed=passed, tests_failed=len(failures), tests_skipped=skipped)
    context.line(f"{passed} passed, {len(failures)} failed, {skipped} skipped in {len(results)} files")
    for line in failures:
        context.fail(line)
    if not passed:
        context.fail("no test ran")


def run(context: Context) -> None:
    run_files(context, files(ROOT), ROOT, AT_ONCE)
