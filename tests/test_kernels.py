"""The Triton kernels without a GPU: their tests under the interpreter, in a process of its own, and the ops
and optimizers on top of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def run_interpreted(*arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPERFAST_ENGINE": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


@pytest.mark.timeout(600)
def test_under_the_interpreter():
    run_interpreted("tests/kernels")


@pytest.mark.timeout(600)
def test_ops_on_interpreted_kernels():
    run_interpreted(
        "tests/ops/test_generate.py", "-k", "not compile and not opcheck and not memory_of_the_op"
    )


@pytest.mark.timeout(600)
def test_batch_norm_on_interpreted_kernels():
    run_interpreted(
        "tests/ops/test_batch_norm_relu_max_pool.py", "tests/nn/test_batch_norm.py", "tests/ops/test_memory.py", "-k",
        "autograd_sees or needed or without_parameters or test_layouts or (like_torch and momentum and 2-auto)"
        " or running_statistics_in or expanded or of_inference",
    )  # fmt: skip
