"""Random shapes, strides, dtypes and faults thrown at everything public: the right answer, or ValueError or
TypeError and nothing changed. tests/fuzz/harness.py says what is right; `python -m tests.fuzz.run OP SEED`
repeats one case."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fuzz.harness import Draw
from tests.fuzz.run import CASES, OPS, run

ROOT = Path(__file__).resolve().parents[1]
DEFAULT, SLOW = 80, 2000  # cases of each
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    ends = run(name, range(DEFAULT))
    assert ends["right"] >= DEFAULT // 3 and ends["refused"], ends


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_many_cases(name):
    """In a process of their own: one that crashes names the case that killed it."""
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(DEFAULT), str(DEFAULT + SLOW)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]


def test_a_failing_case_names_the_command_that_repeats_it(monkeypatch):
    def wrong(draw: Draw) -> str:
        raise RuntimeError("boom")

    monkeypatch.setitem(CASES, "generate", wrong)
    with pytest.raises(
        AssertionError, match="RuntimeError: boom\nrepeat it alone: python -m tests.fuzz.run generate 7"
    ):
        run("generate", range(7, 9))


@pytest.mark.parametrize("name", OPS)
def test_independent_of_the_thread_count(name):
    """Bit for bit, over blocks that go to whichever thread is free."""
    before = torch.get_num_threads()
    try:
        for seed in range(8):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(OPS[name].valid(Draw(name, seed), large=True))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    if a.computed is not None:  # plain PyTorch makes no such promise
                        continue
                    assert torch.equal(bits(a.got), bits(b.got)), f"{name} {seed}: {a.name}"
    finally:
        torch.set_num_threads(before)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.uint8) if t.numel() else t
