"""hyperfast.analysis: the weights that a HyperLSTM makes at every step, against their definition."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hyperfast import analysis
from hyperfast.nn import HyperLSTMCell
from hyperfast.reference import LSTMState


def random_cell(I, H, M, Z, **options):
    torch.manual_seed(0)
    cell = HyperLSTMCell(I, H, M, Z, backend="reference", dtype=torch.float64, **options)
    for p in cell.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return cell


SIZES = [(3, 5, 4, 2), (1, 1, 1, 1), (2, 3, 4, 7)]  # Z above H too


@pytest.mark.parametrize("sizes", SIZES)
def test_scales_give_the_cells_own_step(sizes):
    cell = random_cell(*sizes)
    I, H, M, _ = sizes
    x, state = (
        torch.randn(6, I, dtype=torch.float64),
        LSTMState(*(torch.randn(6, n, dtype=torch.float64) for n in (H, H, M, M))),
    )
    last = cell(x, state)
    scales = analysis.dynamic_scales(cell, last.hyper_h)
    assert scales.shape == (6, 3, 4, H)
    d_x, d_h, d_b = scales.unbind(1)
    x_gates, h_gates = (
        F.linear(*pair).view(6, 4, H) for pair in ((x, cell.weight_ih), (state.h, cell.weight_hh))
    )
    i, f, g, o = (d_x * x_gates + d_h * h_gates + d_b + cell.bias.view(4, H)).unbind(1)
    c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
    torch.testing.assert_close(last.h, o.sigmoid() * c.tanh(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_changes_are_the_norms_of_the_weights_differences(sizes, leading):
    cell = random_cell(*sizes)
    hyper_h = torch.randn(*leading, 7, sizes[2], dtype=torch.float64)
    changes = analysis.weight_changes(cell, hyper_h)
    assert changes.shape == (*leading, 6, 3, 4) and changes.dtype == torch.float64
    d_x, d_h, d_b = analysis.dynamic_scales(cell, hyper_h).flatten(-2).unbind(-2)  # [..., T, 4H]
    weights = d_x[..., None] * cell.weight_ih, d_h[..., None] * cell.weight_hh, d_b[..., None]
    wanted = [w.diff(dim=-3).unflatten(-2, (4, -1)).norm(dim=(-2, -1)) for w in weights]
    torch.testing.assert_close(changes, torch.stack(wanted, -2).detach(), rtol=1e-10, atol=1e-12)


def test_small_changes_in_float32():
    """Embeddings are near their bias, 1: the difference of two would be rounding."""
    cell = HyperLSTMCell(3, 5, 4, 2)
    torch.nn.init.normal_(cell.z_weight)
    hyper_h = 0.5 + 1e-6 * torch.randn(9, 4)
    exact = analysis.weight_changes(copy.deepcopy(cell).double(), hyper_h.double())
    torch.testing.assert_close(analysis.weight_changes(cell, hyper_h), exact, rtol=1e-6, atol=0)


def test_changes_of_a_new_cell_are_zero_in_the_scales():
    """Its embeddings of the scales do not depend on the hyper LSTM yet, and its shifts are zero."""
    changes = analysis.weight_changes(HyperLSTMCell(3, 5, 4, 2), torch.randn(9, 4))
    assert changes.shape == (8, 3, 4) and not changes.any() and not changes.requires_grad
    assert analysis.weight_changes(HyperLSTMCell(3, 5, 4, 2), torch.randn(1, 4)).shape == (0, 3, 4)
