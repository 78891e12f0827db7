"""AdamW and Adam that take factored gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import ops, reference
from hyperfast.ops import AdamWCoefficients
from hyperfast.optim.factored_optimizer import FactoredBatch, FactoredOptimizer, check_options


class Adam(FactoredOptimizer):
    """Adam (Kingma and Ba, ICLR 2015) for models with factored gradients: the results of `torch.optim.Adam`.

    params: a model, `hyperfast.param_groups(model)`, or parameters and groups as in torch. Each factored
    weight must come with its bias and z (in any group, so each may have its own lr and decay). weight_decay:
    L2, added to the (clipped) gradient. max_grad_norm, nonfinite, state_dtype, capturable:
    `FactoredOptimizer`. State and `state_dict` are those of `torch.optim.Adam`. Raises ValueError for options
    out of range, a factored weight without its bias or z, and the state of an amsgrad, maximize or
    differentiable optimizer.
    """

    state_names = ("exp_avg", "exp_avg_sq")
    row = AdamWCoefficients
    refused = ("amsgrad", "maximize", "differentiable")
    decoupled_weight_decay = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
        state_dtype: torch.dtype | str | None = None,
        capturable: bool = False,
        backend: str = "auto",
    ):
        # torch's options, so that a state_dict loads either way
        torch_only = dict(amsgrad=False, maximize=False, foreach=None, differentiable=False, fused=None)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **torch_only)
        defaults |= dict(capturable=capturable, decoupled_weight_decay=self.decoupled_weight_decay)
        super().__init__(params, defaults, max_grad_norm, nonfinite, state_dtype, capturable, backend)

    @staticmethod
    def _check_group(group: dict) -> None:
        beta1, beta2 = map(float, group["betas"])
        checks = {
            "lr must be at least 0": float(group["lr"]) >= 0,
            "betas must be in [0, 1)": 0 <= beta1 < 1 and 0 <= beta2 < 1,
            "eps must be at least 0": float(group["eps"]) >= 0,
            "weight_decay must be at least 0": float(group["weight_decay"]) >= 0,
        }
        check_options(group, checks)

    def _rule(self, group: dict) -> Callable[..., None]:
        return reference.adamw_

    def _fused(self, group: dict, params: list[Tensor], grads: list[Tensor], skip: Tensor | None) -> None:
        exp_avgs, exp_avg_sqs = (list(column) for column in zip(*map(self._states, params), strict=True))
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        beta1, beta2 = map(float, group["betas"])
        kernel(
            params, grads, exp_avgs, exp_avg_sqs, [], self._steps_beside(params), amsgrad=False,
            lr=self._fused_lr(group, params[0].device), beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, grad_scale=None,
            found_inf=skip,
        )  # fmt: skip

    def _coefficients(self, params: list[Tensor], groups: list[dict]) -> Tensor:
        """Seven launches."""
        steps = torch.stack([self.state[p]["step"] for p in params])

        def constant(*numbers):
            return self._constants.get(numbers, steps.device)

        lr, eps = self._lrs(groups, steps.device), constant(*(float(g["eps"]) for g in groups))
        betas = constant(*(tuple(float(g["betas"][i]) for g in groups) for i in (0, 1)))
        decays = [float(g["weight_decay"]) for g in groups]
        decoupled = [g["decoupled_weight_decay"] for g in groups]
        decay = constant(*(d if own else 0.0 for d, own in zip(decays, decoupled, strict=True)))
        l2 = constant(*(0.0 if own else d for d, own in zip(decays, decoupled, strict=True)))
        corrections = 1 - betas**steps
        row = AdamWCoefficients(
            decay=torch.addcmul(self._constants.get(1.0, steps.device), lr, decay, value=-1),
            step_size=lr / corrections[0],
            beta1=betas[0],
            beta2=betas[1],
            bias_correction2_sqrt=corrections[1].sqrt(),
            eps=eps,
            l2=l2,
        )
        return torch.stack(row, 1)

    def _update_factored(self, batch: FactoredBatch) -> None:
        weights, biases = zip(*((f.weight, f.bias) for f in batch.factors), strict=True)
        exp_avgs, exp_avg_sqs = zip(*(self._states(p, self.state_dtype) for p in weights), strict=True)
        bias_states = [
            self._states(f.bias, self.state_dtype) if f.bias_is_trained else (None, None)
            for f in batch.factors
        ]
        ops.adamw_generate(
            weights, exp_avgs, exp_avg_sqs, biases, *zip(*bias_states, strict=True), *batch.tensors(),
            *self._step_numbers(batch), backend=self.backend,
        )  # fmt: skip


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, ICLR 2019) for models with factored gradients: the results of
    `torch.optim.AdamW`. Options and errors of `Adam`, but weight_decay shrinks the parameter itself by
    lr weight_decay."""

    decoupled_weight_decay = True

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | Tensor = 1e-3,
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
