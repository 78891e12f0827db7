"""The CPU kernels of lstm and lstm_backward where their sizes matter: packed weights and weights as they lie,
blocks of columns and rows, results kept or not, gradients given or not. tests/ops/test_lstm.py has the op."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import _cpu, address, dtype_name
from hyperfast.reference import HyperCell, LSTMState, Norms

KEY = torch.tensor([0x123456789ABCDEF])
DROPOUT, EPS = 0.25, 1e-5
# (rows of each step, H, M, Z): steps of one row; few rows; many rows in one step and in several, with more
# columns and rows than a block has; no hyper LSTM
CASES = {
    "one_row": ((1,) * 20, 33, 17, 5),
    "few_rows": ((7, 2, 2, 1), 130, 9, 16),
    "one_step": ((40,), 47, 16, 3),
    "blocks": ((14, 14, 13, 13, 9, 3, 1), 300, 37, 7),
    "many_rows": ((133, 131), 65, 140, 2),
    "no_hyper": ((10,) * 7, 270, 0, 0),
}


def make(sizes: tuple[int, ...], H: int, M: int, Z: int, norms: bool) -> list:
    """The arguments of `reference.lstm` up to batch_sizes, in float64."""
    N, B = sum(sizes), sizes[0]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * scale

    def draw_norms(n: int) -> Norms | None:
        return Norms(1 + draw(4 * n) / 8, draw(4 * n), 1 + draw(n) / 8, draw(n)) if norms else None

    hyper, states = None, [draw(B, H), draw(B, H), None, None]
    if M:
        states[2:] = draw(B, M), draw(B, M)
        recurrent = draw(4 * M, H, scale=H**-0.5), draw(4 * M, M, scale=M**-0.5)
        z_map = draw(12 * Z, M, scale=M**-0.5), 1 + draw(12 * Z)
        hyper = HyperCell(draw(N, 4 * M), *recurrent, *z_map, draw(12, H, Z, scale=Z**-0.5), draw_norms(M))
    weight, batch_sizes = draw(4 * H, H, scale=H**-0.5), torch.tensor(sizes)
    return [draw(N, 4 * H), LSTMState(*states), weight, draw(4 * H), draw_norms(H), hyper, batch_sizes]


def convert(value, dtype: torch.dtype):
    """Every floating-point tensor of nested tuples in dtype."""
    if isinstance(value, tuple):
        return type(value)(*(convert(v, dtype) for v in value))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def run(arguments: list, threads: int, keep: bool = True) -> dict[str, Tensor]:
    """What the kernel writes, by name."""
    x_gates, state, weight, bias, norms, hyper, batch_sizes = arguments
    N, (B, H) = len(x_gates), state.h.shape
    M, Z = (hyper.weight_hh.shape[1], hyper.d_weight.shape[2]) if hyper else (0, 0)
    written = dict(h=H, c=H, hyper_h=M, hyper_c=M) | (dict(h_gates=4 * H, hyper_gates=4 * M) if keep else {})
    results = {name: x_gates.new_full((N, n), float("nan")) for name, n in written.items()}
    none = [None] * 4
    weights = [weight, bias, *(hyper[1:6] if hyper else [None] * 5)]
    weights += [*(norms or none), *(hyper and hyper.norms or none)]
    tensors = [x_gates, hyper and hyper.x_gates, *state, *results.values(), *([] if keep else [None] * 2)]
    sizes, options = (len(batch_sizes), N, B, H, M, Z), (address(KEY), DROPOUT, EPS)
    _cpu.lstm(
        sizes, address(batch_sizes), [address(t) for t in weights], *options,
        [address(t) for t in tensors], dtype_name(x_gates), threads,
    )  # fmt: skip
    return results


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_kernel(assert_accurate, name, dtype, norms):
    arguments = [convert(a, dtype) for a in make(*CASES[name], norms)]
    exact = [convert(a, torch.float64) for a in arguments]
    output, _ = reference.lstm(*exact, KEY, DROPOUT, EPS)
    made = run(arguments, 1)
    assert_accurate(made["h"], output, dtype)
    sizes = CASES[name][0]
    before = [exact[1].h, *output.split(sizes)]  # h that each step goes on from
    h_gates = torch.cat([h[:size] @ exact[2].T for h, size in zip(before, sizes, strict=False)])
    assert_accurate(made["h_gates"], h_gates, dtype)
    for threads in (2, 3):
        for key, again in run(arguments, threads).items():
            assert torch.equal(again, made[key]), (threads, key)
    for key, again in run(arguments, 1, keep=False).items():
        assert torch.equal(again, made[key]), key


def run_backward(arguments: list, kept: dict[str, Tensor], dh: Tensor, dlast: list, threads: int) -> list:
    """What the kernel writes, in the order of the binding; None for what there is not."""
    x_gates, state, weight, bias, norms, hyper, batch_sizes = arguments
    N, (B, H) = len(x_gates), state.h.shape
    M, Z = (hyper.weight_hh.shape[1], hyper.d_weight.shape[2]) if hyper else (0, 0)

    def like(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else torch.full_like(t, float("nan")) for t in tensors]

    none = [None] * 4
    weights = [weight, bias, *(hyper[1:6] if hyper else [None] * 5)]
    both_norms = [*(norms or none), *(hyper and hyper.norms or none)]
    read = (kept[k] for k in ("c", "hyper_c", "h_gates", "hyper_gates", "z"))
    inputs = [x_gates, state.c, state.hyper_c, *(t if t.numel() else None for t in read), dh, *dlast]
    outputs = like(x_gates, x_gates if M else None, *inputs[6:8], state.h, *state[1:2], *state[2:], bias)
    outputs += like(hyper and hyper.d_weight, *both_norms)
    _cpu.lstm_backward(
        (len(batch_sizes), N, B, H, M, Z), address(batch_sizes), [address(t) for t in weights + both_norms],
        address(KEY), DROPOUT, EPS, [address(t) for t in inputs], [address(t) for t in outputs],
        dtype_name(x_gates), threads,
    )  # fmt: skip
    return outputs


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_kernel_backward(assert_accurate, name, dtype, norms):
    given = norms  # gradients of the last state; without them the kernel is told that there are none
    arguments = [convert(a, dtype) for a in make(*CASES[name], norms)]
    x_gates, state, weight, bias, norms, hyper, batch_sizes = exact = [
        convert(a, torch.float64) for a in arguments
    ]
    kept = run(exact, 1)
    kept["z"] = torch.nn.functional.linear(kept["hyper_h"], *hyper[3:5]) if hyper else x_gates[:, :0]
    kept = {key: t.to(dtype) for key, t in kept.items()}  # the kernel reads what the reference reads
    wide = {key: t.double() if t.numel() else None for key, t in kept.items()}
    dh = torch.randn_like(x_gates[:, : state.h.shape[1]]).to(dtype)
    dlast = [None if s is None else torch.randn_like(s).to(dtype) for s in state]
    if not given:
        dlast = [None if s is None else torch.zeros_like(s) for s in dlast]
    want = reference.lstm_backward(
        batch_sizes, weight, bias, norms, hyper, KEY, DROPOUT, EPS, x_gates, state.c, state.hyper_c,
        *(wide[key] for key in ("c", "hyper_c", "h_gates", "hyper_gates", "z")), dh.double(),
        LSTMState(*(None if s is None else s.double() for s in dlast)),
    )  # fmt: skip
    made = run_backward(arguments, kept, dh, dlast if given else [None] * 4, 1)
    none = [None] * 4
    wanted = [want.x_gates, hyper and want.h_gates, want.hyper_gates, want.z, *want.state, want.bias]
    wanted += [want.d_weight, *(want.norms or none), *(want.hyper_norms or none)]
    assert [t is None for t in made] == [t is None for t in wanted]
    pairs = [pair for pair in zip(made, wanted, strict=True) if pair[0] is not None]
    for result, exact_result in pairs if dtype == torch.float64 else [zip(*pairs, strict=True)]:
        assert_accurate(result, exact_result, dtype)  # in float32 all at once: some amplify rounding
    for threads in (2, 3):
        again = run_backward(arguments, kept, dh, dlast if given else [None] * 4, threads)
        assert all(a is None or torch.equal(a, b) for a, b in zip(again, made, strict=True)), threads


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_kernel"]
    done = subprocess.run(command, env=os.environ | {"HYPERFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
