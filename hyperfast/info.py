"""What this installation of hyperfast can do: `python -m hyperfast.info`.

pip hides the build's output, so what was built, for which processors and GPUs, and why not, is told here;
code that meets a missing backend says the same through `why_missing`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

BUILD_INFO = Path(__file__).with_name("_build_info.json")
BACKENDS = ("cpu", "cuda", "triton")


def build_info() -> dict[str, Any]:
    """What the build recorded: compiler, isas, cuda {built, reason, nvcc, architectures}; {} if nothing."""
    try:
        return json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


def why_missing(backend: str) -> str:
    """One or two sentences on why `backend` ("cpu", "cuda" or "triton") cannot be used here; empty if it can.

    Raises ValueError for any other name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(BACKENDS)}")
    if backend == "triton":
        return _not_importable("triton") or _no_gpu()
    module = f"hyperfast._{backend}"
    problem = _not_importable(module)
    if not problem:
        return "" if backend == "cpu" else _no_gpu()
    if not build_info():
        return f"{module} was never built ({problem}): run `pip install -e .` in the repository."
    reason = build_info()["cuda"]["reason"] if backend == "cuda" else ""
    if reason:
        return f"{module} was not built: {reason}. With nvcc, `HYPERFAST_CUDA=1 pip install -e .` builds it."
    return f"{module} was built but does not load: {problem}. Run `pip install -e .` again."


def collect() -> dict[str, Any]:
    """Versions, build, processor kernels, GPU, threads and OpenMP runtimes of this process, as plain data."""
    build = build_info()
    return {
        "hyperfast": _version("hyperfast-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiler": build.get("compiler", "unknown"),
        "cpu": _cpu(),
        "cuda": build.get("cuda", {"built": False}) | {"missing": why_missing("cuda")},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "openmp": openmp_runtimes(),
    }


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process (Linux). More than one makes every call slow."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*)", maps)))


def _cpu() -> dict[str, Any]:
    override = os.environ.get("HYPERFAST_ISA")
    missing = why_missing("cpu")
    isas, isa = [], None
    if not missing:
        module = importlib.import_module("hyperfast._cpu")
        isas = module.isas()
        try:
            isa = module.isa()
        except RuntimeError as error:  # an HYPERFAST_ISA that this machine does not have
            missing = str(error)
    return {"isas": isas, "isa": isa, "override": override, "missing": missing}


def _not_importable(module: str) -> str:
    """Why `import module` fails, or nothing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def _no_gpu() -> str:
    return "" if torch.cuda.is_available() else "torch finds no CUDA GPU."


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    info = collect()
    cpu, cuda = info["cpu"], info["cuda"]
    override = f" (HYPERFAST_ISA={cpu['override']})" if cpu["override"] else ""
    built = f"nvcc {cuda['nvcc']}, for {', '.join(cuda['architectures'])}" if cuda["built"] else "not built"
    rows = {
        "hyperfast": info["hyperfast"] or "not installed",
        "python": info["python"],
        "torch": info["torch"],
        "triton": info["triton"] or "not installed",
        "compiler": info["compiler"],
        "CPU kernels": cpu["missing"] or f"{', '.join(cpu['isas'])}; in use: {cpu['isa']}{override}",
        "CUDA kernels": f"{built}; {cuda['missing']}" if cuda["missing"] else built,
        "GPUs": ", ".join(info["gpus"]) or "none found",
        "threads": info["threads"],
        "OpenMP": ", ".join(info["openmp"]) or "none mapped",
    }
    for name, value in rows.items():
        print(f"{name:<13} {value}")


if __name__ == "__main__":
    main()
