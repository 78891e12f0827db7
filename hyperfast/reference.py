"""Every op in plain PyTorch, with the names and arguments of `hyperfast.ops`: the specification.

Letters: L generated layers, N weights of a layer, K embedding size. Lists have one entry for each layer,
layers may differ in N and K. Nothing here is fast; everything here is differentiable where the mathematics
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AdamWCoefficients(NamedTuple):
    """One AdamW step (Loshchilov and Hutter, 2019): `decay` = 1 - lr weight_decay, `step_size` = lr / (1 -
    beta1^t), `bias_correction2_sqrt` = sqrt(1 - beta2^t)."""

    decay: float
    step_size: float
    beta1: float
    beta2: float
    bias_correction2_sqrt: float
    eps: float


def generate(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], zs: Sequence[Tensor]
) -> list[Tensor]:
    """w[n] = sum_k weight[n, k] z[k] + bias[n]: weight [N, K], bias [N] or None, z [K] -> w [N]."""
    return [F.linear(z, weight, bias) for weight, bias, z in zip(weights, biases, zs, strict=True)]


def generate_backward(weights: Sequence[Tensor], dws: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """dz = weight^T dw [K] for each layer, and |dw|^2 as float64 [L].

    With them every gradient of `generate` is known: d bias = dw, d weight = dw outer z, |d weight|^2 = |dw|^2
    |z|^2.
    """
    dzs = [weight.t() @ dw for weight, dw in zip(weights, dws, strict=True)]
    return dzs, torch.stack([dw.double().square().sum() for dw in dws])


def hyper_linear(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None, layer_bias: Tensor | None = None
) -> Tensor:
    """A linear layer on generated weights: x [..., I], z [K], weight [O I, K], bias [O I] or None, layer_bias
    [O] or None -> [..., O]."""
    return F.linear(x, F.linear(z, weight, bias).view(-1, x.shape[-1]), layer_bias)


def hyper_conv2d(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with a generated kernel: x [B, I, H, W], z [K], weight [O I/groups R S, K], bias [O
    I/groups R S] or None, layer_bias [O] or None, kernel_size (R, S) -> [B, O, H', W']."""
    w = F.linear(z, weight, bias).view(-1, x.shape[1] // groups, *kernel_size)
    return F.conv2d(x, w, layer_bias, stride, padding, dilation, groups)


def adamw_(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, c: AdamWCoefficients) -> None:
    """One AdamW step in place, as `torch.optim.AdamW` does it."""
    p.mul_(c.decay)
    exp_avg.lerp_(grad, 1 - c.beta1)
    exp_avg_sq.mul_(c.beta2).addcmul_(grad, grad, value=1 - c.beta2)
    p.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / c.bias_correction2_sqrt).add_(c.eps), value=-c.step_size)


@torch.no_grad()
def adamw_generate(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_exp_avgs: Sequence[Tensor | None],
    bias_exp_avg_sqs: Sequence[Tensor | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[AdamWCoefficients],
    bias_coefficients: Sequence[AdamWCoefficients],
    grad_scale: float = 1.0,
) -> None:
    """AdamW on weight [N, K] with the gradient dw outer z and on bias [N] with dw, then the next weights [N]
    from `new_zs`.

    In place: weights, biases, their moments, `next_weights`. A bias whose moments are None is added but not
    trained. `zs` [K] are the embeddings the gradient was taken at, `new_zs` [K] those after their own update.
    Every dw is first multiplied by `grad_scale`.
    """
    for i, (weight, bias, dw) in enumerate(zip(weights, biases, dws, strict=True)):
        g = dw * grad_scale
        adamw_(weight, exp_avgs[i], exp_avg_sqs[i], torch.outer(g, zs[i]), coefficients[i])
        m, v = bias_exp_avgs[i], bias_exp_avg_sqs[i]
        if m is not None and v is not None:
            adamw_(bias, m, v, g, bias_coefficients[i])
        next_weights[i].copy_(F.linear(new_zs[i], weight, bias))
