"""SGD that takes factored gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hyperfast import ops, reference, states
from hyperfast.ops import SGDCoefficients
from hyperfast.optim.factored_optimizer import STORAGES, FactoredBatch, FactoredOptimizer, check_options
from hyperfast.states import State


class SGD(FactoredOptimizer):
    """SGD with momentum for models with factored gradients: the results of `torch.optim.SGD`.

    params: a model, `hyperfast.param_groups(model)`, or parameters and groups as in torch. Each factored
    weight must come with its bias and z (in any group, so each may have its own lr and decay). weight_decay:
    L2, added to the (clipped) gradient. nesterov: Nesterov momentum (Sutskever et al., ICML 2013).
    max_grad_norm, nonfinite, state_dtype, capturable: `FactoredOptimizer`. State and `state_dict` are those
    of `torch.optim.SGD`; with state_dtype, and with capturable and a dampening, there is a `step` too. Raises
    ValueError for options out of range, a factored weight without its bias or z, and the state of a maximize
    or differentiable optimizer.
    """

    state_names = ("momentum_buffer",)
    row = SGDCoefficients

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
        state_dtype: torch.dtype | str | None = None,
        capturable: bool = False,
        backend: str = "auto",
    ):
        # torch's options, so that a state_dict loads either way
        torch_only = dict(maximize=False, foreach=None, differentiable=False, fused=None)
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )
        defaults |= torch_only
        super().__init__(params, defaults, max_grad_norm, nonfinite, state_dtype, capturable, backend)

    @staticmethod
    def _check_group(group: dict) -> None:
        momentum = float(group["momentum"])
        checks = {
            "lr must be at least 0": float(group["lr"]) >= 0,
            "momentum must be at least 0": momentum >= 0,
            "weight_decay must be at least 0": float(group["weight_decay"]) >= 0,
            "nesterov needs a momentum and no dampening": (
                not group["nesterov"] or (momentum > 0 and float(group["dampening"]) == 0)
            ),
        }
        check_options(group, checks)

    def _rule(self, group: dict) -> Callable[..., None]:
        return reference.sgd_ if self._has_states(group) else reference.plain_sgd_

    def _has_states(self, group: dict) -> bool:
        return group["momentum"] != 0

    def _counts(self, group: dict, is_rounded: bool) -> bool:
        return is_rounded or self._starts_on_device(group)

    def _starts_on_device(self, group: dict) -> bool:
        """Whether the device must know which step is the first, the one without dampening: the step before
        may have been skipped. (Without dampening a buffer of zeros makes any step the first.)"""
        return self.capturable and self._has_states(group) and group["dampening"] != 0

    def _first_step(self, p: Tensor) -> float:
        return 0.0 if self._is_new(p) else 1.0

    def _is_new(self, p: Tensor) -> bool:
        """Whether p has no momentum yet."""
        state = self.state.get(p, {})
        return state.get("momentum_buffer") is None and "momentum_buffer_codes" not in state

    def _has_kernel(self, p: Tensor, grad: Tensor, group: dict) -> bool:
        return super()._has_kernel(p, grad, group) and not self._starts_on_device(group)

    def _fused(self, group: dict, params: list[Tensor], grads: list[Tensor], skip: Tensor | None) -> None:
        has_states = self._has_states(group)
        is_new = [has_states and not self.capturable and self._is_new(p) for p in params]
        options = {name: float(group[name]) for name in ("weight_decay", "momentum", "dampening")}
        options |= {"lr": self._fused_lr(group, params[0].device), "nesterov": bool(group["nesterov"])}
        for new in {*is_new}:  # torch's kernel takes either kind
            chosen = [i for i, other in enumerate(is_new) if other == new]
            some = [params[i] for i in chosen]
            buffers = [self._states(p)[0] for p in some] if has_states else []
            torch._fused_sgd_(
                some, [grads[i] for i in chosen], buffers, **options, maximize=False, is_first_step=new,
                grad_scale=None, found_inf=skip,
            )  # fmt: skip

    def _coefficients(self, params: list[Tensor], groups: list[dict]) -> Tensor:
        device = params[0].device if self.capturable else torch.device("cpu")

        def constant(*numbers):
            return self._constants.get(numbers, device)

        keep, take, gradient, buffer = [], [], [], []
        for p, group in zip(params, groups, strict=True):
            momentum, new = float(group["momentum"]), not self.capturable and self._is_new(p)
            keep.append(0.0 if new else momentum)
            take.append(1.0 if new else 1 - float(group["dampening"]))
            gradient.append(1.0 if momentum == 0 or group["nesterov"] else 0.0)
            buffer.append(momentum if momentum == 0 or group["nesterov"] else 1.0)
        takes = constant(*take)
        if any(map(self._starts_on_device, groups)):
            later = self._constants.get(2.0, device, torch.float32)
            steps = torch.stack(
                [
                    self.state[p]["step"] if self._starts_on_device(group) else later
                    for p, group in zip(params, groups, strict=True)
                ]
            )
            takes = torch.where(steps == 1, 1.0, takes)
        row = SGDCoefficients(
            lr=self._lrs(groups, device).double().expand(len(groups)),
            l2=constant(*(float(group["weight_decay"]) for group in groups)),
            keep=constant(*keep),
            take=takes,
            gradient=constant(*gradient),
            buffer=constant(*buffer),
        )
        return torch.stack(row, 1)

    def _update_factored(self, batch: FactoredBatch) -> None:
        with_momentum = any(map(self._has_states, (*batch.groups, *batch.bias_groups)))
        numbers = self._step_numbers(batch)  # of what is new before there are buffers
        buffers, bias_buffers = [], []
        for f, group, bias_group in zip(batch.factors, batch.groups, batch.bias_groups, strict=True):
            buffers.append(self._buffer(f.weight, group) if with_momentum else None)
            trained = f.bias_is_trained and with_momentum
            bias_buffers.append(self._buffer(f.bias, bias_group) if trained else None)
        ops.sgd_generate(
            [f.weight for f in batch.factors], buffers, [f.bias for f in batch.factors], bias_buffers,
            *batch.tensors(), *numbers, [f.bias_is_trained for f in batch.factors], backend=self.backend,
        )  # fmt: skip

    def _buffer(self, p: Tensor, group: dict) -> State:
        """The momentum buffer; one to throw away where only the other of weight and bias has momentum."""
        if not self._has_states(group):
            return states.zeros(p, STORAGES[self.state_dtype])
        return self._states(p, self.state_dtype)[0]
