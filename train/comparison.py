"""compare.md of finished runs: tables and pictures of several models side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from hyperfast.analysis import table
from hyperfast.analysis.embeddings import STATISTICS
from hyperfast.analysis.pictures import STYLE
from train.checkpoint import CheckpointError, write_atomically
from train.report import marks, save_figure, size_cells
from train.summary import MB, Run
from train.task import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "compare.md"
ZOOM = 80  # percent
Labelled = dict[str, Run]  # in the order of the tables
# told apart without colour: marker, dash and shade differ
LOOKS = [
    {"color": "#0b3c5d", "marker": "o", "linestyle": "-"},
    {"color": "#d1651b", "marker": "s", "linestyle": "--"},
    {"color": "#5fa55a", "marker": "^", "linestyle": ":"},
    {"color": "#7b2d5b", "marker": "D", "linestyle": "-."},
    {"color": "#7fb0dd", "marker": "v", "linestyle": "-"},
    {"color": "#a8862a", "marker": "P", "linestyle": (0, (6, 1))},
    {"color": "#333333", "marker": "X", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#cf7c9a", "marker": "*", "linestyle": (0, (1, 1))},
]


def write(runs: list[Run], out: Path, command: str, failures: dict[str, str] | None = None) -> Path:
    """Write compare.md and its pictures into `out`; returns compare.md's path.

    failures: why a model has no finished run, by name. Raises CheckpointError where `out` cannot be written
    and for runs that are measured by different figures.
    """
    named = labels(runs)
    metric = _metric(named)
    parts = [
        "# Models compared\n",
        _results(named, out),
        _failures(failures or {}),
        _parameters(named),
        _sizes(named),
        _time(named),
    ]
    save_figure(curves(named), out / f"{metric.name}.png")
    save_figure(against_size(named), out / "size.png")
    if any(run.layers for run in runs):
        save_figure(z_ranges(named), out / "z_ranges.png")
        parts.append(_embeddings(named))
    parts += [recipe_section(named), f"## Command\n\n```\n{command}\n```\n"]
    path = out / FILE
    text = "\n".join(part for part in parts if part)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def labels(runs: list[Run]) -> Labelled:
    """A name for each run: its model's; where several have the same, their folders'."""
    models = [run.model for run in runs]
    folders = [run.folder.name for run in runs]
    named: Labelled = {}
    for run, model, folder in zip(runs, models, folders, strict=True):
        unique = folder if folders.count(folder) == 1 else str(run.folder)
        named[model if models.count(model) == 1 else unique] = run
    return named


def _metric(named: Labelled) -> Metric:
    """The figure of all runs. Raises CheckpointError where they have different ones."""
    first, *others = dict.fromkeys(run.metric for run in named.values())
    if others:
        words = ", ".join(metric.words for metric in (first, *others))
        raise CheckpointError(f"runs measured by different figures cannot be compared: {words}")
    return first


# -- sections ------------------------------------------------------------------------------------


def _results(named: Labelled, out: Path) -> str:
    metric, rows = _metric(named), []
    parts = [part for part in ("validation", "test") if part in {"validation", *_reported(named)}]
    for name, run in named.items():
        s, best, published = run.summary, run.summary["best"], run.summary["published"]
        link = f"[{name}]({Path(os.path.relpath(run.folder, out)).as_posix()}/report.md)"
        cells = [metric.cell(best, part) for part in parts]
        theirs = ["", ""]
        if published:
            difference = run.result - published[metric.name]
            theirs = [metric.text(published[metric.name]), f"{difference:+.{metric.digits}f}"]
        rows.append([link, f"{s['epochs']} of {s['planned_epochs']}", best["epoch"], *cells, *theirs])
    few = [name for name, run in named.items() if run.summary["eval_batches"] is not None]
    cut = [name for name, run in named.items() if run.summary["cut_short"]]
    notes = {
        "Evaluated on a few batches only, not comparable": few,
        "Best epoch cut short by --max-steps": cut,
    }
    header = ["model", "epochs", "best", *(f"{part} {metric.words}" for part in parts)]
    header += ["published", "difference"]
    text = [
        f"## {metric.words.capitalize()}\n",
        f"{' or '.join(_reported(named)).capitalize()} {metric.words} at the best validation epoch; "
        "published: as the report of each run says.\n",
        table(header, rows),
        *_texts(named),
        *(f"\n{note}: {', '.join(names)}." for note, names in notes.items() if names),
        f"\n![{metric.words} by epoch]({metric.name}.png)\n",
    ]
    return "\n".join(text)


def _reported(named: Labelled) -> list[str]:
    """The parts on which the runs report their figure."""
    return list(dict.fromkeys(run.reported for run in named.values()))


def _texts(named: Labelled) -> list[str]:
    """A line for language models: their text, or that of each and a warning where it is not the same."""
    options = {name: run.summary["recipe"] | run.summary["circumstances"] for name, run in named.items()}
    texts = {name: own["text"] for name, own in options.items() if "text" in own}
    measured = {  # Penn Treebank has its own parts
        (own.get("text_checksum"), named[name].reported == "validation" and own.get("val_split"))
        for name, own in options.items()
    }
    if texts and len(measured) > 1:
        each = ", ".join(f"{name} ({text})" for name, text in texts.items())
        return [f"\nDifferent texts, or different parts of one, not comparable: {each}."]
    return [f"\nText: {', '.join(dict.fromkeys(texts.values()))}."] if texts else []


def _failures(failures: dict[str, str]) -> str:
    if not failures:
        return ""
    return f"## Not finished\n\n{table(['model', 'reason'], [list(row) for row in failures.items()])}\n"


def _parameters(named: Labelled) -> str:
    rows = []
    for name, run in named.items():
        p = run.summary["parameters"]
        plain = p["generated"] + p["other"]
        numbers = [p[key] for key in ("generator", "embedding", "other", "total", "generated")] + [plain]
        rows.append([name, *(f"{n:,}" for n in numbers), f"{p['total'] / plain:.2f}"])
    header = ["model", "generator", "z", "other", "total", "generated weights", "main network", "expansion"]
    note = "Main network: generated weights and other parameters. Expansion: total over main network."
    return f"## Parameters\n\n{table(header, rows)}\n\n{note}\n"


def _sizes(named: Labelled) -> str:
    metric, rows = _metric(named), []
    for name, run in named.items():
        sizes, published = run.summary["bytes"], run.summary["published"] or {}
        plain = size_cells(sizes["plain"] / MB, run.result) if "plain" in sizes else ["", ""]
        theirs = ["", ""]
        if published.get("megabytes"):
            theirs = size_cells(published["megabytes"], published[metric.name])
        rows.append([name, *size_cells(sizes["best"] / MB, run.result), *plain, *theirs])
    header = ["model", "file, MB", "MB per point", "main network alone, MB", "MB per point"]
    header += ["published, MB", "MB per point"]
    note = "File: best.pt, the weights. Main network alone: the plain network it generates, for deployment. "
    if metric.larger_is_better:
        note += f"MB per point of {' or '.join(_reported(named))} {metric.words}; "
    else:
        header, *rows = ([row[0], *row[1::2]] for row in (header, *rows))  # no points to share it among
    picture = f"![{metric.words} against size](size.png)"
    heading = f"## Size against {metric.words}"
    return f"{heading}\n\n{table(header, rows)}\n\n{note}1 MB is 2^20 bytes.\n\n{picture}\n"


def _time(named: Labelled) -> str:
    rows = []
    for name, run in named.items():
        t, where = run.summary["time"], run.summary["machine"]
        figures = [f"{t['epoch']:.1f}", f"{t['evaluation']:.1f}", f"{1000 * t['step']:.1f}"]
        figures += [f"{t[f'{run.unit}_per_second']:.0f}", f"{t['peak_memory'] / MB:.0f}"]
        rows.append([name, *figures, where.get("GPU", where["CPU"]), where["threads"], where["torch"]])
    unit = next(iter(named.values())).unit
    header = ["model", "training, s per epoch", "evaluation, s per epoch", "step, ms", f"{unit}/s"]
    header += ["peak memory, MB", "machine", "threads", "torch"]
    note = "To be compared only where machine and threads are equal and nothing else ran."
    return f"## Time\n\n{table(header, rows)}\n\n{note}\n"


def _embeddings(named: Labelled) -> str:
    rows = []
    for name, run in named.items():
        last, ranges = run.history[-1], _published_ranges(run)
        for layer, counts in run.summary["parameters"]["layers"].items():
            z = {key: last[f"z/{layer}/{key}"] for key in STATISTICS}
            ours = [
                f"[{z['min']:.4f}, {z['max']:.4f}]",
                *(f"{z[key]:.4f}" for key in ("mean", "std", "norm")),
            ]
            theirs = "[{:.2f}, {:.2f}]".format(*ranges[layer]) if layer in ranges else ""
            rows.append([name, layer, f"{counts['embedding']:,}", *ours, theirs])
    header = ["model", "layer", "entries of z", "range", "mean", "std", "norm", "published range"]
    picture = "![ranges of z](z_ranges.png)"
    return f"## Embeddings z after the last epoch\n\n{table(header, rows)}\n\n{picture}\n"


def recipe_section(named: Labelled) -> str:
    """The options in which the runs differ; the others in one line."""
    options = [run.summary["recipe"] | run.summary["circumstances"] for run in named.values()]
    keys = [key for key in dict.fromkeys(key for o in options for key in o) if key != "model"]
    differ = [key for key in keys if any(o.get(key) != options[0].get(key) for o in options)]
    rows = [[key.replace("_", " "), *(o.get(key, "") for o in options)] for key in differ]
    same = ", ".join(f"{key.replace('_', ' ')} {options[0][key]}" for key in keys if key not in differ)
    text = f"{table(['option', *named], rows)}\n\n" if rows else ""
    return f"## Recipe\n\n{text}The same in all: {same}.\n"


def _published_ranges(run: Run) -> dict[str, list[float]]:
    return (run.summary["published"] or {}).get("z_ranges", {})


# -- pictures ------------------------------------------------------------------------------------


def look(i: int) -> dict[str, Any]:
    """Colour, marker and dash of run `i`; after all were used, again with hollow markers."""
    style = LOOKS[i % len(LOOKS)]
    return style if i < len(LOOKS) else style | {"markerfacecolor": "white"}


def curves(named: Labelled) -> Figure:
    """The training figure of every run and the one that it reports, over its epochs."""
    metric = _metric(named)
    parts = {
        "training": lambda run: f"train_{metric.name}",
        " or ".join(_reported(named)): lambda run: f"{run.reported}_{metric.name}",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.1), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (label, column) in zip(axes, parts.items(), strict=True):
            epoch_panel(axis, named, column)
            axis.set_ylabel(f"{label} {metric.axis}")
        shown = [
            row[column(run)] for run in named.values() for row in run.history for column in parts.values()
        ]
        axes[0].set_ylim(bottom=_bottom(metric, shown))
        _legend(figure, *axes[0].get_legend_handles_labels())
    return figure


def epoch_panel(axis: Axes, named: Labelled, column: Callable[[Run], str]) -> None:
    """A column of every run's epochs; where all have one epoch alone, they stand side by side."""
    longest = max(len(run.history) for run in named.values())
    for i, (name, run) in enumerate(named.items()):
        beside = 0.1 * (i - (len(named) - 1) / 2) if longest == 1 else 0
        epochs = [row["epoch"] + beside for row in run.history]
        values = [row[column(run)] for row in run.history]
        every = marks(len(epochs), i, len(named))
        axis.plot(epochs, values, label=name, markevery=every, linewidth=1.3, **look(i))
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_xlim(*((0, 2) if longest == 1 else (None, None)))


