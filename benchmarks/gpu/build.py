"""The native modules, and what the compilers made of the kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.parts import ROOT, last_lines
from benchmarks.gpu.record import Context

MODULES = ("_cpu", "_cuda")


def built(root: Path, name: str) -> Path:
    """Where the module of this Python lies."""
    return root / "hyperfast" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def outdated(root: Path) -> list[str]:
    """Native modules that are missing or older than a source of theirs."""
    sources = [root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    paths = {name: built(root, name) for name in MODULES}
    return [name for name, path in paths.items() if not path.exists() or path.stat().st_mtime < newest]


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
        if not built(root, name).exists():
            context.fail(f"there is no hyperfast.{name} after the build")


def run(context: Context) -> None:
    build(context, ROOT)
    command(context, "hyperfast.info", ["-m", "hyperfast.info"], ROOT)
    if importlib.util.find_spec("hyperfast.kernels.resources"):
        table = ["-m", "hyperfast.kernels.resources"]
        command(context, "registers and shared memory of the kernels", table, ROOT, late=Context.line)
