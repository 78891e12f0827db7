"""Tests of the Triton kernels: on a GPU, or under Triton's interpreter in a process of its own, which
tests/test_kernels.py starts. Numbers are drawn on the CPU, so that both see the same ones."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def pytest_generate_tests(metafunc):
    """Tests with an argument `dtype` run for every dtype, unless they say otherwise."""
    given = [mark for mark in metafunc.definition.iter_markers("parametrize") if "dtype" in mark.args[0]]
    if "dtype" in metafunc.fixturenames and not given:
        metafunc.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """cuDNN takes TF32 by torch's default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
