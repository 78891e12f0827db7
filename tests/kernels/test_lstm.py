"""The kernels of `lstm` against the reference in float64: odd sizes, packed rows, norms, dropout, both ways
to z, a sequence in parts."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hyperfast import ops, reference
from hyperfast.kernels import lstm as kernels
from hyperfast.kernels.launch import INTERPRETED
from hyperfast.ops._library import use_engine
from hyperfast.reference import HyperCell, LSTMState, map_state
from tests import lstm_problem
from tests.lstm_problem import (
    Problem,
    Rows,
    assert_equal,
    backward_in_parts,
    forward_in_parts,
    there,
    to,
)


@dataclass(frozen=True)
class Case(lstm_problem.Case):
    """rows_of_z: Z_ROWS, programs: PROGRAMS of the kernels."""

    rows_of_z: int = 0
    programs: int = 1


def write(p: Problem, rows: Rows) -> None:
    options = p.key, p.dropout, p.first_row, p.eps
    kernels.run(p.sizes, p.batch_sizes, p.weights(), *options, p.tensors(rows))


def write_gradients(p: Problem, rows: Rows, outputs: list[Tensor | None]) -> None:
    options = p.key, p.dropout, p.first_row, p.eps
    kernels.run_backward(p.sizes, p.batch_sizes, p.weights(), *options, p.inputs(rows), outputs)


def forward(p: Problem, keep: bool = True) -> Rows:
    rows = p.empty_rows(keep)
    write(p, rows)
    return p.with_z(rows)


def backward(p: Problem, rows: Rows) -> list[Tensor | None]:
    outputs = p.empty_gradients()
    write_gradients(p, rows, outputs)
    return outputs


@pytest.fixture
def configured(monkeypatch):
    """Sets what a case says of tiles."""

    def configure(case: Case) -> None:
        monkeypatch.setattr(kernels, "Z_ROWS", case.rows_of_z)
        if INTERPRETED:  # a program costs a tenth of a second
            monkeypatch.setattr(kernels, "PROGRAMS", case.programs)

    return configure


def check_values(made, exact, plain, dtype, assert_accurate) -> None:
    """plain: the same in plain PyTorch at that precision. All at once: some amplify rounding."""
    made, exact, plain = map(there, (made, exact, plain))
    assert all(t.isfinite().all() for t in made)
    assert_accurate([t.to(dtype) for t in made], exact, dtype, plain)


def check(p: Problem, assert_accurate, cuts=None) -> None:
    """In one part, or in those between `cuts`."""
    dtype = p.x_gates.dtype
    rows = forward_in_parts(p, cuts, write) if cuts else forward(p)
    exact, plain, options = to(p, torch.float64), to(p, dtype), (dtype, assert_accurate)
    check_values(rows, exact.expected_rows(), plain.expected_rows(), *options)
    made = backward_in_parts(p, rows, cuts, write_gradients) if cuts else backward(p, rows)
    wanted = exact.expected_gradients(to(rows, torch.float64))
    check_values(made, wanted, plain.expected_gradients(to(rows, dtype)), *options)


CASES = {
    "everything": Case((3, 2), 7, 5, 2, norms=True, dropout=0.3),
    "z in the kernels": Case((1, 1), 5, 3, 3, rows_of_z=132),
    "embeddings of one number": Case((3, 2), 9, 4, 1, dropout=0.5),
    "one step": Case((2,), 17, norms=True),
    "plain": Case((2, 1), 6, dropout=0.1),
}
MORE = {
    "everything, longer": Case((5, 5, 4, 2, 1, 1), 33, 17, 4, norms=True, dropout=0.2, rows_of_z=132),
    "blocks of columns": Case((3, 3), 257, 16, 5, programs=4),
    "blocks of rows": Case((9, 8, 3), 31, 32, 16, norms=True, programs=3),
    "ones": Case((7, 5), 1, 1, 1, rows_of_z=132),
    "z in several blocks": Case((1, 1), 15, 100, 7, rows_of_z=132),
    "layer norm": Case((4, 4, 3, 3), 65, norms=True, dropout=0.4),
    "plain, longer": Case((3, 3, 3, 1, 1), 300, programs=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case, device, configured, assert_accurate):
    configured(case)
    dtype = torch.float64 if case.Z == 1 else torch.float32
    check(case.problem(dtype, device), assert_accurate)


def test_half_precision(device, configured, assert_accurate):
    case = Case((3,), 12, 6, 5, norms=True)
    configured(case)
    check(case.problem(torch.bfloat16, device), assert_accurate)


@pytest.mark.slow
@pytest.mark.parametrize("case", (CASES | MORE).values(), ids=CASES | MORE)
def test_equals_reference_in_every_dtype(case, dtype, device, configured, assert_accurate):
    configured(case)
    check(case.problem(dtype, device), assert_accurate)


@pytest.mark.parametrize("rows_of_z", [0, pytest.param(132, marks=pytest.mark.slow)])
def test_parts_equal_the_reference_of_the_whole(rows_of_z, device, configured, assert_accurate):
    """Parts go on from the number of their first row, which dropout counts."""
    case = Case((3, 2, 1), 6, 5, 2, dropout=0.4, rows_of_z=rows_of_z)
    configured(case)
    check(case.problem(torch.float32, device), assert_accurate, cuts=(0, 1, 3))


def test_the_op_in_chunks(device, configured, monkeypatch, assert_accurate):
    """Of one step and of two, against the reference of the whole."""
    case = Case((2, 2, 1), 5, 3, 2, dropout=0.3)
    configured(case)
    p = case.problem(torch.float32, device)
    x, weight_ih, weight_x = (torch.randn(n, 4).to(device) for n in (5, 20, 12))
    weight_x = torch.cat((weight_x, p.hyper.weight_ih), 1)
    weights = weight_ih, p.weight_hh, p.bias, weight_x, p.hyper.weight_hh, torch.randn(12).to(device)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 4200)
    assert kernels.most_rows(p.sizes, x.dtype) == 3

    def run(op, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *p.state, *weights, *p.hyper[3:6])]
        hyper = HyperCell(*leaves[8:], None)
        arguments = leaves[0], LSTMState(*leaves[1:5]), *leaves[5:8], None, hyper
        output, last = op(*arguments, p.batch_sizes, p.key, p.dropout, p.eps)
        made = [output, *last]
        return made + list(torch.autograd.grad(made, leaves, [d.to(dtype) for d in (p.dh, *p.dlast)]))

    wanted = run(reference.lstm, torch.float64)
    with use_engine("triton"):
        made = run(ops.lstm, torch.float32)
    for own, exact in zip(made, wanted, strict=True):
        assert_accurate(own, exact, torch.float32)


def test_nothing_kept_and_no_gradients_given(device, configured):
    """As in inference, and where only the output or only a last state is used."""
    case = Case((2,), 5, 3, 2)
    configured(case)
    p = case.problem(torch.float32, device)
    rows = forward(p)
    assert_equal(forward(p, keep=False)[:4], rows[:4])
    zeros = p._replace(dh=torch.zeros_like(p.dh), dlast=map_state(p.dlast, torch.zeros_like))
    absent = p._replace(dh=None, dlast=LSTMState(None, None, None, None))
    assert_equal(backward(zeros, rows), backward(absent, rows))


def test_no_steps(device):
    p = Case((), 5, 3, 2, norms=True).problem(torch.float32, device)
    rows = forward(p)
    assert_equal(backward(p, rows), p.expected_gradients(rows))


def test_equal_bit_for_bit_every_time(device, configured):
    case = Case((2,), 8, 4, 2, dropout=0.5)
    configured(case)
    p = case.problem(torch.float32, device)
    rows = forward(p)
    assert_equal(forward(p), rows)
    assert_equal(backward(p, rows), backward(p, rows))


def test_dropout_drops_what_the_reference_drops(device, configured):
    """Over rows and columns past a block, by an unsigned comparison: shares above a half have a threshold
    above 2^31."""
    case = Case((5, 4), 37, dropout=0.75)
    configured(case)
    p = case.problem(torch.float64, device)
    p = p._replace(state=LSTMState(p.state.h, torch.zeros_like(p.state.c)))
    dropped = forward(p).c[:5] == 0
    rows = torch.arange(5, device=device)
    assert torch.equal(dropped, reference.dropout_scale(p.key, rows, 37, 0, 0.75) == 0)
    assert 0.5 < dropped.double().mean() < 0.95


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_sequence(value, device, configured):
    case = Case((3, 3), 5, norms=True)
    configured(case)
    p = case.problem(torch.float32, device)
    clean = forward(p)
    p.x_gates[1, 3] = value
    h = forward(p).h
    assert h[[1, 4]].isnan().all()
    assert torch.equal(h[[0, 2, 3, 5]], clean.h[[0, 2, 3, 5]])


def test_steps():
    made = kernels.steps_of(torch.tensor([3, 3, 1]))
    assert made == [(0, -1, 3), (3, 0, 3), (6, 3, 1)]
