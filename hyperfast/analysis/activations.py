"""Activations of a network: moments, histograms, how many are near zero, and which units are dead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hyperfast.analysis.batches import Batches, on_device, take
from hyperfast.analysis.distribution import Distribution, Tally, memory_order
from hyperfast.analysis.preserve import eagerly, preserved
from hyperfast.analysis.table import counted, shown, table
from hyperfast.nn import BatchNormReLUMaxPool2d, Generator
from hyperfast.nn.weights import plain_namer

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.GLU,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """Outputs of the module `name`, an instance of `kind`.

    values: their distribution, in which near_zero is the share of |a| < threshold. peak: the largest |a| of
    every unit over all positions and samples, float64 [units], NaN where one was not a number. A unit is an
    entry of one dimension of an output, `activation_statistics` says which.
    """

    name: str
    kind: str
    values: Distribution
    peak: Tensor
    threshold: float

    def dead(self) -> Tensor:
        """Which units had |a| < threshold everywhere, bool [units]."""
        return self.peak < self.threshold

    @property
    def dead_share(self) -> float:
        """Of all units; NaN where there are none."""
        return int(self.dead().sum()) / len(self.peak) if len(self.peak) else math.nan


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """By layer, in the order in which they were first called, and of `total`, all together.

    Of `batches` batches. Two shares are called those of dead neurons: `total.values.near_zero`, of single
    activations with |a| < threshold, and `total.dead_share`, of units that have no other.
    """

    layers: tuple[LayerActivations, ...]
    total: LayerActivations
    threshold: float
    batches: int

    def rows(self) -> list[dict[str, Any]]:
        """For each layer and the total: layer, kind, the figures of `Distribution`, units, dead (how many),
        dead_share, threshold, batches."""
        return [
            {"layer": layer.name, "kind": layer.kind}
            | layer.values.figures()
            | {"units": len(layer.peak), "dead": int(layer.dead().sum()), "dead_share": layer.dead_share}
            | {"threshold": self.threshold, "batches": self.batches}
            for layer in (*self.layers, self.total)
        ]

    def to_markdown(self) -> str:
        """One table, shares in percent."""
        below = f"|a| < {self.threshold:g}"
        header = ["layer", "module", "mean", "std", "min", "max", f"{below}, %", "units", "dead", "dead, %"]
        cells = []
        for row in self.rows():
            numbers = [f"{row[key]:.4g}" for key in ("mean", "std", "min", "max")]
            shares = [f"{100 * row[key]:.1f}" for key in ("near_zero", "dead_share")]
            cells.append(
                [row["layer"], row["kind"], *numbers, shares[0], row["units"], row["dead"], shares[1]]
            )
        lost = self.total.values.nonfinite
        text = f"{counted(self.batches)}. A unit is dead where {below} at every position of every sample."
        text += f" {lost} activations are not finite and count in no figure." if lost else ""
        return f"{table(header, cells)}\n\n{text}"


def activation_statistics(
    model: nn.Module,
    batches: Batches,
    threshold: float = 0.01,
    limit: int | None = 5,
    layers: Iterable[str] | None = None,
    *,
    unit_dim: int | None = None,
) -> ActivationStatistics:
    """What the activations of `model` look like, by layer, over the first `limit` of `batches` (None: all).

    batches: (inputs, targets); the targets are not used. layers: names of modules, whose outputs are meant;
    default: every activation module (ReLU, GELU, ...; `hyperfast.nn.BatchNormReLUMaxPool2d`, after its pool),
    and if the model has none every module without children. Names are those of the plain network. What a
    forward computes with a function, as `F.relu`, no module shows: name the module around it. A module called
    several times in a forward has a row for each call ("relu", "relu call 2"), one whose output has several
    tensors one for each ("lstm[0]", "lstm[1]"). Outputs are looked at as the module returns them, so that
    what works on them in place later does no harm, and none is kept. unit_dim: the dimension of an output
    along which its units lie; default: 1, as of [B, F] and [B, C, H, W], and the last of three, [B, T, F].
    For a network of Conv1d, whose outputs are [B, C, T], give 1.

    The model runs in the mode it is in: call `model.train()` first for batch norm by the batch, `eval()` for
    running statistics and no dropout. It is the same afterwards, running statistics and random numbers
    included (`preserved`). A compiled model runs without being compiled.

    Raises ValueError for no batches, a limit below 1, no or unknown layers, layers that no forward called, a
    module whose number of units changes from batch to batch, and an output without dimension `unit_dim`.
    """
    modules = _chosen(model, layers)
    recorder = _Recorder(threshold, unit_dim)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eagerly(model))
        for name, module in modules.items():
            hook = recorder.hook(name, type(module).__name__)
            stack.callback(module.register_forward_hook(hook).remove)
        for batch in take(batches, limit):
            recorder.begin()
            model(on_device(model, batch)[0])
    missing = set(modules) - recorder.called if layers is not None else not recorder.called
    if missing:
        names = ", ".join(sorted(missing)) if layers is not None else ", ".join(modules)
        raise ValueError(f"no forward called {names}, or they return no floating-point tensor; name layers")
    return recorder.statistics()


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules to look at, by name in the plain network."""
    plain = plain_namer(model)
    if layers is not None:
        if isinstance(layers, str):
            raise TypeError(f"layers must be a list of names, got the string {layers!r}")
        known = {shown(plain(name)): m for name, m in model.named_modules(remove_duplicate=False)}
        layers = list(layers)
        if not layers:
            raise ValueError("layers must name at least one module, got none")
        for name in layers:
            if name not in known:
                raise ValueError(f"model has no module {name!r}; it has {', '.join(filter(None, known))}")
        return {name: known[name] for name in layers}
    inside = {id(part) for m in model.modules() if isinstance(m, Generator) for part in m.modules()}
    modules = {shown(plain(name)): m for name, m in model.named_modules() if id(m) not in inside}
    found = {name: m for name, m in modules.items() if _is_activation(m)}
    return found or {n: m for n, m in modules.items() if all(id(child) in inside for child in m.children())}


