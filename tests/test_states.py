"""Low-precision optimizer states: the formats, and the kernels against the reference bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperfast import ops, states
from hyperfast.ops._library import _cpu
from hyperfast.states import EightBit

ROOT = Path(__file__).resolve().parents[1]
STORAGES = ["bfloat16", "8bit"]
# shapes that end within a vector, a group of rows with one scale, what is decoded at once, and a block
SHAPES = [
    (0, 3),
    (1, 1),
    (31, 1),
    (33, 1),
    (5, 7),
    (65, 8),
    (16, 16),
    (17, 16),
    (1025, 16),
    (40, 17),
    (3, 100),
]
SHAPES += [(2, 255), (3, 256), (2, 257), (33, 511), (33, 512), (2049, 5)]


def stored(values: torch.Tensor, storage: str, signed: bool) -> states.State:
    state = states.zeros(values, storage)
    states.encode_(state, values, signed)
    return state


def parts(state: states.State) -> list[torch.Tensor]:
    return list(state) if isinstance(state, EightBit) else [state]


def cloned(state):
    if isinstance(state, EightBit):
        return EightBit(*(t.clone() for t in state))
    return None if state is None else state.clone()


def error(state: states.State, values: torch.Tensor, signed: bool) -> torch.Tensor:
    return (states.decode(state, signed) - values).abs()


class TestFormats:
    @pytest.mark.parametrize("signed", [True, False])
    def test_every_code_survives(self, signed):
        """decode and encode to nearest are inverses on all 256 codes, whatever the scale."""
        codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
        for scale in (1.0, 3e-12, 7e7):
            state = EightBit(codes, torch.tensor([scale]))
            values = states.decode(state, signed)
            again = stored(values, "8bit", signed)
            torch.testing.assert_close(states.decode(again, signed), values, rtol=1e-5, atol=0)
            same = codes != 0x80 if signed else torch.ones_like(codes, dtype=bool)  # 0x80 is a zero too
            assert torch.equal(again.codes[same], codes[same])

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("storage", STORAGES)
    def test_nearest_is_near(self, shape, storage):
        values = torch.randn(shape)
        half_ulp = {"bfloat16": 2.0**-8, "8bit": 2.0**-4}[storage]
        for signed, given in ((True, values), (False, values.square())):
            state = stored(given, storage, signed)
            assert (error(state, given, signed) <= half_ulp * 1.001 * given.abs() + 1e-4 * half_ulp).all()

    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("signed", [True, False])
    def test_random_rounding_is_right_on_average(self, storage, signed):
        """100,000 copies of a few values, in groups with a larger one."""
        for value in (0.3, 0.0123, 3e-4):
            values = torch.full((6250, 16), value)
            values[::16, 0] = 1.0
            state = states.zeros(values, storage)
            states.encode_(
                state, values, signed, states.random_bits(12345678, 0, values.shape, values.device)
            )
            got = states.decode(state, signed)[values != 1.0]
            assert got.unique().numel() <= 2  # the neighbours
            assert abs(got.double().mean() / value - 1) < 2e-3

    def test_a_second_moment_never_becomes_zero(self):
        values = torch.full((16, 16), 1e-30)
        values[0, 0] = 1.0
        for seed in range(4):
            random = states.random_bits(seed, 0, values.shape, values.device)
            state = states.zeros(values, "8bit")
            states.encode_(state, values, False, random)
            assert (states.decode(state, False) > 0).all()

    def test_zeros_stay_zeros(self):
        for signed in (True, False):
            state = stored(torch.zeros(20, 16), "8bit", signed)
            assert states.decode(state, signed).count_nonzero() == 0
            mixed = torch.zeros(20, 16)
            mixed[3, 3] = 1.0
            if signed:
                assert states.decode(stored(mixed, "8bit", True), True).count_nonzero() == 1

    def test_scales_of_the_extremes(self):
        for scale in (1e-38, 1e-35, 1e-20, 1e20, 1e38):
            values = torch.rand(32, 8) * scale
            state = stored(values, "8bit", False)
            decoded = states.decode(state, False)
            assert decoded.isfinite().all()
            if scale > 1e-36:
                assert (error(state, values, False) <= 2.0**-4 * values + 2.0**-30 * scale).all()

    @pytest.mark.parametrize("storage", STORAGES)
    def test_conversions(self, storage):
        p = torch.randn(37, 5)
        state = stored(p, storage, True)
        assert states.converted(state, p, storage, True) is state
        plain = states.converted(state, p, "plain", True)
        assert plain.dtype == torch.float32 and torch.equal(plain, states.decode(state, True))
        again = states.converted(plain, p, storage, True)
        torch.testing.assert_close(states.decode(again, True), plain, rtol=1e-5, atol=0)


def problem(rule: str, storage: str) -> dict:
    """Columns of arguments for `SHAPES`, every other bias trained, states in the midst of a training."""
    g = torch.Generator().manual_seed(3)
    columns: dict[str, list] = {name: [] for name in ("w", "b", "s", "bs", "dw", "z", "new_z", "next")}
    for i, (n, k) in enumerate(SHAPES):
        scale = 10.0 ** torch.randint(-3, 3, (n, 1), generator=g)
        m = torch.randn(n, k, generator=g) * scale
        v = torch.rand(n, k, generator=g) * scale**2
        mb, vb = torch.randn(n, generator=g), torch.rand(n, generator=g)
        columns["w"].append(torch.randn(n, k, generator=g))
        columns["b"].append(torch.randn(n, generator=g))
        columns["s"].append([stored(m, storage, True), stored(v, storage, False)])
        trained = i % 2 == 0
        columns["bs"].append(
            [stored(mb, storage, True), stored(vb, storage, False)] if trained else [None] * 2
        )
        columns["dw"].append(torch.randn(n, generator=g))
        columns["z"].append(torch.randn(k, generator=g))
        columns["new_z"].append(torch.randn(k, generator=g))
        columns["next"].append(torch.full((n,), float("nan")))
    return columns


def arguments(rule: str, columns: dict, copy=cloned) -> tuple:
    c = {name: [t.clone() for t in columns[name]] for name in ("w", "b", "next")}
    s, bs = ([[copy(x) for x in pair] for pair in columns[name]] for name in ("s", "bs"))
    count = 2 if rule == "adam" else 1
    given = (columns["dw"], columns["z"], columns["new_z"], c["next"])
    if rule == "adam":
        row = ops.AdamWCoefficients(0.99, 0.05, 0.9, 0.999, 0.3, 1e-8, 0.01)
        rows = [row] * len(SHAPES)
    else:
        row = ops.SGDCoefficients(0.05, 0.01, 0.9, 1.0, 1.0, 0.9)
        rows = [row if pair[0] is not None else None for pair in bs]
    states_, bias_states = ([[pair[i] for pair in x] for i in range(count)] for x in (s, bs))
    seeds = [0x9E3779B1 * i % 2**32 for i in range(len(SHAPES))]
    return (c["w"], *states_, c["b"], *bias_states, *given, [row] * len(SHAPES), rows, 0.5, seeds)


def call(rule: str, backend: str, args: tuple) -> None:
    (ops.adamw_generate if rule == "adam" else ops.sgd_generate)(*args, backend=backend)


def compare(rule: str, storage: str, args: tuple, wanted: tuple) -> None:
    count = 2 if rule == "adam" else 1
    for column in (0, 1 + count, 5 + 2 * count):  # weights, biases, next weights
        ours, theirs = torch.cat([t.reshape(-1) for t in args[column]]), torch.cat(
            [t.reshape(-1) for t in wanted[column]]
        )  # fmt: skip
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    for column in (*range(1, 1 + count), *range(2 + count, 2 + 2 * count)):
        codes = [[parts(s)[0].reshape(-1) for s in x[column] if s is not None] for x in (args, wanted)]
        got, expected = (torch.cat(c) for c in codes)
        # equal but where the last bit of float32 decides how an element is rounded
        assert (got != expected).float().mean() < 1e-3
        for a, b in zip(args[column], wanted[column], strict=True):
            if a is not None:
                for x, y in zip(parts(a)[1:], parts(b)[1:], strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=0)


def as_tensors(rule: str, args: tuple, trained: list[bool]) -> dict:
    """The numbers among `arguments` as the tensors that a CUDA graph reads."""
    rows, bias_rows, scale, seeds = args[-4:]
    nothing = [0.0] * len(rows[0])
    made = {
        "coefficients": torch.tensor(rows, dtype=torch.float64),
        "bias_coefficients": torch.tensor([row or nothing for row in bias_rows], dtype=torch.float64),
        "grad_scale": torch.tensor(scale, dtype=torch.float64),
        "seeds": torch.tensor(seeds),
    }
    return made | ({"bias_is_trained": trained} if rule == "sgd" else {})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("storage", ["plain", *STORAGES])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
class TestNumbersInTensors:
    def written(self, rule: str, args: tuple) -> list[torch.Tensor]:
        count = 2 if rule == "adam" else 1
        columns = [*args[: 2 + 2 * count], args[5 + 2 * count]]
        return [t for column in columns for state in column if state is not None for t in parts(state)]

    def both(self, rule, storage, backend, **more):
        """(arguments before, arguments after a call with tensors)"""
        args = arguments(rule, problem(rule, storage))
        trained = [pair is not None for pair in args[3 if rule == "sgd" else 4]]
        before = [t.clone() for t in self.written(rule, args)]
        op = ops.adamw_generate if rule == "adam" else ops.sgd_generate
        op(*args[:-4], **as_tensors(rule, args, trained), **more, backend=backend)
        return before, args

    def test_are_those_numbers(self, rule, storage, backend):
        _, ours = self.both(rule, storage, backend)
        theirs = arguments(rule, problem(rule, storage))
        call(rule, backend, theirs)
        for a, b in zip(self.written(rule, ours), self.written(rule, theirs), strict=True):
            assert torch.equal(a, b)

    def test_skip(self, rule, storage, backend):
        before, ours = self.both(rule, storage, backend, skip=torch.tensor(1.0))
        made = ops.generate(ours[0], ours[3 if rule == "adam" else 2], ours[8 if rule == "adam" else 6])
        now = self.written(rule, ours)
        assert all(torch.equal(a, b) for a, b in zip(now[: -len(SHAPES)], before, strict=False))
        for a, b in zip(now[-len(SHAPES) :], made, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_do_not_skip(self, rule, storage, backend):
        before, ours = self.both(rule, storage, backend, skip=torch.tensor(0.0))
        theirs = arguments(rule, problem(rule, storage))
        call(rule, backend, theirs)
        for a, b in zip(self.written(rule, ours), self.written(rule, theirs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
class TestKernels:
    def test_against_the_reference(self, rule, storage):
        columns = problem(rule, storage)
        ours, theirs = arguments(rule, columns), arguments(rule, columns)
        call(rule, "auto", ours), call(rule, "reference", theirs)
        compare(rule, storage, ours, theirs)
        made = ops.generate(ours[0], ours[3 if rule == "adam" else 2], columns["new_z"])
        next_weights = ours[9 if rule == "adam" else 7]
        assert all(torch.equal(a, b) for a, b in zip(made, next_weights, strict=True))

    def test_independent_of_the_thread_count(self, rule, storage):
        columns, results, before = problem(rule, storage), [], torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(arguments(rule, columns))
                call(rule, "auto", results[-1])
        finally:
            torch.set_num_threads(before)
        count = 2 if rule == "adam" else 1
        for column in (0, *range(1, 1 + count), 1 + count, *range(2 + count, 2 + 2 * count)):
            for a, b in zip(results[0][column], results[1][column], strict=True):
                assert a is None or all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))

    def test_nothing_outside_is_written(self, rule, storage):
        columns = problem(rule, storage)
        frames = []

        def framed(t):
            frame = torch.full((t.numel() + 128,), 77, dtype=t.dtype)
            frames.append(frame)
            return frame[64:-64].view(t.shape).copy_(t)

        for name in ("s", "bs"):
            columns[name] = [
                [
                    EightBit(*map(framed, s))
                    if isinstance(s, EightBit)
                    else framed(s)
                    if s is not None
                    else s
                    for s in pair
                ]
                for pair in columns[name]
            ]
        args = arguments(rule, columns, copy=lambda state: state)
        call(rule, "auto", args)
        assert all((frame[:64] == 77).all() and (frame[-64:] == 77).all() for frame in frames)


SCRIPT = """
import sys, torch
from hyperfast.ops._library import _cpu
from tests.test_states import STORAGES, arguments, call, compare, problem
assert _cpu.isa() == sys.argv[1]
for storage in STORAGES:
    for rule in ("adam", "sgd"):
        columns = problem(rule, storage)
        ours, theirs = arguments(rule, columns), arguments(rule, columns)
        call(rule, "auto", ours), call(rule, "reference", theirs)
        compare(rule, storage, ours, theirs)
