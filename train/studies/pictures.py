"""Pictures of the analyses: a panel for each state of the networks, a curve for each network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hyperfast.analysis.pictures import style
from train.comparison import look
from train.report import marks
from train.studies.verdict import STATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hyperfast.analysis.activations import LayerActivations
    from hyperfast.analysis.gradients import GradientHealth
    from hyperfast.analysis.weights import LayerWeights, WeightStatistics

Results = Mapping[str, Mapping[str, Any]]  # by state and model
PANELS, BINS = 12, 40  # of the weights
HATCHES = ("////", "....", "\\\\\\\\", "xxxx")


@contextlib.contextmanager
def panels(
    results: Results, rows: Sequence[str], height: float = 2.9, more: Sequence[Line2D] = ()
) -> Iterator[tuple[Figure, Any]]:
    """A figure with a column for each state and a row for each label of a y-axis: figure and axes [rows,
    states], of which the legend is drawn at the end, with `more` in it."""
    with style() as figure_class:
        figure = figure_class(figsize=(3.7 * len(results) + 0.3, height * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(results), squeeze=False, sharey="row")
        for column, state in enumerate(results):
            axes[0, column].set_title(STATES[state], fontsize=9)
        for row, label in zip(axes, rows, strict=True):
            row[0].set_ylabel(label)
        yield figure, axes
        handles, names = axes[0, 0].get_legend_handles_labels()
        names += [handle.get_label() for handle in more]
        figure.legend([*handles, *more], names, loc="outside upper center", ncols=min(4, len(names)))


def each(results: Results, axes: Any) -> Iterator[tuple[Any, int, str, Any]]:
    """Axes of a state, number and name of a network, what was found."""
    for column, by_model in zip(axes.T, results.values(), strict=True):
        for i, (model, found) in enumerate(by_model.items()):
            yield column, i, model, found


def curve(axis: Axes, i: int, of: int, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """In the look of network `i`, with about twelve markers."""
    axis.plot(x, y, **{"markevery": marks(len(x), i, of), "linewidth": 1.3} | look(i) | options)


def lr_finder(results: Results) -> Figure:
    """Loss over learning rate, raw and smoothed; a vertical line at the suggestion."""
    more = [
        Line2D([], [], color="0.5", linewidth=0.7, label="single batches"),
        Line2D(
            [], [], color="0.5", linewidth=0.9, marker="|", markersize=9, linestyle="none", label="suggestion"
        ),
    ]
    with panels(results, ["loss"], more=more) as (figure, axes):
        for (axis,), i, model, found in each(results, axes):
            rates, color = found.rates.tolist(), look(i)["color"]
            axis.plot(rates, found.losses.tolist(), color=color, linewidth=0.7, alpha=0.4)
            curve(axis, i, 2, rates, found.smoothed.tolist(), label=model)
            if found.suggestion:
                axis.axvline(found.suggestion, color=color, linestyle=look(i)["linestyle"], linewidth=0.9)
        for by_model, (axis,) in zip(results.values(), axes.T, strict=True):
            finite = [x for f in by_model.values() for x in f.smoothed[f.smoothed.isfinite()].tolist()]
            first = max(f.losses[0].item() for f in by_model.values())
            axis.set(xscale="log", xlabel="learning rate", ylim=(0, min(1.05 * max(finite), 2.5 * first)))
    return figure


def landscape(results: Results) -> Figure:
    """The band from the lowest to the highest loss over learning rates at each step."""
    with panels(results, ["loss"]) as (figure, axes):
        for (axis,), i, model, found in each(results, axes):
            low, high = (x.tolist() for x in found.band())
            own = look(i)
            steps, hatch = range(found.batches), HATCHES[i % len(HATCHES)]
            axis.fill_between(steps, low, high, color=own["color"], alpha=0.2, linewidth=0)
            axis.fill_between(
                steps, low, high, facecolor="none", edgecolor=own["color"], hatch=hatch, linewidth=0
            )
            curve(axis, i, 2, steps, low, label=model)
            curve(axis, i, 2, steps, high)
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def predictiveness(results: Results) -> Figure:
    rows = {"norm of the gradient's change": "changes", "change / norm of the gradient": "ratios"}
    return _by_batch(results, rows)


def smoothness(results: Results) -> Figure:
    return _by_batch(results, {"change of the gradient / noise": "ratios"})


def _by_batch(results: Results, rows: Mapping[str, str]) -> Figure:
    """Attributes of what was found, one number for each batch, on logarithmic axes; a line at their mean."""
    with panels(results, list(rows), height=2.9 if len(rows) == 1 else 2.3) as (figure, axes):
        for column, i, model, found in each(results, axes):
            for axis, name in zip(column, rows.values(), strict=True):
                values = getattr(found, name)
                curve(axis, i, 2, range(1, len(values) + 1), values.tolist(), label=model)
                axis.set_yscale("log")
                axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            column[-1].set_xlabel("batch")
    return figure


def max_difference(results: Results) -> Figure:
    """Largest change over the distance."""
    with panels(results, ["largest change of the gradient"]) as (figure, axes):
        for (axis,), i, model, found in each(results, axes):
            moved = found.distances > 0  # at 0 there is no change
            points = found.distances[moved].tolist(), found.differences[moved].tolist()
            curve(axis, i, 2, *points, label=model, markevery=1)
            axis.set(xlabel="distance along the gradient", yscale="log")
    return figure


def health(results: Results) -> Figure:
    """Shares of vanishing and exploding elements by weight, in the network's order."""
    rows = ["|g| below $10^{-7}$ (%)", "|g| above 1 (%)"]
    with panels(results, rows, height=2.2) as (figure, axes):
        for column, i, model, found in each(results, axes):
            layers = _layers(found)
            for axis, key in zip(column, ("vanishing", "exploding"), strict=True):
                values = [100 * row[key] for row in layers]
                options = {"label": model, "markevery": 1, "clip_on": False}
                curve(axis, i, 2, range(1, len(values) + 1), values, **options)
                axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            column[-1].set_xlabel("weight, in the order of the network")
        for axis in axes.flat:
            axis.set_ylim(0, max(1, axis.get_ylim()[1]))
    return figure


