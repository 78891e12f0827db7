"""lstm: against the reference in float64, torch's LSTM, sequences one by one, and everything around it."""

import functools
import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from hyperfast import ops, reference
from hyperfast.ops._library import use_engine
from hyperfast.reference import HyperCell, LSTMState, Norms

lstm_module = importlib.import_module("hyperfast.ops.lstm")  # ops.lstm is the function


class Case(NamedTuple):
    """sizes: rows of each step; dense: they are not given. M 0: no hyper LSTM."""

    sizes: tuple[int, ...]
    H: int
    M: int = 0
    Z: int = 0
    norms: bool = False
    dropout: float = 0.0
    dense: bool = True
    I: int = 3


# around vectors of 4 to 16 numbers and panels of twice as many
CASES = {
    "ones": Case((1,), 1, 1, 1),
    "ones_norms": Case((1, 1), 1, 1, 1, True, 0.5),
    "lstm": Case((3,) * 4, 5),
    "lstm_norms": Case((3,) * 4, 17, norms=True),
    "lstm_packed": Case((4, 4, 3, 1), 16, norms=True, dropout=0.3, dense=False),
    "one_step": Case((5,), 7, 3, 2, True),
    "hyper": Case((3,) * 4, 15, 5, 3),
    "hyper_norms": Case((7,) * 3, 16, 8, 4, True),
    "hyper_dropout": Case((2,) * 3, 33, 17, 5, False, 0.25),
    "hyper_packed": Case((5, 5, 3, 3, 2, 1, 1), 31, 9, 16, True, 0.1, False),
    "wide_hyper": Case((2, 2), 3, 65, 1, True),
    "rows": Case((13, 11), 63, 16, 4, True, 0.1, False),
    "long": Case((3,) * 300, 4, 3, 2, True),
}
KEY = torch.tensor([-0x123456789ABCDEF])
NAMES = (
    "x", *LSTMState._fields, "weight_ih", "weight_hh", "bias", "hyper.weight_ih", "hyper.weight_hh",
    "hyper.bias", "z_weight", "z_bias", "d_weight", *Norms._fields,
    *(f"hyper {name}" for name in Norms._fields),
)  # fmt: skip
STATE, WEIGHTS = slice(1, 5), slice(5, None)  # of NAMES


def make(case: Case, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    """One tensor, or None, for each of NAMES; c and norms in float32 beside half precision."""
    sizes, H, M, Z, *_, I = case
    N, B = sum(sizes), sizes[0] if sizes else 3
    wide = torch.float32 if dtype.itemsize == 2 else dtype

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)

    def norms(n):
        scales = (1 + draw(4 * n, scale=0.2, dtype=wide), 1 + draw(n, scale=0.2, dtype=wide))
        return [scales[0], draw(4 * n, dtype=wide), scales[1], draw(n, dtype=wide)]

    own = [draw(4 * H, I, scale=I**-0.5), draw(4 * H, H, scale=H**-0.5), draw(4 * H)]
    state = [draw(B, H, scale=0.5), draw(B, H, dtype=wide), None, None]
    hyper = [None] * 6
    if M:
        state[2:] = [draw(B, M, scale=0.5), draw(B, M, dtype=wide)]
        hyper = [draw(4 * M, I + H, scale=(I + H) ** -0.5), draw(4 * M, M, scale=M**-0.5), draw(4 * M)]
        hyper += [draw(12 * Z, M, scale=M**-0.5), 1 + draw(12 * Z), draw(12, H, Z, scale=Z**-0.5)]
    none = [None] * 4
    own_norms, hyper_norms = (norms(n) if case.norms and n else none for n in (H, M))
    return [draw(N, I), *state, *own, *hyper, *own_norms, *hyper_norms]


def run(function, case: Case, tensors, **options) -> list[torch.Tensor]:
    """h of every step and the last state, without what is None."""
    x, state, weights = tensors[0], LSTMState(*tensors[STATE]), tensors[WEIGHTS]
    norms, hyper_norms = (Norms(*n) if case.norms else None for n in (weights[9:13], weights[13:]))
    hyper = HyperCell(*weights[3:9], hyper_norms) if case.M else None
    given = *weights[:3], norms, hyper
    batch_sizes = None if case.dense else torch.tensor(case.sizes, dtype=torch.int64)
    key = KEY if case.dropout else None
    output, last = function(x, state, *given, batch_sizes, key, case.dropout, **options)
    return [output, *(s for s in last if s is not None)]


