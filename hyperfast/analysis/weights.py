"""Weights of a network, generated ones included: moments, quantiles, histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperfast.analysis.distribution import Distribution, Tally
from hyperfast.analysis.table import shown, table
from hyperfast.nn.generator import generators
from hyperfast.nn.weights import freeze

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parameter `name` of the plain network, of `shape`.

    values: its distribution, in which near_zero is the share of |w| < threshold. quantiles: those of
    `QUANTILES`, of what is finite, linear between neighbours.
    """

    name: str
    shape: tuple[int, ...]
    values: Distribution
    quantiles: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Euclidean norm of all its numbers; NaN without any."""
        return math.sqrt(self.values.count) * math.hypot(self.values.mean, self.values.std)


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """By parameter, in the order of the plain network. near_zero counts |w| < threshold."""

    layers: tuple[LayerWeights, ...]
    threshold: float

    def rows(self) -> list[dict[str, Any]]:
        """For each parameter: parameter, shape ("64 x 3 x 3 x 3"), the figures of `Distribution`, norm, the
        quantiles as q01 ... q99, threshold."""
        return [
            {"parameter": layer.name, "shape": " x ".join(map(str, layer.shape))}
            | layer.values.figures()
            | {"norm": layer.norm}
            | {f"q{100 * q:02.0f}": x for q, x in zip(QUANTILES, layer.quantiles, strict=True)}
            | {"threshold": self.threshold}
            for layer in self.layers
        ]

    def to_markdown(self) -> str:
        """One table, shares in percent."""
        numbers = ["mean", "std", "norm", "min", *(f"q{100 * q:02.0f}" for q in QUANTILES), "max"]
        header = ["parameter", "shape", *numbers, f"|w| < {self.threshold:g}, %"]
        cells = [
            [row["parameter"], row["shape"], *(f"{row[key]:.3g}" for key in numbers)]
            + [f"{100 * row['near_zero']:.1f}"]
            for row in self.rows()
        ]
        return table(header, cells)


@torch.no_grad()
def weight_statistics(model: nn.Module, threshold: float = 1e-3) -> WeightStatistics:
    """How the weights of `model` are distributed, biases and scales of norms included.

    A hypernetwork's are those that its generators make, under the names of the plain network
    (`hyperfast.freeze`), its generators and embeddings are not among them. A parameter that layers share
    comes once, under its first name. Nothing is run but the generators. Raises what `freeze` raises, for a
    generator whose weights belong to no layer.
    """
    plain = freeze(model) if any(generators(model)) else model
    layers = []
    for name, weight in plain.named_parameters():
        if weight.is_floating_point():
            tally = Tally(threshold)
            tally.add(weight)
            quantiles = _quantiles(weight.detach(), tally.nonfinite)
            layers.append(LayerWeights(shown(name), tuple(weight.shape), tally.distribution(), quantiles))
    return WeightStatistics(tuple(layers), threshold)


def _quantiles(weight: Tensor, nonfinite: int) -> tuple[float, ...]:
    flat = weight.reshape(-1)
    flat = flat[flat.isfinite()] if nonfinite else flat
    if not flat.numel():
        return (math.nan,) * len(QUANTILES)
    if flat.device.type == "cpu":  # numpy sorts with vector instructions, 20 times as fast as torch
        flat = flat if flat.dtype == torch.float64 else flat.float()
        ordered = torch.from_numpy(np.sort(flat.numpy()))
    else:
        ordered = flat.sort().values
    places = torch.tensor(QUANTILES, dtype=torch.float64) * (len(ordered) - 1)
    below = places.long()
    pairs = torch.stack([below, (below + 1).clamp(max=len(ordered) - 1)])
    low, high = ordered[pairs.to(ordered.device)].double().cpu()
    return tuple((low + (high - low) * (places - below)).tolist())
