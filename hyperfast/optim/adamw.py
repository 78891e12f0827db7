"""AdamW that takes factored gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hyperfast import ops
from hyperfast.factored import Factors, generator_of, is_stand_in
from hyperfast.nn.generator import generators
from hyperfast.ops import AdamWCoefficients
from hyperfast.ops._library import check_backend
from hyperfast.optim.clip import factors_of, grad_norm

NONFINITE = ("raise", "skip")


def param_groups(
    model: nn.Module,
    weight: dict | None = None,
    bias: dict | None = None,
    z: dict | None = None,
    **common: Any,
) -> list[dict]:
    """Parameter groups of `model`: generator weights, generator biases, embeddings, everything else.

    weight, bias, z: options of those groups (`z={"lr": 1e-2, "weight_decay": 0.0}`); common: options of all
    four. Groups without parameters are left out.
    """
    roles = {"weight": weight or {}, "bias": bias or {}, "z": z or {}, "other": {}}
    role_of = {}
    for _, g in generators(model):
        for name, p in g.named_parameters(recurse=False):
            role_of[id(p)] = "z" if name == "z" else "weight" if p.dim() > 1 else "bias"
    members: dict[str, list[Tensor]] = {role: [] for role in roles}
    for p in model.parameters():
        members[role_of.get(id(p), "other")].append(p)
    return [
        {"params": members[role], "name": role, **common, **options}
        for role, options in roles.items()
        if members[role]
    ]


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) for models with factored gradients: the results of
    `torch.optim.AdamW`.

    params: a model, `hyperfast.param_groups(model)`, or parameters and groups as in torch. Each factored
    weight must come with its bias and z (in any group, so each may have its own lr and decay). max_grad_norm:
    clip the gradient of everything to this norm inside the step; `.grad` keeps the unclipped values.
    nonfinite: a non-finite gradient norm raises FloatingPointError ("raise") or leaves everything as it is
    and counts in `skipped_steps` ("skip"). After a step `grad_norm` is the norm before clipping.

    Order of a step: norm; embeddings and ordinary parameters; then one pass over each generator that updates
    weight, bias and their moments and writes the weights of the next forward. State and `state_dict` are
    those of `torch.optim.AdamW`. Raises ValueError for options out of range, a factored weight without its
    bias or z, and the state of an amsgrad, maximize or differentiable optimizer.
    """

    takes_factored_gradients = True

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        backend: str = "auto",
    ):
        if isinstance(params, nn.Module):
            params = params.parameters()
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        self.max_grad_norm, self.nonfinite, self.backend = max_grad_norm, nonfinite, check_backend(backend)
        self.grad_norm: float | None = None
        self.skipped_steps = 0
        # torch.optim.AdamW's options, so that a state_dict loads either way
        torch_only = dict(
            amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None
        )
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **torch_only, decoupled_weight_decay=True
        )
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)
        factors_of(self._parameters())  # a split triple raises here, not in the first step

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns closure's loss. Raises FloatingPointError for a non-finite gradient norm if
        nonfinite="raise"."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        factors = factors_of(parameters)
        self.grad_norm = float(grad_norm(parameters, factors))
        if not math.isfinite(self.grad_norm):
            if self.nonfinite == "raise":
                raise FloatingPointError(f"the gradient norm is {self.grad_norm}; nothing was updated")
            self.skipped_steps += 1
            return loss
        clipped = self.max_grad_norm is not None and self.grad_norm > 0
        scale = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6)) if clipped else 1.0
        factors = [f for f in factors if f.bias.grad is not None]
        old_zs = [f.z.detach().reshape(-1).clone() for f in factors]
        biases = {id(f.bias) for f in factors}
        for group in self.param_groups:
            ordinary = [p for p in group["params"] if p.grad is not None and id(p) not in biases]
            self._step_ordinary(group, [p for p in ordinary if not is_stand_in(p)], scale)
        self._step_factored(factors, old_zs, scale)
        return loss

    def _moments(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _step_ordinary(self, group: dict, params: list[Tensor], scale: float) -> None:
        if not params:
            return
        if any(p.grad.is_sparse or p.is_complex() for p in params):
            raise RuntimeError("hyperfast.optim.AdamW takes dense real gradients only")
        states = [self._moments(p) for p in params]
        grads = [p.grad for p in params]
        if scale != 1.0:
            grads = torch._foreach_mul(grads, scale)
        beta1, beta2 = group["betas"]
        fused = all(p.is_floating_point() and p.device.type == "cpu" for p in params)
        adamw(
            params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
            [s["step"] for s in states], fused=fused, foreach=False if fused else None, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        if fused:  # torch's fused CPU kernels do not: next weights must notice that a z or bias changed
            torch.autograd.graph.increment_version(params)

    def _step_factored(self, factors: list[Factors], old_zs: list[Tensor], scale: float) -> None:
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        batches: dict[tuple, list[int]] = {}
        for i, f in enumerate(factors):
            batches.setdefault((f.weight.dtype, f.weight.device), []).append(i)
        for indices in batches.values():
            batch = [factors[i] for i in indices]
            states = [self._moments(f.weight) for f in batch]
            bias_states = [self._moments(f.bias) if f.bias_is_trained else {} for f in batch]
            coefficients = [_advance(s, group_of[id(f.weight)]) for s, f in zip(states, batch, strict=True)]
            bias_coefficients = [
                _advance(s, group_of[id(f.bias)]) if s else c
                for s, f, c in zip(bias_states, batch, coefficients, strict=True)
            ]
            ops.adamw_generate(
                [f.weight for f in batch],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [f.bias for f in batch],
                [s.get("exp_avg") for s in bias_states],
                [s.get("exp_avg_sq") for s in bias_states],
                [f.bias.grad for f in batch],
                [old_zs[i] for i in indices],
                [f.z.detach().reshape(-1) for f in batch],
                [_next_weight(f) for f in batch],
                coefficients,
                bias_coefficients,
                scale,
                backend=self.backend,
            )
            for f in batch:
                generator_of(f.weight).next_weights_written()

    @contextlib.contextmanager
    def _without_stand_ins(self) -> Iterator[None]:
        """Groups without the parameters that only stand in for a missing bias: torch.optim's state knows
        none."""
        whole = [dict(group) for group in self.param_groups]
        for group in self.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if not is_stand_in(p)]
            for key in {"params", "param_names"} & group.keys():
                group[key] = [group[key][i] for i in kept]
        try:
            yield
        finally:
            for group, before in zip(self.param_groups, whole, strict=True):
                group.update({key: before[key] for key in ("params", "param_names") if key in before})

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "nonfinite", "backend", "grad_norm", "skipped_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def state_dict(self) -> dict[str, Any]:
        with self._without_stand_ins():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            refused = [key for key in ("amsgrad", "maximize", "differentiable") if group.get(key)]
            if refused:
                raise ValueError(
                    f"hyperfast.optim.AdamW does not do {', '.join(refused)}, which this state was made with"
                )
        with self._without_stand_ins():
            super().load_state_dict(state_dict)


def _next_weight(f: Factors) -> Tensor:
    generator = generator_of(f.weight)
    position = next(i for i, own in enumerate(generator.factors()) if own.weight is f.weight)
    return generator.next_weights()[position]


def _advance(state: dict[str, Any], group: dict) -> AdamWCoefficients:
    """Counts the step and returns its coefficients."""
    state["step"] += 1
    t, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), (float(beta) for beta in group["betas"])
    step_size = lr / (1 - beta1**t)
    return AdamWCoefficients(
        1 - lr * group["weight_decay"], step_size, beta1, beta2, math.sqrt(1 - beta2**t), group["eps"]
    )


def _check_group(group: dict) -> None:
    beta1, beta2 = map(float, group["betas"])
    checks = {
        "lr must be at least 0": float(group["lr"]) >= 0,
        "betas must be in [0, 1)": 0 <= beta1 < 1 and 0 <= beta2 < 1,
        "eps must be at least 0": float(group["eps"]) >= 0,
        "weight_decay must be at least 0": float(group["weight_decay"]) >= 0,
    }
    for message, ok in checks.items():
        if not ok:
            raise ValueError(f"{message}, got lr {group['lr']}, betas {group['betas']}, eps {group['eps']}, "
                             f"weight_decay {group['weight_decay']}")  # fmt: skip