def seeds(case: Case, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A gradient for each of what `run` returns."""
    tensors = make(case, dtype)
    first = torch.randn(sum(case.sizes), case.H, dtype=torch.float64).to(dtype)
    return [first, *(torch.randn_like(s) for s in tensors[STATE] if s is not None)]


def with_gradients(function, case: Case, tensors, grads, **options) -> tuple[list, list]:
    """What `run` returns, and the gradients of `tensors` without what is None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    made = run(function, case, leaves, **options)
    used = [(m, d) for m, d in zip(made, grads, strict=True) if d is not None]
    outputs, grads = zip(*used, strict=True)
    wanted = [t for t in leaves if t is not None]
    return made, list(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))


def double(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


# ---- the reference


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 as published, in Python's integers."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & low, (first >> 32) ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_philox_is_the_published_one():
    """Known answers of the authors' Random123; the reference, which has no fourth word, for any counter."""
    ones, pi = 0xFFFFFFFF, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    known = {
        ((0,) * 4, (0, 0)): [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ((ones,) * 4, (ones, ones)): [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        (tuple(pi), (0xA4093822, 0x299F31D0)): [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    }
    for (counter, key), words in known.items():
        assert philox4x32(counter, key) == words
    assert reference.philox(torch.tensor([0]), torch.tensor([0]), 1, 0).item() == 0x6627E8D5
    rows = torch.tensor([0, 1, 77, 2**31, 2**32 - 1])
    for key, stream in ((0, 0), (-1, 1), (-(2**63), 0), (0x299F31D0A4093822, 1)):
        got = reference.philox(torch.tensor([key]), rows, 5, stream)
        for row, column in itertools.product(range(5), range(5)):
            counter = [column, rows[row].item(), stream, 0]
            assert got[row, column] == philox4x32(counter, [key & ones, key >> 32 & ones])[0]


def test_dropout_scale():
    scale = reference.dropout_scale(torch.tensor([3]), torch.arange(300), 400, 0, 0.3)
    assert set(scale.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs((scale == 0).double().mean().item() - 0.3) < 0.005  # 3.8 standard deviations
    others = [(torch.tensor([4]), 0), (torch.tensor([3]), 1), (torch.tensor([3 + 2**32]), 0)]
    for key, stream in others:
        other = reference.dropout_scale(key, torch.arange(300), 400, stream, 0.3)
        assert abs((scale == other).double().mean().item() - 0.58) < 0.01
    part = reference.dropout_scale(torch.tensor([3]), torch.arange(7, 9), 400, 0, 0.3)
    assert torch.equal(part, scale[7:9])  # of a row's own number, however it is batched


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["lstm", "lstm_packed"])
def test_is_torchs_lstm(name, backend):
    case = CASES[name]._replace(norms=False, dropout=0.0)
    tensors = make(case)
    theirs = nn.LSTM(case.I, case.H).double()
    given = *tensors[5:8], torch.zeros_like(tensors[7])
    with torch.no_grad():
        for p, value in zip(theirs.parameters(), given, strict=True):
            p.copy_(value)
        packed = nn.utils.rnn.PackedSequence(tensors[0], torch.tensor(case.sizes))
        expected, last = theirs(packed, (tensors[1][None], tensors[2][None]))
        got = run(ops.lstm, case, tensors, backend=backend)
    for a, b in zip(got, (expected.data, last[0][0], last[1][0]), strict=True):
        torch.testing.assert_close(a, b)


def test_packed_sequences_are_those_one_by_one():
    case = CASES["hyper_packed"]._replace(dropout=0.0)
    tensors = make(case)
    output, *last = run(ops.lstm, case, tensors)
    starts = [0, *itertools.accumulate(case.sizes)]
    for b in range(case.sizes[0]):
        rows = [start + b for start, size in zip(starts, case.sizes, strict=False) if size > b]
        alone = [None if t is None else t[rows] if i < 1 else t[b : b + 1] if i < 5 else t
                 for i, t in enumerate(tensors)]  # fmt: skip
        h, *ended = run(ops.lstm, case._replace(sizes=(1,) * len(rows), dense=True), alone)
        torch.testing.assert_close(output[rows], h)
        for s, own in zip(last, ended, strict=True):
            torch.testing.assert_close(s[b : b + 1], own)


# ---- the op against it


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [pytest.param(name, torch.float64, marks=[pytest.mark.slow] * (name == "long")) for name in CASES],
)
def test_accurate(assert_accurate, poison, name, dtype):
    case = CASES[name]
    tensors, grads = make(case, dtype), seeds(case, dtype)
    made, gradients = with_gradients(ops.lstm, case, tensors, grads)
    expected, wanted = with_gradients(reference.lstm, case, double(tensors), double(grads))
    single = [None if t is None else t.float() for t in tensors], [d.float() for d in grads]
    plain, plain_gradients = with_gradients(reference.lstm, case, *single)
    results = [*made, *gradients], [*expected, *wanted], [*plain, *plain_gradients]
    for got, exact, simple in zip(*results, strict=True):
        # layer norm of a few numbers, and hundreds of steps, amplify rounding: the reference's too
        lost = (simple.double() - exact).norm() / torch.finfo(torch.float32).eps
        if lost > 2 * exact.norm():
            assert got.dtype == dtype
            assert (got.double() - exact).norm() <= 4 * lost * torch.finfo(dtype).eps
        else:
            assert_accurate(got, exact, dtype)


@pytest.mark.parametrize("name", ["lstm_packed", "hyper_packed", "hyper_dropout", "rows", "long"])
def test_chunks(poison, monkeypatch, name):
    """However many rows are taken at once: one step, some, or all but the last ones."""
    case = CASES[name]
    tensors, grads, N = make(case), seeds(case), sum(case.sizes)
    made, gradients = with_gradients(reference.lstm, case, tensors, grads)
    for rows in {1, case.sizes[0] + case.sizes[1], N // 2, N - 1}:
        monkeypatch.setattr(lstm_module, "CPU_ROWS", rows)
        got, got_gradients = with_gradients(ops.lstm, case, tensors, grads)
        for a, b in zip([*got, *got_gradients], [*made, *gradients], strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for a, b in zip(run(ops.lstm, case, tensors), got, strict=True):
                assert torch.equal(a, b)


def test_chunks_are_whole_steps():
    steps = [5, 5, 5, 3, 3, 1, 1, 1]
    for most in range(1, 26):
        chunks = lstm_module._chunks(steps, most)
        assert [size for chunk in chunks for size in chunk.steps] == steps
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
        for chunk, following in itertools.pairwise(chunks):
            assert chunk.stop - chunk.start <= most or len(chunk.steps) == 1
            assert chunk.stop - chunk.start + following.steps[0] > most  # no more would have fit
            assert following.before == chunk.stop - chunk.steps[-1]
    assert len(lstm_module._chunks(steps, 24)) == 1 and lstm_module._chunks([], 7) == []


@pytest.mark.parametrize("name", ["lstm", "hyper_packed", "one_step"])
def test_without_gradients(poison, name):
    """The same bits, and nothing kept: the op makes no gates."""
    case = CASES[name]
    tensors = make(case, torch.float32)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    made = run(ops.lstm, case, leaves)
    with torch.no_grad():
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for a, b in zip(run(ops.lstm, case, leaves), made, strict=True):
                    assert torch.equal(a, b) and not a.requires_grad
    _, *others = torch.ops.hyperfast.lstm(*op_arguments(case, tensors), False)
    assert not any(t.numel() for t in (*others[:3], *others[7:]))


def op_arguments(case: Case, tensors) -> tuple:
    batch_sizes = None if case.dense else torch.tensor(case.sizes)
    key = KEY if case.dropout else None
    return (tensors[0], tensors[STATE], tensors[WEIGHTS], batch_sizes, key, case.dropout, 1e-5)


LAYOUTS = {
    "transposed": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "part": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "negated": lambda t: torch._neg_view(t.neg()),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lstm_norms", "hyper_packed"])
def test_any_layout(name, layout):
    case = CASES[name]
    tensors, grads = ([None if t is None else LAYOUTS[layout](t) for t in ts]
                      for ts in (make(case), seeds(case)))  # fmt: skip
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    wanted = [t for t in leaves if t is not None]
    results = []
    for function in (ops.lstm, reference.lstm):
        made = run(function, case, leaves)
        results.append([*made, *torch.autograd.grad(made, wanted, grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["lstm_packed", "hyper_norms", "hyper_packed"])
def test_gradients_of_some_results(name):
    """Of h alone, as in training, and of each part of the last state alone."""
    case = CASES[name]
    tensors, grads = make(case), seeds(case)
    for i in range(len(grads)):
        some = [d if j == i else None for j, d in enumerate(grads)]
        _, got = with_gradients(ops.lstm, case, tensors, some)
        _, wanted = with_gradients(reference.lstm, case, tensors, some)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("name", ["lstm_norms", "hyper_packed"])
def test_only_what_needs_a_gradient(name):
    case = CASES[name]
    tensors, grads = make(case), seeds(case)
    _, wanted = with_gradients(reference.lstm, case, tensors, grads)
    there = [i for i, t in enumerate(tensors) if t is not None]
    expected = dict(zip(there, wanted, strict=True))
    for needed in (*([i] for i in there), there[:5], there[5:]):
        leaves = [None if t is None else t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        made = run(ops.lstm, case, leaves)
        got = torch.autograd.grad(made, [leaves[i] for i in needed], grads)
        for i, a in zip(needed, got, strict=True):
            torch.testing.assert_close(a, expected[i], msg=lambda m, i=i: f"{NAMES[i]}: {m}")


def test_the_same_bits_with_any_number_of_threads():
    """But for the products over all rows, which torch makes."""
    products = {i for i, name in enumerate(NAMES) if "weight_" in name or name == "z_weight"}
    case = Case((9, 9, 8, 5), 129, 37, 4, True, 0.2, False)
    tensors, grads, results = make(case, torch.float32), seeds(case, torch.float32), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(ops.lstm, case, tensors, grads))
    finally:
        torch.set_num_threads(before)
    (made, gradients), *others = results
    for other, other_gradients in others:
        assert all(torch.equal(a, b) for a, b in zip(made, other, strict=True))
        for i, (a, b) in enumerate(zip(gradients, other_gradients, strict=True)):
            if i in products:
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b), NAMES[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lstm", "hyper_norms"])
def test_saved_bytes(name, dtype):
    """What the docstring says for each row; beside it what is there anyway, weights and the first state."""
    case = CASES[name]
    leaves = [None if t is None else t.requires_grad_() for t in make(case, dtype)]
    given, saved = {t.data_ptr() for t in leaves[1:] if t is not None}, {}

    def pack(t):
        if t.data_ptr() not in given:
            saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(ops.lstm, case, leaves)
    assert sum(saved.values()) == sum(case.sizes) * (case.I + 6 * (case.H + case.M)) * dtype.itemsize


@pytest.mark.parametrize("case", [Case((2, 2), 3, norms=True), Case((2, 1), 2, 2, 1, True, 0.3, False)])
def test_gradcheck(case):
    """Of the second derivative too, which the reference gives."""
    tensors = make(case)
    there = [i for i, t in enumerate(tensors) if t is not None]

    def function(*leaves):
        given = dict(zip(there, leaves, strict=True))
        return tuple(run(ops.lstm, case, [given.get(i) for i in range(len(NAMES))]))

    leaves = [tensors[i].requires_grad_() for i in there]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_create_graph_where_one_input_is_made_of_another():
    """And another is there twice."""
    case = CASES["lstm_norms"]
    tensors = make(case)
    bias = tensors[7].clone().requires_grad_()
    tensors[7] = tensors[NAMES.index("gates_bias")] = bias
    x, results = tensors[0], []
    for function in (ops.lstm, reference.lstm):
        tensors[0] = x * bias[: case.I]
        made = run(function, case, tensors)
        (first,) = torch.autograd.grad(made[0].square().sum(), bias, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), bias)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_no_gradient_comes(create_graph):
    case = CASES["hyper_norms"]
    tensors = [None if t is None else t.requires_grad_() for t in make(case)]
    made = [WithoutGradient.apply(m) for m in run(ops.lstm, case, tensors)]
    wanted = [t for t in tensors if t is not None]
    loss = sum(m.sum() for m in made)
    for d in torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True):
        assert d is None or not d.count_nonzero()


# ---- other dtypes, autocast


@pytest.mark.parametrize("wide_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lstm_packed", "hyper_norms"])
def test_half_precision(assert_accurate, name, dtype, wide_state):
    """Computed in float32: results and gradients are the exact ones, rounded. c and norms in either dtype."""
    case = CASES[name]
    tensors, grads = make(case, dtype), seeds(case, dtype)
    if not wide_state:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    made, gradients = with_gradients(ops.lstm, case, tensors, grads)
    expected, wanted = with_gradients(reference.lstm, case, double(tensors), double(grads))
    kinds = [dtype, *(torch.float32 if i % 2 else dtype for i in range(len(made) - 1))]
    for got, exact, kind in zip(made, expected, kinds, strict=True):
        assert_accurate(got, exact, kind, exact.to(kind))
    inputs = [t for t in tensors if t is not None]
    for got, exact, t in zip(gradients, wanted, inputs, strict=True):
        assert_accurate(got, exact, t.dtype, exact.to(t.dtype))
    plain = run(ops.lstm, case, tensors, backend="reference")
    for a, b, kind in zip(plain, made, kinds, strict=True):
        assert a.dtype == kind
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(assert_accurate, backend):
    """Everything but c and norms in its dtype, whatever comes: x may be bfloat16 already."""
    case = CASES["hyper_packed"]
    tensors, grads = make(case, torch.float32), seeds(case, torch.float32)
    tensors[0] = tensors[0].bfloat16()
    wide = [i in (2, 4) or i >= 14 for i in range(len(NAMES))]
    rounded = [t if w or t is None else t.bfloat16() for t, w in zip(tensors, wide, strict=True)]
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        made = run(ops.lstm, case, leaves, backend=backend)
    kinds = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert [m.dtype for m in made] == kinds
    grads = [d.to(kind) for d, kind in zip(grads, kinds, strict=True)]
    gradients = torch.autograd.grad(made, [t for t in leaves if t is not None], grads)
    expected, wanted = with_gradients(reference.lstm, case, double(rounded), double(grads))
    for got, exact in zip(made, expected, strict=True):
        assert_accurate(got, exact, got.dtype, exact.to(got.dtype))
    for got, exact, t in zip(gradients, wanted, tensors, strict=True):
        # through a copy in bfloat16, so rounded to that
        assert got.dtype == t.dtype
        torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


# ---- torch's machinery


def compiled_run(case: Case):
    torch._dynamo.reset()
    function = torch.compile(ops.lstm, fullgraph=True, backend="aot_eager")
    return functools.partial(with_gradients, function, case)


@pytest.mark.parametrize(
    "name",
    [
        "lstm_norms",
        "hyper_packed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm_packed", "hyper_dropout")),
    ],
)
def test_compiled(name):
    case = CASES[name]
    tensors, grads = make(case), seeds(case)
    expected = with_gradients(ops.lstm, case, tensors, grads)
    got = compiled_run(case)(tensors, grads)
    with torch.no_grad():
        plain = run(torch.compile(ops.lstm, fullgraph=True, backend="aot_eager"), case, tensors)
    for a, b in zip(itertools.chain(*got, plain), itertools.chain(*expected, expected[0]), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.slow
def test_inductor():
    case = CASES["hyper_packed"]
    tensors, grads = make(case, torch.float32), seeds(case, torch.float32)
    torch._dynamo.reset()
    got = with_gradients(torch.compile(ops.lstm, fullgraph=True), case, tensors, grads)
    expected = with_gradients(ops.lstm, case, tensors, grads)
    for a, b in zip(itertools.chain(*got), itertools.chain(*expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_for_any_length():
    """A new number of steps compiles once more, then no more."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.lstm, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for T in (4, 5):
            case = CASES["hyper_norms"]._replace(sizes=(7,) * T)
            tensors = make(case)
            for a, b in zip(run(compiled, case, tensors), run(ops.lstm, case, tensors), strict=True):
                torch.testing.assert_close(a, b)
    with torch._dynamo.config.patch(error_on_recompile=True):
        case = CASES["hyper_norms"]._replace(sizes=(7,) * 6)
        tensors = make(case)
        for a, b in zip(run(compiled, case, tensors), run(ops.lstm, case, tensors), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_with_autocast_and_a_tensor_twice():
    case = CASES["lstm_norms"]
    torch._dynamo.reset()
    tensors = make(case, torch.float32)
    bias = tensors[7].requires_grad_()
    tensors[NAMES.index("gates_bias")] = bias
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        results = []
        for function in (torch.compile(ops.lstm, fullgraph=True, backend="aot_eager"), ops.lstm):
            with context:
                made = run(function, case, tensors)
            results.append([*made, *torch.autograd.grad([m.float().sum() for m in made], bias)])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [pytest.param("lstm_norms", marks=pytest.mark.slow), "hyper_packed"])
def test_opcheck(name):
    case = CASES[name]
    tensors = make(case, torch.float32)
    forward, backward = torch.ops.hyperfast.lstm.default, torch.ops.hyperfast.lstm_backward.default
    given = op_arguments(case, tensors)
    for keep in (False, True):
        torch.library.opcheck(forward, (*given, keep))
    made = forward(*given, True)
    grads = [*seeds(case, torch.float32), None, None][:5]
    grads[1] = None
    needed = [t is not None and i % 2 == 0 for i, t in enumerate([tensors[0], *tensors[WEIGHTS]])]
    kept = [*made[:4], *made[8:]]
    torch.library.opcheck(backward, (grads, *given[:3], kept, *given[3:], needed))


def test_functorch():
    """vmap over sequences, gradients of weights for each, and jvp: by the reference."""
    case = CASES["hyper_norms"]
    tensors = make(case)
    stacked = torch.stack([tensors[0], 2 * tensors[0], -tensors[0]])

    def loss(x, weight_hh):
        given = [x, *tensors[1:6], weight_hh, *tensors[7:]]
        return sum(m.square().sum() for m in run(ops.lstm, case, given))

    wanted = [torch.func.grad(loss, (0, 1))(one, tensors[6]) for one in stacked]
    got = torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(stacked, tensors[6])
    for i in range(3):
        leaves = stacked[i].clone().requires_grad_(), tensors[6].clone().requires_grad_()
        exact = torch.autograd.grad(loss(*leaves), leaves)
        for j in range(2):
            torch.testing.assert_close(got[j][i], exact[j])
            torch.testing.assert_close(wanted[i][j], exact[j])
    _, tangent = torch.func.jvp(lambda w: loss(stacked[0], w), (tensors[6],), (torch.ones_like(tensors[6]),))
    torch.testing.assert_close(tangent, wanted[0][1].sum())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad):
    """Tangents by the reference, frozen weights or not."""
    case = CASES["hyper_packed"]
    tensors = make(case)
    weights = [None if t is None else t.clone().requires_grad_(requires_grad) for t in tensors[1:]]
    direction, results = torch.randn_like(tensors[0]), []
    for function in (ops.lstm, reference.lstm):
        with forward_ad.dual_level():
            made = run(function, case, [forward_ad.make_dual(tensors[0], direction), *weights])
            results.append([part for m in made for part in forward_ad.unpack_dual(m)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_forward_mode_is_not_lost():
    """By ops whose Functions have none: an error, not a result without a tangent."""
    weight, z = torch.randn(6, 2), torch.randn(2)
    for requires_grad in (False, True):
        given = weight.clone().requires_grad_(requires_grad)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
            ops.generate([given], [None], [forward_ad.make_dual(z, z)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["lstm_norms", "hyper_packed"])
def test_no_steps_and_no_sequences(name, backend):
    case = CASES[name]._replace(sizes=())
    tensors = [None if t is None else t.requires_grad_() for t in make(case)]
    output, *last = run(ops.lstm, case, tensors, backend=backend)
    assert output.shape == (0, case.H)
    states = [s for s in tensors[STATE] if s is not None]
    for s, first in zip(last, states, strict=True):
        assert torch.equal(s, first) and s.data_ptr() != first.data_ptr()
    seeds = [torch.randn_like(s) for s in last]
    for got, seed in zip(torch.autograd.grad(last, states, seeds), seeds, strict=True):
        assert torch.equal(got, seed)
    none = [t if t is None or not 1 <= i < 5 else t[:0] for i, t in enumerate(tensors)]
    made = run(ops.lstm, case, none, backend=backend)
    assert all(m.shape[0] == 0 for m in made)
    for got in torch.autograd.grad(sum(m.sum() for m in made), tensors[6:8], allow_unused=True):
        assert got is None or not got.count_nonzero()


def test_meta():
    case = CASES["hyper_packed"]
    tensors = [None if t is None else t.to("meta").requires_grad_() for t in make(case)]
    case = case._replace(dropout=0.0)
    made = run(ops.lstm, case, tensors)
    assert all(m.is_meta for m in made) and made[0].shape == (sum(case.sizes), case.H)
    for t, d in zip(tensors, torch.autograd.grad(sum(m.sum() for m in made), tensors), strict=True):
        assert d.shape == t.shape


def test_inference_tensors():
    case = CASES["hyper_packed"]
    expected = run(ops.lstm, case, make_again(case))
    with torch.inference_mode():
        tensors = make_again(case)
        for a, b in zip(run(ops.lstm, case, tensors), expected, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(run(ops.lstm, case, tensors), expected, strict=True):
        assert torch.equal(a, b)
    tensors[6] = tensors[6].clone().requires_grad_()
    with pytest.raises(ValueError, match="made under inference_mode cannot be part of a graph"):
        run(ops.lstm, case, tensors)


def make_again(case: Case):
    torch.manual_seed(3)
    return make(case)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["one_step", "hyper_packed"])
def test_outputs_alias_nothing(name, backend):
    case = CASES[name]
    tensors = make(case)
    made = run(ops.lstm, case, tensors, backend=backend)
    memory = [t.untyped_storage().data_ptr() for t in (*made, *(t for t in tensors if t is not None))]
    if backend == "auto":
        assert len(set(memory)) == len(memory)


def test_engines_agree():
    case = CASES["hyper_packed"]
    tensors, grads = make(case), seeds(case)
    made = with_gradients(ops.lstm, case, tensors, grads)
    with use_engine("reference"):
        plain = with_gradients(ops.lstm, case, tensors, grads)
    for a, b in zip(itertools.chain(*made), itertools.chain(*plain), strict=True):
        torch.testing.assert_close(a, b)


# ---- bad input


def bad(**changes) -> dict:
    N, I, B, H, M, Z = 6, 4, 2, 3, 2, 2
    hyper = HyperCell(
        torch.ones(4 * M, I + H), torch.ones(4 * M, M), torch.ones(4 * M), torch.ones(12 * Z, M),
        torch.ones(12 * Z), torch.ones(12, H, Z), norms(M),
    )  # fmt: skip
    state = LSTMState(torch.ones(B, H), torch.ones(B, H), torch.ones(B, M), torch.ones(B, M))
    given = {"x": torch.ones(N, I), "state": state, "weight_ih": torch.ones(4 * H, I)}
    given |= {"weight_hh": torch.ones(4 * H, H), "bias": torch.ones(4 * H), "norms": norms(H), "hyper": hyper}
    given |= {"batch_sizes": torch.tensor([2, 2, 1, 1]), "key": torch.tensor([1])}
    given |= {"dropout": 0.1, "eps": 1e-5, "backend": "auto"}
    for name, value in changes.items():
        first, *path = name.split("__")
        given[first] = replaced(given[first], path, value)
    return given


def norms(n: int) -> Norms:
    return Norms(torch.ones(4 * n), torch.ones(4 * n), torch.ones(n), torch.ones(n))


def replaced(whole, path, value):
    if not path:
        return value
    return whole._replace(**{path[0]: replaced(getattr(whole, path[0]), path[1:], value)})


MORE = torch.ones(7, 7)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(6)}, ValueError, r"x must be \[N, I\], got shape \[6\]"),
        ({"x": torch.ones(6, 5)}, ValueError, r"weight_ih must be \[4H, I\] = \[12, 5\] .* got \[12, 4\]"),
        ({"x": torch.ones(6, 0)}, ValueError, r"x must be \[N, I\] with I at least 1, got shape \[6, 0\]"),
        ({"x": 3}, TypeError, "x must be a tensor, got int"),
        ({"x": torch.ones(6, 4).to_sparse()}, TypeError, "x must be a dense tensor"),
        ({"x": torch.ones(6, 4).long()}, TypeError, "x must be floating .*, got torch.int64"),
        ({"x": torch.ones(6, 4).double()}, TypeError, "must be torch.float64 like x, got"),
        ({"state": torch.ones(2, 3)}, TypeError, "state must be an LSTMState .*, got Tensor"),
        ({"state": (torch.ones(2, 3),)}, TypeError, "state must be an LSTMState .*, got a tuple of 1"),
        ({"state__h": torch.ones(2)}, ValueError, r"state.h must be \[B, H\], got shape \[2\]"),
        ({"state__h": MORE}, ValueError, r"state.c must be \[B, H\] = \[7, 7\] .* got \[2, 3\]"),
        ({"state__h": torch.ones(2, 0)}, ValueError, r"state.h must be \[B, H\] with H at least 1"),
        ({"state__c": MORE}, ValueError, r"state.c must be \[B, H\] = \[2, 3\] for N = 6.* got \[7, 7\]"),
        ({"state__c": None}, TypeError, "state.c must be a tensor, got NoneType"),
        ({"state__hyper_h": MORE}, ValueError, r"state.hyper_h must be \[B, M\] = \[2, 2\]"),
        ({"state__hyper_c": None}, TypeError, "state.hyper_c must be a tensor, got NoneType"),
        ({"hyper": None}, ValueError, "state.hyper_h and state.hyper_c must be None without hyper"),
        ({"weight_hh": MORE}, ValueError, r"weight_hh must be \[4H, H\] = \[12, 3\] .* got \[7, 7\]"),
        ({"weight_hh": torch.ones(12, 3).double()}, TypeError, "weight_hh must be torch.float32 like"),
        ({"weight_hh": torch.ones(12, 3, device="meta")}, ValueError, "weight_hh must be on cpu .* got meta"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[4H\] = \[12\] .* got \[4\]"),
        ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
        ({"norms": 3}, TypeError, "norms must be a Norms .*, got int"),
        ({"norms__cell_bias": MORE}, ValueError, r"norms.cell_bias must be \[H\] = \[3\]"),
        ({"norms__gates_weight": torch.ones(12).half()}, TypeError, "gates_weight must be torch.float32"),
        ({"hyper": (1, 2)}, TypeError, "hyper must be a HyperCell .*, got a tuple of 2"),
        ({"hyper__weight_ih": MORE}, ValueError, r"hyper.weight_ih must be \[4M, I\+H\] = \[8, 7\]"),
        ({"hyper__bias": MORE}, ValueError, r"hyper.bias must be \[4M\] = \[8\]"),
        ({"hyper__weight_hh": MORE}, ValueError, r"must be \[.*\] .* got \[.*\]"),
        ({"hyper__weight_hh": torch.ones(8)}, ValueError, r"hyper.weight_hh must be \[4M, M\], got shape"),
        ({"hyper__weight_hh": torch.ones(0, 0)}, ValueError, "with M at least 1"),
        ({"hyper__z_weight": MORE}, ValueError, r"hyper.z_weight must be \[12Z, M\] = \[24, 2\]"),
        ({"hyper__z_bias": MORE}, ValueError, r"hyper.z_bias must be \[12Z\] = \[24\]"),
        ({"hyper__d_weight": MORE}, ValueError, r"hyper.d_weight must be \[12, H, Z\], got shape \[7, 7\]"),
        ({"hyper__d_weight": torch.ones(12, 4, 2)}, ValueError, r"= \[12, 3, 2\] .* 4, 2\]"),
        ({"hyper__norms": MORE}, TypeError, "hyper.norms must be a Norms .*, got Tensor"),
        ({"hyper__norms__gates_bias": MORE}, ValueError, r"hyper.norms.gates_bias must be \[4M\] = \[8\]"),
        ({"batch_sizes": [2, 2, 1, 1]}, TypeError, "batch_sizes must be a tensor, got list"),
        ({"batch_sizes": MORE.long()}, ValueError, r"batch_sizes must be \[T\], got shape \[7, 7\]"),
        ({"batch_sizes": torch.ones(6)}, TypeError, "batch_sizes must be torch.int64, got torch.float32"),
        (
            {"batch_sizes": torch.ones(6, dtype=torch.int64, device="meta")}, ValueError,
            "batch_sizes must be on the CPU, got meta",
        ),
        ({"batch_sizes": torch.tensor([2, 1, 2, 1])}, ValueError, r"never rise, .* got \[2, 1, 2, 1\]"),
        ({"batch_sizes": torch.tensor([2, 2, 2, 0])}, ValueError, r"must be positive, .* got \[2, 2, 2, 0\]"),
        ({"batch_sizes": torch.tensor([2, 2, 3, -1])}, ValueError, "batch_sizes must be positive"),
        ({"batch_sizes": torch.tensor([3, 2, 1])}, ValueError, "begin with the 2 sequences of the state"),
        ({"batch_sizes": torch.tensor([2, 1, 1])}, ValueError, r"sum to the 6 rows .* 1, 1\], sum 4"),
        ({"batch_sizes": torch.tensor([], dtype=torch.int64)}, ValueError, r"got \[\], sum 0"),
        ({"batch_sizes": torch.ones(9, dtype=torch.int64)}, ValueError, r"1, 1, \.\.\.\], sum 9"),
        (
            {"batch_sizes": None, "x": torch.ones(5, 4)},
            ValueError,
            "x must have T B rows for the 2 sequences of the state, got 5",
        ),
        ({"key": None}, ValueError, r"key must be a tensor, int64 \[1\], for dropout 0.1, got None"),
        ({"key": 3}, TypeError, "key must be a tensor, got int"),
        ({"key": torch.ones(1)}, TypeError, "key must be torch.int64, got torch.float32"),
        ({"key": torch.tensor([1, 2])}, ValueError, r"key must be \[1\], got \[2\]"),
        ({"key": torch.tensor([1], device="meta")}, ValueError, "key must be on cpu like x, got meta"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"dropout": float("nan")}, ValueError, "dropout must be at least 0"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"),
        ({"eps": float("inf")}, ValueError, "eps must be at least 0 and finite"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(changes, error, message, backend):
    ops.lstm(**bad())
    with pytest.raises(error, match=message):
        ops.lstm(**bad(**{"backend": backend} | changes))


def test_bad_batch_sizes_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(ops.lstm, fullgraph=True, backend="aot_eager")
    compiled(**bad())
    with pytest.raises(ValueError, match="never rise"):
        compiled(**bad(batch_sizes=torch.tensor([2, 1, 2, 1])))
