"""The ops on the CUDA kernels without a GPU: tests of theirs on the emulator, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_emulator import build

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(600)
def test_on_the_emulator():
    build.module()  # or skip
    tests = ["tests/ops/test_adamw_generate.py", "tests/ops/test_next_weights.py", "tests/test_states.py"]
    tests += ["tests/ops/test_generate.py", "tests/ops/test_generate_backward.py"]
    telling = "values_and_next_weights or bit_for_bit or against_the_reference or skip or outside"
    telling += " or refused or empty"
    left_out = "compile or opcheck or thread or instruction or test_values_and_next_weights and not 17"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "tests.cuda_emulator.plugin", *tests, "-k", f"({telling}) and not ({left_out})"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