def _layers(found: GradientHealth) -> list[dict[str, Any]]:
    """The rows of weights, but those of norms, which are as large as their biases."""
    sizes = dict(zip(found.names, found.sizes, strict=True))
    return [
        row
        for row in found.rows()
        if (layer := row["parameter"].removesuffix(".weight")) != row["parameter"]
        and row["size"] > sizes.get(f"{layer}.bias", 0)
    ]


def activations(results: Results) -> Figure:
    """By layer: dead units, activations near zero, standard deviation."""
    rows = {
        "dead (%)": lambda layer: 100 * layer.dead_share,
        "|a| below 0.01 (%)": lambda layer: 100 * layer.values.near_zero,
        "standard deviation": lambda layer: layer.values.std,
    }
    with panels(results, list(rows), height=2.0) as (figure, axes):
        for column, i, model, found in each(results, axes):
            for axis, value in zip(column, rows.values(), strict=True):
                points = _by_layer(found.layers, value)
                curve(axis, i, 2, *points, label=model, markevery=1, clip_on=axis is column[2])
                axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            for axis in column[:2]:
                axis.set_ylim(0, 100)
            column[2].set(yscale="log", xlabel="activation, in the order of the network")
    return figure


def _by_layer(
    layers: Sequence[LayerActivations], value: Callable[[LayerActivations], float]
) -> tuple[list[int], list[float]]:
    return list(range(1, len(layers) + 1)), [value(layer) for layer in layers]


def weights(results: Results) -> Figure:
    """Densities of the weights of convolutions and linear layers, in the network's order, a panel for each:
    trained, and in grey as the first network starts."""
    named = {model: matrices(found) for model, found in results["trained"].items()}
    first = matrices(next(iter(results["initial"].values())))
    count = min(PANELS, max(map(len, named.values())))
    columns = min(4, count)
    rows = math.ceil(count / columns)
    with style() as figure_class:
        figure = figure_class(figsize=(1.9 * columns + 0.4, 1.6 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for place, axis in enumerate(axes):
            if place >= count:
                axis.set_visible(False)
                continue
            shapes = []
            if place < len(first):
                axis.stairs(
                    *_density(first[place]), color="0.55", fill=True, alpha=0.4, label="at initialisation"
                )
            for i, (model, layers) in enumerate(named.items()):
                if place < len(layers):
                    options = {key: look(i)[key] for key in ("color", "linestyle")}
                    axis.stairs(*_density(layers[place]), label=f"{model}, trained", linewidth=1.2, **options)
                    shapes.append(layers[place].shape)
            kind = "conv" if len(shapes[0]) == 4 else "linear"
            axis.set_title(f"{place + 1}: {kind} {shapes[0][1]} to {shapes[0][0]}", fontsize=8)
            axis.set_yscale("log")
            axis.locator_params(axis="x", nbins=4)
            axis.tick_params(labelsize=7)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=4)
        figure.supxlabel("weight", fontsize=9)
        figure.supylabel("density", fontsize=9)
    return figure


def matrices(found: WeightStatistics) -> list[LayerWeights]:
    """The weights of convolutions and linear layers."""
    return [layer for layer in found.layers if len(layer.shape) > 1]


def _density(layer: LayerWeights) -> tuple[list[float], list[float]]:
    """A density in about BINS bins, and their edges."""
    own = layer.values
    together = math.ceil(len(own.counts) / BINS)
    missing = -len(own.counts) % together
    width = (own.edges[1] - own.edges[0]).item()
    counts = F.pad(own.counts, (0, missing)).view(-1, together).sum(1)
    density = counts / (counts.sum() * width * together)
    edges = own.edges[0].item() + width * together * torch.arange(len(counts) + 1)
    return density.tolist(), edges.tolist()
