"""hyperfast.info: what is said about the installation, above all about what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperfast import info

ROOT = Path(__file__).resolve().parents[1]


def run_info(**env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hyperfast.info"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_collect_describes_this_process():
    found = info.collect()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]["missing"] == ""
    assert found["cpu"]["isa"] in found["cpu"]["isas"] and "scalar" in found["cpu"]["isas"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cuda"]["built"] in (True, False)


def test_command_prints_the_chosen_isa():
    done = run_info(HYPERFAST_ISA="scalar")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "in use: scalar (HYPERFAST_ISA=scalar)" in done.stdout
    for row in ("hyperfast", "torch", "triton", "compiler", "CUDA kernels", "GPUs", "threads", "OpenMP"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), row


def test_command_survives_an_isa_that_is_not_there():
    done = run_info(HYPERFAST_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert "mmx" in done.stdout and "scalar" in done.stdout


def test_why_missing_refuses_unknown_backends():
    with pytest.raises(ValueError, match="backend is 'rocm'; wanted one of cpu, cuda, triton"):
        info.why_missing("rocm")


def test_why_missing_is_empty_for_what_works():
    assert info.why_missing("cpu") == ""
    if torch.cuda.is_available():
        assert info.why_missing("triton") == ""
    else:
        assert info.why_missing("triton")
        assert info.why_missing("cuda")


@pytest.mark.parametrize(
    "recorded, said",
    [
        ({}, "never built"),
        ({"cuda": {"built": False, "reason": "nvcc was not found in PATH"}}, "nvcc was not found in PATH"),
        ({"cuda": {"built": True, "reason": ""}}, "does not load: no such module"),
    ],
)
def test_why_missing_tells_the_builds_reason(monkeypatch, recorded, said):
    monkeypatch.setattr(info, "_not_importable", lambda module: "no such module")
    monkeypatch.setattr(info, "build_info", lambda: recorded)
    assert said in info.why_missing("cuda")
    assert "pip install -e ." in info.why_missing("cuda")


def test_main_without_anything_built(monkeypatch, capsys):
    monkeypatch.setattr(info, "_not_importable", lambda module: f"No module named {module!r}")
    monkeypatch.setattr(info, "build_info", dict)
    info.main()
    printed = capsys.readouterr().out
    assert "hyperfast._cpu was never built" in printed and "not built" in printed


def test_build_info_of_a_broken_file_is_empty(monkeypatch, tmp_path):
    broken = tmp_path / "_build_info.json"
    broken.write_text("{")
    monkeypatch.setattr(info, "BUILD_INFO", broken)
    assert info.build_info() == {}
