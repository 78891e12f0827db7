"""report.md of a hypernetwork and its plain twin, trained with one recipe: accuracy by epoch, filters,
embeddings, parameters, time, the recipe with any option that differs, and the published figures beside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn

from hyperfast.analysis import filter_sheet, generator_costs, layer_weight, table, z_bars, z_report
from hyperfast.analysis.pictures import style
from hyperfast.nn import SharedCoreGenerator, named_generators, parameter_counts
from train.checkpoint import write_atomically
from train.comparison import look, recipe_section
from train.report import COSTS, save_figure
from train.summary import MB, Run
from train.task import ACCURACY

if TYPE_CHECKING:
    from train.mnist import Published

VALIDATION = {"linestyle": "--", "marker": "x"}, {"linestyle": ":", "marker": "+"}  # of the two runs
FILTERS = 256  # drawn of each convolution


def write(
    runs: Sequence[Run], models: Sequence[nn.Module], published: Sequence[Published], out: Path, command: str
) -> Path:
    """Write report.md, its pictures, z.npz and z.safetensors into `out`; returns report.md's path.

    runs, models (of the best epoch), published: of the hypernetwork and of its plain twin. Raises
    CheckpointError where `out` cannot be written.
    """
    hyper = models[0]
    save_figure(curves(runs, published), out / "curves.png")
    parts = [
        f"# MNIST, {runs[0].model} and its plain twin\n",
        _accuracy(runs, published, out),
        _parameters(runs),
        counting_section(hyper),
        f"## Generators\n\n{generator_costs(hyper).to_markdown()}\n\n{COSTS}\n",
        _filters(runs, models, out),
    ]
    save_figure(z_bars(hyper), out / "z_bars.png")
    parts += [
        embeddings_section(hyper, out),
        f"{z_report(hyper).to_markdown()}\n\n![entries of z](z_bars.png)\n",
        _time(runs),
        recipe_section({run.model: run for run in runs}),
        f"## Command\n\n```\n{command}\n```\n",
    ]
    path = out / "report.md"
    text = "\n".join(part for part in parts if part)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


# -- sections ------------------------------------------------------------------------------------


def _accuracy(runs: Sequence[Run], published: Sequence[Published], out: Path) -> str:
    rows = []
    for run, theirs in zip(runs, published, strict=True):
        best, first = run.summary["best"], run.history[0]
        link = f"[{run.model}]({Path(os.path.relpath(run.folder, out)).as_posix()}/report.md)"
        ours = [ACCURACY.cell(best, part) for part in ("validation", "test")]
        rows.append(
            [link, len(run.history), best["epoch"], *ours, f"{100 - first['validation_accuracy']:.2f} %"]
        )
        error = "" if theirs.first_error is None else f"{theirs.first_error:.2f} %"
        rows.append(["published", "", theirs.best_epoch or "", "", f"{theirs.accuracy:.2f} %", error])
    header = [
        "model",
        "epochs",
        "best epoch",
        "validation accuracy",
        "test accuracy",
        "validation error, epoch 1",
    ]
    notes = []
    if any(run.summary["eval_batches"] is not None for run in runs):
        notes.append("Evaluated on a few batches only: not comparable.")
    if any(run.summary["cut_short"] for run in runs):
        notes.append("A best epoch was cut short by --max-steps.")
    notes = "".join(f"\n{note}\n" for note in notes)
    return (
        f"## Accuracy\n\nTest accuracy at the best validation epoch.\n\n{table(header, rows)}\n{notes}\n"
        "![accuracy and error by epoch](curves.png)\n"
    )


def _parameters(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        p, sizes = run.summary["parameters"], run.summary["bytes"]
        plain = p["generated"] + p["other"]
        counts = [p[key] for key in ("embedding", "generator", "other", "total", "generated")]
        mb = [f"{sizes[key] / MB:.2f}" for key in ("best", "plain")]
        rows.append([run.model, *(f"{n:,}" for n in counts), f"{p['total'] / plain:.2f}", *mb])
    header = ["model", "z", "generator", "other", "**total**", "generated weights", "total / main network"]
    header += ["best.pt, MB", "plain network, MB"]
    note = (
        "Other: biases and ordinary weights. Plain network: for deployment, frozen.safetensors of each run."
    )
    return f"## Parameters\n\n{table(header, rows)}\n\n{note}\n"


def counting_section(model: nn.Module) -> str:
    """Both ways to count a network whose generator has a shared core; empty for others."""
    shared = [g for _, g in named_generators(model) if isinstance(g, SharedCoreGenerator)]
    if not shared:
        return ""
    z = sum(g.z.numel() for g in shared)
    core = sum(g.core_weight.numel() + g.core_bias.numel() for g in shared)
    counts = parameter_counts(model)
    heads = counts["generator"] - core
    rows = [
        ["z", f"{z:,}"],
        ["core", f"{core:,}"],
        ['**"effective": z and core**', f"**{z + core:,}**"],
        ["heads", f"{heads:,}"],
        ["other: biases, ordinary weights", f"{counts['other']:,}"],
        ["**all that is trained and stored**", f"**{counts['total']:,}**"],
    ]
    generated = sum(shape.numel() for g in shared for shape in g.shapes)
    return (
        f"## Two ways to count\n\n{table(['parameters', 'number'], rows)}\n\nThe published count is the "
        f"effective one. It leaves out the heads, which are trained as well: {heads:,} parameters for "
        f"{generated:,} generated weights.\n"
    )


def _filters(runs: Sequence[Run], models: Sequence[nn.Module], out: Path) -> str:
    """A picture of every convolution's filters, of the plain network and of the hypernetwork."""
    generated = {layer.name for layer in z_report(models[0]).layers}
    convs = [name for name, m in models[1].named_modules() if isinstance(m, nn.Conv2d)]
    for name in convs:
        made = "generated" if name in generated else "learned"
        sheets = {f"{name}, {runs[1].model}": layer_weight(models[1], name)}
        sheets[f"{name}, {runs[0].model} ({made})"] = layer_weight(models[0], name)
        save_figure(filter_sheet(sheets, FILTERS, common_scale=True), out / f"filters_{name}.png")
    pictures = "\n\n".join(f"![filters of {name}](filters_{name}.png)" for name in convs)
    return f"## Filters, plain and generated\n\nOn one scale for each layer.\n\n{pictures}\n"


