"""The kernels of `lstm` against the reference in float64: odd sizes, packed rows, norms, dropout, both ways
to z, and sums over several chunks of steps."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.kernels import lstm as kernels
from hyperfast.kernels.launch import INTERPRETED
from hyperfast.reference import HyperCell, LSTMState, Norms

EPS = 1e-3


class Case(NamedTuple):
    """batch_sizes; H, M, Z (0, 0: no hyper LSTM). rows_of_z: Z_ROWS, chunk: CHUNK_BYTES, programs:
    PROGRAMS of the kernels."""

    batch_sizes: tuple[int, ...]
    H: int
    M: int = 0
    Z: int = 0
    norms: bool = False
    dropout: float = 0.0
    rows_of_z: int = 0
    chunk: int = 1 << 26
    programs: int = 1

    def sizes(self) -> tuple[int, ...]:
        B = max(self.batch_sizes, default=3)
        return len(self.batch_sizes), sum(self.batch_sizes), B, self.H, self.M, self.Z

    def problem(self, dtype: torch.dtype, device: torch.device) -> "Problem":
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def make(*shape: int, scale: float = 0.5, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape) * scale).to(device).to(dtype)

        def norms(n: int) -> Norms | None:
            made = [1 + make(4 * n, dtype=wide), make(4 * n, dtype=wide)]
            made += [1 + make(n, dtype=wide), make(n, dtype=wide)]
            return Norms(*made) if self.norms else None

        _, N, B, H, M, Z = self.sizes()
        hyper, state = None, LSTMState(make(B, H), make(B, H, dtype=wide))
        if M:
            matrices = make(4 * M, H, scale=H**-0.5), make(4 * M, M, scale=M**-0.5), make(12 * Z, M)
            hyper = HyperCell(make(N, 4 * M), *matrices, make(12 * Z), make(12, H, Z), norms(M))
            state = LSTMState(*state[:2], make(B, M), make(B, M, dtype=wide))
        dlast = LSTMState(*(None if s is None else make(*s.shape, dtype=s.dtype) for s in state))
        weight_hh, bias = make(4 * H, H, scale=H**-0.5), make(4 * H)
        key = torch.tensor([0x123456789ABCDEF], device=device)
        return Problem(make(N, 4 * H), state, weight_hh, bias, norms(H), hyper, key, make(N, H), dlast)


class Problem(NamedTuple):
    x_gates: Tensor
    state: LSTMState
    weight_hh: Tensor
    bias: Tensor
    norms: Norms | None
    hyper: HyperCell | None
    key: Tensor
    dh: Tensor
    dlast: LSTMState


class Kept(NamedTuple):
    """Of every step, as the kernels' forward writes it."""

    h: Tensor
    c: Tensor
    hyper_h: Tensor | None
    hyper_c: Tensor | None
    h_gates: Tensor
    hyper_gates: Tensor | None


def to(value, dtype: torch.dtype):
    """All floating tensors of nested tuples in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(*(to(part, dtype) for part in value)) if isinstance(value, tuple) else value


def flat(value) -> list[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(value, tuple):
        return [t for part in value for t in flat(part)]
    return [] if value is None else [value]


def expected_forward(case: Case, p: Problem) -> Kept:
    """In the dtype of the problem's weights."""
    state, kept, start = p.state, [], 0
    for size in case.batch_sizes:
        state = LSTMState(*(None if s is None else s[:size] for s in state))
        rows, hyper = torch.arange(start, start + size, device=p.key.device), p.hyper
        before, x, hyper_gates = state, p.x_gates[start : start + size], None
        if hyper is not None:
            hyper = hyper._replace(x_gates=hyper.x_gates[start : start + size])
            hyper_gates = hyper.x_gates + before.h @ hyper.weight_xh.T + before.hyper_h @ hyper.weight_hh.T
        options = rows, p.key, case.dropout, EPS
        state = reference.lstm_step(x, state, p.weight_hh, p.bias, p.norms, hyper, *options)
        kept.append(Kept(*state, before.h @ p.weight_hh.T, hyper_gates))
        start += size
    return Kept(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*kept, strict=True)))


def weights_of(p: Problem) -> list[Tensor | None]:
    hyper = p.hyper[1:6] if p.hyper else [None] * 5
    norms = [*(p.norms or [None] * 4), *(p.hyper and p.hyper.norms or [None] * 4)]
    return [p.weight_hh, p.bias, *hyper, *norms]


