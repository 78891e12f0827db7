"""report.md of a finished run: result, parameters, file sizes, embeddings, time, recipe and machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import hyperfast
from hyperfast.analysis import CostReport, ZReport, filter_sheet, generator_costs, table, z_bars, z_report
from hyperfast.analysis.embeddings import STATISTICS
from hyperfast.analysis.pictures import STYLE
from train import summary
from train.checkpoint import write_atomically
from train.summary import MB, Summary
from train.task import ACCURACY, Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from torch import Tensor, nn

    from train.loop import Trainer
    from train.task import Row, Task

COSTS = (
    "Parameters with z; ratio: for each generated weight. In the generators alone: flops of the matrix "
    "products and bytes of the least that has to be moved, parameters, generated weights and their "
    "gradients, by one generation and by a training step with Adam or AdamW. 1 MB is 2^20 bytes."
)
KERNELS, FILTERS = 3, 144  # drawn: of a network, and of each of them
# told apart without colour: dash, marker and shade differ
PARTS = {
    "train": {"color": "#0b3c5d", "linestyle": "-", "marker": "o"},
    "validation": {"color": "#d1651b", "linestyle": "--", "marker": "s"},
    "test": {"color": "#5fa55a", "linestyle": ":", "marker": "^", "markerfacecolor": "white"},
}


@dataclass
class Published:
    """What a report says of a model: test accuracy in percent, saved size in MB, z ranges by layer; what the
    accuracy is."""

    accuracy: float
    megabytes: float | None = None
    z_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    what: str = "best test epoch"


def write(
    trainer: Trainer,
    title: str,
    reason: str,
    command: str,
    published: Published | None = None,
    frozen: Path | None = None,
    extra: str = "",
) -> Path:
    """Write report.md, its pictures and summary.json to the run's folder; the model holds the best epoch's
    weights.

    reason: why the training ended. frozen: the plain network's file, if written. extra: sections of the
    command's own, Markdown. Returns report.md's path.
    """
    out, history = trainer.out, trainer.history
    figures = summary.collect(trainer, title, reason, command, published, frozen)
    save_figure(curves(history, trainer.best["epoch"], trainer.metric), out / "curves.png")
    parts = [
        f"# {title}\n",
        _result(figures, trainer.metric, trainer.data.parts),
        _files(figures, trainer.metric),
        "## Curves\n\n![curves](curves.png)\n\nTraining figures are those of the steps: "
        f"{trainer.data.steps_see}, weights still moving.\n",
        _parameters(figures["parameters"], generator_costs(trainer.model), trainer.data),
    ]
    layers = list(figures["parameters"]["layers"])
    if layers:
        z = z_report(trainer.model)
        save_figure(z_evolution([trainer.initial_z, *history], layers), out / "z.png")
        save_figure(z_bars(z), out / "z_bars.png")
        parts.append(_embeddings(history[-1], z, trainer.best["epoch"], published))
    if kernels := _first_kernels(trainer.model):
        save_figure(filter_sheet(kernels, FILTERS), out / "filters.png")
        parts.append(f"## Filters\n\nAfter epoch {trainer.best['epoch']}.\n\n![filters](filters.png)\n")
    if extra:
        parts.append(extra)
    parts += [_time(figures["time"], trainer.data), _recipe(figures, trainer.data)]
    parts.append(_machine(figures["machine"]))
    path = out / "report.md"
    text = "\n".join(parts)
    write_atomically(path, lambda file: file.write(text.encode()))
    summary.write(out, figures)
    return path


# -- sections ------------------------------------------------------------------------------------


def _result(figures: Summary, metric: Metric, parts: Sequence[str]) -> str:
    best, published = figures["best"], figures["published"]
    ended = f"{figures['steps']} steps ({figures['reason']})"
    rows = [
        ["this run, best validation epoch", best["epoch"], *(metric.cell(best, part) for part in parts)],
    ]
    if published:
        empty = [""] * len(parts)
        rows.append([f"published, {published['what']}", *empty, metric.text(published[metric.name])])
    lines = [
        f"Trained {figures['epochs']} of {figures['planned_epochs']} epochs, {ended}.\n",
        table(["", "epoch", *(f"{part} {metric.words}" for part in parts)], rows),
    ]
    if target := figures["target"]:
        lines.append("\n" + _target(target, f"{figures['reported']} {metric.words}", metric))
    if figures["eval_batches"] is not None:
        lines.append(f"\nEvaluated on {figures['eval_batches']} batches only: not comparable.")
    if figures["cut_short"]:
        lines.append("\nThe best epoch was cut short by --max-steps.")
    return "\n".join(lines) + "\n"


def _target(target: dict[str, Any], words: str, metric: Metric) -> str:
    """Whether and when the target was reached."""
    value = metric.text(target[metric.name])
    if target["epoch"] is None:
        return f"No epoch reached the target of {value} {words}."
    startup = target["startup_seconds"]
    return (
        f"{words.capitalize()} reached the target of {value} after epoch {target['epoch']}: "
        f"{target['seconds']:.1f} s of training"
        + (f" ({startup:.1f} s of them to compile kernels and capture the step)" if startup else "")
        + f", {target['evaluation_seconds']:.1f} s of evaluation beside it."
    )


def _files(figures: Summary, metric: Metric) -> str:
    """Sizes, and where more is better megabytes for each point of the result."""
    result, sizes, published = (
        metric.of(figures["best"], figures["reported"]),
        figures["bytes"],
        figures["published"],
    )
    rows = [["best.pt, weights", *size_cells(sizes["best"] / MB, result)]]
    if "plain" in sizes:
        name = figures["plain_file"]
        name = f"{name}, plain network" if name else "plain network (not written; --save-frozen)"
        rows.append([name, *size_cells(sizes["plain"] / MB, result)])
    rows.append(["last.pt, to resume from", f"{sizes['last'] / MB:.1f}", ""])
    if published and published["megabytes"]:
        rows.append(["published, saved model", *size_cells(published["megabytes"], published[metric.name])])
    columns = 3 if metric.larger_is_better else 2
    header = ["file", "MB", f"MB per point of {figures['reported']} {metric.words}"]
    text = table(header[:columns], [row[:columns] for row in rows])
    return f"## Files\n\n{text}\n\n1 MB is 2^20 bytes.\n"


def _parameters(counts: dict[str, Any], costs: CostReport, data: Task) -> str:
    if not data.may_generate:
        return f"## Parameters\n\n{counts['total']:,} in all.\n"
    layers, plain = counts["layers"], counts["generated"] + counts["other"]
    rows = [[name, f"{counts[key]:,}"] for name, key in (("generator", "generator"), ("z", "embedding"))]
    rows += [["other (biases, batch norm, ordinary weights)", f"{counts['other']:,}"]]
    rows += [["**total**", f"**{counts['total']:,}**"], ["main network after generation", f"{plain:,}"]]
    rows += [["expansion (total / main network)", f"{counts['total'] / plain:.2f}"]]
    text = f"## Parameters\n\n{table(['parameters', 'number'], rows if layers else rows[2:4])}\n"
    if layers:
        text += f"\n{costs.to_markdown()}\n\n{COSTS}\n"
    return text


def _embeddings(last: Row, best: ZReport, best_epoch: int, published: Published | None) -> str:
    """Figures of the last epoch's z, and how alike those of the best epoch are."""
    ranges = published.z_ranges if published else {}
    rows = []
    for layer in (own.name for own in best.layers):
        row = [layer, *(f"{last[f'z/{layer}/{name}']:.4f}" for name in STATISTICS)]
        if ranges:
            row.append(f"[{ranges[layer][0]:.2f}, {ranges[layer][1]:.2f}]" if layer in ranges else "")
        rows.append(row)
    header = ["layer", *STATISTICS] + (["published range"] if ranges else [])
    text = table(header, rows)
    return (
        f"## Embeddings z\n\nAfter epoch {last['epoch']}:\n\n{text}\n\n![evolution of z](z.png)\n\n"
        f"After epoch {best_epoch}, the best, with cosines between embeddings:\n\n{best.to_markdown()}\n\n"
        "![entries of z](z_bars.png)\n"
    )