"""


@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_instruction_set(isa):
    environment = os.environ | {"HYPERFAST_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, isa], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_moment_that_falls_follows_its_mean():
    """v of beta2 = 0.999 after the gradient stops: to nearest it would stay where it is, in both formats."""
    N, K, steps = 64, 16, 1500
    row = ops.AdamWCoefficients(1.0, 0.0, 0.9, 0.999, 1.0, 1e-8)
    for storage in STORAGES:
        w, b, z = torch.zeros(N, K), torch.zeros(N), torch.ones(K)
        m, v = states.zeros(w, storage), stored(torch.ones(N, K), storage, False)
        nearest = stored(torch.ones(N, K), storage, False)
        for t in range(steps):
            dw = torch.full((N,), 1.0 if t == 0 else 0.0)
            ops.adamw_generate(
                [w],
                [m],
                [v],
                [b],
                [None],
                [None],
                [dw],
                [z],
                [z],
                [torch.empty(N)],
                [row],
                [row],
                seeds=[0x9E3779B1 * t % 2**32],
            )
            if t < 50:
                states.encode_(nearest, states.decode(nearest, False) * 0.999, False)
        expected = 0.999**steps
        assert abs(states.decode(v, False).mean().item() / expected - 1) < 0.1
        if storage == "bfloat16":
            assert (states.decode(nearest, False) == 1.0).all()  # has not moved


def problem_of(dtype=torch.float32):
    w, b, z = torch.randn(5, 4, dtype=dtype), torch.randn(5, dtype=dtype), torch.randn(4, dtype=dtype)
    return w, b, z


BAD = {
    "mixed": (lambda a: a.update(v=[torch.zeros(5, 4)]), TypeError, "exp_avg_sq 0 must be an EightBit"),
    "codes shape": (
        lambda a: a.update(m=[EightBit(torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1))]),
        ValueError, "codes of exp_avg 0 must be",
    ),
    "codes dtype": (
        lambda a: a.update(m=[EightBit(torch.zeros(5, 4), torch.zeros(1))]), TypeError, "codes of exp_avg 0",
    ),
    "scales shape": (
        lambda a: a.update(m=[EightBit(torch.zeros(5, 4, dtype=torch.uint8), torch.zeros(2))]),
        ValueError, "scales of exp_avg 0",
    ),
    "float64 weight": (
        lambda a: a.update({k: [t.double() for t in a[k]] for k in ("w", "b", "dw", "z", "next")}),
        TypeError, "needs a float32 weight",
    ),
    "seeds": (lambda a: a.update(seeds=[1, 2]), ValueError, "1 weights but 2 of seeds"),
    "seeds shape": (lambda a: a.update(seeds=torch.zeros(2).long()), ValueError, r"seeds must be \[1\]"),
    "seeds dtype": (lambda a: a.update(seeds=torch.zeros(1)), TypeError, "seeds must be torch.int64"),
    "coefficients shape": (
        lambda a: a.update(row=torch.zeros(1, 6, dtype=torch.float64)), ValueError,
        r"coefficients must be \[1, 7\] as a tensor, got \[1, 6\]",
    ),
    "coefficients dtype": (lambda a: a.update(row=torch.zeros(1, 7)), TypeError, "must be torch.float64"),
    "scale shape": (lambda a: a.update(scale=torch.ones(1)), ValueError, r"grad_scale must be \[\]"),
    "scale dtype": (lambda a: a.update(scale=torch.tensor(1)), TypeError, "grad_scale must be torch.float64"),
    "skip shape": (lambda a: a.update(skip=torch.zeros(1)), ValueError, r"skip must be \[\]"),
    "skip device": (
        lambda a: a.update(skip=torch.zeros((), device="meta")), ValueError, "skip must be on cpu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, monkeypatch):
    monkeypatch.setattr(_cpu, "update_generate", lambda *args: pytest.fail("native code was reached"))
    w, b, z = problem_of()
    a = {
        "w": [w], "m": [states.zeros(w, "8bit")], "v": [states.zeros(w, "8bit")], "b": [b], "dw": [b.clone()],
        "z": [z], "next": [torch.empty(5)], "seeds": [1],
    }  # fmt: skip
    row = ops.AdamWCoefficients(1.0, 0.0, 0.9, 0.999, 1.0, 1e-8)
    a |= {"row": [row], "scale": 1.0, "skip": None}
    change, kind, message = BAD[case]
    change(a)
    with pytest.raises(kind, match=message):
        ops.adamw_generate(
            a["w"], a["m"], a["v"], a["b"], [None], [None], a["dw"], a["z"], a["z"], a["next"], a["row"],
            [row], a["scale"], a["seeds"], a["skip"],
        )  # fmt: skip


@pytest.mark.parametrize("storage", ["plain", *STORAGES])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_sgd(storage, momentum, monkeypatch):
    w, b, z = problem_of()
    buffers = (
        [states.zeros(w, storage) if momentum else None],
        [states.zeros(b, storage) if momentum else None],
    )
    row, found = ops.SGDCoefficients(0.1, 0.0, 0.9, 1.0, 0.0, 1.0), []
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.hyperfast, "update_generate", lambda *arguments: found.append(arguments))
        ops.sgd_generate(
            [w], buffers[0], [b], buffers[1], [b.clone()], [z], [z.clone()], [torch.empty(5)], [row], [row]
        )
    torch.library.opcheck(torch.ops.hyperfast.update_generate.default, found[0])


def test_reference_where_kernels_do_not_serve(monkeypatch):
    """K over 512."""
    monkeypatch.setattr(_cpu, "update_generate", lambda *args: pytest.fail("native code was reached"))
    w, b, z = torch.randn(3, 513), torch.randn(3), torch.randn(513)
    m, v = states.zeros(w, "8bit"), states.zeros(w, "8bit")
    row = ops.AdamWCoefficients(1.0, 0.1, 0.9, 0.999, 1.0, 1e-8)
    before = w.clone()
    ops.adamw_generate(
        [w], [m], [v], [b], [None], [None], [b.clone()], [z], [z], [torch.empty(3)], [row], [row]
    )
    assert not torch.equal(w, before) and m.scales.count_nonzero() == 3
