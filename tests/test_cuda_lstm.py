"""The persistent CUDA kernels of `lstm` against the reference in float64, on the emulator and on a GPU."""

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.reference import LSTMState
from tests import lstm_problem
from tests.cuda_emulator import build
from tests.cuda_emulator.kernels import Kernels, address, dtype_name
from tests.lstm_problem import Problem, Rows, there, to

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = 37  # numbers behind the end of every tensor the kernels write: they stay as they are


@dataclass(frozen=True)
class Case(lstm_problem.Case):
    """blocks: multiprocessors of the emulator (a block each)."""

    blocks: int = 3


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


class Runner:
    """The kernels of one module on one device, for one problem."""

    def __init__(self, kernels, p: Problem, blocks: int):
        self.kernels, self.p, self.dtype = kernels, p, p.x_gates.dtype
        if kernels.emulated:
            ctypes.CDLL(kernels.module.__file__).emulator_set_multiprocessors(blocks)
        self.guarded: list[tuple[Tensor, int]] = []

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Poisoned, and more memory behind it, which `check_ends` looks at."""
        size = math.prod(shape)
        memory = self.kernels.poison(size + SMALL, dtype=dtype)
        self.guarded.append((memory, size))
        return memory[:size].view(shape)

    def check_ends(self) -> None:
        assert all(memory[size:].isnan().all() for memory, size in self.guarded), "wrote past an end"

    def run(self, backward: bool, *tensors) -> None:
        p, module, name = self.p, self.kernels.module, dtype_name(self.dtype)
        asked = p.sizes, address(p.batch_sizes), name, backward
        assert module.lstm_refuses(*asked) == ""
        scratch = self.output((module.lstm_scratch(*asked),), torch.float32)
        kernel = module.lstm_backward if backward else module.lstm
        kernel(
            *asked[:2], [address(t) for t in p.weights()], address(p.key), p.dropout, p.eps,
            *([address(t) for t in own] for own in tensors), address(scratch), name, self.kernels.stream(),
        )  # fmt: skip
        self.check_ends()


def forward(kernels, p: Problem, blocks: int, keep: bool = True) -> Rows:
    run = Runner(kernels, p, blocks)
    rows = p.empty_rows(keep, run.output)
    run.run(False, p.tensors(rows))
    return p.with_z(rows)


def in_every_order(kernels, schedules, run) -> list[Tensor]:
    """What run makes, without what there is not; the same in all orders of threads and blocks."""
    first = None
    for schedule in schedules:
        kernels.set_schedule(schedule)
        made = there(run())
        first = first or made
        assert all(torch.equal(a, b) for a, b in zip(made, first, strict=True)), "depends on the order"
    return first


def check_forward(kernels, case: Case, dtype: torch.dtype, schedules, assert_accurate) -> None:
    p = case.problem(dtype, kernels.device)
    made = in_every_order(kernels, schedules, lambda: forward(kernels, p, case.blocks))
    expected, plain = (to(p, kind).expected_rows() for kind in (torch.float64, dtype))
    for own, wanted, at_this_precision in zip(made, there(expected), there(plain), strict=True):
        assert_accurate(own.to(dtype), wanted, dtype, at_this_precision)  # c is wider


def gradients(p: Problem) -> list[Tensor]:
    """By autograd of the reference, in the problem's dtype: of x_gates, weight_hh, state, bias and norms, and
    with a hyper LSTM of hyper_x_gates, its weights and norms."""
    leaves = [p.x_gates, p.weight_hh, *there(p.state), p.bias, *(p.norms or ())]
    if p.hyper is not None:
        leaves += [p.hyper_x_gates, *there(p.hyper[:6]), *(p.hyper.norms or ())]
    for t in leaves:
        t.requires_grad_()
    output, last = reference.lstm_steps(*p[:11])
    pairs = [(t, d) for t, d in zip((output, *last), (p.dh, *p.dlast), strict=True) if d is not None]
    found = torch.autograd.grad([t for t, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True)]


def before(first: Tensor, rows: Tensor, batch_sizes: list[int]) -> Tensor:
    """What each row goes on from."""
    parts, start = [first], 0
    for size, following in zip(batch_sizes, batch_sizes[1:], strict=False):
        parts.append(rows[start : start + following])
        start += size
    return torch.cat(parts)


def backward(kernels, p: Problem, rows: Rows, blocks: int) -> list[Tensor | None]:
    """As `gradients`, from what the forward kept."""
    run, dtype, sizes = Runner(kernels, p, blocks), p.x_gates.dtype, p.batch_sizes.tolist()
    outputs = p.empty_gradients(run.output)
    run.run(True, p.inputs(rows), outputs)
    dx, dh_gates, dhyper, dz, *dstate = outputs[:8]
    dbias, dd_weight, *norms = outputs[8:]

    def product(d: Tensor, other: Tensor) -> Tensor:
        return (d.double().mT @ other.double()).to(dtype)

    h_before = before(p.state.h, rows.h, sizes)
    made = [dx, product(dx if dh_gates is None else dh_gates, h_before), *dstate, dbias, *norms[:4]]
    if p.hyper is not None:
        hyper_before = before(p.state.hyper_h, rows.hyper_h, sizes)
        made += [dhyper, product(dhyper, h_before), product(dhyper, hyper_before), product(dz, rows.hyper_h)]
        made += [dz.double().sum(0).to(dtype), dd_weight, *norms[4:]]
    return made


def check_backward(kernels, case: Case, dtype: torch.dtype, schedules, assert_accurate, given=None) -> None:
    """given: the only incoming gradients that there are, of (h of every row, *state)."""
    p = case.problem(dtype, kernels.device)
    if given is not None:
        dh, *dlast = (d if i in given else None for i, d in enumerate((p.dh, *p.dlast)))
        p = p._replace(dh=dh, dlast=LSTMState(*dlast))
    rows = forward(kernels, p, case.blocks)
    made = in_every_order(kernels, schedules, lambda: backward(kernels, p, rows, case.blocks))
    exact, plain = (gradients(to(p, kind)) for kind in (torch.float64, dtype))
    # all at once: some amplify rounding
    assert_accurate([t.to(dtype) for t in made], exact, dtype, plain)


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


@pytest.mark.parametrize("given", [0, 1, 2])
def test_gradients_that_are_not_given_are_zero(cuda_kernels, given, assert_accurate):
    """Of h of every row, of the last h and of the last c alone."""
    case = Case((2, 2, 1), 10, 5, 2, norms=given == 1)
    check_backward(cuda_kernels, case, torch.float32, (0,), assert_accurate, (given,))


def test_what_is_not_kept_changes_nothing(cuda_kernels):
    case = CASES["hyper"]
    p = case.problem(torch.float32, cuda_kernels.device)
    kept, alone = (forward(cuda_kernels, p, case.blocks, keep) for keep in (True, False))
    lstm_problem.assert_equal(kept[:4], alone[:4])


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
    p = case.problem(torch.float32)
    library = ctypes.CDLL(kernels.module.__file__)
    forward(kernels, p, case.blocks)
    library.emulator_set_resident_blocks(case.blocks - 1)
    try:
        with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
            forward(kernels, p, case.blocks)
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
