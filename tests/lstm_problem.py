"""What the tests of the kernels of `lstm` share: a call of them, and what the reference makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast import reference
from hyperfast.reference import HyperCell, LSTMState, Norms

KEY = -0x123456789ABCDEF
EPS = 1e-3  # large enough to be missed
NONE = (None,) * 4
# What the backward writes: from FIRST_SUM on sums over all rows, before them the gradients of the state.
GRADIENTS = (
    "x_gates", "h_gates", "hyper_gates", "z", *LSTMState._fields, "bias", "d_weight", *Norms._fields,
    *(f"hyper {name}" for name in Norms._fields),
)  # fmt: skip
FIRST_STATE, FIRST_SUM = 4, 8


@dataclass(frozen=True)
class Case:
    """batch_sizes: rows of each step; H, M, Z: units of the LSTM and its hyper LSTM, numbers of an embedding;
    M = Z = 0: no hyper LSTM."""

    batch_sizes: tuple[int, ...]
    H: int
    M: int = 0
    Z: int = 0
    norms: bool = False
    dropout: float = 0.0

    def problem(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        """Numbers drawn on the CPU; beside half precision c and norms are float32."""
        N, B, H, M, Z = sum(self.batch_sizes), max(self.batch_sizes, default=3), self.H, self.M, self.Z
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)

        def norms(n: int) -> Norms | None:
            pairs = [(1 + draw(k, scale=1 / 8, dtype=wide), draw(k, dtype=wide)) for k in (4 * n, n)]
            return Norms(*pairs[0], *pairs[1]) if self.norms else None

        def state() -> LSTMState:
            of_hyper = (draw(B, M), draw(B, M, dtype=wide)) if M else (None, None)
            return LSTMState(draw(B, H), draw(B, H, dtype=wide), *of_hyper)

        hyper = None
        if M:
            matrices = draw(4 * M, H, scale=H**-0.5), draw(4 * M, M, scale=M**-0.5), None
            z_map = draw(12 * Z, M, scale=M**-0.5), 1 + draw(12 * Z)
            hyper = HyperCell(*matrices, *z_map, draw(12, H, Z, scale=Z**-0.5), norms(M))
        return Problem(
            draw(N, 4 * H), draw(N, 4 * M) if M else None, state(), draw(4 * H, H, scale=H**-0.5),
            draw(4 * H), norms(H), hyper, torch.tensor(self.batch_sizes, dtype=torch.int64),
            torch.tensor([KEY], device=device) if self.dropout else None, self.dropout, EPS,
            draw(N, H), state(),
        )  # fmt: skip


class Rows(NamedTuple):
    """What the forward writes of every step; None for what is not kept or not there. z [N, 12Z]: what follows
    from hyper_h for the backward."""

    h: Tensor
    c: Tensor
    hyper_h: Tensor | None
    hyper_c: Tensor | None
    h_gates: Tensor | None
    hyper_gates: Tensor | None
    z: Tensor | None = None


class Problem(NamedTuple):
    """What `reference.lstm_steps` takes, in its order; the gradients given to the backward (None: zero), and
    the number of the first row. hyper has no input: its weight_ih is [4M, H] and its bias None."""

    x_gates: Tensor
    hyper_x_gates: Tensor | None
    state: LSTMState
    weight_hh: Tensor
    bias: Tensor
    norms: Norms | None
    hyper: HyperCell | None
    batch_sizes: Tensor
    key: Tensor | None
    dropout: float
    eps: float
    dh: Tensor | None
    dlast: LSTMState
    first_row: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, N, B, H, M, Z."""
        M, Z = (self.hyper.weight_hh.shape[1], self.hyper.d_weight.shape[2]) if self.hyper else (0, 0)
        return len(self.batch_sizes), len(self.x_gates), *self.state.h.shape, M, Z

    def weights(self) -> list[Tensor | None]:
        """The fifteen of the kernels."""
        xh, hh, _, *maps, hyper_norms = self.hyper or (None,) * 7
        return [self.weight_hh, self.bias, xh, hh, *maps, *(self.norms or NONE), *(hyper_norms or NONE)]

    def tensors(self, rows: Rows) -> list[Tensor | None]:
        """What the forward reads, and writes to."""
        return [self.x_gates, self.hyper_x_gates, *self.state, *rows[:6]]

    def inputs(self, rows: Rows) -> list[Tensor | None]:
        """What the backward reads."""
        kept = rows.c, rows.hyper_c, rows.h_gates, rows.hyper_gates, rows.z
        return [self.x_gates, self.state.c, self.state.hyper_c, *kept, self.dh, *self.dlast]

    def with_z(self, rows: Rows) -> Rows:
        if self.hyper is None:
            return rows
        return rows._replace(z=F.linear(rows.hyper_h, self.hyper.z_weight, self.hyper.z_bias))

    def empty_rows(self, keep: bool = True, make: Callable[..., Tensor] | None = None) -> Rows:
        """Tensors for the forward to write to, by make(shape, dtype), or poisoned."""
        _, N, _, H, M, _ = self.sizes
        dtype, wide, make = self.x_gates.dtype, self.state.c.dtype, make or self._poisoned
        columns = (H, dtype), (H, wide), (M, dtype), (M, wide), (4 * H * keep, dtype), (4 * M * keep, dtype)
        return Rows(*(make((N, n), kind) if n else None for n, kind in columns))

    def empty_gradients(self, make: Callable[..., Tensor] | None = None) -> list[Tensor | None]:
        """The same for the backward, GRADIENTS in turn."""
        _, N, _, H, M, Z = self.sizes
        dtype, make = self.x_gates.dtype, make or self._poisoned
        of_rows = 4 * H, 4 * H * bool(M), 4 * M, 12 * Z
        weights = self.weights()
        like = [*self.state, self.bias, *weights[6:]]
        made = [make((N, n), dtype) if n else None for n in of_rows]
        return made + [None if t is None else make(tuple(t.shape), t.dtype) for t in like]

    def _poisoned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=self.x_gates.device)

    def expected_rows(self) -> Rows:
        """By the reference, in the problem's dtype."""
        state, made, start = self.state, [], 0
        for size in self.batch_sizes.tolist():
            now, rows = slice(start, start + size), torch.arange(start, start + size, device=state.h.device)
            before = reference.map_state(state, lambda s, size=size: s[:size])
            hyper_x = hyper_gates = None
            if self.hyper is not None:
                hyper_x = self.hyper_x_gates[now]
                hyper_gates = hyper_x + before.h @ self.hyper.weight_ih.mT
                hyper_gates = hyper_gates + before.hyper_h @ self.hyper.weight_hh.mT
            options = self.hyper, self.first_row + rows, self.key, self.dropout, self.eps
            state = reference.lstm_step(
                self.x_gates[now], hyper_x, before, self.weight_hh, self.bias, self.norms, *options
            )
            made.append(Rows(*state, before.h @ self.weight_hh.mT, hyper_gates))
            start += size
        parts = zip(*(rows[:6] for rows in made), strict=True)
        return self.with_z(Rows(*(None if own[0] is None else torch.cat(own) for own in parts)))

    def expected_gradients(self, rows: Rows) -> list[Tensor | None]:
        """By the reference, from `rows`, as the backward writes them."""
        assert not self.first_row
        *inputs, dh, _, _, _, _ = self.inputs(rows)
        given = zip(self.dlast, self.state, strict=True)
        dlast = LSTMState(*(torch.zeros_like(s) if s is not None and d is None else d for d, s in given))
        dh = torch.zeros_like(rows.h) if dh is None else dh
        options = self.norms, self.hyper, self.key, self.dropout, self.eps
        made = reference.lstm_backward(
            self.batch_sizes, self.weight_hh, self.bias, *options, *inputs, dh, dlast
        )
        of_rows = made.x_gates, made.h_gates if self.hyper else None, made.hyper_gates, made.z
        sums = made.bias, made.d_weight, *(made.norms or NONE), *(made.hyper_norms or NONE)
        return [*of_rows, *made.state, *sums]

    def part(self, steps: slice, rows: Rows) -> Problem:
        """Of some of its steps, which go on from `rows` of those before. dlast is cut to its sequences: it is
        theirs once the steps after have added to it in place."""
        sizes = self.batch_sizes.tolist()
        starts = [0, *itertools.accumulate(sizes)]
        now, size = slice(starts[steps.start], starts[steps.stop]), sizes[steps.start]
        state = reference.map_state(self.state, lambda s: s[:size])
        if steps.start:
            before = starts[steps.start - 1]
            state = reference.map_state(LSTMState(*rows[:4]), lambda s: s[before : before + size])
        return self._replace(
            batch_sizes=self.batch_sizes[steps],
            x_gates=self.x_gates[now],
            hyper_x_gates=None if self.hyper is None else self.hyper_x_gates[now],
            state=state,
            dh=self.dh[now],
            dlast=reference.map_state(self.dlast, lambda s: s[:size]),
            first_row=self.first_row + now.start,
        )

    def of_part(self, part: Problem, rows: Rows) -> Rows:
        """A part's among the rows of all."""
        start = part.first_row - self.first_row
        return Rows(*(None if t is None else t[start : start + len(part.x_gates)] for t in rows))


