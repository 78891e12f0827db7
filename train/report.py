"""report.md of a finished run: accuracy, parameters, file sizes, embeddings, time, recipe and machine."""

from __future__ import annotations

import math
import platform
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

import hyperfast
from hyperfast.nn import named_generators, parameter_counts, plain_state_dict
from train.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from train.loop import Row, Trainer

MB = 2**20
STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "lines.markersize": 4,
}
# told apart without colour: dash, marker and shade differ
PARTS = {
    "train": {"color": "#0b3c5d", "linestyle": "-", "marker": "o"},
    "validation": {"color": "#d1651b", "linestyle": "--", "marker": "s"},
    "test": {"color": "#5fa55a", "linestyle": ":", "marker": "^", "markerfacecolor": "white"},
}


@dataclass
class Published:
    """What a report says of a model: test accuracy in percent, saved size in MB, z ranges by layer."""

    accuracy: float
    megabytes: float | None = None
    z_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def write(
    trainer: Trainer,
    title: str,
    reason: str,
    command: str,
    published: Published | None = None,
    frozen: Path | None = None,
) -> Path:
    """Write report.md with its pictures to the run's folder; the model holds the best epoch's weights.

    reason: why the training ended. frozen: the plain network's file, if written. Returns report.md's path.
    """
    out, history, model = trainer.out, trainer.history, trainer.model
    save_figure(curves(history, trainer.best["epoch"]), out / "curves.png")
    parts = [
        f"# {title}\n",
        _result(trainer, reason, published),
        _files(trainer, published, frozen),
        "## Curves\n\n![accuracy and loss](curves.png)\n\nTraining figures are those of the steps: "
        "augmented images, dropout, weights still moving.\n",
        _parameters(model),
    ]
    layers = [name for name, _ in named_generators(model)]
    if layers:
        save_figure(z_evolution([trainer.initial_z, *history], layers), out / "z.png")
        parts.append(_embeddings(history[-1], layers, published))
    parts += [_time(history), _recipe(trainer, command), _machine(trainer)]
    path = out / "report.md"
    text = "\n".join(parts)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


# -- sections ------------------------------------------------------------------------------------


def _result(trainer: Trainer, reason: str, published: Published | None) -> str:
    best, config = trainer.best, trainer.config
    epochs = f"{len(trainer.history)} of {config.epochs} epochs, {trainer.steps} steps ({reason})"
    rows = [
        ["this run, best validation epoch", best["epoch"], percent(best, "validation"), percent(best, "test")]
    ]
    if published:
        rows.append(["published, best test epoch", "", "", f"{published.accuracy:.2f} %"])
    lines = [f"Trained {epochs}.\n", table(["", "epoch", "validation accuracy", "test accuracy"], rows)]
    if config.eval_batches is not None:
        lines.append(f"\nEvaluated on {config.eval_batches} batches only: not comparable.")
    if best["steps"] < trainer.steps_per_epoch:
        lines.append("\nThe best epoch was cut short by --max-steps.")
    return "\n".join(lines) + "\n"


def _files(trainer: Trainer, published: Published | None, frozen: Path | None) -> str:
    """Sizes, and megabytes for each point of test accuracy."""
    accuracy = trainer.best["test_accuracy"]

    def row(name: str, size: float, points: float) -> list[str]:
        return [name, f"{size:.1f}", f"{size / points:.2f}" if points else "-"]

    rows = [row("best.pt, weights", _megabytes(trainer.out / "best.pt"), accuracy)]
    if frozen:
        rows.append(row(f"{frozen.name}, plain network", _megabytes(frozen), accuracy))
    elif any(named_generators(trainer.model)):
        size = sum(t.nbytes for t in plain_state_dict(trainer.model).values()) / MB
        rows.append(row("plain network (not written; --save-frozen)", size, accuracy))
    last = trainer.out / "last.pt"
    rows.append(["last.pt, to resume from", f"{_megabytes(last):.1f}", ""])
    if published and published.megabytes:
        rows.append(row("published, saved model", published.megabytes, published.accuracy))
    text = table(["file", "MB", "MB per point of test accuracy"], rows)
    return f"## Files\n\n{text}\n\n1 MB is 2^20 bytes.\n"


def _parameters(model: nn.Module) -> str:
    counts = parameter_counts(model)
    text = "## Parameters\n\n"
    generators = list(named_generators(model))
    if generators:
        rows = []
        for name, generator in generators:
            n, z = sum(math.prod(shape) for shape in generator.shapes), generator.z.numel()
            own = sum(p.numel() for p in generator.parameters()) - z
            rows.append([name, f"{n:,}", f"{own:,}", f"{z:,}", f"{own / n:.2f}"])
        n, own = counts["generated"], counts["generator"]
        rows.append(["all layers", f"{n:,}", f"{own:,}", f"{counts['embedding']:,}", f"{own / n:.2f}"])
        text += (
            table(["layer", "generated weights", "generator", "z", "generator / generated"], rows) + "\n\n"
        )
    plain = counts["generated"] + counts["other"]
    rows = [[name, f"{counts[key]:,}"] for name, key in (("generator", "generator"), ("z", "embedding"))]
    rows += [["other (biases, batch norm, ordinary weights)", f"{counts['other']:,}"]]
    rows += [["**total**", f"**{counts['total']:,}**"], ["main network after generation", f"{plain:,}"]]
    rows += [["expansion (total / main network)", f"{counts['total'] / plain:.2f}"]]
    return text + table(["parameters", "number"], rows if generators else rows[2:4]) + "\n"


