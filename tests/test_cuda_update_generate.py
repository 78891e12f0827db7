"""The CUDA kernel `update_generate` against the reference, on the emulator and on a GPU."""

import pytest
import torch
from torch import Tensor

from hyperfast import reference, states
from hyperfast.info import why_missing
from hyperfast.states import EightBit
from tests.cuda_emulator.kernels import Kernels, address, dtype_name

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RULES = {"adam": 2, "momentum": 1, "sgd": 0}  # states
# K: lanes of a row, one access, several (over 128), rows in single elements (odd); N: one, less and more than
# a group of 8-bit states, a block's rows and one more
SHAPES = [
    (1, 1),
    (33, 4),
    (40, 3),
    (129, 16),
    (17, 17),
    (20, 100),
    (9, 128),
    (3, 511),
    (5, 512),
    (65, 8),
    (7, 33),
]
SHAPES += [(513, 16), (35, 5)]
ADAM = [0.999, 1e-2, 0.9, 0.99, 0.7, 1e-8, 0.01]
SGD = {"momentum": [0.1, 0.01, 0.9, 0.8, 1.0, 0.9], "sgd": [0.1, 0.01, 0.0, 1.0, 1.0, 0.0]}


class Problem:
    """Columns of layers; the bias of every third is not trained."""

    def __init__(self, kernels: Kernels, rule: str, storage: str, dtype: torch.dtype, offset: int = 0):
        self.kernels, self.rule, self.storage, self.dtype = kernels, rule, storage, dtype

        def column(letters: str) -> list[Tensor]:
            sizes = [dict(zip("NK", shape, strict=True)) for shape in SHAPES]
            shapes = [[size[letter] for letter in letters] for size in sizes]
            return [kernels.randn(*shape, dtype=dtype, offset=offset) for shape in shapes]

        self.weights, self.biases, self.dws = column("NK"), column("N"), column("N")
        self.zs, self.new_zs = column("K"), column("K")
        self.ws = [kernels.poison(N, dtype=dtype) for N, _ in SHAPES]
        kinds = range(RULES[rule])
        self.states = [[self.state(w, kind) for w in self.weights] for kind in kinds]
        self.bias_states = [[self.state(b, kind) for b in self.biases] for kind in kinds]
        self.trained = [i % 3 != 1 for i in range(len(SHAPES))]
        rows = [ADAM if rule == "adam" else SGD[rule]] * len(SHAPES)
        factors = 1 + 0.1 * torch.arange(len(SHAPES), dtype=torch.float64)[:, None]
        self.coefficients = (torch.tensor(rows, dtype=torch.float64) / factors).to(kernels.device)
        self.bias_coefficients = (self.coefficients * 0.9).contiguous()
        self.grad_scale = torch.tensor(0.37, dtype=torch.float64, device=kernels.device)
        self.seeds = torch.arange(len(SHAPES), device=kernels.device) * 1234567891 % 2**32
        self.skip = torch.zeros((), device=kernels.device)

    def state(self, like: Tensor, kind: int) -> states.State:
        """In the midst of a training, in groups of different sizes."""
        values = torch.randn_like(like) * 10 ** torch.randint(
            -3, 2, (len(like),) + (1,) * (like.dim() - 1)
        ).to(like)
        values = values if kind == 0 else values.square()
        if self.storage == "plain":
            return values
        state = states.zeros(like, self.storage)
        states.encode_(state, values, kind == 0)
        return state

    def run(self, schedule: int = 0) -> None:
        self.kernels.set_schedule(schedule)

        def addresses(columns: list, i: int, there: bool = True) -> list[int]:
            found = [0] * 4
            for j, column in enumerate(columns if there else []):
                parts = column[i] if isinstance(column[i], EightBit) else (column[i],)
                found[2 * j : 2 * j + len(parts)] = map(address, parts)
            return found

        table = [
            (
                address(self.weights[i]), *addresses(self.states, i), address(self.biases[i]),
                *addresses(self.bias_states, i, self.trained[i]),
                *(address(column[i]) for column in (self.dws, self.zs, self.new_zs, self.ws)),
                *self.weights[i].shape, int(self.trained[i]),
            )
            for i in range(len(SHAPES))
        ]  # fmt: skip
        self.kernels.module.update_generate(
            table, address(self.coefficients), address(self.bias_coefficients),
            "adam" if self.rule == "adam" else "sgd", self.storage, address(self.grad_scale),
            address(self.seeds), address(self.skip), dtype_name(self.dtype), self.kernels.stream(),
        )  # fmt: skip

    def written(self) -> list[Tensor]:
        columns = [self.weights, self.biases, *self.states, *self.bias_states]
        stored = [state for column in columns for state in column]
        return [t for state in stored for t in (state if isinstance(state, EightBit) else (state,))]

    def reference(self, dtype: torch.dtype) -> "Problem":
        """What the reference makes of it, plain states and numbers in `dtype`."""
        made = object.__new__(Problem)

        def copied(t: states.State) -> states.State:
            if isinstance(t, EightBit):
                return EightBit(*(part.clone() for part in t))
            return t.to(dtype, copy=True) if self.storage == "plain" else t.clone()

        for name in ("weights", "biases", "dws", "zs", "new_zs", "ws"):
            setattr(made, name, [t.to(dtype, copy=True) for t in getattr(self, name)])
        for name in ("states", "bias_states"):
            setattr(made, name, [[copied(t) for t in column] for column in getattr(self, name)])
        masked = [
            [t if trained else None for t, trained in zip(column, self.trained, strict=True)]
            for column in made.bias_states
        ]
        numbers = self.coefficients, self.bias_coefficients, self.grad_scale, self.seeds, self.skip
        arguments = made.dws, made.zs, made.new_zs, made.ws, *numbers
        if self.rule == "adam":
            reference.adamw_generate(made.weights, *made.states, made.biases, *masked, *arguments)
        else:
            none = [[None] * len(SHAPES)]
            columns = made.states or none, masked or none
            reference.sgd_generate(
                made.weights, *columns[0], made.biases, *columns[1], *arguments, self.trained
            )
        return made


