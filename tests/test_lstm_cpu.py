"""The CPU kernels of lstm and lstm_backward where their sizes matter: packed weights and weights as they lie,
blocks of columns and rows, results kept or not, gradients given or not, a sequence in parts, results over
inputs. tests/ops/test_lstm.py has the op."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hyperfast.ops._library import _cpu, address, dtype_name
from hyperfast.reference import LSTMState, map_state
from tests.lstm_problem import (
    FIRST_STATE,
    FIRST_SUM,
    Case,
    Problem,
    Rows,
    assert_equal,
    backward_in_parts,
    clones,
    forward_in_parts,
    there,
    to,
)

DTYPES = [torch.float32, torch.float64]
# steps of one row; few rows; many rows in one step and in several, with more columns and rows than a block
# has; no hyper LSTM
CASES = {
    "one_row": Case((1,) * 20, 33, 17, 5, dropout=0.25),
    "few_rows": Case((7, 2, 2, 1), 130, 9, 16, dropout=0.25),
    "one_step": Case((40,), 47, 16, 3, dropout=0.25),
    "blocks": Case((14, 14, 13, 13, 9, 3, 1), 300, 37, 7, dropout=0.25),
    "many_rows": Case((133, 131), 65, 140, 2, dropout=0.25),
    "no_hyper": Case((10,) * 7, 270, dropout=0.25),
}
# Steps at which parts begin. Every other step the backward adds up the pieces of packed weights from the last
# to the first, so that bits are equal where parts of several pieces begin after an even number of steps.
CUTS = {"one_row": (0, 1, 20), "few_rows": (0, 1, 3, 4), "blocks": (0, 2, 4, 7), "no_hyper": (0, 4, 7)}


class Kernels:
    """The kernels for a whole sequence or parts of it, with what they pack and their scratch made once."""

    def __init__(self, p: Problem, threads: int = 1, keep: bool = True):
        self.threads, self.keep, self.dtype = threads, keep, dtype_name(p.x_gates)
        self.memory = [self._pack(p, False, keep), self._pack(p, True, p.norms is not None)]

    def _pack(self, p: Problem, backward: bool, whole: bool) -> list[Tensor | None]:
        counts = _cpu.lstm_memory(p.sizes, backward, whole, self.dtype, self.threads)
        memory = [torch.full((n,), 255, dtype=torch.uint8) if n else None for n in counts]  # NaN
        weights = [address(t) for t in p.weights()]
        _cpu.lstm_pack(p.sizes, weights, backward, [address(t) for t in memory], self.dtype, self.threads)
        return memory

    def _run(self, kernel, p: Problem, memory, *tensors) -> None:
        kernel(
            p.sizes, address(p.batch_sizes), [address(t) for t in p.weights()], [address(t) for t in memory],
            address(p.key), p.dropout, p.first_row, p.eps, *([address(t) for t in own] for own in tensors),
            self.dtype, self.threads,
        )  # fmt: skip

    def write(self, p: Problem, rows: Rows) -> None:
        self._run(_cpu.lstm, p, self.memory[0], p.tensors(rows))

    def write_gradients(self, p: Problem, rows: Rows, outputs: list[Tensor | None]) -> None:
        self._run(_cpu.lstm_backward, p, self.memory[1], p.inputs(rows), outputs)

    def forward(self, p: Problem) -> Rows:
        rows = p.empty_rows(self.keep)
        self.write(p, rows)
        return p.with_z(rows)

    def backward(self, p: Problem, rows: Rows) -> list[Tensor | None]:
        outputs = p.empty_gradients()
        self.write_gradients(p, rows, outputs)
        return outputs


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel(assert_accurate, name, dtype, norms):
    p = replace(CASES[name], norms=norms).problem(dtype)
    rows = Kernels(p).forward(p)
    for made, wanted in zip(there(rows), there(to(p, torch.float64).expected_rows()), strict=True):
        assert_accurate(made, wanted, dtype)
    for threads in (2, 3):
        assert_equal(Kernels(p, threads).forward(p), rows)
    assert_equal(Kernels(p, keep=False).forward(p)[:4], rows[:4])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_backward(assert_accurate, name, dtype, norms):
    p = replace(CASES[name], norms=norms).problem(dtype)
    if not norms:  # the kernel is told that the last state has no gradients
        p = p._replace(dlast=LSTMState(None, None, None, None))
    rows = Kernels(p).forward(p)
    wanted = to(p, torch.float64).expected_gradients(to(rows, torch.float64))
    made = Kernels(p).backward(p, rows)
    assert [t is None for t in made] == [t is None for t in wanted]
    pairs = zip(there(made), there(wanted), strict=True)
    for result, exact in pairs if dtype == torch.float64 else [(there(made), there(wanted))]:
        assert_accurate(result, exact, dtype)  # in float32 all at once: some amplify rounding
    for threads in (2, 3):
        assert_equal(Kernels(p, threads).backward(p, rows), made)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, cuts", CUTS.items(), ids=CUTS)
def test_parts_equal_the_whole(assert_accurate, name, cuts, dtype, norms):
    """Each goes on from the state of the one before, and from the number of its first row, which dropout
    counts; what is packed serves all."""
    p = replace(CASES[name], norms=norms).problem(dtype)
    kernels = Kernels(p, threads=2 if norms else 1)
    rows = kernels.forward(p)
    assert_equal(forward_in_parts(p, cuts, kernels.write), rows)
    whole = kernels.backward(p, rows)
    parts = backward_in_parts(p, rows, cuts, kernels.write_gradients)
    assert_equal(parts[:FIRST_SUM], whole[:FIRST_SUM])
    assert_accurate(there(parts[FIRST_SUM:]), [t.double() for t in there(whole[FIRST_SUM:])], dtype)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", ["few_rows", "blocks", "no_hyper"])
def test_results_over_inputs(name, norms):
    """hyper_gates over hyper_x_gates; dx_gates over x_gates, and the state's gradient over the last one's."""
    p = replace(CASES[name], norms=norms).problem(torch.float32)
    rows = Kernels(p).forward(p)
    gradients = Kernels(p).backward(p, rows)
    x_gates, hyper_x_gates = clones((p.x_gates, p.hyper_x_gates))
    q = p._replace(x_gates=x_gates, hyper_x_gates=hyper_x_gates, dlast=map_state(p.dlast, torch.clone))
    kernels = Kernels(q, threads=2)
    made = q.empty_rows()._replace(hyper_gates=q.hyper_x_gates)
    kernels.write(q, made)
    assert_equal(q.with_z(made), rows)
    outputs = q.empty_gradients()
    outputs[0], outputs[FIRST_STATE:FIRST_SUM] = q.x_gates, q.dlast
    kernels.write_gradients(q, rows, outputs)
    assert_equal(outputs, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not every"]
    done = subprocess.run(command, env=os.environ | {"HYPERFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
