"""The plain HyperLSTM that the benchmarks run against computes what ours does."""

import pytest
import torch
from torch import nn

from benchmarks.bench_lstm import Case
from benchmarks.plain_lstm import PlainHyperLSTMCell
from hyperfast.nn import HyperLSTMCell


@pytest.mark.parametrize("layer_norm", [False, True])
def test_plain_cell(layer_norm):
    ours = HyperLSTMCell(5, 7, 6, 3, layer_norm, dtype=torch.float64)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.4)
    plain = PlainHyperLSTMCell(ours)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())
    x, weights = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 26, dtype=torch.float64)
    state = tuple(torch.randn(4, n, dtype=torch.float64) for n in ours.state_sizes)
    for cell in (ours, plain):
        made = torch.cat(cell(x, cell(x, state)), 1)
        (made * weights).sum().backward()
    torch.testing.assert_close(torch.cat(plain(x, state), 1), torch.cat(ours(x, state), 1))
    for name, parts in plain.parts().items():
        found = torch.cat([plain.get_parameter(part).grad for part in parts])
        expected = ours.get_parameter(name).grad
        torch.testing.assert_close(found.view(expected.shape), expected, msg=name)


def test_flops():
    case = Case(B=3, T=2, I=5, H=7, M=6, Z=2, layer_norm=False)
    macs = 28 * (5 + 7) + 24 * (5 + 7 + 6) + 24 * 6 + 12 * 7 * 2
    assert case.flops() == 3 * 2 * macs * 3
