"""The persistent CUDA kernels of `lstm` against the reference in float64, on the emulator and on a GPU."""

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.reference import HyperCell, LSTMState, Norms
from tests.cuda_emulator.kernels import address, dtype_name

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = 37  # numbers behind the end of every tensor the kernels write: they stay as they are


@dataclass(frozen=True)
class Case:
    """batch_sizes of every step; H, M, Z; multiprocessors of the emulator (a block each)."""

    batch_sizes: tuple[int, ...]
    H: int
    M: int = 0
    Z: int = 0
    norms: bool = False
    dropout: float = 0.0
    blocks: int = 3

    @property
    def sizes(self) -> tuple[int, ...]:
        return len(self.batch_sizes), sum(self.batch_sizes), self.batch_sizes[0], self.H, self.M, self.Z


# strips: 1, several a block, part of one; rows: fewer than blocks, more, two tiles of the batch; K: part of a
# chunk of 64, several; units: more than threads; embeddings in accesses of 16 bytes and not
CASES = {
    "one": Case((1,), 1),
    "plain": Case((3, 3), 17),
    "norms": Case((5, 4, 4, 1), 20, norms=True),
    "hyper": Case((2, 2, 1), 19, 7, 3, blocks=4),
    "hyper_norms": Case((4, 3, 1), 33, 11, 4, norms=True),
    "dropout": Case((3, 2), 13, 5, 8, norms=True, dropout=0.4),
    "two_tiles": Case((37, 33), 9, 6, 1, dropout=0.1, blocks=5),
    "larger_hyper": Case((2, 2), 5, 70, 2, norms=True),
    "chunks": Case((2, 1), 130, 12, 2, norms=True, blocks=6),
}
LONG = {
    "many_units": Case((2, 1), 515, 33, 16, norms=True, blocks=20),
    "many_steps": Case((3,) * 20 + (1,) * 11, 24, 8, 4, norms=True, dropout=0.2, blocks=4),
}


class Problem:
    """What `reference.lstm` takes, in `dtype` and float32 where the kernels want that."""

    def __init__(self, case: Case, dtype: torch.dtype):
        T, N, B, H, M, Z = case.sizes
        self.case, self.dtype = case, dtype
        made = lambda *shape, scale=1.0, dtype=dtype: (torch.randn(*shape) * scale).to(dtype)  # noqa: E731

        def norms(n: int) -> Norms | None:
            if not case.norms:
                return None
            parts = [1 + made(4 * n, scale=0.2), made(4 * n), 1 + made(n, scale=0.2), made(n)]
            return Norms(*(p.float() for p in parts))

        self.x_gates = made(N, 4 * H)
        self.weight_hh, self.bias = made(4 * H, H, scale=H**-0.5), made(4 * H)
        self.norms, self.hyper, self.state = norms(H), None, LSTMState(made(B, H), made(B, H).float())
        if M:
            weights = made(4 * M, H, scale=H**-0.5), made(4 * M, M, scale=M**-0.5)
            z = made(12 * Z, M, scale=M**-0.5), made(12 * Z)
            d_weight = made(12, H, Z, scale=Z**-0.5)
            self.hyper = HyperCell(made(N, 4 * M), *weights, *z, d_weight, norms(M))
            self.state = LSTMState(*self.state[:2], made(B, M), made(B, M).float())
        self.key = torch.tensor([0x123456789ABCDEF0 + 7]) if case.dropout else None
        self.batch_sizes = torch.tensor(case.batch_sizes)

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Of `reference.lstm`, all in `dtype`."""
        cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
        norms = None if self.norms is None else Norms(*map(cast, self.norms))
        hyper = self.hyper
        if hyper is not None:
            inner = None if hyper.norms is None else Norms(*map(cast, hyper.norms))
            hyper = HyperCell(*map(cast, hyper[:-1]), inner)
        state = LSTMState(*map(cast, self.state))
        given = cast(self.x_gates), state, cast(self.weight_hh), cast(self.bias), norms, hyper
        return *given, self.batch_sizes, self.key, self.case.dropout

    def weights(self) -> list[Tensor | None]:
        """The fifteen of the kernels."""
        none = (None,) * 4
        hyper = (None,) * 5 if self.hyper is None else self.hyper[1:6]
        hyper_norms = none if self.hyper is None else self.hyper.norms or none
        return [self.weight_hh, self.bias, *hyper, *(self.norms or none), *hyper_norms]


def every_step(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """h, c, hyper_h, hyper_c, h_gates, hyper_gates of every row by the reference, computed in `dtype`."""
    x_gates, state, weight_hh, bias, norms, hyper, sizes, key, dropout = problem.arguments(dtype)
    rows: list[list[Tensor]] = [[] for _ in range(6)]
    start = 0
    for size in sizes.tolist():
        state = LSTMState(*(None if s is None else s[:size] for s in state))
        rows[4].append(state.h @ weight_hh.mT)
        now = hyper
        if hyper is not None:
            now = hyper._replace(x_gates=hyper.x_gates[start : start + size])
            rows[5].append(now.x_gates + state.h @ hyper.weight_xh.mT + state.hyper_h @ hyper.weight_hh.mT)
        numbers = torch.arange(start, start + size)
        x_now = x_gates[start : start + size]
        state = reference.lstm_step(x_now, state, weight_hh, bias, norms, now, numbers, key, dropout, 1e-5)
        for own, made in zip(rows, state, strict=False):
            own.append(made)
        start += size
    return [torch.cat(own) for own in rows if own and own[0] is not None]


class Runner:
    """The kernels of one module on one device."""

    def __init__(self, kernels, case: Case):
        self.kernels, self.case = kernels, case
        if kernels.emulated:
            ctypes.CDLL(kernels.module.__file__).emulator_set_multiprocessors(case.blocks)
        self.batch_sizes = torch.tensor(case.batch_sizes)
        self.guarded: list[tuple[Tensor, int]] = []

    def there(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(self.kernels.device).contiguous()

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Poisoned, and more memory behind it, which `check_ends` looks at."""
        size = math.prod(shape)
        memory = self.kernels.poison(size + SMALL, dtype=dtype)
        self.guarded.append((memory, size))
        return memory[:size].view(shape)

    def check_ends(self) -> None:
        assert all(memory[size:].isnan().all() for memory, size in self.guarded), "wrote past an end"

    def scratch(self, dtype: torch.dtype, backward: bool) -> Tensor:
        asked = self.case.sizes, address(self.batch_sizes), dtype_name(dtype), backward
        assert self.kernels.module.lstm_refuses(*asked) == ""
        return self.output((self.kernels.module.lstm_scratch(*asked),), torch.float32)


