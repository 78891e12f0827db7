"""What optimizers that take factored gradients share."""

from __future__ import annotations

import contextlib
import math
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperfast import states
from hyperfast.factored import Factors, generator_of, is_stand_in
from hyperfast.nn.generator import generators
from hyperfast.ops._library import check_backend
from hyperfast.optim.clip import factors_of, grad_norm
from hyperfast.states import EightBit, State

NONFINITE = ("raise", "skip")
STORAGES = {None: "plain", torch.bfloat16: "bfloat16", "8bit": "8bit"}  # by state_dtype


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


class FactoredBatch(NamedTuple):
    """Factored layers that one call of an op updates; lists with one entry for each layer."""

    factors: list[Factors]
    groups: list[dict]  # of the weights
    bias_groups: list[dict]
    old_zs: list[Tensor]
    positions: list[int]  # of the weights among all parameters
    scale: float

    def tensors(self) -> tuple[list[Tensor], ...]:
        """dws, old zs, new zs, next weights."""
        return (
            [f.bias.grad for f in self.factors],
            self.old_zs,
            [f.z.detach().reshape(-1) for f in self.factors],
            [_next_weight(f) for f in self.factors],
        )

    def seeds(self, steps: Iterable[float]) -> list[int]:
        """Of stochastic rounding: another for each step and each weight."""
        pairs = zip(steps, self.positions, strict=True)
        return [zlib.crc32(f"{int(step)}/{position}".encode()) for step, position in pairs]