def _is_activation(module: nn.Module) -> bool:
    """Of the kinds that are more than a function, those that have not put another forward in its place."""
    fused = BatchNormReLUMaxPool2d
    return isinstance(module, ACTIVATIONS) or (
        isinstance(module, fused) and type(module).forward is fused.forward
    )


class _Recorder:
    """Takes outputs of modules in, by module and call."""

    def __init__(self, threshold: float, unit_dim: int | None):
        self.threshold, self.unit_dim = threshold, unit_dim
        self.kinds: dict[str, str] = {}
        self.tallies: dict[str, Tally] = {}
        self.peaks: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.batches = 0

    def begin(self) -> None:
        """Of a batch."""
        self.calls.clear()
        self.batches += 1

    def hook(self, name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self.calls[name] += 1
            call = f"{name} call {self.calls[name]}".lstrip() if self.calls[name] > 1 else name
            outputs = list(_floating_point(output))
            for i, tensor in enumerate(outputs):
                self.called.add(name)
                self._add(call if len(outputs) == 1 else f"{call}[{i}]", kind, tensor)

        return record

    def _add(self, name: str, kind: str, output: Tensor) -> None:
        peak = _peak(output.detach(), self._units(name, output.dim()))
        if name not in self.tallies:
            self.kinds[name], self.tallies[name], self.peaks[name] = kind, Tally(self.threshold), peak
        elif peak.shape != self.peaks[name].shape:
            seen = f"{len(peak)} units after {len(self.peaks[name])}"
            raise ValueError(f"the output of {name!r} must have the same units in every batch, got {seen}")
        else:
            self.peaks[name] = torch.maximum(self.peaks[name], peak)  # NaN stays
        self.tallies[name].add(output)

    def _units(self, name: str, dims: int) -> int | None:
        """Along which dimension of an output the units lie; None where all of it is one unit."""
        if self.unit_dim is None:
            return {0: None, 1: None, 3: 2}.get(dims, 1)
        if not -dims <= self.unit_dim < dims:
            raise ValueError(f"unit_dim must be a dimension of the output of {name!r}, got {self.unit_dim}")
        return self.unit_dim % dims

    def statistics(self) -> ActivationStatistics:
        peaks = {name: peak.double().cpu() for name, peak in self.peaks.items()}
        all_values = Tally(self.threshold)
        for tally in self.tallies.values():
            all_values.merge(tally)
        layers = tuple(
            LayerActivations(name, self.kinds[name], tally.distribution(), peaks[name], self.threshold)
            for name, tally in self.tallies.items()
        )
        peak = torch.cat(list(peaks.values()))
        total = LayerActivations("all", "", all_values.distribution(), peak, self.threshold)
        return ActivationStatistics(layers, total, self.threshold, self.batches)


def _floating_point(output: Any) -> Iterator[Tensor]:
    """The dense floating-point tensors in what a module returns."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout == torch.strided:
            yield leaf


def _peak(output: Tensor, units: int | None) -> Tensor:
    """The largest |a| along dimension `units`, [units]."""
    if units is None or output.dim() == 1:
        output, units = output.reshape(-1, 1 if units is None else len(output)), 1
    if not output.numel():
        return output.new_zeros(output.shape[units])
    order = memory_order(output)
    output = output.permute(order)
    outermost, *others = (d for d, before in enumerate(order) if before != units)
    # over the outermost dimension first: the inner loops are long then, whatever the layout
    low, high = output.amin(outermost, keepdim=True), output.amax(outermost, keepdim=True)
    if others:
        low, high = low.amin(others), high.amax(others)
    return torch.maximum(high, -low).flatten()  # no |a| is written
