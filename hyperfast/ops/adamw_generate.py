"""`adamw_generate`: AdamW or Adam on rank-one generator gradients and the next weights, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast.ops.update_generate import Update, listed, update_generate
from hyperfast.reference import AdamWCoefficients
from hyperfast.states import State


def adamw_generate(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    biases: Sequence[Tensor],
    bias_exp_avgs: Sequence[State | None],
    bias_exp_avg_sqs: Sequence[State | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[AdamWCoefficients] | Tensor,
    bias_coefficients: Sequence[AdamWCoefficients] | Tensor,
    grad_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    skip: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """One AdamW or Adam step of every generator from its factored gradient, and the weights of the next
    forward, in one pass.

    For each layer: weight, exp_avg, exp_avg_sq [N, K] with the gradient grad_scale dw outer z; bias [N] and
    its moments [N] (None: not trained) with grad_scale dw; next_weights [N] = weight new_z + bias, bit for
    bit what `generate` would return. zs and new_zs [K] are the embeddings before and after their own update.
    Moments are stored like the weight, or beside float32 weights all in bfloat16 or all in 8 bits
    (`hyperfast.states`), rounded at random by seeds, an integer below 2^32 for each layer that should differ
    from step to step. Arguments written to must be contiguous and share no memory.

    Numbers may be tensors on the weights' device, which a CUDA graph reads at every replay: coefficients and
    bias_coefficients float64 [L, 7], grad_scale of no dimensions, seeds int64 [L]. skip: a float tensor of no
    dimensions; unless it is zero nothing but next_weights is written. Raises ValueError or TypeError, before
    anything is changed.
    """
    bias_exp_avgs, bias_exp_avg_sqs = list(bias_exp_avgs), list(bias_exp_avg_sqs)
    update = Update(
        rule="adam",
        names=("exp_avg", "exp_avg_sq"),
        weights=list(weights),
        states=[list(exp_avgs), list(exp_avg_sqs)],
        biases=list(biases),
        bias_states=[bias_exp_avgs, bias_exp_avg_sqs],
        bias_is_trained=[m is not None for m in bias_exp_avgs],
        dws=list(dws),
        zs=list(zs),
        new_zs=list(new_zs),
        next_weights=list(next_weights),
        coefficients=listed(coefficients),
        bias_coefficients=listed(bias_coefficients),
        grad_scale=grad_scale,
        seeds=listed(seeds),
        skip=skip,
    )
    update_generate(update, backend)
