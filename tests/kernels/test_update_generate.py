"""`update_generate_kernel` against the reference: parameters in float64, stored states bit for bit."""

import pytest
import torch

from hyperfast import reference, states
from hyperfast.kernels import generate
from hyperfast.kernels.update_generate import run
from hyperfast.states import EightBit

SIZES = [(1, 1), (33, 1), (5, 3), (65, 16), (17, 64), (9, 100), (3, 512), (0, 16), (33, 17)]
ROWS = {
    "adam": reference.AdamWCoefficients(0.99, 0.05, 0.9, 0.99, 0.3, 1e-8, 0.01),
    "sgd": reference.SGDCoefficients(0.05, 0.01, 0.9, 1.0, 1.0, 0.9),
}
BIAS_ROWS = {"adam": ROWS["adam"]._replace(beta1=0.8, l2=0.0), "sgd": ROWS["sgd"]._replace(lr=0.02)}
SCALE = 0.5


def shifted(t: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy that begins `shift` elements behind the beginning of its memory."""
    return torch.cat([t.new_zeros(shift), t.reshape(-1)])[shift:].view(t.shape)


def parts(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, EightBit) else [] if state is None else [state]


class Problem:
    """The layers of `SIZES`, every other bias trained."""

    def __init__(self, rule, storage, dtype, device, shift=0, count=None):
        self.rule, self.storage, self.dtype, self.device = rule, storage, dtype, device
        count = {"adam": 2, "sgd": 1}[rule] if count is None else count
        self.trained = [i % 2 == 0 for i in range(len(SIZES))]

        def random(*shape):
            return torch.randn(shape).to(device).to(dtype)

        def stored(like, signed):
            values = torch.randn_like(like) * 0.1 if signed else torch.rand_like(like) * 0.1
            if storage == "plain":
                return shifted(values, shift)
            state = states.zeros(like, storage)
            states.encode_(state, values, signed)
            moved = (
                [shifted(state, shift)]
                if storage == "bfloat16"
                else EightBit(*map(lambda t: shifted(t, shift), state))
            )
            return moved if storage == "8bit" else moved[0]

        self.w = [shifted(random(N, K), shift) for N, K in SIZES]
        self.b = [random(N) for N, _ in SIZES]
        self.dw = [random(N) for N, _ in SIZES]
        self.z, self.new_z = ([random(K) for _, K in SIZES] for _ in range(2))
        self.s = [[stored(w, j == 0) for w in self.w] for j in range(count)]
        self.bs = [
            [stored(b, j == 0) if t else None for b, t in zip(self.b, self.trained, strict=True)]
            for j in range(count)
        ]
        self.next = [torch.full_like(b, torch.nan) for b in self.b]
        self.seeds = [0x9E3779B1 * i % 2**32 for i in range(len(SIZES))]

    def written(self) -> list[torch.Tensor]:
        columns = [self.w, self.b, *self.s, *self.bs]
        return [t for column in columns for state in column for t in parts(state)]

    def run(self, skip=None):
        def addresses(columns, i):
            found = [0] * 4
            for j, column in enumerate(columns):
                for k, part in enumerate(parts(column[i])):
                    found[2 * j + k] = part.data_ptr()
            return found

        table = [
            (
                self.w[i].data_ptr(), *addresses(self.s, i), self.b[i].data_ptr(), *addresses(self.bs, i),
                *(column[i].data_ptr() for column in (self.dw, self.z, self.new_z, self.next)),
                *self.w[i].shape, int(self.trained[i]),
            )
            for i in range(len(SIZES))
        ]  # fmt: skip
        rows, bias_rows = (
            torch.tensor([row[self.rule]] * len(SIZES), dtype=torch.float64, device=self.device)
            for row in (ROWS, BIAS_ROWS)
        )
        scale = torch.tensor(SCALE, dtype=torch.float64, device=self.device)
        seeds = torch.tensor(self.seeds, device=self.device)
        arguments = (rows, bias_rows, self.rule, self.storage, scale, seeds, skip, self.dtype, self.device)
        run(table, *arguments)

    def expected(self, dtype=None) -> dict[str, list]:
        """What the reference makes of it, in `dtype` if given."""

        def copied(state):
            if isinstance(state, EightBit):
                return EightBit(*(t.clone() for t in state))
            return None if state is None else state.to(dtype or state.dtype, copy=True)

        names = ("w", "b", "dw", "z", "new_z", "next")
        made = {name: [copied(t) for t in getattr(self, name)] for name in names}
        made["s"], made["bs"] = ([[copied(t) for t in c] for c in columns] for columns in (self.s, self.bs))
        count, numbers = len(SIZES), (SCALE, self.seeds)
        read = (made["dw"], made["z"], made["new_z"], made["next"], [ROWS[self.rule]] * count)
        if self.rule == "adam":
            bias_rows = [BIAS_ROWS["adam"]] * count
            reference.adamw_generate(
                made["w"], *made["s"], made["b"], *made["bs"], *read, bias_rows, *numbers
            )
        else:
            bias_rows = [BIAS_ROWS["sgd"] if t else None for t in self.trained]
            nothing = [[None] * count]
            reference.sgd_generate(
                made["w"],
                *(made["s"] or nothing),
                made["b"],
                *(made["bs"] or nothing),
                *read,
                bias_rows,
                *numbers,
            )
        return made

    def assert_next_weights_are_generated(self):
        outs = [torch.full_like(b, torch.nan) for b in self.b]
        table = [
            (w.data_ptr(), b.data_ptr(), z.data_ptr(), out.data_ptr(), *w.shape)
            for w, b, z, out in zip(self.w, self.b, self.new_z, outs, strict=True)
        ]
        generate.run(table, self.dtype, self.device)
        assert all(torch.equal(a, b) for a, b in zip(outs, self.next, strict=True))


RULES = [("adam", 2), ("sgd", 1), ("sgd", 0)]


@pytest.mark.parametrize("shift", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule, count", RULES)
def test_plain_states_equal_reference(rule, count, dtype, shift, device, assert_accurate):
    if shift and dtype != torch.float32:
        pytest.skip("one dtype says it for all")
    ours = Problem(rule, "plain", dtype, device, shift, count)
    exact, plain = ours.expected(torch.float64), ours.expected()
    ours.run()
    for name in ("w", "b", "next"):
        assert_accurate(getattr(ours, name), exact[name], dtype, plain[name])
    for name in ("s", "bs"):
        for got, wanted, rounded in zip(getattr(ours, name), exact[name], plain[name], strict=True):
            columns = [[t for t in column if t is not None] for column in (got, wanted, rounded)]
            assert_accurate(*columns[:2], dtype, columns[2])
    ours.assert_next_weights_are_generated()


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("shift", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stored_states_equal_the_specification_bit_for_bit(rule, storage, shift, device, assert_accurate):
    ours = Problem(rule, storage, torch.float32, device, shift)
    wanted = ours.expected()
    ours.run()
    for name in ("s", "bs"):
        for got, expected in zip(getattr(ours, name), wanted[name], strict=True):
            for a, b in zip(got, expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))
    for name in ("w", "b", "next"):
        assert_accurate(getattr(ours, name), [t.double() for t in wanted[name]], torch.float32)
    ours.assert_next_weights_are_generated()


@pytest.mark.parametrize("storage", ["plain", "8bit"])
@pytest.mark.parametrize("skip", [0.0, 1.0, float("nan")])
def test_skip(storage, skip, device):
    """With a gradient that would spoil everything."""
    ours, other = (Problem("adam", storage, torch.float32, device) for _ in range(2))
    if skip != 0:
        ours.dw = [torch.full_like(dw, torch.nan) for dw in ours.dw]
    before = [t.clone() for t in ours.written()]
    ours.run(torch.tensor(skip, device=device))
    if skip != 0:
        assert all(torch.equal(a, b) for a, b in zip(ours.written(), before, strict=True))
        assert all(w.isfinite().all() for w in ours.next)
    else:
        assert not all(torch.equal(a, b) for a, b in zip(ours.written(), before, strict=True))
    ours.assert_next_weights_are_generated()


def test_bad_tables_are_refused(device):
    numbers = torch.zeros(1, 7, dtype=torch.float64, device=device)
    scale, seeds = numbers[0, 0], torch.zeros(1, dtype=torch.int64, device=device)
    good = [16] * 14 + [4, 4, 1]
    for field, storage, size in ((0, "plain", 4), (3, "bfloat16", 2), (4, "8bit", 4), (13, "plain", 4)):
        row = list(good)
        row[field] = 16 + size // 2
        with pytest.raises(ValueError, match=f"no multiple of its elements' {size} bytes"):
            run([tuple(row)], numbers, numbers, "adam", storage, scale, seeds, None, torch.float32, device)
    with pytest.raises(ValueError, match="beside float32 weights only, got torch.float64"):
        run([tuple(good)], numbers, numbers, "adam", "8bit", scale, seeds, None, torch.float64, device)
