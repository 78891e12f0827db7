"""What optimizers that take factored gradients share."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hyperfast import reference, states
from hyperfast.factored import Factors, generator_of, is_stand_in, shard_of
from hyperfast.nn.generator import generators
from hyperfast.ops._library import check_backend, to_device
from hyperfast.optim.clip import alike, factors_of, grad_norm
from hyperfast.states import EightBit, State

if TYPE_CHECKING:
    from hyperfast.distributed.rows import RowShard

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


class Control(NamedTuple):
    """What a step does with the gradients as a whole, as numbers or, on the device, as tensors []."""

    scale: float | Tensor  # of every gradient
    count: float | Tensor = 1.0  # what step counters go up by: 0 in a skipped step
    skip: Tensor | None = None  # float32; 1: nothing changes


class FactoredBatch(NamedTuple):
    """Factored layers that one call of an op updates; lists with one entry for each layer."""

    factors: list[Factors]
    groups: list[dict]  # of the weights
    bias_groups: list[dict]
    old_zs: list[Tensor]
    positions: list[int]  # of the weights among all parameters
    control: Control

    def tensors(self) -> tuple[list[Tensor], ...]:
        """dws, old zs, new zs, next weights."""
        return (
            [f.bias.grad for f in self.factors],
            self.old_zs,
            [f.z.detach().reshape(-1) for f in self.factors],
            [_next_weight(f) for f in self.factors],
        )

    def trained(self) -> tuple[list[Tensor], list[dict]]:
        """Parameters and groups of the weights, then of the biases; a weight in place of a bias that is not
        trained."""
        chosen = [
            (f.bias, bias_group) if f.bias_is_trained else (f.weight, group)
            for f, group, bias_group in zip(self.factors, self.groups, self.bias_groups, strict=True)
        ]
        weights = [f.weight for f in self.factors]
        return weights + [p for p, _ in chosen], self.groups + [group for _, group in chosen]


class Constants:
    """Small tensors of the options' numbers, made once for each device.

    A CUDA graph reads them at every replay: those that a capture met are never given back, and none can be
    made during one.
    """

    KEPT = 256

    def __init__(self) -> None:
        self._made: OrderedDict[tuple, Tensor] = OrderedDict()
        self._captured: dict[tuple, Tensor] = {}

    def get(self, numbers: float | tuple, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        """`numbers`, in nested tuples, as a tensor."""
        key = (numbers, device, dtype)
        if key not in self._made:
            refuse_capture(device, "options changed")
            self._made[key] = to_device(numbers, dtype, device)
            if len(self._made) > self.KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        if is_capturing(device):
            self._captured[key] = self._made[key]
        return self._made[key]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph of what runs on `device` is being captured."""
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()  # there is no graph before, nor may asking start CUDA
        and torch.cuda.is_current_stream_capturing()
    )


def refuse_capture(device: torch.device, reason: str) -> None:
    """RuntimeError while a graph is captured: what is made now would be made again at every replay."""
    if is_capturing(device):
        raise RuntimeError(
            f"hyperfast.optim: {reason} since the last step outside a capture; take one just so, then capture"
        )


