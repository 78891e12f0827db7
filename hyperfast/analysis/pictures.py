"""Pictures of filters and embeddings. They need matplotlib, which is imported as one is drawn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.analysis.embeddings import ZReport, z_report
from hyperfast.nn import plain_state_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "lines.markersize": 4,
}
# from dark to light in grey as well, and grey itself in the middle, at 0
SIGNED = "cividis"


@contextlib.contextmanager
def style() -> Iterator[type[Figure]]:
    """matplotlib's Figure, in the style of all pictures. ImportError that says what to install."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install matplotlib (hyperfast-kernels installs it, unless without "
            "dependencies)"
        ) from error
    with matplotlib.rc_context(STYLE):
        yield Figure


def layer_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of `layer`, generated or ordinary, as the plain network has it.

    layer: the name of a layer, whose `weight` is meant, or of a parameter. Raises ValueError, which lists
    them, for another name.
    """
    weights = plain_state_dict(model)
    for name in (f"{layer}.weight".lstrip("."), layer):
        if name in weights:
            return weights[name]
    raise ValueError(f"model has no weight of {layer!r}; it has {', '.join(weights)}")


def filter_sheet(
    weights: Tensor | Mapping[str, Tensor], limit: int = 256, common_scale: bool = False
) -> Figure:
    """The filters of convolutions, weights [O, I, R, S] by title, as sheets side by side.

    The filters of one output channel are a row, in the order of the input channels; where these are few,
    several outputs stand beside each other. Of more than `limit` filters the first outputs and inputs are
    drawn, which the title says. Each sheet has a scale of its own, or all have a common one, symmetric around
    0: dark is negative, light positive, in colour and in grey. `layer_weight` gets the weight of a model's
    layer. Raises ValueError for other shapes and a limit below 1.
    """
    sheets = {"": weights} if isinstance(weights, Tensor) else dict(weights)
    for title, weight in sheets.items():
        if weight.dim() != 4 or not weight.numel():
            raise ValueError(f"weight {title!r} must be [O, I, R, S], not empty, got {list(weight.shape)}")
    if limit < 1 or not sheets:
        raise ValueError(f"limit and the number of weights must be at least 1, got {limit}, {len(sheets)}")
    with style() as Figure:
        drawn = {title: _sheet(weight, limit) for title, weight in sheets.items()}
        tallest = max(grid.shape[0] / grid.shape[1] for grid, _ in drawn.values())
        size = (3.5 * len(sheets), 2.75 * min(max(tallest, 0.3), 2.5) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(sheets), squeeze=False)[0]
        largest = max(_extreme(grid) for grid, _ in drawn.values()) if common_scale else None
        for axis, (title, (grid, caption)) in zip(axes, drawn.items(), strict=True):
            axis.set_axis_off()
            axis.set_title("\n".join(filter(None, (title, caption))), fontsize=8)
            image = signed_image(axis, grid, largest)
            if not common_scale or axis is axes[-1]:
                beside = list(axes) if common_scale else axis
                figure.colorbar(image, ax=beside, shrink=0.8, aspect=25, label="weight")
    return figure


def _extreme(values: Tensor) -> float:
    return values.nan_to_num().abs().max().item()


def signed_image(axis, values: Tensor, extreme: float | None = None) -> AxesImage:
    """Draws a matrix with a colour scale from -extreme to extreme, the largest of `values` by default; NaN
    stays white. `axis`: matplotlib's Axes."""
    extreme = (_extreme(values) if extreme is None else extreme) or 1.0
    return axis.imshow(values.numpy(), cmap=SIGNED, vmin=-extreme, vmax=extreme, interpolation="nearest")


def _sheet(weight: Tensor, limit: int) -> tuple[Tensor, str]:
    """The filters in rows and columns with NaN between them, and what they are, in words."""
    weight = weight.detach().double().cpu()
    O, I, R, S = weight.shape
    inputs = min(I, math.isqrt(limit))
    outputs = min(O, limit // inputs)
    what = f"{_of(outputs, O, 'output')}, {_of(inputs, I, 'input')}, {R} x {S}"
    columns = max(1, round(math.sqrt(outputs / inputs)))  # of output channels
    rows = math.ceil(outputs / columns)
    gap = 2 if columns > 1 and inputs > 1 else 1  # between output channels
    sheet = weight.new_full((rows * columns, R + 1, inputs * (S + 1) + gap - 1), math.nan)
    filters = F.pad(weight[:outputs, :inputs], (0, 1, 0, 1), value=math.nan)
    sheet[:outputs, :, : inputs * (S + 1)] = filters.transpose(1, 2).flatten(2)
    sheet = sheet.view(rows, columns, R + 1, -1).transpose(1, 2).reshape(rows * (R + 1), -1)
    return sheet[:-1, :-gap], what


def _of(some: int, all: int, what: str) -> str:
    return ("" if some == all else f"first {some} of ") + f"{all} {what}{'s' if all > 1 else ''}"


def z_bars(model: nn.Module | ZReport, limit: int = 24) -> Figure:
    """The embedding z of every generated layer as bars, a panel for each of the first `limit` layers, all
    with one scale.

    Where a layer has E > 1 embeddings the bars are their mean and a line goes from the smallest to the
    largest entry. Raises ValueError for a model without generated layers and a limit below 1.
    """
    layers = (model if isinstance(model, ZReport) else z_report(model)).layers
    if not layers or limit < 1:
        raise ValueError(f"generated layers and limit must be at least 1, got {len(layers)}, {limit}")
    shown = layers[:limit]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    with style() as Figure:
        size = (max(1.9 * columns + 0.4, 3.6), 1.65 * rows + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes.flat, shown, strict=False):
            z, entries = layer.z, range(1, layer.z.shape[1] + 1)
            axis.bar(entries, z.mean(0).tolist(), color="#6f93b5", edgecolor="#0b3c5d", linewidth=0.5)
            several = len(z) > 1
            if several:
                axis.vlines(entries, z.min(0).values, z.max(0).values, color="black", linewidth=0.7)
            axis.axhline(0, color="0.3", linewidth=0.7)
            count = f" (E = {len(z)})" if several else ""
            axis.set_title(f"{layer.name or 'weight'}{count}", fontsize=8)
            axis.grid(axis="x", visible=False)
            axis.set_axisbelow(True)
            axis.locator_params(axis="x", integer=True, nbins=6)
        figure.supxlabel("entry of z", fontsize=9)
        figure.supylabel("z", fontsize=9)
        several = any(len(layer.z) > 1 for layer in shown)
        lines = "bars: mean of E embeddings, lines: smallest to largest" if several else ""
        cut = f"first {limit} of {len(layers)} layers" if len(layers) > limit else ""
        if lines or cut:
            figure.suptitle("; ".join(filter(None, (cut, lines))), fontsize=8)
    return figure