def poisoned(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.full_like(like, torch.nan).contiguous()


def options_of(case: Case, p: Problem) -> tuple:
    sizes, key = torch.tensor(case.batch_sizes, dtype=torch.int64), p.key if case.dropout else None
    return case.sizes(), sizes, weights_of(p), key, case.dropout, EPS


def forward(case: Case, p: Problem, kept: bool = True) -> Kept:
    """What the kernels write, over poisoned memory."""
    _, N, _, H, M, _ = case.sizes()
    wide = p.state.c.dtype

    def empty(n: int, dtype: torch.dtype = p.x_gates.dtype) -> Tensor | None:
        return torch.full((N, n), torch.nan, dtype=dtype, device=p.key.device) if n else None

    made = Kept(empty(H), empty(H, wide), empty(M), empty(M, wide), empty(4 * H * kept), empty(4 * M * kept))
    hyper_x = p.hyper and p.hyper.x_gates
    kernels.run(*options_of(case, p), [p.x_gates, hyper_x, *p.state, *made])
    return made


def backward(case: Case, p: Problem, kept: Kept, wanted: reference.LSTMGradients) -> reference.LSTMGradients:
    """What the kernels make of the gradients; `wanted` for the shapes."""
    made = reference.LSTMGradients(*to_dtypes(wanted, p))
    z = None if p.hyper is None else z_of(p, kept)
    inputs = [p.x_gates, p.state.c, p.state.hyper_c, kept.c, kept.hyper_c, kept.h_gates, kept.hyper_gates, z]
    none = [None] * 4
    outputs = [made.x_gates, made.h_gates if p.hyper else None, made.hyper_gates, made.z]
    outputs += [*made.state, made.bias, made.d_weight, *(made.norms or none), *(made.hyper_norms or none)]
    kernels.run_backward(*options_of(case, p), [*inputs, p.dh, *p.dlast], outputs)
    return made if p.hyper else made._replace(h_gates=made.x_gates)


def to_dtypes(wanted: reference.LSTMGradients, p: Problem):
    """Poisoned tensors of its shapes, in the dtypes that gradients have."""
    dtype, wide = p.x_gates.dtype, p.state.c.dtype

    def like(value, name: str = ""):
        if isinstance(value, tuple):
            return type(value)(*(like(v, f) for v, f in zip(value, value._fields, strict=True)))
        is_wide = name.endswith("_weight") and name != "d_weight" or name.endswith("_bias")
        is_wide = is_wide or name in ("c", "hyper_c")
        return None if value is None else poisoned(value.to(wide if is_wide else dtype))

    return like(wanted)


def z_of(p: Problem, kept: Kept) -> Tensor:
    return torch.nn.functional.linear(kept.hyper_h, p.hyper.z_weight, p.hyper.z_bias)


def expected_backward(case: Case, p: Problem, kept: Kept) -> reference.LSTMGradients:
    z = None if p.hyper is None else z_of(p, kept)
    sizes = torch.tensor(case.batch_sizes, dtype=torch.int64)
    arguments = p.weight_hh, p.bias, p.norms, p.hyper, p.key, case.dropout, EPS, p.x_gates
    of_steps = kept.c, kept.hyper_c, kept.h_gates, kept.hyper_gates, z
    return reference.lstm_backward(sizes, *arguments, p.state.c, p.state.hyper_c, *of_steps, p.dh, p.dlast)


@pytest.fixture
def configured(monkeypatch):
    """Sets what a case says of tiles."""

    def configure(case: Case) -> None:
        for name, value in (("Z_ROWS", case.rows_of_z), ("CHUNK_BYTES", case.chunk)):
            monkeypatch.setattr(kernels, name, value)
        if INTERPRETED:  # a program costs a tenth of a second
            monkeypatch.setattr(kernels, "PROGRAMS", case.programs)

    return configure


def check(case: Case, dtype: torch.dtype, device: torch.device, assert_accurate) -> None:
    p = case.problem(dtype, device)
    kept = forward(case, p)
    exact, exact_kept = to(p, torch.float64), to(kept, torch.float64)
    compare = [(kept, expected_forward(case, exact), expected_forward(case, to(p, dtype)))]
    wanted = expected_backward(case, exact, exact_kept)
    plain = expected_backward(case, to(p, dtype), to(kept, dtype))
    compare.append((backward(case, p, kept, wanted), wanted, plain))
    for got, right, simple in compare:
        for name, *values in zip(right._fields, got, right, simple, strict=True):
            made, expected, rough = map(flat, values)
            if not made:
                continue
            assert all(t.isfinite().all() for t in made), name
            assert_accurate([t.to(dtype) for t in made], expected, dtype, rough)


CASES = {
    "everything": Case((3, 2), 7, 5, 2, norms=True, dropout=0.3),
    "z in the kernels": Case((1, 1), 5, 3, 3, rows_of_z=132),
    "chunks": Case((3, 2), 9, 4, 1, dropout=0.5, chunk=1),
    "one step": Case((2,), 17, norms=True),
    "plain": Case((2, 1), 6, dropout=0.1),
}
MORE = {
    "everything, longer": Case((5, 5, 4, 2, 1, 1), 33, 17, 4, norms=True, dropout=0.2, rows_of_z=132),
    "blocks of columns": Case((3, 3), 257, 16, 5, programs=4),
    "blocks of rows": Case((9, 8, 3), 31, 32, 16, norms=True, programs=3),
    "ones": Case((7, 5), 1, 1, 1, rows_of_z=132),
    "z in several blocks": Case((1, 1), 15, 100, 7, rows_of_z=132, chunk=1),
    "layer norm": Case((4, 4, 3, 3), 65, norms=True, dropout=0.4, chunk=4000),
    "plain, longer": Case((3, 3, 3, 1, 1), 300, chunk=1, programs=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference(case, device, configured, assert_accurate):
    configured(case)
    dtype = torch.float64 if case.chunk == 1 else torch.float32
    check(case, dtype, device, assert_accurate)


def test_half_precision(device, configured, assert_accurate):
    case = Case((3,), 12, 6, 5, norms=True)
    configured(case)
    check(case, torch.bfloat16, device, assert_accurate)


@pytest.mark.slow
@pytest.mark.parametrize("case", (CASES | MORE).values(), ids=CASES | MORE)
def test_equals_reference_in_every_dtype(case, dtype, device, configured, assert_accurate):
    configured(case)
    check(case, dtype, device, assert_accurate)


def test_nothing_kept_and_no_gradients_given(device, configured):
    """As in inference, and where only the output or only a last state is used."""
    case = Case((2,), 5, 3, 2)
    configured(case)
    p = case.problem(torch.float32, device)
    kept = forward(case, p)
    for a, b in zip(flat(kept[:4]), flat(forward(case, p, kept=False)[:4]), strict=True):
        assert torch.equal(a, b)
    zeros = p._replace(dh=torch.zeros_like(p.dh), dlast=LSTMState(*map(torch.zeros_like, p.dlast)))
    wanted = expected_backward(case, p, kept)
    absent = p._replace(dh=None, dlast=LSTMState(None, None, None, None))
    found = [flat(backward(case, q, kept, wanted)) for q in (zeros, absent)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_steps(device):
    case = Case((), 5, 3, 2, norms=True)
    p = case.problem(torch.float32, device)
    kept = forward(case, p)
    wanted = reference.lstm_backward(
        torch.empty(0, dtype=torch.int64), p.weight_hh, p.bias, p.norms, p.hyper, None, 0.0, EPS, p.x_gates,
        p.state.c, p.state.hyper_c, *kept[1:2], kept.hyper_c, kept.h_gates, kept.hyper_gates, z_of(p, kept),
        p.dh, p.dlast,
    )  # fmt: skip
    for a, b in zip(flat(backward(case, p, kept, wanted)), flat(wanted), strict=True):
        assert torch.equal(a, b)


def test_equal_bit_for_bit_every_time(device, configured):
    case = Case((2,), 8, 4, 2, dropout=0.5)
    configured(case)
    p = case.problem(torch.float32, device)
    kept = forward(case, p)
    wanted = expected_backward(case, p, kept)
    first, second = (flat((forward(case, p), backward(case, p, kept, wanted))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_drops_what_the_reference_drops(device, configured):
    """Over rows and columns past a block, by an unsigned comparison: shares above a half have a threshold
    above 2^31."""
    case = Case((5, 4), 37, dropout=0.75)
    configured(case)
    p = case.problem(torch.float64, device)
    p = p._replace(state=LSTMState(p.state.h, torch.zeros_like(p.state.c)))
    dropped = forward(case, p).c[:5] == 0
    rows = torch.arange(5, device=device)
    assert torch.equal(dropped, reference.dropout_scale(p.key, rows, 37, 0, 0.75) == 0)
    assert 0.5 < dropped.double().mean() < 0.95


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_sequence(value, device, configured):
    case = Case((3, 3), 5, norms=True)
    configured(case)
    p = case.problem(torch.float32, device)
    clean = forward(case, p)
    p.x_gates[1, 3] = value
    h = forward(case, p).h
    assert h[[1, 4]].isnan().all()
    assert torch.equal(h[[0, 2, 3, 5]], clean.h[[0, 2, 3, 5]])


def test_steps():
    made = kernels.steps_of(torch.tensor([3, 3, 1]))
    assert made == [(0, -1, 3), (3, 0, 3), (6, 3, 1)]
