"""The native modules, and what the compilers made of the kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.parts import ROOT, last_lines
from benchmarks.gpu.record import Context

MODULES = ("_cpu", "_cuda")


def outdated(root: Path) -> list[str]:
    """Native modules that are missing or older than a source of theirs."""
    sources = [root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    built = {name: list((root / "hyperfast").glob(f"{name}.*.so")) for name in MODULES}
    return [n for n, paths in built.items() if not any(p.stat().st_mtime >= newest for p in paths)]


def command(context: Context, what: str, arguments: Sequence[str], root: Path, late=Context.fail) -> None:
    """Runs Python with `arguments`; its output is in this part's log. late(context, words): where it did not
    end in time."""
    print(f"--- {what}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=max(context.remaining() - 3, 1),
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        print((stopped.stdout or b"").decode(errors="replace"), flush=True)
        late(context, f"{what}: not done in time")
        return
    print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        context.fail(f"{what}: exit status {done.returncode}: {last_lines(done.stdout + done.stderr)}")


def build(context: Context, root: Path) -> None:
    """Builds what is outdated in `root`."""
    missing = outdated(root)
    if missing:
        command(context, "the build", ["setup.py", "build_ext", "--inplace"], root)
    context.line(
        f"built {', '.join(missing)}" if missing else "the native modules are newer than their sources"
    )
    for name in MODULES:
        if not list((root / "hyperfast").glob(f"{name}.*.so")):
            context.fail(f"there is no hyperfast.{name} after the build")


def run(context: Context) -> None:
    build(context, ROOT)
    command(context, "hyperfast.info", ["-m", "hyperfast.info"], ROOT)
    if importlib.util.find_spec("hyperfast.kernels.resources"):
        table = ["-m", "hyperfast.kernels.resources"]
        command(context, "registers and shared memory of the kernels", table, ROOT, late=Context.line)