def spans(cuts: Sequence[int]) -> list[slice]:
    """The parts that a sequence has between `cuts`."""
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def forward_in_parts(p: Problem, cuts: Sequence[int], run: Callable[[Problem, Rows], object]) -> Rows:
    """What run(part, rows), which writes rows, makes of one part after the other."""
    rows = p.empty_rows()
    for steps in spans(cuts):
        part = p.part(steps, rows)
        run(part, p.of_part(part, rows))
    return p.with_z(rows)


def backward_in_parts(p: Problem, rows: Rows, cuts: Sequence[int], run: Callable) -> list[Tensor | None]:
    """What run(part, rows, outputs) makes of one part before the other, with the state's gradient over that
    of the last state, and sums added up."""
    p = p._replace(dlast=reference.map_state(p.dlast, torch.clone))
    made = p.empty_gradients()
    made[FIRST_STATE:FIRST_SUM] = p.dlast
    for i, steps in enumerate(reversed(spans(cuts))):
        part = p.part(steps, rows)
        start, outputs = part.first_row - p.first_row, part.empty_gradients()
        of_rows = [None if t is None else t[start : start + len(part.x_gates)] for t in made[:FIRST_STATE]]
        outputs[:FIRST_SUM] = [*of_rows, *part.dlast]
        run(part, p.of_part(part, rows), outputs)
        for total, share in zip(made[FIRST_SUM:], outputs[FIRST_SUM:], strict=True):
            if total is not None:
                total.add_(share) if i else total.copy_(share)
    return made


def to(value, dtype: torch.dtype):
    """All floating-point tensors of nested tuples in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(*(to(part, dtype) for part in value)) if isinstance(value, tuple) else value


def there(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def clones(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in tensors]


def assert_equal(made: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Bit for bit."""
    for i, (a, b) in enumerate(zip(made, wanted, strict=True)):
        assert (a is None and b is None) or torch.equal(a, b), i