def forward(kernels, problem: Problem, keep: bool = True) -> list[Tensor]:
    """h, c, hyper_h, hyper_c, h_gates, hyper_gates of every row."""
    case, dtype = problem.case, problem.dtype
    run = Runner(kernels, case)
    T, N, B, H, M, Z = case.sizes
    weights = [run.there(t) for t in problem.weights()]
    hyper_x = None if problem.hyper is None else problem.hyper.x_gates
    inputs = [run.there(t) for t in (problem.x_gates, hyper_x, *problem.state)]
    shapes = [((N, H), dtype), ((N, H), torch.float32), ((N, M), dtype), ((N, M), torch.float32)]
    shapes += [((N, 4 * H), dtype), ((N, 4 * M), dtype)]
    outputs = [run.output(*shape) if shape[0][1] else None for shape in shapes]
    given = outputs if keep else [*outputs[:4], None, None]
    key, scratch = run.there(problem.key), run.scratch(dtype, False)
    kernels.module.lstm(
        case.sizes, address(run.batch_sizes), [address(t) for t in weights], address(key), case.dropout, 1e-5,
        [address(t) for t in (*inputs, *given)], address(scratch), dtype_name(dtype), kernels.stream(),
    )  # fmt: skip
    run.check_ends()
    return [t for t in outputs if t is not None]


def check_forward(kernels, case: Case, dtype: torch.dtype, schedules, assert_accurate) -> None:
    problem = Problem(case, dtype)
    expected, plain = every_step(problem, torch.float64), every_step(problem, dtype)
    first = None
    for schedule in schedules:
        kernels.set_schedule(schedule)
        made = forward(kernels, problem)
        first = first or made
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True)), "depends on the order"
    for own, wanted, at_this_precision in zip(first, expected, plain, strict=True):
        own = own.cpu()
        if dtype != torch.float32 and own.dtype == torch.float32:  # c, which the kernel does not round
            at_this_precision, own = at_this_precision.to(dtype), own.to(dtype)
        assert_accurate(own, wanted, dtype, at_this_precision)


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_reference(cuda_kernels, name, assert_accurate):
    schedules = cuda_kernels.schedules()
    check_forward(cuda_kernels, CASES[name], torch.float32, schedules, assert_accurate)


def gradients(problem: Problem, dlast: list[Tensor | None], dh: Tensor | None, dtype) -> list[Tensor]:
    """By autograd of the reference in `dtype`: of x_gates, hyper_x_gates, weight_hh, state, bias, what makes
    embeddings, d_weight and the norms."""
    x_gates, state, weight_hh, bias, norms, hyper, *options = problem.arguments(dtype)
    leaves = [x_gates, weight_hh, *state, bias, *(norms or ())]
    if hyper is not None:
        leaves += [hyper.x_gates, *hyper[1:6], *(hyper.norms or ())]
    leaves = [t.requires_grad_() for t in leaves if t is not None]
    output, last = reference.lstm(x_gates, state, weight_hh, bias, norms, hyper, *options)
    pairs = [(t, d) for t, d in zip((output, *last), (dh, *dlast), strict=True) if d is not None]
    found = torch.autograd.grad(
        [t for t, _ in pairs], leaves, [d.to(dtype) for _, d in pairs], allow_unused=True
    )
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True)]


