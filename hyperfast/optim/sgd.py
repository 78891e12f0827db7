"""SGD that takes factored gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from hyperfast import ops, states
from hyperfast.factored import Factors
from hyperfast.ops import SGDCoefficients
from hyperfast.optim.factored_optimizer import STORAGES, FactoredBatch, FactoredOptimizer, check_options
from hyperfast.states import State


class SGD(FactoredOptimizer):
    """SGD with momentum for models with factored gradients: the results of `torch.optim.SGD`.

    params: a model, `hyperfast.param_groups(model)`, or parameters and groups as in torch. Each factored
    weight must come with its bias and z (in any group, so each may have its own lr and decay). weight_decay:
    L2, added to the (clipped) gradient. nesterov: Nesterov momentum (Sutskever et al., ICML 2013).
    max_grad_norm, nonfinite, state_dtype: `FactoredOptimizer`. State and `state_dict` are those of
    `torch.optim.SGD`; with state_dtype there is a `step` too. Raises ValueError for options out of range, a
    factored weight without its bias or z, and the state of a maximize or differentiable optimizer.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        state_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
    ):
        # torch's options, so that a state_dict loads either way
        torch_only = dict(maximize=False, foreach=None, differentiable=False, fused=None)
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )
        super().__init__(params, {**defaults, **torch_only}, max_grad_norm, nonfinite, state_dtype, backend)

    @staticmethod
    def _check_group(group: dict) -> None:
        momentum = group["momentum"]
        checks = {
            "lr must be at least 0": group["lr"] >= 0,
            "momentum must be at least 0": momentum >= 0,
            "weight_decay must be at least 0": group["weight_decay"] >= 0,
            "nesterov needs a momentum and no dampening": (
                not group["nesterov"] or (momentum > 0 and group["dampening"] == 0)
            ),
        }
        check_options(group, checks)

    def _needs_states(self, factors: Factors, group_of: dict[int, dict]) -> bool:
        return any(group_of[id(p)]["momentum"] != 0 for p in (factors.weight, factors.bias))

    def _is_new(self, p: Tensor) -> bool:
        """Whether p has no momentum yet."""
        state = self.state.get(p, {})
        return state.get("momentum_buffer") is None and "momentum_buffer_codes" not in state

    def _update_ordinary(self, group: dict, params: list[Tensor], grads: list[Tensor], fused: bool) -> None:
        if group["momentum"] == 0:
            self._torch_sgd(group, params, grads, [None] * len(params), fused)
            return
        is_new = [self._is_new(p) for p in params]
        for new in {*is_new}:  # torch's fused kernel takes either kind
            chosen = [i for i, other in enumerate(is_new) if other == new]
            some = [params[i] for i in chosen]
            buffers = [None] * len(some) if new else [self._states(p)[0] for p in some]
            self._torch_sgd(group, some, [grads[i] for i in chosen], buffers, fused)
            for p, buffer in zip(some, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _torch_sgd(
        self, group: dict, params: list[Tensor], grads: list[Tensor], buffers: list, fused: bool
    ) -> None:
        options = {
            k: group[k] for k in ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        }
        sgd(params, grads, buffers, fused=fused, foreach=False if fused else None, **options)

    def _update_factored(self, batch: FactoredBatch) -> None:
        with_momentum = any(g["momentum"] != 0 for g in (*batch.groups, *batch.bias_groups))
        coefficients, buffers, bias_coefficients, bias_buffers, steps = [], [], [], [], []
        for f, group, bias_group in zip(batch.factors, batch.groups, batch.bias_groups, strict=True):
            coefficients.append(self._coefficients(f.weight, group))
            buffers.append(self._buffer(f.weight, group) if with_momentum else None)
            trained = f.bias_is_trained
            bias_coefficients.append(self._coefficients(f.bias, bias_group) if trained else None)
            bias_buffers.append(self._buffer(f.bias, bias_group) if trained and with_momentum else None)
            steps.append(self._count(f.weight) if with_momentum else 0.0)
        ops.sgd_generate(
            [f.weight for f in batch.factors],
            buffers,
            [f.bias for f in batch.factors],
            bias_buffers,
            *batch.tensors(),
            coefficients,
            bias_coefficients,
            batch.scale,
            batch.seeds(steps),
            backend=self.backend,
        )

    def _coefficients(self, p: Tensor, group: dict) -> SGDCoefficients:
        momentum, new = group["momentum"], self._is_new(p)
        if momentum == 0:
            gradient, buffer = 1.0, 0.0
        else:
            gradient, buffer = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
        return SGDCoefficients(
            lr=float(group["lr"]),
            l2=group["weight_decay"],
            keep=0.0 if new else momentum,
            take=1.0 if new else 1 - group["dampening"],
            gradient=gradient,
            buffer=buffer,
        )

    def _buffer(self, p: Tensor, group: dict) -> State:
        """The momentum buffer; one to throw away where only the other of weight and bias has momentum."""
        if group["momentum"] == 0:
            return states.zeros(p, STORAGES[self.state_dtype])
        return self._states(p, self.state_dtype)[0]

    def _count(self, p: Tensor) -> float:
        """The step, counted only where stochastic rounding needs it: torch's SGD has none."""
        if self.state_dtype is None:
            return 0.0
        step = self.state[p].setdefault("step", torch.tensor(0.0, dtype=torch.float32))
        step += 1
        return float(step)