def generated(p: Problem) -> list[Tensor]:
    """What `generate` makes of the weights as they are."""
    outs = [p.kernels.poison(N, dtype=p.dtype) for N, _ in SHAPES]
    columns = zip(p.weights, p.biases, p.new_zs, outs, strict=True)
    p.kernels.module.generate(
        [(*map(address, row), *row[0].shape) for row in columns], dtype_name(p.dtype), p.kernels.stream()
    )
    return outs


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_equals_reference(cuda_kernels, rule, dtype, offset, assert_accurate):
    """Offset 1: no tensor begins at a multiple of 16 bytes. Next weights are those of `generate`."""
    p = Problem(cuda_kernels, rule, "plain", dtype, offset)
    expected, plain = p.reference(torch.float64), p.reference(dtype)
    p.run()
    for name in ("weights", "biases"):
        assert_accurate(getattr(p, name), getattr(expected, name), dtype, getattr(plain, name))
    for got, wanted, rounded in zip(p.states + p.bias_states, expected.states + expected.bias_states,
                                    plain.states + plain.bias_states, strict=True):  # fmt: skip
        assert_accurate(got, wanted, dtype, rounded)
    assert all(torch.equal(w, made) for w, made in zip(p.ws, generated(p), strict=True))


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_low_precision_states(cuda_kernels, rule, storage, assert_accurate):
    """Codes are the reference's but for the few that float32's rounding takes to a neighbour."""
    p = Problem(cuda_kernels, rule, storage, torch.float32)
    expected = p.reference(torch.float32)
    p.run()
    differ = total = 0
    for got, wanted in zip(p.states + p.bias_states, expected.states + expected.bias_states, strict=True):
        for ours, theirs in zip(got, wanted, strict=True):
            if storage == "8bit":
                torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=0)
                ours, theirs = ours.codes, theirs.codes
            else:
                ours, theirs = ours.view(torch.int16), theirs.view(torch.int16)
            far = (ours.int() - theirs.int()).abs()
            assert far.max() <= 1
            differ, total = differ + far.count_nonzero().item(), total + far.numel()
    assert differ <= 0.002 * total, f"{differ} of {total} codes differ"
    for name in ("weights", "biases"):
        assert_accurate(getattr(p, name), [t.double() for t in getattr(expected, name)], torch.float32)
    assert all(torch.equal(w, made) for w, made in zip(p.ws, generated(p), strict=True))


