"""Builds CUDA sources for the emulator, with ninja under build/: what did not change is not compiled again."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RULES = """\
rule cxx
  command = {cxx} -x c++ {flags} $more -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} {flags} $in -o $out
"""


def toolkit_headers() -> Path | None:
    """Where cuda_fp16.h is: beside nvcc, or in NVIDIA's Python packages."""
    places = []
    nvcc = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"]()[0]
    if nvcc:
        places.append(Path(nvcc).resolve().parents[1] / "include")
        command = [nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        places += [Path(line.split("=", 1)[1].strip().strip('"')) / "include" for line in said.splitlines() if "TOP=" in line]
    site = Path(sysconfig.get_path("purelib"))
    places += sorted(site.glob("nvidia/*/include"))
    return next((p for p in places if (p / "cuda_fp16.h").exists() and (p / "cuda_runtime_api.h").exists()), None)


def build(name: str, sources: Sequence[Path], flags: str = "", sanitize: bool = False, bulk: bool = True) -> Path:
    """The shared library of `sources` and the emulator. Skips the test where g++, ninja or headers are missing.

    bulk: as a GPU with bulk copies runs them (sm_90), or without (sm_80).
    """
    headers, ninja, cxx = toolkit_headers(), shutil.which("ninja"), os.environ.get("CXX", "g++")
    scripts = Path(sysconfig.get_path("scripts"), "ninja")
    ninja = ninja or (str(scripts) if scripts.exists() else None)
    if headers is None:
        pytest.skip("no CUDA headers: neither nvcc nor NVIDIA's Python packages")
    if ninja is None or shutil.which(shlex.split(cxx)[0]) is None:
        pytest.skip("the emulator needs ninja and g++")
    common = "-std=c++17 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Wno-attributes"
    common += " -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined" if sanitize else " -O1"
    common += f" -ffp-contract=off -DHYPERFAST_BULK_COPIES={int(bulk)} -I{HERE} -I{ROOT / 'csrc'} -isystem {headers} {flags}"
    folder = ROOT / "build" / "cuda_emulator" / f"{name}-{'sanitized' if sanitize else 'plain'}-{int(bulk)}"
    folder.mkdir(parents=True, exist_ok=True)
    text = [RULES.format(cxx=cxx, flags=common)]
    objects = []
    for source in [HERE / "emulator.cpp", *sources]:
        objects.append(f"{source.name}.o")
        text.append(f"build {objects[-1]}: cxx {source}")
    text.append(f"build {name}.so: link {' '.join(objects)}\n")
    (folder / "build.ninja").write_text("\n".join(text))
    done = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"{name}.so"


@functools.cache
def module(bulk: bool = True) -> ModuleType:
    """hyperfast._cuda, bindings and kernels, on the emulator: its functions take tensors of the CPU. With
    HYPERFAST_EMULATOR_SANITIZE=1 under the sanitizers, whose runtimes must be loaded."""
    import pybind11

    sanitize = os.environ.get("HYPERFAST_EMULATOR_SANITIZE") == "1"
    includes = {pybind11.get_include(), *(sysconfig.get_path(name) for name in ("include", "platinclude"))}
    flags = " ".join(f"-isystem {shlex.quote(path)}" for path in sorted(includes))
    sources = [ROOT / "csrc" / "module_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    path = build("_cuda", sources, flags, sanitize, bulk)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