def _embeddings(last: Row, layers: list[str], published: Published | None) -> str:
    ranges = published.z_ranges if published else {}
    names = ("min", "max", "mean", "std", "norm")
    rows = []
    for layer in layers:
        row = [layer, *(f"{last[f'z/{layer}/{name}']:.4f}" for name in names)]
        if ranges:
            row.append(f"[{ranges[layer][0]:.2f}, {ranges[layer][1]:.2f}]" if layer in ranges else "")
        rows.append(row)
    header = ["layer", *names] + (["published range"] if ranges else [])
    text = table(header, rows)
    return f"## Embeddings z after epoch {last['epoch']}\n\n{text}\n\n![evolution of z](z.png)\n"


def _time(history: list[Row]) -> str:
    def mean(key: str) -> float:
        return sum(row[key] for row in history) / len(history)

    steps = sum(row["steps"] for row in history)
    seconds = sum(row["seconds"] for row in history)
    rate = sum(row["images_per_second"] * row["seconds"] for row in history) / seconds
    rows = [
        ["training, s per epoch", f"{mean('seconds'):.1f}"],
        ["evaluation (validation and test), s per epoch", f"{mean('evaluation_seconds'):.1f}"],
        ["training step, ms", f"{1000 * seconds / steps:.1f}"],
        ["of it waiting for data, %", f"{100 * sum(row['input_seconds'] for row in history) / seconds:.1f}"],
        ["images/s in training", f"{rate:.0f}"],
        [
            "peak memory of the process, MB",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
        ],
    ]
    return f"## Time and memory\n\n{table(['', 'value'], rows)}\n"


def _recipe(trainer: Trainer, command: str) -> str:
    options = trainer.recipe | trainer.circumstances
    rows = [[name.replace("_", " "), v] for name, v in options.items() if name not in ("threads", "torch")]
    return f"## Recipe\n\n```\n{command}\n```\n\n{table(['option', 'value'], rows)}\n"


def _machine(trainer: Trainer) -> str:
    rows = [["CPU", cpu_name()]]
    if trainer.device.type == "cuda":
        rows.append(["GPU", torch.cuda.get_device_name(trainer.device)])
    rows += [
        ["threads", torch.get_num_threads()],
        ["torch", torch.__version__],
        ["hyperfast", hyperfast.__version__],
        ["Python", platform.python_version()],
        ["system", f"{platform.system()} {platform.machine()}"],
    ]
    return f"## Machine\n\n{table(['', 'value'], rows)}\n"


# -- pictures ------------------------------------------------------------------------------------


def curves(history: list[Row], best_epoch: int) -> Figure:
    """Accuracy and loss of the three parts over epochs; a thin line marks the best validation epoch."""
    epochs = [row["epoch"] for row in history]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, kind, label in zip(
            axes, ("accuracy", "loss"), ("accuracy (%)", "cross-entropy"), strict=True
        ):
            for i, (part, style) in enumerate(PARTS.items()):
                values = [row[f"{part}_{kind}"] for row in history]
                axis.plot(epochs, values, label=part, markevery=marks(len(epochs), i), linewidth=1.3, **style)
            axis.axvline(best_epoch, color="0.4", linewidth=0.7, label="best validation epoch")
            axis.set(xlabel="epoch", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
            if len(epochs) == 1:
                axis.set_xlim(0, 2)
        axes[0].set_ylim(0, 1.1 * max(row[f"{part}_accuracy"] for row in history for part in PARTS) or 1)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def z_evolution(states: list[Row], layers: list[str]) -> Figure:
    """A panel for each layer from the initial state, epoch 0: mean, mean +- std, extremes of z."""
    epochs = list(range(len(states)))
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    with matplotlib.rc_context(STYLE):
        size = (1.9 * columns + 0.4, 1.65 * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axis in axes.flat[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes.flat, layers, strict=False):
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


def marks(points: int, i: int) -> tuple[int, int]:
    """First and every how many points curve `i` has a marker: about twelve, beside those of other curves."""
    every = max(1, points // 12)
    return min(i * every // len(PARTS), points - 1), every


# -- small things --------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def percent(row: Row, part: str) -> str:
    return f"{row[f'{part}_accuracy']:.2f} %"


def cpu_name() -> str:
    """The processor's name as Linux gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _megabytes(path: Path) -> float:
    return path.stat().st_size / MB
