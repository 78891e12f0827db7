"""The emulator that runs CUDA kernels on the CPU finds the faults planted in faults.cu."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_emulator import build
from tests.cuda_emulator.kernels import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
COUNT = 256
# fault -> what the launch says, or "wrong" where it is the result that shows it, in some schedule
FAULTS = {
    "missing_syncthreads": "wrong",
    "missing_syncwarp": "wrong",
    "missing_copy_wait": "a thread ends with copies it never waited for",
    "no_wait": "more arrivals at a barrier than it was made for",
    "no_last_wait": "a block ends with copies it never waited for",
    "wrong_phase": "threads wait for ever",
    "odd_size": "multiples of 16 bytes",
    "odd_address": "multiples of 16 bytes",
    "no_second_barrier": "wrong",
    "lanes_missing": "threads wait for ever",
    "different_operations": "lanes of a warp meet in",
    "misaligned_access": "misaligned access of 16 bytes",
    "missing_grid_barrier": "wrong",
    "early_exit": "threads wait for ever",
    "barrier_of_one_block": "threads wait for ever",
}
SANITIZED = ["out_of_bounds", "out_of_shared_bounds"]


def library(sanitize: bool = False) -> ctypes.CDLL:
    made = ctypes.CDLL(str(build.build("faults", [build.HERE / "faults.cu"], sanitize=sanitize)))
    made.run_kernel.restype = ctypes.c_char_p
    return made


def outcome(made: ctypes.CDLL, name: str, fault: int, schedule: int) -> str:
    """The launch's error; "wrong" or "right" of its result where there is none."""
    numbers, out = torch.randn(COUNT), torch.full((COUNT,), torch.nan)
    made.emulator_set_schedule(schedule)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (numbers, out)]
    said = made.run_kernel(name.encode(), fault, COUNT, *pointers)
    if said is not None:
        return said.decode()
    return "right" if torch.equal(out, numbers.flip(0)) else "wrong"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    made = library()
    found = [outcome(made, name, 1, schedule) for schedule in SCHEDULES]
    assert any(FAULTS[name] in said for said in found), found


@pytest.mark.parametrize("name", [*FAULTS, *SANITIZED])
def test_right_kernels_are_right(name):
    made = library()
    for schedule in range(8):
        assert outcome(made, name, 0, schedule) == "right"


def test_impossible_launches_are_refused():
    made, nothing = library(), ctypes.c_void_p(0)
    for threads in (0, 33, 2048):
        assert made.run_kernel(b"no_wait", 0, threads, nothing, nothing) == b"invalid configuration"


def sanitized(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with the sanitizers' runtimes loaded first, as .ci/sanitize runs it."""
    path = build.build("faults", [build.HERE / "faults.cu"], sanitize=True)
    listed = subprocess.run(["ldd", str(path)], capture_output=True, text=True).stdout
    runtimes = [word for word in listed.split() if word.startswith("/") and any(
        name in word for name in ("libasan", "libubsan", "libstdc++"))]  # fmt: skip
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1:symbolize=0"
    environment |= {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_find_accesses_out_of_bounds(name):
    code = (
        "from tests.test_cuda_emulator import library, outcome; "
        f"print(outcome(library(sanitize=True), {name!r}, FAULT, 0))"
    )
    right = sanitized("-c", code.replace("FAULT", "0"))
    assert right.stdout == "right\n", right.stderr[-2000:]
    wrong = sanitized("-c", code.replace("FAULT", "1"))
    assert wrong.returncode and "AddressSanitizer: heap-buffer-overflow" in wrong.stderr, wrong.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_under_sanitizers():
    tests = sorted(path.name for path in (ROOT / "tests").glob("test_cuda_*.py") if path != Path(__file__))
    done = sanitized(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "emulator",
        *(f"tests/{name}" for name in tests), HYPERFAST_EMULATOR_SANITIZE="1",
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