def export_z(model: nn.Module, out: Path) -> dict[str, Tensor]:
    """Write the embeddings, float32 [E, K] by layer name, to z.npz and z.safetensors in `out`; returns
    them."""
    z = {layer.name: layer.z.float().contiguous() for layer in z_report(model).layers}
    write_atomically(out / "z.npz", lambda file: np.savez(file, **{name: v.numpy() for name, v in z.items()}))
    write_atomically(out / "z.safetensors", lambda file: file.write(safetensors.torch.save(z)))
    return z


def embeddings_section(model: nn.Module, out: Path) -> str:
    """Exports z, and says where; empty for a plain network."""
    if not any(named_generators(model)):
        return ""
    z = export_z(model, out)
    sizes = ", ".join(f"{name} {list(v.shape)}" for name, v in z.items())
    return f"## Exported z\n\n`z.npz` and `z.safetensors`, of the best epoch, by layer: {sizes}.\n"


def _time(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        t, where = run.summary["time"], run.summary["machine"]
        figures = [f"{t['epoch']:.1f}", f"{1000 * t['step']:.1f}", f"{t['images_per_second']:.0f}"]
        machine = where.get("GPU", where["CPU"]), where["threads"]
        rows.append([run.model, *figures, f"{t['peak_memory'] / MB:.0f}", *machine])
    header = [
        "model",
        "training, s per epoch",
        "step, ms",
        "images/s",
        "peak memory, MB",
        "machine",
        "threads",
    ]
    ratio = runs[0].summary["time"]["step"] / runs[1].summary["time"]["step"]
    note = f"A step of the hypernetwork takes {ratio:.2f} times the plain one's, if nothing else ran."
    return f"## Time\n\n{table(header, rows)}\n\n{note}\n"


# -- pictures ------------------------------------------------------------------------------------


def curves(runs: Sequence[Run], published: Sequence[Published]) -> Figure:
    """Accuracy, and error on a logarithmic axis, of all runs on the validation and test images; hollow: what
    was published."""
    with style() as figure_class:
        figure = figure_class(figsize=(7.2, 3.3), layout="constrained")
        axes = figure.subplots(1, 2)
        for i, run in enumerate(runs):
            for part, options in _looks(i).items():
                epochs = [row["epoch"] for row in run.history]
                accuracies = [row[f"{part}_accuracy"] for row in run.history]
                axes[0].plot(epochs, accuracies, linewidth=1.3, **options)
                axes[1].plot(epochs, [100 - a for a in accuracies], linewidth=1.3, **options)
        for i, theirs in enumerate(published):
            hollow = look(i) | {"linestyle": "none", "markerfacecolor": "white", "markersize": 7, "zorder": 3}
            if theirs.best_epoch:
                axes[0].plot(theirs.best_epoch, theirs.accuracy, **hollow)
                axes[1].plot(theirs.best_epoch, 100 - theirs.accuracy, **hollow)
            if theirs.first_error:
                axes[1].plot(1, theirs.first_error, **hollow)
        for axis, label in zip(axes, ("accuracy (%)", "error (%)"), strict=True):
            axis.set(xlabel="epoch", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        _logarithmic(axes[1])
        figure.legend(*_legend(runs, published), loc="outside upper center", ncols=3)
    return figure


def _looks(i: int) -> dict[str, dict[str, Any]]:
    """Of the curves of run `i`: markers, dashes and shades differ, so that one epoch is seen too."""
    own = look(i)
    return {"validation": own | VALIDATION[i], "test": own | {"linestyle": "-"}}


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers, several in a decade."""
    axis.set_yscale("log", nonpositive="clip")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    ticks = [m * 10.0**e for e in range(-2, 3) for m in (1, 2, 3, 5) if low <= m * 10.0**e <= high]
    axis.set_yticks(ticks)


def _legend(runs: Sequence[Run], published: Sequence[Published]) -> tuple[list[Line2D], list[str]]:
    entries = [
        (Line2D([], [], **_looks(i)[part]), f"{run.model}, {part}")
        for part in ("test", "validation")
        for i, run in enumerate(runs)
    ]
    if any(theirs.best_epoch for theirs in published):
        hollow = {"marker": "o", "color": "0.3", "markerfacecolor": "white", "linestyle": "none"}
        first = " (epoch 1: validation)" if any(theirs.first_error for theirs in published) else ""
        entries.append((Line2D([], [], **hollow), f"hollow: published{first}"))
    handles, names = zip(*entries, strict=True)
    return list(handles), list(names)
