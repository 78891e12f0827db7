"""The persistent CUDA kernels of `lstm` against the reference in float64, on the emulator and on a GPU."""

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.reference import HyperCell, LSTMState, Norms
from tests.cuda_emulator import build
from tests.cuda_emulator.kernels import Kernels, address, dtype_name

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
    "two_tiles": Case((33, 2), 9, 6, 1, dropout=0.1, blocks=5),
    "larger_hyper": Case((2, 2), 5, 70, 2, norms=True),
    "chunks": Case((2, 1), 130, 12, 2, norms=True, blocks=6),
}
EVERY_ORDER = ("hyper", "norms")  # cases that run in all orders of threads and blocks
LONG = {
    "many_units": Case((2, 1), 515, 33, 16, norms=True, blocks=60),
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
        z = (hyper_h.float() @ hyper.z_weight.float().mT.to(hyper_h.device)).add(
            hyper.z_bias.to(hyper_h.device)
        )
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
    made = [
        dx,
        product(dx if dh_gates is None else dh_gates, h_before),
        dh0,
        dc0,
        dhyper_h0,
        dhyper_c0,
        dbias,
    ]
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


def schedules_of(kernels, name: str) -> tuple[int, ...]:
    return kernels.schedules() if name in EVERY_ORDER else kernels.schedules()[:1]


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_reference(cuda_kernels, name, assert_accurate):
    schedules = schedules_of(cuda_kernels, name)
    check_forward(cuda_kernels, CASES[name], torch.float32, schedules, assert_accurate)


@pytest.mark.parametrize("name", CASES)
def test_backward_equals_autograd_of_the_reference(cuda_kernels, name, assert_accurate):
    schedules = schedules_of(cuda_kernels, name)
    check_backward(cuda_kernels, CASES[name], torch.float32, schedules, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(cuda_kernels, dtype, assert_accurate):
    """Z = 8 is one access of 16 bytes there."""
    case = CASES["dropout"]
    check_forward(cuda_kernels, case, dtype, (0,), assert_accurate)
    check_backward(cuda_kernels, case, dtype, (0,), assert_accurate)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_all_cases_in_all_orders(cuda_kernels, name, dtype, assert_accurate):
    case = (CASES | LONG)[name]
    schedules = cuda_kernels.schedules() if name in CASES else (2,)
    check_forward(cuda_kernels, case, dtype, schedules, assert_accurate)
    check_backward(cuda_kernels, case, dtype, schedules, assert_accurate)


@pytest.mark.parametrize("given", [1, 2, 4])
def test_gradients_that_are_not_given_are_zero(cuda_kernels, given, assert_accurate):
    """Of h of every row, of the last h and of the last c alone."""
    case = Case((2, 2, 1), 10, 5, 2, norms=given == 2)
    check_backward(cuda_kernels, case, torch.float32, (0,), assert_accurate, given)


def test_what_is_not_kept_changes_nothing(cuda_kernels):
    problem = Problem(CASES["hyper"], torch.float32)
    kept, alone = (forward(cuda_kernels, problem, keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], alone[:4], strict=True))
    assert all(t.isnan().all() for t in alone[4:])


def refuses(module, sizes: tuple[int, ...], batch_sizes: list[int], dtype="float32", backward=False) -> str:
    steps = torch.tensor(batch_sizes)
    return module.lstm_refuses(sizes, address(steps), dtype, backward)


def test_what_is_served(cuda_kernels):
    """On 132 multiprocessors of 227 KiB, those of an H100: the report's cell and the paper's, both ways."""
    module = cuda_kernels.module
    if cuda_kernels.emulated:
        ctypes.CDLL(module.__file__).emulator_set_multiprocessors(132)
    for B, H, Z in ((32, 512, 16), (128, 1000, 4), (128, 1000, 16)):
        for backward in (False, True):
            for dtype in DTYPES:
                assert refuses(module, (1, B, B, H, 128, Z), [B], dtype_name(dtype), backward) == ""
    assert "do not fit" in refuses(module, (1, 1, 1, 2048, 128, 16), [1])
    assert "do not fit" in refuses(module, (1, 1, 1, 1 << 20, 0, 0), [1])
    assert "float64" in refuses(module, (1, 1, 1, 4, 0, 0), [1], "float64")
    falling = list(range(257, 0, -1))
    assert "different sizes" in refuses(module, (257, sum(falling), 257, 4, 0, 0), falling)
    assert refuses(module, (256, sum(falling[1:]), 256, 4, 0, 0), falling[1:]) == ""


def test_more_blocks_than_run_at_once_are_refused():
    """What the layout asks for fits by construction; a launch that does not is CUDA's error, not a hang."""
    case = CASES["norms"]
    kernels = Kernels(build.module(), torch.device("cpu"))
    problem = Problem(case, torch.float32)
    library = ctypes.CDLL(kernels.module.__file__)
    forward(kernels, problem)
    library.emulator_set_resident_blocks(case.blocks - 1)
    try:
        with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
            forward(kernels, problem)
    finally:
        library.emulator_set_resident_blocks(-1)


@pytest.mark.parametrize(
    "sizes, batch_sizes, said",
    [
        ((0, 0, 0, 4, 0, 0), [1], "T, N, B and H must be at least 1"),
        ((1, 1, 1, 4, 3, 0), [1], "M and Z must be at least 1, or both 0"),
        ((2, 3, 1, 4, 0, 0), [1, 2], "never rise"),
        ((2, 2, 2, 4, 0, 0), [2, 0], "at least 1"),
        ((2, 4, 2, 4, 0, 0), [2, 1], "begin with B and sum to N"),
        ((1, 1, 2, 4, 0, 0), [1], "begin with B and sum to N"),
    ],
)
def test_bad_sizes(sizes, batch_sizes, said):
    with pytest.raises(ValueError, match=said):
        refuses(build.module(), sizes, batch_sizes)


def replaced(values: list[int], **at: int) -> list[int]:
    return [at.get(f"i{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"dtype": "float64"}, "not served: float64"),
        ({"dropout": 1.0, "key": 64}, "dropout must be at least 0 and below 1"),
        ({"dropout": 0.5}, "key and dropout come together"),
        ({"scratch": 0}, "scratch must not be null"),
        ({"scratch": 68}, "multiple of its elements' 16 bytes"),
        ({"weights": replaced([64] * 15, i0=0)}, "weight_hh and bias must not be null"),
        ({"weights": replaced([64] * 15, i4=0)}, "hyper_weight_xh to d_weight must not be null"),
        ({"weights": replaced([64] * 15, i8=0)}, "norms must not be null"),
        ({"tensors": replaced([64] * 12, i0=0)}, "x_gates, h0, c0, h and c must not be null"),
        ({"tensors": replaced([64] * 12, i4=0)}, "hyper tensors must not be null"),
        ({"tensors": replaced([64] * 12, i0=66)}, "multiple of its elements' 4 bytes"),
        ({"sizes": (1, 1, 1, 4, 0, 0)}, "must be null without them"),
    ],
)
def test_bad_input_never_reaches_the_gpu(changed, said):
    """A call with a hyper LSTM and norms, and addresses that nobody reads."""
    steps = torch.tensor([1])
    given = dict(
        sizes=(1, 1, 1, 4, 3, 2), batch_sizes=address(steps), weights=[64] * 15, key=0, dropout=0.0, eps=1e-5,
        tensors=[64] * 12, scratch=64, dtype="float32", stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=said):
        build.module().lstm(**given | changed)