@pytest.mark.parametrize("rule, storage", [("adam", "plain"), ("adam", "8bit"), ("momentum", "bfloat16")])
def test_skipping_writes_next_weights_alone(cuda_kernels, rule, storage):
    p = Problem(cuda_kernels, rule, storage, torch.float32)
    p.skip.fill_(1)
    p.dws[0].fill_(torch.nan)
    before = [t.clone() for t in p.written()]
    p.run()
    assert all(torch.equal(*pair) for pair in zip(p.written(), before, strict=True))
    assert all(torch.equal(w, made) for w, made in zip(p.ws, generated(p), strict=True))


@pytest.mark.parametrize("storage", ["plain", "8bit"])
def test_schedules_agree(cuda_kernels, storage):
    """Bit for bit, whatever order threads and blocks run in."""
    found = []
    for schedule in cuda_kernels.schedules():
        torch.manual_seed(0)
        p = Problem(cuda_kernels, "adam", storage, torch.float32)
        p.run(schedule)
        found.append([*p.written(), *p.ws])
    assert all(torch.equal(*pair) for other in found for pair in zip(found[0], other, strict=True))


def test_untrained_biases_stay(cuda_kernels):
    p = Problem(cuda_kernels, "adam", "plain", torch.float32)
    before = [b.clone() for b in p.biases]
    p.run()
    stayed = [torch.equal(*pair) for pair in zip(p.biases, before, strict=True)]
    assert stayed == [not trained for trained in p.trained]


def test_layers_without_rows_launch_nothing(cuda_kernels, monkeypatch):
    """A rank may own none. z changes with the optimizer's own step."""
    monkeypatch.setattr(f"{__name__}.SHAPES", [(0, K) for _, K in SHAPES])
    for storage in ("plain", "bfloat16", "8bit"):
        p = Problem(cuda_kernels, "adam", storage, torch.float32)
        p.run()
        assert not any(t.numel() for t in p.written())


ROW = (64, 64, 0, 64, 0, 64, 64, 0, 64, 0, 64, 64, 64, 64, 5, 3, 1)


def changed(**fields: int) -> tuple:
    names = "weight s0 c0 s1 c1 bias bs0 bc0 bs1 bc1 dw z new_z w N K trained".split()
    return tuple(fields.get(name, value) for name, value in zip(names, ROW, strict=True))


@pytest.mark.parametrize(
    "row, storage, dtype, numbers, said",
    [
        (changed(K=0), "plain", "float32", 64, r"segments\[0\]: K is 0"),
        (changed(N=-1), "plain", "float32", 64, "N is -1"),
        (changed(dw=0), "plain", "float32", 64, "weight, dw, z, new_z and w must not be null"),
        (changed(s1=0), "plain", "float32", 64, "states must not be null"),
        (changed(bs0=0), "plain", "float32", 64, "states must not be null"),
        (changed(bias=0), "plain", "float32", 64, "a trained bias must not be null"),
        (ROW, "8bit", "float32", 64, "scales must not be null"),
        (ROW, "8bit", "float64", 64, "beside float32 weights only"),
        (ROW, "4bit", "float32", 64, "storage is '4bit'; wanted one of 8bit, bfloat16, plain"),
        (changed(weight=66), "plain", "float32", 64, "no multiple of its elements' 4 bytes"),
        (changed(s0=65), "bfloat16", "float32", 64, "no multiple of its elements' 2 bytes"),
        (
            ROW,
            "plain",
            "float32",
            0,
            "coefficients, bias_coefficients, grad_scale and seeds must not be null",
        ),
        (ROW, "plain", "float32", 60, "no multiple of its elements' 8 bytes"),
    ],
)
def test_bad_input_never_reaches_the_gpu(row, storage, dtype, numbers, said):
    cuda = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
    with pytest.raises(ValueError, match=said):
        cuda.update_generate([row], numbers, numbers, "adam", storage, 64, 64, 0, dtype, 0)


def test_nothing_to_do_is_no_launch():
    cuda = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
    cuda.update_generate([changed(N=0)], 64, 64, "adam", "plain", 64, 64, 0, "float32", 0)