def _first_kernels(model: nn.Module) -> dict[str, Tensor]:
    """The first kernels larger than a pixel, generated or not, in the network's order."""
    kernels = {
        name.removesuffix(".weight"): p
        for name, p in hyperfast.freeze(model).named_parameters()
        if p.dim() == 4 and math.prod(p.shape[2:]) > 1
    }
    return dict(list(kernels.items())[:KERNELS])


def _time(time: dict[str, float], data: Task) -> str:
    unit = data.unit
    rows = [
        ["training, s per epoch", f"{time['epoch']:.1f}"],
        [f"evaluation ({' and '.join(data.parts)}), s per epoch", f"{time['evaluation']:.1f}"],
        ["training step, ms", f"{1000 * time['step']:.1f}"],
        ["of training for data, %", f"{100 * time['input']:.1f}"],
        [f"{unit}/s in training", f"{time[f'{unit}_per_second']:.0f}"],
        ["peak memory of the process, MB", f"{time['peak_memory'] / MB:.0f}"],
    ]
    if time["startup"]:
        rows.insert(3, ["compiling kernels and capturing the step, s in all", f"{time['startup']:.1f}"])
    if "gpu_memory" in time:
        rows.append(["peak memory of the GPU, MB", f"{time['gpu_memory'] / MB:.0f}"])
    return f"## Time and memory\n\n{table(['', 'value'], rows)}\n"


