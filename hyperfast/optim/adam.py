"""AdamW and Adam that take factored gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from hyperfast import ops
from hyperfast.ops import AdamWCoefficients
from hyperfast.optim.factored_optimizer import FactoredBatch, FactoredOptimizer, check_options


class Adam(FactoredOptimizer):
    """Adam (Kingma and Ba, ICLR 2015) for models with factored gradients: the results of `torch.optim.Adam`.

    params: a model, `hyperfast.param_groups(model)`, or parameters and groups as in torch. Each factored
    weight must come with its bias and z (in any group, so each may have its own lr and decay). weight_decay:
    L2, added to the (clipped) gradient. max_grad_norm, nonfinite, state_dtype: `FactoredOptimizer`. State and
    `state_dict` are those of `torch.optim.Adam`. Raises ValueError for options out of range, a factored
    weight without its bias or z, and the state of an amsgrad, maximize or differentiable optimizer.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    refused = ("amsgrad", "maximize", "differentiable")
    decoupled_weight_decay = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        state_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
    ):
        # torch's options, so that a state_dict loads either way
        torch_only = dict(
            amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None
        )
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **torch_only)
        defaults["decoupled_weight_decay"] = self.decoupled_weight_decay
        super().__init__(params, defaults, max_grad_norm, nonfinite, state_dtype, backend)

    @staticmethod
    def _check_group(group: dict) -> None:
        beta1, beta2 = group["betas"]
        checks = {
            "lr must be at least 0": group["lr"] >= 0,
            "betas must be in [0, 1)": 0 <= beta1 < 1 and 0 <= beta2 < 1,
            "eps must be at least 0": group["eps"] >= 0,
            "weight_decay must be at least 0": group["weight_decay"] >= 0,
        }
        check_options(group, checks)

    def _step_of(self, p: Tensor) -> Tensor:
        return self.state[p].setdefault("step", torch.tensor(0.0, dtype=torch.float32))

    def _update_ordinary(self, group: dict, params: list[Tensor], grads: list[Tensor], fused: bool) -> None:
        steps = [self._step_of(p) for p in params]
        exp_avgs, exp_avg_sqs = (list(column) for column in zip(*map(self._states, params), strict=True))
        beta1, beta2 = group["betas"]
        adam(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=fused, foreach=False if fused else None,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False, decoupled_weight_decay=group["decoupled_weight_decay"],
        )  # fmt: skip

    def _update_factored(self, batch: FactoredBatch) -> None:
        trained = [f.bias_is_trained for f in batch.factors]
        coefficients = [self._advance(f.weight, g) for f, g in zip(batch.factors, batch.groups, strict=True)]
        bias_coefficients = [
            self._advance(f.bias, g) if t else c
            for f, g, t, c in zip(batch.factors, batch.bias_groups, trained, coefficients, strict=True)
        ]
        exp_avgs, exp_avg_sqs = zip(
            *(self._states(f.weight, self.state_dtype) for f in batch.factors), strict=True
        )
        bias_states = [
            self._states(f.bias, self.state_dtype) if t else (None, None)
            for f, t in zip(batch.factors, trained, strict=True)
        ]
        ops.adamw_generate(
            [f.weight for f in batch.factors],
            exp_avgs,
            exp_avg_sqs,
            [f.bias for f in batch.factors],
            *zip(*bias_states, strict=True),
            *batch.tensors(),
            coefficients,
            bias_coefficients,
            batch.scale,
            batch.seeds(self.state[f.weight]["step"] for f in batch.factors),
            backend=self.backend,
        )

    def _advance(self, p: Tensor, group: dict) -> AdamWCoefficients:
        """Counts the step and returns its coefficients."""
        step = self._step_of(p)
        step += 1
        t, lr, (beta1, beta2) = float(step), float(group["lr"]), (float(beta) for beta in group["betas"])
        decoupled, decay = group["decoupled_weight_decay"], group["weight_decay"]
        return AdamWCoefficients(
            decay=1 - lr * decay if decoupled else 1.0,
            step_size=lr / (1 - beta1**t),
            beta1=beta1,
            beta2=beta2,
            bias_correction2_sqrt=math.sqrt(1 - beta2**t),
            eps=group["eps"],
            l2=0.0 if decoupled else decay,
        )


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, ICLR 2019) for models with factored gradients: the results of
    `torch.optim.AdamW`. Options and errors of `Adam`, but weight_decay shrinks the parameter itself by
    lr weight_decay."""

    decoupled_weight_decay = True

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever state was loaded, as in torch
            group["decoupled_weight_decay"] = True
