"""What the compiler makes of the CUDA kernels: registers, shared memory, no spills, wide accesses."""

import re
import runpy
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NAMES = [source.stem for source in SOURCES]
KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
# registers of a thread that leave room for as many blocks on an SM as the sources say: 65,536 over those of
# four blocks of 256, three (update_generate in float32), two (hyper_linear), one of 1024 (the sum), one of
# 512 (the LSTM)
BOUNDS = {
    "generate_kernel": 64,
    "generate_backward_kernel": 64,
    "generate_backward_sum_kernel": 64,
    "update_generate_kernel": 80,
    "hyper_linear_kernel": 128,
    "hyper_linear_sum_kernel": 64,
    "lstm_fwd_kernel": 128,
    "lstm_bwd_kernel": 128,
}
DOUBLE_BOUND = 128  # of update_generate_kernel


def nvcc() -> str:
    found, reason = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"]()
    return found or pytest.skip(reason)


@cache
def report(source: Path, arch: str) -> str:
    """ptxas's words: those of the build if it is newer than the sources, else of a compilation."""
    newest = max(path.stat().st_mtime for path in source.parent.iterdir())
    for built in ROOT.glob(f"build/ninja-*/{source.name}.o.txt"):
        if built.stat().st_mtime > newest and f"sm_{arch}" in built.read_text():
            return built.read_text()
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = [
        nvcc(),
        "-O3",
        "-std=c++17",
        "-gencode",
        target,
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        "/dev/null",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# the LSTM's take half a minute
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("lstm") else n for n in NAMES]
)
@pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.slow), "90a"])
def test_compiles_without_spills(name, arch):
    text = report(ROOT / "csrc" / "cuda" / f"{name}.cu", arch)
    found = [match.groups() for match in KERNEL.finditer(text) if match[2] == arch]
    assert found, text
    for symbol, _, stack, stores, loads, registers, rest in found:
        kernel = next(
            name for name in sorted(BOUNDS, key=len, reverse=True) if f"{len(name)}{name}" in symbol
        )
        shared = int(match[1]) if (match := re.search(r"(\d+) bytes smem", rest)) else 0
        print(f"sm_{arch} {symbol}: {registers} registers, {stack} bytes of stack, {shared} shared")
        assert (stack, stores, loads) == ("0", "0", "0"), symbol
        bound = (
            DOUBLE_BOUND if f"{kernel}Id" in symbol and kernel == "update_generate_kernel" else BOUNDS[kernel]
        )
        assert int(registers) <= bound, symbol
        assert shared <= 48 * 1024, symbol


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("name", NAMES)
def test_instructions(name, arch):
    """Streams in accesses of 16 bytes past L2; hyper_linear's by asynchronous copies."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    command = [nvcc(), "-O3", "-std=c++17", f"-arch=compute_{arch}", "-ptx", "-o", "-", str(source)]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if name == "hyper_linear":
        wanted = "cp.async.bulk.shared::cluster.global" if arch == "90a" else "cp.async.cg.shared.global"
        assert wanted in ptx and re.search(r"ld\.shared\.v4", ptx)
        assert ("mbarrier" in ptx) == (arch == "90a")
        return
    if name.startswith(
        "lstm"
    ):  # loads of the exchanged state past L1; a barrier of the grid by release and acquire
        assert "cp.async.cg.shared.global" in ptx and "ld.shared.v4" in ptx and "ld.global.nc" not in ptx
        assert "atom.add.release.gpu" in ptx and "ld.acquire.gpu" in ptx
        return
    assert re.search(r"ld\.global\.cs\.v4", ptx)
    if name == "update_generate":
        assert re.search(r"st\.global\.cs\.v4", ptx) and "redux.sync" in ptx
