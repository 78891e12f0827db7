"""The build: setup.py in copies of the repository, and one OpenMP runtime in the result."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hyperfast.info import openmp_runtimes

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "/nonexistent"  # a CUDA_HOME without nvcc

pytest.importorskip("setuptools")
pytest.importorskip("pybind11")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the build reads, nothing built in it."""
    copy = tmp_path_factory.mktemp("build") / "repository"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in ("csrc", "hyperfast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    (copy / "README.md").write_text("# hyperfast\n")
    return copy


def run_setup(tree: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """`python setup.py arguments` where importing torch fails."""
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HYPERFAST_") and k != "CUDA_HOME"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=tree, env=clean | env, capture_output=True, text=True)


def build_info(tree: Path) -> dict:
    return json.loads((tree / "hyperfast" / "_build_info.json").read_text())


def built(tree: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (tree / "hyperfast").glob("*.so")}


def test_setup_needs_no_torch(tree):
    done = run_setup(tree, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0.1.0")


@pytest.mark.parametrize(
    "env, said",
    [
        ({"HYPERFAST_CUDA": "1", "CUDA_HOME": NOWHERE}, "nvcc was not found in CUDA_HOME=/nonexistent"),
        ({"HYPERFAST_CUDA": "yes"}, "HYPERFAST_CUDA is 'yes'; it may be auto, 1 or 0"),
        ({"HYPERFAST_CUDA": "0", "CXX": "/nonexistent/g++"}, "set CXX to a C++ compiler"),
    ],
)
def test_bad_environment_is_one_clear_line(tree, env, said):
    done = run_setup(tree, "build_ext", "--inplace", **env)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("hyperfast: ") and said in lines[-1]
    assert "Traceback" not in done.stderr
    assert not built(tree)


def test_nvcc_is_looked_for_in_path(tmp_path, monkeypatch):
    find_nvcc = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert find_nvcc() == (str(nvcc), "")
    monkeypatch.setenv("PATH", NOWHERE)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == (str(nvcc), "")


def test_kernels_are_compiled_once_per_isa():
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    text = build["build_file"](None, "g++")
    compiled = re.findall(r"^build \S*/(\S+)\.o: cxx csrc/\S+\n  flags = (.*)", text, re.M)
    flags = dict(compiled)
    assert len(flags) == len(compiled)
    kernels = {path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - {"dispatch.cpp"}
    per_isa = {f"{kernel}.{isa}" for kernel in kernels for isa in build["ISA_FLAGS"]}
    assert set(flags) == per_isa | {"module_cpu.cpp", "dispatch.cpp"}
    for name, text in flags.items():
        assert ("-mavx" in text) == (".avx" in name)
        assert ("-DHYPERFAST_ISA=" in text) == (name in per_isa)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_build_without_and_with_failing_nvcc(tree, tmp_path):
    """auto builds without nvcc, then with one that fails (only the CUDA part runs); 1 with that one fails."""
    done = run_setup(tree, "build_ext", "--inplace", CUDA_HOME=NOWHERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout
    assert built(tree) == {"_cpu"}
    wanted = {"built": False, "reason": "nvcc was not found in CUDA_HOME=/nonexistent"}
    assert build_info(tree)["cuda"] == wanted

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: out of order'\nexit 1\n")
    nvcc.chmod(0o755)
    stale = next((tree / "hyperfast").glob("_cpu*.so"))
    shutil.copy2(stale, stale.with_name(stale.name.replace("_cpu", "_cuda")))
    done = run_setup(tree, "build_ext", "--inplace", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-c csrc/cpu/" not in done.stdout, "objects that did not change were compiled again"
    assert built(tree) == {"_cpu"}, "an older build's _cuda was left"
    assert "nvcc fatal error: out of order" in build_info(tree)["cuda"]["reason"]

    done = run_setup(tree, "build_ext", "--inplace", CUDA_HOME=str(tmp_path), HYPERFAST_CUDA="1")
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("hyperfast: HYPERFAST_CUDA=1, but hyperfast._cuda did not compile")

    header = next((tree / "csrc" / "cpu").glob("*.h"))
    header.touch()
    done = run_setup(tree, "build_ext", "--inplace", HYPERFAST_CUDA="0")
    assert done.returncode == 0 and "-c csrc/cpu/" in done.stdout, "a changed header compiles nothing"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_packages_and_modules(tree):
    done = run_setup(tree, "bdist_wheel", HYPERFAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    names = set(zipfile.ZipFile(next((tree / "dist").glob("hyperfast_kernels-*.whl"))).namelist())
    assert {"hyperfast/__init__.py", "hyperfast/_build_info.json", "hyperfast/kernels/__init__.py"} <= names
    assert any(name.startswith("hyperfast/_cpu.") for name in names)
    assert all(name.startswith(("hyperfast/", "hyperfast_kernels-")) for name in names)


@pytest.mark.parametrize("first", ["hyperfast", "torch"])
def test_exactly_one_openmp_runtime(first):
    code = (
        f"import {first}, torch, hyperfast\n"
        "x = torch.randn(64, 256, requires_grad=True)\n"
        "hyperfast.nn.HyperLinear(256, 256)(x).square().sum().backward()\n"
        "from hyperfast.info import openmp_runtimes\n"
        "print('\\n'.join(openmp_runtimes()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


def test_a_second_openmp_runtime_is_seen(tmp_path):
    [runtime] = openmp_runtimes()
    second = shutil.copy2(runtime, tmp_path / "libgomp-0123abcd.so.1")
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(second)!r})\n"
        "from hyperfast.info import openmp_runtimes\n"
        "print('\\n'.join(openmp_runtimes()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert str(second) in done.stdout.split() and len(done.stdout.split()) == 2, done.stdout + done.stderr