def _bottom(metric: Metric, figures: list[float]) -> float | None:
    """Where an axis starts: close to the lowest figure, but at 0 where more is better and not all of them
    would lie in its top."""
    return 0 if metric.larger_is_better and min(figures) < ZOOM else None


def against_size(named: Labelled) -> Figure:
    """The result against the size of the file and against the number of parameters, published beside."""
    metric = _metric(named)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.1), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for i, run in enumerate(named.values()):
            s, style = run.summary, look(i) | {"linestyle": "none"}
            published = s["published"] or {}
            total = s["parameters"]["total"]
            points = ((s["bytes"]["best"] / MB, published.get("megabytes")), (total, total))
            for axis, (ours, theirs) in zip(axes, points, strict=True):
                if published and theirs:
                    figures = [run.result, published[metric.name]]
                    axis.plot([ours, theirs], figures, color="0.7", linewidth=0.7)
                    axis.plot(theirs, figures[1], **style | {"markerfacecolor": "white", "zorder": 3})
                axis.plot(ours, run.result, clip_on=False, **style)
        for axis, label in zip(axes, ("size of the weights' file (MB)", "parameters"), strict=True):
            axis.set(xscale="log", xlabel=label)
            axis.margins(x=0.1)
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if high > 10 * low else MaxNLocator(4))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(NullFormatter())
        shown = [run.result for run in named.values()]
        shown += [run.summary["published"][metric.name] for run in named.values() if run.summary["published"]]
        axes[0].set_ylim(bottom=_bottom(metric, shown))
        axes[0].set_ylabel(f"{' or '.join(_reported(named))} {metric.axis}")
        handles = [Line2D([], [], **look(i) | {"linestyle": "none"}) for i in range(len(named))]
        names = list(named)
        if any(run.summary["published"] for run in named.values()):
            hollow = {"marker": "o", "color": "0.3", "markerfacecolor": "white", "linestyle": "none"}
            handles, names = [*handles, Line2D([], [], **hollow)], [*names, "hollow: published"]
        _legend(figure, handles, names)
    return figure


