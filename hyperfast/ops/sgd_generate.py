"""`sgd_generate`: SGD on rank-one generator gradients and the next weights, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast.ops.update_generate import Update, listed, update_generate
from hyperfast.reference import SGDCoefficients
from hyperfast.states import State


def sgd_generate(
    weights: Sequence[Tensor],
    momentum_buffers: Sequence[State | None],
    biases: Sequence[Tensor],
    bias_momentum_buffers: Sequence[State | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[SGDCoefficients] | Tensor,
    bias_coefficients: Sequence[SGDCoefficients | None] | Tensor,
    grad_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    skip: Tensor | None = None,
    bias_is_trained: Sequence[bool] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """One SGD step of every generator from its factored gradient, and the weights of the next forward, in one
    pass.

    momentum_buffers [N, K]: all None without momentum. bias_coefficients None, or bias_is_trained False where
    they are a tensor [L, 6]: the bias is added but not trained. bias_momentum_buffers [N]: None there and
    without momentum. All else, storage of the buffers and errors included, as in `adamw_generate`.
    """
    coefficients, bias_coefficients, seeds = map(listed, (coefficients, bias_coefficients, seeds))
    trained = [True] * len(weights) if bias_is_trained is None else list(bias_is_trained)
    if isinstance(bias_coefficients, list) and bias_is_trained is None:
        trained = [row is not None for row in bias_coefficients]
    buffers, bias_buffers = list(momentum_buffers), list(bias_momentum_buffers)
    without = all(b is None for b in buffers) and all(b is None for b in bias_buffers)
    if without and not len(buffers) == len(bias_buffers) == len(weights):
        raise ValueError(
            f"{len(weights)} weights but {len(buffers)} of momentum_buffer, {len(bias_buffers)} of "
            "bias_momentum_buffer"
        )
    update = Update(
        rule="sgd",
        names=() if without else ("momentum_buffer",),
        weights=list(weights),
        states=[] if without else [buffers],
        biases=list(biases),
        bias_states=[] if without else [bias_buffers],
        bias_is_trained=trained,
        dws=list(dws),
        zs=list(zs),
        new_zs=list(new_zs),
        next_weights=list(next_weights),
        coefficients=coefficients,
        bias_coefficients=bias_coefficients,
        grad_scale=grad_scale,
        seeds=seeds,
        skip=skip,
    )
    update_generate(update, backend)
