"""Optimizers of this project's own, beside those of torch and `hyperfast.optim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hyperfast.optim.factored_optimizer import check_options, is_capturing


class NesterovSGD(torch.optim.Optimizer):
    """SGD with Nesterov momentum: with g the gradient plus weight_decay p, v <- momentum v + g and
    p <- p - lr (g + momentum v).

    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning"
    (ICML 2013), in the variables of `torch.optim.SGD(nesterov=True)`, whose results it has and whose
    state_dict loads here and back. All parameters of a device and dtype are updated together. lr: a number or
    a tensor [], which is read where it lies: nothing waits for a GPU. capturable: steps may be captured in a
    CUDA graph once one was taken outside. Raises ValueError for options out of range and the state of another
    method, RuntimeError for sparse gradients and for captures that would replay a wrong step.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, capturable=capturable)
        # torch's options, so that a state_dict loads either way
        defaults |= dict(dampening=0.0, nesterov=True, maximize=False, foreach=None, differentiable=False)
        super().__init__(params, defaults | {"fused": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of `torch.optim.SGD(nesterov=True)` too."""
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", self.defaults["capturable"])  # torch's SGD has none

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:
        """One step. closure: computes the loss, which is returned, and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lists = [params, [p.grad for p in params], [self._velocity(p, group) for p in params]]
            for (own, grads, velocities), _ in self._group_tensors_by_device_and_dtype(lists).values():
                _update(own, grads, velocities, group)
        return loss

    def _velocity(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """v, zeros at first. Called in each step, and so the place for what a step cannot take."""
        if p.grad.is_sparse:
            raise RuntimeError("NesterovSGD takes no sparse gradients")
        velocity = self.state[p].get("momentum_buffer")
        if is_capturing(p.device):
            if not group["capturable"]:
                raise RuntimeError("NesterovSGD: a captured step needs capturable=True")
            if velocity is None:  # the replays would each begin with zeros
                raise RuntimeError("NesterovSGD: take one step outside the capture first, it makes the state")
        if velocity is None:
            velocity = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return velocity


def _update(params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], group: dict) -> None:
    """The step of parameters of one device and dtype."""
    lr, momentum = group["lr"], float(group["momentum"])
    if group["weight_decay"]:
        grads = torch._foreach_add(grads, params, alpha=float(group["weight_decay"]))
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_add_(velocities, grads)
    update = torch._foreach_add(grads, velocities, alpha=momentum)
    if isinstance(lr, Tensor):  # as `alpha` it would be asked for its value
        torch._foreach_mul_(update, lr.reshape(()))
        torch._foreach_sub_(params, update)
    else:
        torch._foreach_add_(params, update, alpha=-lr)


def _check(group: dict[str, Any]) -> None:
    """ValueError for options out of range, and for those of a method that is not this one."""
    lr = group["lr"]
    check_options(
        group,
        {
            "lr must be at least 0": isinstance(lr, Tensor) or lr >= 0,
            "momentum must be above 0": group["momentum"] > 0,
            "weight_decay must be at least 0": group["weight_decay"] >= 0,
            "NesterovSGD has Nesterov momentum without dampening and minimizes": (
                group["nesterov"] and not group["dampening"] and not group.get("maximize")
            ),
        },
    )