class FactoredOptimizer(torch.optim.Optimizer):
    """Base of the optimizers of models with factored gradients.

    max_grad_norm: clip the gradient of everything to this norm inside the step; `.grad` keeps the unclipped
    values. nonfinite: a non-finite gradient norm raises FloatingPointError ("raise") or leaves everything as
    it is and counts in `skipped_steps` ("skip"). After a step `grad_norm` is the norm before clipping.
    state_dtype: how the states of factored weights and their biases are stored (`hyperfast.states`): None
    like the parameter, torch.bfloat16, or "8bit", the last two beside float32 parameters only.

    Order of a step: norm; embeddings and ordinary parameters; then one pass over each generator that updates
    weight, bias and their states and writes the weights of the next forward.

    Subclasses name their states (the first is signed, a second is not) and what of torch they refuse, and do
    the arithmetic.
    """

    takes_factored_gradients = True
    state_names: tuple[str, ...]
    refused = ("maximize", "differentiable")

    def __init__(
        self,
        params: nn.Module | Iterable,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        nonfinite: str,
        state_dtype: torch.dtype | str | None,
        backend: str,
    ):
        if isinstance(params, nn.Module):
            params = params.parameters()
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if state_dtype not in STORAGES:
            raise ValueError(f"state_dtype must be None, torch.bfloat16 or '8bit', got {state_dtype!r}")
        self.max_grad_norm, self.nonfinite, self.backend = max_grad_norm, nonfinite, check_backend(backend)
        self.state_dtype = state_dtype
        self.grad_norm: float | None = None
        self.skipped_steps = 0
        super().__init__(params, defaults)
        for group in self.param_groups:
            self._check_group(group)
        self._factors()  # a split triple raises here, not in the first step

    @staticmethod
    @abstractmethod
    def _check_group(group: dict) -> None:
        """ValueError for options out of range."""

    @abstractmethod
    def _update_ordinary(self, group: dict, params: list[Tensor], grads: list[Tensor], fused: bool) -> None:
        """One step of parameters with dense gradients."""

    @abstractmethod
    def _update_factored(self, batch: FactoredBatch) -> None:
        """One step of factored weights and their biases, and their next weights."""

    def _needs_states(self, factors: Factors, group_of: dict[int, dict]) -> bool:
        """Whether the update of these factors has states; layers of one call agree in it."""
        return True

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _factors(self) -> list[Factors]:
        factors = factors_of(self._parameters())
        for f in factors if self.state_dtype is not None else ():
            if f.weight.dtype != torch.float32:
                raise ValueError(
                    f"state_dtype {self.state_dtype} needs float32 parameters, got a factored weight of "
                    f"{f.weight.dtype}"
                )
        return factors

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns closure's loss. Raises FloatingPointError for a non-finite gradient norm if
        nonfinite="raise"."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters, factors = self._parameters(), self._factors()
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

    def _states(self, p: Tensor, state_dtype: torch.dtype | str | None = None) -> list[State]:
        """The states of p as `state_dtype` says: zeros at first, converted where they are in another form."""
        found, storage = self.state[p], STORAGES[state_dtype]
        made = []
        for i, name in enumerate(self.state_names):
            state = found.get(name)
            if state is None and name + "_codes" in found:
                state = EightBit(found[name + "_codes"], found[name + "_scales"])
            if state is None:
                state = states.zeros(p, storage)
            state = states.converted(state, p, storage, signed=i == 0)
            for key in (name, name + "_codes", name + "_scales"):
                found.pop(key, None)
            parts = {"_codes": state.codes, "_scales": state.scales} if storage == "8bit" else {"": state}
            found.update({name + suffix: part for suffix, part in parts.items()})
            made.append(state)
        return made

    def _step_ordinary(self, group: dict, params: list[Tensor], scale: float) -> None:
        if not params:
            return
        if any(p.grad.is_sparse or p.is_complex() for p in params):
            raise RuntimeError(f"hyperfast.optim.{type(self).__name__} takes dense real gradients only")
        grads = [p.grad for p in params]
        if scale != 1.0:
            grads = torch._foreach_mul(grads, scale)
        fused = all(p.is_floating_point() and p.device.type == "cpu" for p in params)
        self._update_ordinary(group, params, grads, fused)
        if fused:  # torch's fused CPU kernels do not: next weights must notice that a z or bias changed
            torch.autograd.graph.increment_version(params)

    def _step_factored(self, factors: list[Factors], old_zs: list[Tensor], scale: float) -> None:
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        position_of = {id(p): i for i, p in enumerate(self._parameters())}
        batches: dict[tuple, list[int]] = {}
        for i, f in enumerate(factors):
            kind = (f.weight.dtype, f.weight.device, self._needs_states(f, group_of))
            batches.setdefault(kind, []).append(i)
        for indices in batches.values():
            batch = FactoredBatch(
                factors=[factors[i] for i in indices],
                groups=[group_of[id(factors[i].weight)] for i in indices],
                bias_groups=[group_of[id(factors[i].bias)] for i in indices],
                old_zs=[old_zs[i] for i in indices],
                positions=[position_of[id(factors[i].weight)] for i in indices],
                scale=scale,
            )
            self._update_factored(batch)
            for f in batch.factors:
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
        own = ("max_grad_norm", "nonfinite", "backend", "state_dtype", "grad_norm", "skipped_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def state_dict(self) -> dict[str, Any]:
        """torch's, and it loads into torch's optimizer: without state_dtype it is the same, bfloat16 states
        are cast. States in 8 bits are there as `NAME_codes` and `NAME_scales`, which torch refuses in its
        first step; load them into an optimizer without state_dtype, whose state_dict torch takes."""
        with self._without_stand_ins():
            return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes torch's state and any state_dtype's; bit for bit in the same, else converted. Raises
        ValueError for the state of an optimizer that does what this one does not, or of another model."""
        for group in state_dict["param_groups"]:
            refused = [key for key in self.refused if group.get(key)]
            if refused:
                raise ValueError(
                    f"hyperfast.optim.{type(self).__name__} does not do {', '.join(refused)}, which this "
                    "state was made with"
                )
        # torch casts states to the parameter's dtype: low-precision ones are kept from it
        low = {
            i: {name: value for name, value in state.items() if _is_low_precision(name, value)}
            for i, state in state_dict["state"].items()
        }
        rest = {
            i: {name: value for name, value in state.items() if name not in low[i]}
            for i, state in state_dict["state"].items()
        }
        with self._without_stand_ins():
            super().load_state_dict({**state_dict, "state": rest})
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            for i, p in zip(ids, self._parameters(), strict=True):
                for name, value in low.get(i, {}).items():
                    self.state[p][name] = value.to(p.device)
        factored = {id(p) for f in self._factors() for p in (f.weight, f.bias)}
        for p, found in self.state.items():
            if any(name + suffix in found for name in self.state_names for suffix in ("", "_codes")):
                self._states(p, self.state_dtype if id(p) in factored else None)


def _is_low_precision(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (
        value.dtype in (torch.bfloat16, torch.uint8) or name.endswith("_scales")
    )


def _next_weight(f: Factors) -> Tensor:
    generator = generator_of(f.weight)
    position = next(i for i, own in enumerate(generator.factors()) if own.weight is f.weight)
    return generator.next_weights()[position]


def check_options(group: dict, checks: dict[str, bool]) -> None:
    """ValueError with the first message whose check fails."""
    for message, ok in checks.items():
        if not ok:
            options = ", ".join(
                f"{name} {value}" for name, value in group.items() if name not in ("params", "param_names")
            )
            raise ValueError(f"{message}, got {options}")