class FactoredOptimizer(torch.optim.Optimizer):
    """Base of the optimizers of models with factored gradients.

    max_grad_norm: clip the gradient of everything to this norm inside the step; `.grad` keeps the unclipped
    values. nonfinite: a non-finite gradient norm raises FloatingPointError ("raise", the default) or leaves
    everything as it is and counts in `skipped_steps` ("skip"). After a step `grad_norm` is the norm before
    clipping. state_dtype: how the states of factored weights and their biases are stored
    (`hyperfast.states`): None like the parameter, torch.bfloat16, or "8bit", the last two beside float32
    parameters only.

    capturable: the step can be captured in a CUDA graph; it never waits for the GPU. lr may then be a tensor
    without dimensions beside the parameters, which `fill_` changes between replays; other options are part of
    the graph. All parameters are on one device, step counters there too. nonfinite is "skip"; `grad_norm` and
    `skipped_steps` (int64) are tensors. Take one ordinary step before the capture.

    Order of a step: norm; embeddings and ordinary parameters; then one pass over each generator that updates
    weight, bias and their states and writes the weights of the next forward.

    Subclasses name their states (the first is signed, a second is not) and what of torch they refuse, and do
    the arithmetic.
    """

    takes_factored_gradients = True
    state_names: tuple[str, ...]
    row: type  # of coefficients: a NamedTuple of the reference
    refused = ("maximize", "differentiable")
    capturable = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        nonfinite: str | None,
        state_dtype: torch.dtype | str | None,
        capturable: bool,
        backend: str,
    ):
        if isinstance(params, nn.Module):
            params = params.parameters()
        if nonfinite is None:
            nonfinite = "skip" if capturable else "raise"
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if capturable and nonfinite != "skip":
            raise ValueError("a capturable step cannot raise: nonfinite must be 'skip'")
        max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if state_dtype not in STORAGES:
            raise ValueError(f"state_dtype must be None, torch.bfloat16 or '8bit', got {state_dtype!r}")
        self.max_grad_norm, self.nonfinite, self.backend = max_grad_norm, nonfinite, check_backend(backend)
        self.state_dtype, self.capturable = state_dtype, bool(capturable)
        self.grad_norm: float | Tensor | None = None
        self.skipped_steps: int | Tensor = 0
        self._constants = Constants()
        super().__init__(params, defaults)
        if capturable:
            self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self._parameters()[0].device)
        for group in self.param_groups:
            self._check_group(group)
        self._factors()  # a split triple raises here, not in the first step

    @staticmethod
    @abstractmethod
    def _check_group(group: dict) -> None:
        """ValueError for options out of range."""

    @abstractmethod
    def _fused(self, group: dict, params: list[Tensor], grads: list[Tensor], skip: Tensor | None) -> None:
        """One step of parameters of one dtype and device by torch's fused kernel."""

    @abstractmethod
    def _coefficients(self, params: list[Tensor], groups: list[dict]) -> Tensor:
        """float64 [parameters, fields of `row`] for this step, where the step counters are."""

    @abstractmethod
    def _update_factored(self, batch: FactoredBatch) -> None:
        """One step of factored weights and their biases, and their next weights."""

    @abstractmethod
    def _rule(self, group: dict) -> Callable[..., None]:
        """What `_fused` does, in `hyperfast.reference`; its coefficients are `row`."""

    def _has_states(self, group: dict) -> bool:
        """Whether the update of a parameter of this group has states."""
        return True

    def _needs_states(self, factors: Factors, group_of: dict[int, dict]) -> bool:
        """Whether the update of these factors has states; layers of one call agree in it."""
        return any(self._has_states(group_of[id(p)]) for p in (factors.weight, factors.bias))

    def _counts(self, group: dict, is_rounded: bool) -> bool:
        """Whether a parameter of this group has a step counter. is_rounded: a factored weight with
        low-precision states beside it, whose rounding needs one."""
        return True

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _group_of(self) -> dict[int, dict]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

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
        self._check_step(parameters)
        control = self._control(grad_norm(parameters, factors))
        if control is None:
            return loss
        factors = [f for f in factors if f.bias.grad is not None]
        old_zs = _copies([f.z for f in factors])
        self._count(factors, control)
        biases = {id(f.bias) for f in factors}
        ordinary = [
            p for p in parameters if p.grad is not None and id(p) not in biases and not is_stand_in(p)
        ]
        self._step_ordinary(ordinary, control)
        self._step_factored(factors, old_zs, control)
        return loss

    def _check_step(self, parameters: list[Tensor]) -> None:
        """RuntimeError or ValueError, before anything changes, for what a step cannot do."""
        trained = [p for p in parameters if p.grad is not None]
        if any(p.grad.is_sparse or p.is_complex() for p in trained):
            raise RuntimeError(f"hyperfast.optim.{type(self).__name__} takes dense real gradients only")
        if not self.capturable:
            if trained and is_capturing(trained[0].device):
                raise RuntimeError(
                    "hyperfast.optim: to capture a step, make the optimizer with capturable=True"
                )
            return
        lrs = [group["lr"] for group in self.param_groups if isinstance(group["lr"], Tensor)]
        devices = {t.device for t in (*trained, *lrs)}
        if len(devices) > 1:
            raise ValueError(
                "with capturable=True all parameters and tensors that are an lr must be on one device, got "
                + ", ".join(sorted(map(str, devices)))
            )
        if trained and self.skipped_steps.device != trained[0].device:  # the model was moved
            self.skipped_steps = self.skipped_steps.to(trained[0].device)

    def _control(self, norm: Tensor) -> Control | None:
        """What the norm means for the step; None: there is none. Sets `grad_norm` and `skipped_steps`."""
        if self.capturable:
            return self._control_on_device(norm)
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            if self.nonfinite == "raise":
                raise FloatingPointError(f"the gradient norm is {self.grad_norm}; nothing was updated")
            self.skipped_steps += 1
            return None
        clipped = self.max_grad_norm is not None and self.grad_norm > 0
        return Control(min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6)) if clipped else 1.0)

    def _control_on_device(self, norm: Tensor) -> Control:
        """Seven launches, four without clipping."""
        self.grad_norm, device = norm, norm.device
        count = torch.lt(norm, math.inf, out=torch.empty((), dtype=torch.float32, device=device))  # NaN: 0
        self.skipped_steps += count == 0
        scale: float | Tensor = 1.0
        if self.max_grad_norm is not None:
            total = norm + self._constants.get(1e-6, device)  # float64
            scale = self._constants.get(self.max_grad_norm, device) / total.clamp_(min=self.max_grad_norm)
        return Control(scale, count, 1 - count)

    def _count(self, factors: list[Factors], control: Control) -> None:
        """Step counters of everything that is updated go up, all at once."""
        weights, group_of, rounded = {id(f.weight) for f in factors}, self._group_of(), set()
        if self.state_dtype is not None:
            rounded = {id(f.weight) for f in factors if self._needs_states(f, group_of)}
        steps = [
            self._step_of(p)
            for p in self._parameters()
            if (id(p) in weights or p.grad is not None)
            and not is_stand_in(p)
            and self._counts(group_of[id(p)], id(p) in rounded)
        ]
        if steps and isinstance(control.count, Tensor):
            torch._foreach_add_(steps, control.count, alpha=1)  # without alpha it would ask for the value
        elif steps:
            torch._foreach_add_(steps, control.count)

    def _step_of(self, p: Tensor) -> Tensor:
        """The step counter: on the CPU, as torch keeps it without capturable, else beside the parameter."""
        found, device = self.state[p], p.device if self.capturable else torch.device("cpu")
        step = found.get("step")
        if step is None:
            refuse_capture(p.device, "parameters came")
            step = torch.full((), self._first_step(p), dtype=torch.float32, device=device)
        elif step.device != device:
            refuse_capture(p.device, "parameters moved")
        found["step"] = step.to(device)
        return found["step"]

    def _first_step(self, p: Tensor) -> float:
        """Where the counter of a parameter without one begins."""
        return 0.0

    def _steps_beside(self, params: list[Tensor]) -> list[Tensor]:
        """The counters on the device of `params`, where torch's fused kernels want them."""
        steps, device = [self.state[p]["step"] for p in params], params[0].device
        if steps[0].device == device:
            return steps
        return list(to_device([float(step) for step in steps], torch.float32, device).unbind())

    def _lrs(self, groups: list[dict], device: torch.device) -> Tensor:
        """float64 [groups] on `device`, or where it is one tensor for all that, []."""
        lrs = [group["lr"] for group in groups]
        if not self.capturable or not any(isinstance(lr, Tensor) for lr in lrs):
            return self._constants.get(tuple(float(lr) for lr in lrs), device)
        distinct = {id(lr): lr for lr in lrs}
        if len(distinct) == 1:
            return lrs[0].reshape(())
        made = [
            lr.double().reshape(()) if isinstance(lr, Tensor) else self._constants.get(lr, device)
            for lr in distinct.values()
        ]
        place = {key: i for i, key in enumerate(distinct)}
        index = tuple(place[id(lr)] for lr in lrs)
        return torch.stack(made)[self._constants.get(index, device, torch.int64)]

    def _fused_lr(self, group: dict, device: torch.device) -> float | Tensor:
        """lr as torch's fused kernels take it: on a GPU a tensor must be float32."""
        lr = group["lr"]
        if not self.capturable or not isinstance(lr, Tensor):
            return float(lr)
        return lr.reshape(()).float() if device.type == "cuda" else lr.reshape(())

    def _step_numbers(self, batch: FactoredBatch) -> tuple:
        """What the op takes after next weights: coefficients of weights and of biases, scale, seeds, skip."""
        params, groups = batch.trained()
        L, device = len(batch.factors), params[0].device
        seeds = self._constants.get((0,) * L, device, torch.int64)
        if self.state_dtype is not None and "step" in self.state[params[0]]:
            steps = torch.stack([self.state[p]["step"] for p in params[:L]])
            positions = self._constants.get(tuple(batch.positions), steps.device, torch.int64)
            seeds = _moved(states.seeds(steps, positions), device)
        table = _moved(self._coefficients(params, groups), device)
        scale = batch.control.scale
        if self.capturable and not isinstance(scale, Tensor):
            scale = self._constants.get(scale, device)
        return table[:L], table[L:], scale, seeds, batch.control.skip

    def _states(self, p: Tensor, state_dtype: torch.dtype | str | None = None) -> list[State]:
        """The states of p as `state_dtype` says: zeros at first, converted where they are in another form."""
        found, storage = self.state[p], STORAGES[state_dtype]
        made = [found.get(name) for name in self.state_names]
        if state_dtype is None and all(state is not None and state.dtype == p.dtype for state in made):
            return made  # in every step but the first
        made = []
        for i, name in enumerate(self.state_names):
            state = found.get(name)
            if state is None and name + "_codes" in found:
                state = EightBit(found[name + "_codes"], found[name + "_scales"])
            if state is None:
                refuse_capture(p.device, "parameters came")
                state = states.zeros(p, storage)
            state = states.converted(state, p, storage, signed=i == 0)
            for key in (name, name + "_codes", name + "_scales"):
                found.pop(key, None)
            parts = {"_codes": state.codes, "_scales": state.scales} if storage == "8bit" else {"": state}
            found.update({name + suffix: part for suffix, part in parts.items()})
            made.append(state)
        return made

    def _step_ordinary(self, params: list[Tensor], control: Control) -> None:
        grads = {id(p): p.grad for p in params}
        if isinstance(control.scale, Tensor) or control.scale != 1.0:
            for some in alike(params):
                scale = control.scale
                scale = scale.to(some[0].dtype) if isinstance(scale, Tensor) else scale
                scaled = torch._foreach_mul([p.grad for p in some], scale)
                grads.update(zip(map(id, some), scaled, strict=True))
        for group in self.param_groups:
            chosen = [p for p in group["params"] if id(p) in grads]
            with_kernel = [p for p in chosen if self._has_kernel(p, grads[id(p)], group)]
            for some in alike(with_kernel):
                self._fused(group, some, [grads[id(p)] for p in some], control.skip)
                # fused kernels on the CPU do not: next weights must notice that a z or bias changed
                torch.autograd.graph.increment_version(some)
            fused = {id(p) for p in with_kernel}
            others = [p for p in chosen if id(p) not in fused]
            self._step_plain(group, others, [grads[id(p)] for p in others], control.skip)

    def _has_kernel(self, p: Tensor, grad: Tensor, group: dict) -> bool:
        """Whether torch's fused kernel updates p: those walk through parameter, gradient and states alike."""
        state, strides = self.state.get(p, {}), p.stride()
        stored = [state.get(name) for name in self.state_names]
        alike = all(t is None or t.stride() == strides for t in (grad, *stored))
        return alike and p.device.type in ("cpu", "cuda") and p.is_floating_point()

    def _step_plain(
        self, group: dict, params: list[Tensor], grads: list[Tensor], skip: Tensor | None
    ) -> None:
        """In plain PyTorch, one parameter after another."""
        if not params:
            return
        table = self._coefficients(params, [group] * len(params))
        for p, grad, numbers in zip(params, grads, table, strict=True):
            stored = self._states(p) if self._has_states(group) else ()
            row = self.row(*numbers.unbind())
            reference.update_(self._rule(group), p, stored, reference.wide(grad), row, skip=skip)

    def _step_factored(self, factors: list[Factors], old_zs: list[Tensor], control: Control) -> None:
        group_of = self._group_of()
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
                control=control,
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

    def _with_rows(
        self, state_dict: dict[str, Any], change: Callable[[RowShard | None, Tensor], Tensor]
    ) -> dict[str, Any]:
        """`state_dict` with `change(rows that this rank has, None for all; state)` in place of every state of
        one or more dimensions. Raises ValueError with the parameter's number where `change` does."""
        shards = {id(p): shard_of(p) for p in self._parameters()}
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for p in self._parameters() if not is_stand_in(p)]
        changed = dict(state_dict["state"])
        for i, p in zip(numbers, parameters, strict=False):  # torch refuses other numbers of parameters
            for name, value in changed.get(i, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    try:
                        new = change(state_shard(shards.get(id(p)), p, name), value)
                    except ValueError as error:
                        raise ValueError(f"{name} of parameter {i}: {error}") from error
                    changed[i] = {**changed[i], name: new}
        return {**state_dict, "state": changed}

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "nonfinite", "backend", "state_dtype", "capturable", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in (*own, "skipped_steps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_constants", Constants())
        for group in self.param_groups:  # whatever state was loaded: this optimizer is what it was made as
            if "capturable" in group:
                group["capturable"] = self.capturable

    def state_dict(self) -> dict[str, Any]:
        """torch's, and it loads into torch's optimizer: without state_dtype it is the same, bfloat16 states
        are cast. States in 8 bits are there as `NAME_codes` and `NAME_scales`, which torch refuses in its
        first step; load them into an optimizer without state_dtype, whose state_dict torch takes. Of a
        sharded generator it holds `hyperfast.distributed.ShardedRows`."""
        with self._without_stand_ins():
            state = super().state_dict()
        return self._with_rows(state, lambda shard, t: t if shard is None else shard.sharded(t))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes torch's state and any state_dtype's; bit for bit in the same, else converted. Of a sharded
        generator it takes this rank's rows of `ShardedRows` or of whole tensors. Raises ValueError for the
        state of an optimizer that does what this one does not, or of another model."""
        for group in state_dict["param_groups"]:
            refused = [key for key in self.refused if group.get(key)]
            if refused:
                raise ValueError(
                    f"hyperfast.optim.{type(self).__name__} does not do {', '.join(refused)}, which this "
                    "state was made with"
                )
        state_dict = self._with_rows(state_dict, _rows_of_rank)
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
            if "step" in found and isinstance(p, Tensor):
                found["step"] = torch.as_tensor(found["step"], dtype=torch.float32)
                self._step_of(p)
            if any(name + suffix in found for name in self.state_names for suffix in ("", "_codes")):
                self._states(p, self.state_dtype if id(p) in factored else None)


def _is_low_precision(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and (
        value.dtype in (torch.bfloat16, torch.uint8) or name.endswith("_scales")
    )


def state_shard(shard: RowShard | None, p: Tensor, name: str) -> RowShard | None:
    """Rows of the state `name` of parameter p [n, K] or [n] whose rows are `shard`."""
    if shard is None or not name.endswith("_scales"):
        return shard
    return shard.of_scales(states.rows_per_scale((*p.shape, 1)[1]))


def _rows_of_rank(shard: RowShard | None, value: Tensor) -> Tensor:
    if shard is not None:
        return shard.take(value)
    if hasattr(value, "with_local"):  # hyperfast.distributed.ShardedRows
        raise ValueError(
            "rows of one rank do not load into an optimizer of all rows: gather them with "
            "hyperfast.distributed.whole(state)"
        )
    return value


def _copies(zs: list[Tensor]) -> list[Tensor]:
    """Copies [K], one launch for those of a device and dtype."""
    made = {}
    for some in alike(zs):
        copies = torch.cat([z.detach().reshape(-1) for z in some]).split([z.numel() for z in some])
        made.update(zip(map(id, some), copies, strict=True))
    return [made[id(z)] for z in zs]


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`, which nothing waits for."""
    if t.device == device:
        return t
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


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
