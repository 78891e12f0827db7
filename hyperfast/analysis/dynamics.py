"""How the weights that a HyperLSTM makes for its main LSTM change from step to step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.nn import HyperLSTMCell
from hyperfast.reference import modulation


def dynamic_scales(cell: HyperLSTMCell, hyper_h: Tensor) -> Tensor:
    """d_x, d_h and d_b of the gates i, f, g, o, [..., 3, 4, H]: what scales the rows of weight_ih and of
    weight_hh and what is added to the bias, at every step.

    hyper_h [..., M]: outputs of the cell's hyper LSTM, of the steps themselves, not those before.
    """
    *leading, M = hyper_h.shape
    z = F.linear(hyper_h.reshape(-1, M), cell.z_weight, cell.full_z_bias())
    return torch.stack(modulation(z, cell.d_weight), 1).view(*leading, 3, 4, cell.hidden_size)


@torch.no_grad()
def weight_changes(cell: HyperLSTMCell, hyper_h: Tensor) -> Tensor:
    """How far the effective weights of the main LSTM move in each step, float64 [..., T - 1, 3, 4]: the
    Frobenius norms of

        diag(d_x[t] - d_x[t-1]) weight_ih,    diag(d_h[t] - d_h[t-1]) weight_hh,    d_b[t] - d_b[t-1]

    in the rows of each gate (i, f, g, o), as plotted under a text by Ha, Dai and Le, "HyperNetworks" (2017),
    for weight_hh. hyper_h [..., T, M]: outputs of the hyper LSTM at consecutive steps. The norm over places
    and gates is that of the change of all weights.

    The embeddings z of two steps differ by dz, and |diag(D dz) weight| = |R dz| with R [Z, Z] of the QR
    decomposition of the rows of D = d_weight, each times the norm of its row of weight: nothing of the size
    of the weights is made for a step.
    """
    H = cell.hidden_size
    rows = [weight.double().norm(dim=1) for weight in (cell.weight_ih, cell.weight_hh)]
    rows = torch.stack([*rows, torch.ones_like(rows[0])]).view(12, H, 1)
    R = torch.linalg.qr(rows * cell.d_weight.double(), mode="r").R
    # of the differences, not the difference of z: that is near its bias, whose rounding would be all there is
    dz = F.linear(hyper_h.double().diff(dim=-2), cell.z_weight.double()).unflatten(-1, (12, -1))
    return torch.einsum("...pz,pyz->...py", dz, R).norm(dim=-1).unflatten(-1, (3, 4))