def z_ranges(named: Labelled) -> Figure:
    """A panel for each generated layer: z after the last epoch of every run that generates it, and the
    published range."""
    most_first = sorted((run.layers for run in named.values()), key=len, reverse=True)
    layers = list(dict.fromkeys(layer for layers in most_first for layer in layers))
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(1.75 * columns + 0.6, 5.8), 1.9 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(layers) :]:
            axis.set_visible(False)
        for axis, layer in zip(axes.flat, layers, strict=False):
            _range_panel(axis, layer, {name: run for name, run in named.items() if layer in run.layers})
            axis.set_title(layer, fontsize=9)
        handles = [
            Line2D([], [], color="#0b3c5d", linewidth=1, marker="_", label="smallest to largest"),
            Line2D([], [], color="#6f93b5", linewidth=5, solid_capstyle="butt", label="mean ± std"),
            Line2D([], [], color="black", marker="o", markersize=3, linestyle="none", label="mean"),
        ]
        if any(_published_ranges(run) for run in named.values()):
            handles.append(Patch(facecolor="0.9", edgecolor="0.4", hatch="////", label="published range"))
        _legend(figure, handles, [handle.get_label() for handle in handles])
        figure.supylabel("entries of z", fontsize=9)
    return figure


def _range_panel(axis: Axes, layer: str, named: Labelled) -> None:
    for x, run in enumerate(named.values()):
        z = {key: run.history[-1][f"z/{layer}/{key}"] for key in ("min", "max", "mean", "std")}
        axis.vlines(x, z["mean"] - z["std"], z["mean"] + z["std"], color="#6f93b5", linewidth=6)
        axis.plot([x, x], [z["min"], z["max"]], color="#0b3c5d", linewidth=1, marker="_", markersize=7)
        axis.plot(x, z["mean"], color="black", marker="o", markersize=3)
        if published := _published_ranges(run).get(layer):
            low, high = published
            axis.bar(
                x + 0.35, high - low, 0.2, low, facecolor="0.9", edgecolor="0.4", hatch="////", linewidth=0.6
            )
    axis.use_sticky_edges = False
    middle, width = (len(named) - 1) / 2, max(len(named), 3)
    axis.set_xlim(middle - width / 2, middle + width / 2)
    axis.set_xticks(range(len(named)), list(named), rotation=35, ha="right", fontsize=7)
    axis.grid(axis="x", visible=False)


def _legend(figure: Figure, handles: list, names: list[str]) -> None:
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
