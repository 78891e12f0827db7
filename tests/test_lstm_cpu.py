"""lstm's CPU kernel where its sizes matter: packed weights and weights as they lie, blocks of columns and
rows, results kept or not. tests/ops/test_lstm.py has the op."""

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


@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_kernel"]
    done = subprocess.run(command, env=os.environ | {"HYPERFAST_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