def before(first: Tensor, rows: Tensor, batch_sizes) -> Tensor:
    """What each row goes on from."""
    parts, start = [first], 0
    for size, following in zip(batch_sizes, batch_sizes[1:], strict=False):
        parts.append(rows[start : start + following])
        start += size
    return torch.cat(parts)


def backward(kernels, problem: Problem, kept: list[Tensor], dlast, dh) -> list[Tensor]:
    """As `gradients`, from what the forward kept."""
    case, dtype = problem.case, problem.dtype
    run, hyper = Runner(kernels, case), problem.hyper
    T, N, B, H, M, Z = case.sizes
    if M:
        h, c, hyper_h, hyper_c, h_gates, hyper_gates = kept
        z = (hyper_h.float() @ hyper.z_weight.float().mT.to(hyper_h.device)).add(hyper.z_bias.to(hyper_h.device))
        z = z.to(dtype).contiguous()
    else:
        h, c, h_gates = kept
        hyper_h = hyper_c = hyper_gates = z = None
    inputs = [problem.x_gates, problem.state.c, problem.state.hyper_c, c, hyper_c, h_gates, hyper_gates, z]
    inputs = [run.there(t) for t in (*inputs, dh, *dlast)]
    shapes = [((N, 4 * H), dtype), ((N, 4 * H if M else 0), dtype), ((N, 4 * M), dtype), ((N, 12 * Z), dtype)]
    shapes += [((B, H), dtype), ((B, H), torch.float32), ((B, M), dtype), ((B, M), torch.float32)]
    shapes += [((4 * H,), dtype), ((12, H if M else 0, Z), dtype)]
    for n in (H, M):
        shapes += [((size * case.norms,), torch.float32) for size in (4 * n, 4 * n, n, n)]
    outputs = [run.output(*shape) if math.prod(shape[0]) else None for shape in shapes]
    weights = [run.there(t) for t in problem.weights()]
    key, scratch = run.there(problem.key), run.scratch(dtype, True)
    kernels.module.lstm_backward(
        case.sizes, address(run.batch_sizes), [address(t) for t in weights], address(key), case.dropout, 1e-5,
        [address(t) for t in inputs], [address(t) for t in outputs], address(scratch), dtype_name(dtype),
        kernels.stream(),
    )  # fmt: skip
    run.check_ends()
    dx, dh_gates, dhyper, dz, dh0, dc0, dhyper_h0, dhyper_c0, dbias, dd_weight, *norms = [
        None if t is None else t.cpu() for t in outputs
    ]
    h_before = before(problem.state.h, h.cpu(), case.batch_sizes).double()
    product = lambda d, rows: (d.double().mT @ rows).to(dtype)  # noqa: E731
    made = [dx, product(dx if dh_gates is None else dh_gates, h_before), dh0, dc0, dhyper_h0, dhyper_c0, dbias]
    made += norms[:4]
    if M:
        hyper_before = before(problem.state.hyper_h, hyper_h.cpu(), case.batch_sizes).double()
        made += [dhyper, product(dhyper, h_before), product(dhyper, hyper_before)]
        made += [product(dz, hyper_h.cpu().double()), dz.double().sum(0).to(dtype), dd_weight, *norms[4:]]
    return [t for t in made if t is not None]


def check_backward(kernels, case: Case, dtype: torch.dtype, schedules, assert_accurate, given=31) -> None:
    """given: a bit for each incoming gradient that there is."""
    problem = Problem(case, dtype)
    _, N, B, H, M, _ = case.sizes
    made = [torch.randn(N, H), *(torch.randn(B, n) for n in (H, H, M, M))]
    made = [t.to(torch.float32 if i in (2, 4) else dtype) for i, t in enumerate(made)]
    dh, *dlast = [t if given >> i & 1 and t.numel() else None for i, t in enumerate(made)]
    expected = gradients(problem, dlast, dh, torch.float64)
    plain = gradients(problem, dlast, dh, dtype)
    kept = forward(kernels, problem)
    first = None
    for schedule in schedules:
        kernels.set_schedule(schedule)
        made = backward(kernels, problem, kept, dlast, dh)
        first = first or made
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True)), "depends on the order"
    for own, wanted, at_this_precision in zip(first, expected, plain, strict=True):
        assert_accurate(own.to(dtype), wanted, dtype, at_this_precision.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_backward_equals_autograd_of_the_reference(cuda_kernels, name, assert_accurate):
    schedules = cuda_kernels.schedules()
    check_backward(cuda_kernels, CASES[name], torch.float32, schedules, assert_accurate)
