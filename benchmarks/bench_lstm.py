"""HyperLSTM over a sequence against nn.LSTM and against the time loops of plain PyTorch.

loop             as users write it: a module for a step, called for every step (`benchmarks.plain_lstm`)
hoisted          the same in fewer and larger products: those of the input for all steps before the loop
compiled step    torch.compile of the step of that
hyperfast        HyperLSTM
nn.LSTM          without a hyper LSTM; hyperfast's own LSTM beside it, also with layer norm

torch.compile of the whole hoisted loop is left out: it unrolls the loop, and 5 of its 100 steps took 38 s to
compile on two cores (and then ran at 85 % of the eager loop's time).
All ways in turns in one process, forward and backward to the input, the first state and all weights, after
their results have been compared; forward alone is without gradients. Memory: the most that torch holds at a
time beyond what it held before and beyond the results. All of it once with the allocator as it is and then
with one that keeps freed memory, as the training commands set it (`train.allocator`), for all ways. The floor
is the products alone at the rate of one of 2048 x 2048 matrices, measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import interleaved, median, paired_ratio, peak_bytes
from benchmarks.plain_lstm import PlainHyperLSTMCell
from hyperfast import reference
from hyperfast.nn import LSTM, HyperLSTM, HyperLSTMCell, LSTMState
from train.allocator import keep_freed_memory

MIB = 2**20
GEMM = 2048
Run = Callable[[Tensor, tuple[Tensor, ...]], Sequence[Tensor]]  # x, state -> output, *last state


class Case(NamedTuple):
    B: int
    T: int
    I: int
    H: int
    M: int
    Z: int
    layer_norm: bool
    rounds: int = 5

    def flops(self) -> int:
        """Of the products of one step, forward and backward."""
        H, M, Z = self.H, self.M, self.Z
        macs = 4 * H * (self.I + H) + 4 * M * (self.I + H + M) + 12 * Z * M + 12 * H * Z
        return 3 * 2 * macs * self.B


CASES = {
    "plain": Case(32, 100, 128, 512, 128, 16, layer_norm=False),
    "norms": Case(32, 100, 128, 512, 128, 16, layer_norm=True),
    "paper": Case(128, 50, 50, 1000, 128, 4, layer_norm=True, rounds=3),
}


class Way(NamedTuple):
    run: Run
    parameters: list[nn.Parameter]
    x: Tensor
    state: tuple[Tensor, ...]

    def train(self) -> list[Tensor]:
        """Output, last state and all gradients; every result of a step has a gradient."""
        results = self.run(self.x, self.state)
        inputs = [self.x, *self.state, *self.parameters]
        grads = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])
        return [*(r.detach() for r in results), *grads]

    @torch.no_grad()
    def forward(self) -> Sequence[Tensor]:
        return self.run(self.x, self.state)


def loop(cell: PlainHyperLSTMCell) -> Run:
    def run(x: Tensor, state: tuple[Tensor, ...]) -> Sequence[Tensor]:
        outputs = []
        for step in x:
            state = cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs), *state

    return run


def hoisted(cell: HyperLSTMCell, step: Callable) -> Run:
    """step: `reference.lstm_step`, or that compiled."""

    def run(x: Tensor, state: tuple[Tensor, ...]) -> Sequence[Tensor]:
        B, rows = x.shape[1], x.flatten(0, 1)
        outputs, now, numbers = [], LSTMState(*state), torch.arange(B)  # numbers: for dropout alone
        hyper, norms = cell._hyper(), cell._norms()
        x_gates = F.linear(rows, cell.weight_ih)
        its_gates = F.linear(rows, hyper.weight_ih[:, : cell.input_size], hyper.bias)
        for mine, its in zip(x_gates.split(B), its_gates.split(B), strict=True):
            now = step(mine, its, now, cell.weight_hh, cell.bias, norms, hyper, numbers, None, 0.0, 1e-5)
            outputs.append(now.h)
        return torch.stack(outputs), *now

    return run


def whole(model: nn.Module) -> Run:
    """A module for sequences, of one layer."""

    def run(x: Tensor, state: tuple[Tensor, ...]) -> Sequence[Tensor]:
        output, last = model(x, tuple(s.unsqueeze(0) for s in state))
        return output, *(s[0] for s in last)

    return run


def ways(case: Case) -> dict[str, Way]:
    """The first is what the others must equal, but for those without a hyper LSTM."""
    torch._dynamo.reset()
    B, T, I, H, M, Z = case[:6]
    ours = HyperLSTM(I, H, 1, M, Z, case.layer_norm)
    cell: HyperLSTMCell = ours.layers[0]
    nn.init.normal_(cell.d_weight, 0.1 / Z, 0.02)  # as after some training: every gradient counts
    nn.init.normal_(cell.z_weight, std=0.05)
    plain = PlainHyperLSTMCell(cell)
    names = [name for name, _ in cell.named_parameters()]
    weights = [plain.get_parameter(part) for name in names for part in plain.parts()[name]]
    x = torch.randn(T, B, I).requires_grad_()
    state = tuple((torch.randn(B, n) * 0.1).requires_grad_() for n in cell.state_sizes)
    own = list(cell.parameters())
    step = torch.compile(reference.lstm_step, dynamic=False)
    made = {
        "loop": Way(loop(plain), weights, x, state),
        "hoisted": Way(hoisted(cell, reference.lstm_step), own, x, state),
        "compiled step": Way(hoisted(cell, step), own, x, state),
        "hyperfast": Way(whole(ours), own, x, state),
    }
    for name, model in (
        ("nn.LSTM", nn.LSTM(I, H)),
        ("hyperfast LSTM", LSTM(I, H)),
        ("hyperfast LSTM, layer norm", LSTM(I, H, layer_norm=True)),
    ):
        made[name] = Way(whole(model), list(model.parameters()), x, state[:2])
    return made


def check(made: dict[str, Way]) -> None:
    """Every way with a hyper LSTM gives the results and gradients of the loop."""

    def flat(way: Way) -> list[Tensor]:
        # the gradients of the weights as one: the loop has them in more parts, in the same order
        found, inputs = way.train(), 2 * (1 + len(way.state))
        return [*found[:inputs], torch.cat([g.flatten() for g in found[inputs:]])]

    wanted = flat(made["loop"])
    for name in ("hoisted", "compiled step", "hyperfast"):
        for a, b in zip(flat(made[name]), wanted, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm(), name


@pytest.mark.timeout(1800)
# what keeps memory cannot be taken back: last
@pytest.mark.parametrize(("keeps", "name"), [(keeps, name) for keeps in (False, True) for name in CASES])
def bench_lstm(benchmark, report, keeps, name):
    case, rows = CASES[name], []

    def measure() -> None:
        if keeps:
            assert keep_freed_memory()
        torch.manual_seed(0)
        made = ways(case)
        check(made)
        a, b = torch.randn(2, GEMM, GEMM)
        train = {name: way.train for name, way in made.items()} | {"product": lambda: a @ b}
        times = interleaved(train, case.rounds)
        forward = interleaved({name: way.forward for name, way in made.items()}, case.rounds)
        floor = case.flops() / (2 * GEMM**3 / median(times["product"]))
        for name, way in made.items():
            step = median(times[name]) / case.T
            rows.append([
                name, f"{1e3 * step:.2f} ms", f"{paired_ratio(times[name], times['hyperfast']):.2f}",
                f"{1e3 * median(forward[name]) / case.T:.2f} ms",
                f"{paired_ratio(forward[name], forward['hyperfast']):.2f}",
                f"{peak_bytes(way.train) / MIB:.0f} MiB",
            ])  # fmt: skip
        own = median(times["hyperfast"]) / case.T
        rows.append(["floor of the products", f"{1e3 * floor:.2f} ms", f"{floor / own:.2f}", "", "", ""])

    benchmark.pedantic(measure, rounds=1)
    header = ["way", "forward + backward, a step", "times ours", "forward, a step", "times ours", "memory"]
    sizes = f"batch {case.B}, T {case.T}, input {case.I}, H {case.H}, M {case.M}, N_z {case.Z}"
    title = f"HyperLSTM{' with layer norm' * case.layer_norm}, {sizes}, float32"
    report(title + ", freed memory kept" * keeps, header, rows)