def _recipe(figures: Summary, data: Task) -> str:
    options = figures["recipe"] | figures["circumstances"]
    left_out = {"threads", "torch"} | (set() if data.may_generate else {"state_dtype"})
    rows = [[name.replace("_", " "), v] for name, v in options.items() if name not in left_out]
    return f"## Recipe\n\n```\n{figures['command']}\n```\n\n{table(['option', 'value'], rows)}\n"


def _machine(machine: dict[str, Any]) -> str:
    return f"## Machine\n\n{table(['', 'value'], [list(row) for row in machine.items()])}\n"


# -- pictures ------------------------------------------------------------------------------------


def curves(history: list[Row], best_epoch: int, metric: Metric = ACCURACY) -> Figure:
    """Figure of all parts over epochs, and the loss where that is another thing; a thin line marks the best
    validation epoch."""
    epochs = [row["epoch"] for row in history]
    parts = {part: style for part, style in PARTS.items() if f"{part}_loss" in history[0]}
    kinds = {metric.name: metric.axis} | ({} if metric.of_loss else {"loss": "cross-entropy"})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, (kind, label) in zip(axes, kinds.items(), strict=True):
            for i, (part, style) in enumerate(parts.items()):
                values = [row[f"{part}_{kind}"] for row in history]
                axis.plot(
                    epochs,
                    values,
                    label=part,
                    markevery=marks(len(epochs), i, len(parts)),
                    linewidth=1.3,
                    **style,
                )
            axis.axvline(best_epoch, color="0.4", linewidth=0.7, label="best validation epoch")
            axis.set(xlabel="epoch", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
            if len(epochs) == 1:
                axis.set_xlim(0, 2)
        if metric.larger_is_better:
            axes[0].set_ylim(0, 1.1 * max(metric.of(row, part) for row in history for part in parts) or 1)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def z_evolution(states: list[Row], layers: list[str]) -> Figure:
    """A panel for each layer from the initial state, epoch 0: mean, mean +- std, extremes of z."""
    epochs = list(range(len(states)))
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    with matplotlib.rc_context(STYLE):
        size = (max(1.9 * columns + 0.4, 5.2), 1.65 * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axis in axes.flat[len(layers) :]:
            axis.set_visible(False)
        for i, (axis, layer) in enumerate(zip(axes.flat, layers, strict=False)):
            axis.tick_params(labelbottom=i + columns >= len(layers))  # the lowest of each column
            _z_panel(
                axis,
                epochs,
                {
                    k: [s.get(f"z/{layer}/{k}", math.nan) for s in states]
                    for k in ("min", "max", "mean", "std")
                },
            )
            axis.set_title(layer, fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel("entries of z", fontsize=9)
    return figure


def _z_panel(axis: Axes, epochs: list[int], z: dict[str, list[float]]) -> None:
    low = [m - s for m, s in zip(z["mean"], z["std"], strict=True)]
    high = [m + s for m, s in zip(z["mean"], z["std"], strict=True)]
    axis.fill_between(epochs, low, high, color="#9db8d2", linewidth=0, label="mean ± std")
    axis.plot(epochs, z["mean"], color="#0b3c5d", linewidth=1.4, label="mean")
    axis.plot(epochs, z["max"], color="#b03a2e", linestyle="--", linewidth=1, label="largest")
    axis.plot(epochs, z["min"], color="0.25", linestyle=":", linewidth=1.2, label="smallest")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=STYLE["savefig.dpi"]))


def marks(points: int, i: int, curves: int) -> tuple[int, int]:
    """First and every how many points curve `i` of so many has a marker: about twelve, beside the others'."""
    every = max(1, points // 12)
    return min(i * every // curves, points - 1), every


# -- small things --------------------------------------------------------------------------------


def size_cells(megabytes: float, points: float) -> list[str]:
    """Size, and megabytes for each point of a figure."""
    return [f"{megabytes:.1f}", f"{megabytes / points:.2f}" if points else "-"]
