"""The parts of a study that compare trainings: models, optimizers, losses, augmentations.

Each is some runs of `python -m train.vgg`, a table of them and a picture, with the published figures beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hyperfast.analysis import table
from hyperfast.analysis.pictures import style
from train import compare, vgg
from train.comparison import epoch_panel, look
from train.loop import Row, write_csv
from train.report import save_figure
from train.studies.study import NORMED, PLAIN, Figures, Study
from train.studies.verdict import Quantity
from train.summary import Run

WITHIN = 1.0  # percent of accuracy from the best: converged
CONVERGED = (
    "Train: after the last epoch; validation and test: after the best one. Converged: the first epoch whose "
    f"validation accuracy is within {WITHIN:g} point of the best."
)


@dataclass(frozen=True)
class Published:
    """Best accuracy in percent on what the source calls validation, CIFAR-10's test images; epochs: until it
    converged; train: accuracy on training images at the end."""

    accuracy: float
    epochs: int | None = None
    train: float | None = None


@dataclass(frozen=True)
class Choice:
    """One run. arguments: of train.vgg. folder: in the study, where it is not the part's own."""

    name: str
    arguments: tuple[str, ...]
    report: Published | None = None
    notebook: Published | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Trainings:
    """A part. about: what is compared, a paragraph of the report. quantities: what batch norm is said to
    do."""

    name: str
    title: str
    about: str
    choices: tuple[Choice, ...]
    quantities: tuple[Quantity, ...] = ()

    def folder(self, choice: Choice) -> str:
        """Of a run, in the study's."""
        return choice.folder or f"{self.name}/{choice.name}"

    def plans(self, study: Study) -> list[compare.Plan]:
        """The runs. Exits with one line where the study's options do not fit them."""
        return [study.plan(self.folder(own), own.name, own.arguments) for own in self.choices]

    def run(self, study: Study, report: Callable[[], Any]) -> dict[str, str]:
        """Train what is not trained; why a run failed, by name. report(): called after every run.

        Raises compare.Refused where a run could not even start, Interrupted, CheckpointError.
        """
        figures = study.figures(self.name, self.name)
        if figures is not None and figures["complete"]:
            return {}
        plans = self.plans(study)

        def write(finished: list[Run], failures: dict[str, str]) -> None:
            runs = {plan.name: run for plan in plans for run in finished if run.folder == plan.folder}
            if runs or failures:
                self._write(study, runs, failures)
                report()

        return compare.train_all(plans, write, stops=lambda plan: not plan.started)[1]

    def _write(self, study: Study, runs: dict[str, Run], failures: dict[str, str]) -> None:
        rows = [
            {"run": own.name, "folder": self.folder(own)} | result(own, runs[own.name])
            for own in self.choices
            if own.name in runs
        ]
        (study.out / self.name).mkdir(exist_ok=True)
        if runs:
            write_csv(study.path(self.name, self.name, "csv"), rows)
            save_figure(picture(self.choices, runs), study.path(self.name, self.name, "png"))
        seconds = sum(row["seconds"] for row in rows)
        figures = {"complete": len(runs) == len(self.choices), "runs": rows, "failures": failures}
        study.save(self.name, self.name, figures | {"seconds": seconds})

    def values(self, figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
        """For `Quantity`: its figures by state and model."""
        return {"trained": {row["run"]: row for row in figures["runs"]}}

    def section(self, figures: Figures) -> str:
        """Of report.md, from what `run` saved."""
        header = ["run", "epochs", "best", "train accuracy", "validation accuracy", "test accuracy"]
        header += ["converged after", "training, s", "report", "converged after", "notebook"]
        rows = [_cells(row) for row in figures["runs"]]
        used = [i for i in range(len(header)) if i < 8 or any(row[i] for row in rows)]
        header, *rows = ([row[i] for i in used] for row in (header, *rows))
        parts = [self.about, table(header, rows)] if rows else [self.about]
        if figures["failures"]:
            parts.append(
                table(["not finished", "reason"], [list(item) for item in figures["failures"].items()])
            )
        if rows:
            parts += [CONVERGED, f"![{self.title}]({self.name}/{self.name}.png)"]
        return "\n\n".join(parts)


def result(choice: Choice, run: Run) -> Row:
    """What the table says of a run: accuracies in percent at the best validation epoch, the training one at
    the end, epochs until it converged, seconds of training, the published figures."""
    best, last, published = run.summary["best"], run.history[-1], {}
    for source, theirs in (("report", choice.report), ("notebook", choice.notebook)):
        if theirs:
            published |= {
                f"{source}_{key}": value for key, value in vars(theirs).items() if value is not None
            }
    return {
        "epochs": len(run.history),
        "best_epoch": best["epoch"],
        "train_accuracy": last["train_accuracy"],
        "validation_accuracy": best["validation_accuracy"],
        "test_accuracy": best["test_accuracy"],
        "converged": converged(run.history),
        "seconds": last["training_seconds"],
    } | published


def converged(history: Sequence[Row]) -> int:
    """The first epoch whose validation accuracy is within WITHIN of the best one's."""
    best = max(row["validation_accuracy"] for row in history)
    return next(row["epoch"] for row in history if row["validation_accuracy"] >= best - WITHIN)


def _cells(row: Row) -> list[str]:
    def percent(key: str) -> str:
        return f"{row[key]:.2f} %" if key in row else ""

    return [
        f"[{row['run']}]({row['folder']}/report.md)",
        str(row["epochs"]),
        str(row["best_epoch"]),
        *(percent(f"{part}_accuracy") for part in ("train", "validation", "test")),
        str(row["converged"]),
        f"{row['seconds']:.0f}",
        percent("report_accuracy"),
        str(row.get("report_epochs", "")),
        percent("notebook_accuracy"),
    ]


# -- picture -------------------------------------------------------------------------------------


def picture(choices: Sequence[Choice], runs: dict[str, Run]) -> Figure:
    """Training loss and validation accuracy by epoch, and the test accuracy at the best validation epoch
    beside the published figures."""
    done = {choice: runs[choice.name] for choice in choices if choice.name in runs}
    named = {choice.name: run for choice, run in done.items()}
    with style() as figure_class:
        figure = figure_class(figsize=(9.2, 2.6 + 0.22 * math.ceil(len(named) / 4)), layout="constrained")
        loss, accuracy, best = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        epoch_panel(loss, named, lambda run: "train_loss")
        epoch_panel(accuracy, named, lambda run: "validation_accuracy")
        loss.set_ylabel("training loss")
        accuracy.set_ylabel("validation accuracy (%)")
        accuracy.set_ylim(
            0, 1.1 * max(row["validation_accuracy"] for run in done.values() for row in run.history)
        )
        for i, (choice, run) in enumerate(done.items()):
            dots = [(run.result, {}, 4)]
            dots += [(theirs.accuracy, hollow, 3) for theirs, hollow in _published(choice)]
            for x, options, order in dots:
                best.plot(x, i, clip_on=False, **look(i) | {"linestyle": "none"} | options, zorder=order)
        best.set_yticks(range(len(named)), list(named))
        best.set_ylim(len(named) - 0.5, -0.5)
        best.grid(axis="y", visible=False)
        best.set_xlabel("best test accuracy (%)")
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        if handles := _published_handles(done):
            best.legend(handles=handles, loc="best", fontsize=7)
    return figure


REPORT, NOTEBOOK = {"markerfacecolor": "white"}, {"markerfacecolor": "white", "marker": "x"}


def _published(choice: Choice) -> list[tuple[Published, dict[str, Any]]]:
    both = ((choice.report, REPORT), (choice.notebook, NOTEBOOK))
    return [(theirs, options) for theirs, options in both if theirs]


def _published_handles(done: dict[Choice, Run]) -> list[Line2D]:
    grey = {"color": "0.3", "linestyle": "none", "marker": "o"}
    handles = [Line2D([], [], **grey, label="here")]
    if any(choice.report for choice in done):
        handles.append(Line2D([], [], **grey | REPORT, label="report"))
    if any(choice.notebook for choice in done):
        handles.append(Line2D([], [], **grey | NOTEBOOK, label="notebook"))
    return handles if len(handles) > 1 else []


# -- the parts -----------------------------------------------------------------------------------


def _both(key: str) -> tuple[float, float]:
    """Of the report, without and with batch norm."""
    return getattr(vgg.PUBLISHED[PLAIN], key), getattr(vgg.PUBLISHED[NORMED], key)


ACCURACY = (
    Quantity(
        "test_accuracy", "test, best epoch", "better accuracy", _both("accuracy"), larger=True, unit="%"
    ),
    Quantity(
        "train_accuracy",
        "training, at the end",
        "better accuracy",
        _both("train_accuracy"),
        larger=True,
        unit="%",
    ),
)


def _model(name: str, label: str | None = None) -> Choice:
    """A network with its own recipe; several parts look at it."""
    theirs = vgg.PUBLISHED[name]
    published = Published(theirs.accuracy, train=theirs.train_accuracy)
    return Choice(label or name, ("--model", name), published, folder=f"models/{name}")


def models(names: Sequence[str]) -> Trainings:
    about = "Each with its own recipe (`--recipe report`). The other parts look at these networks."
    return Trainings("models", "Models", about, tuple(map(_model, names)), ACCURACY)


def _normed(name: str, *arguments: str, **published: Published) -> Choice:
    return Choice(name, ("--model", NORMED, *arguments), **published)


def _optimizer(
    name: str, optimizer: str, rate: float, decay: float, *figures: float, schedule: str = "steps"
) -> Choice:
    """figures: best accuracy and epochs of the report, best accuracy of the notebook."""
    arguments = (
        "--optimizer",
        optimizer,
        "--lr",
        str(rate),
        "--weight-decay",
        str(decay),
        "--schedule",
        schedule,
    )
    theirs = (
        {"report": Published(figures[0], int(figures[1])), "notebook": Published(figures[2])}
        if figures
        else {}
    )
    return _normed(name, *arguments, **theirs)


OPTIMIZERS = Trainings(
    "optimizers",
    "Optimizers",
    f"{NORMED}: SGD and Nesterov's (lr 0.01, momentum 0.9, weight decay 5e-4), Adam and RMSprop (lr 1e-3, no "
    "decay), AdamW (lr 1e-3, decay 0.01); the learning rate falls in steps or as a cosine.",
    (
        _optimizer("sgd_steps", "sgd", 0.01, 5e-4, 89.5, 15, 81.20),
        _optimizer("sgd_cosine", "sgd", 0.01, 5e-4, schedule="cosine"),
        _optimizer("adam_steps", "adam", 1e-3, 0.0, 89.1, 12, 82.63),
        _optimizer("adamw_steps", "adamw", 1e-3, 0.01, 89.8, 13, 82.98),
        _optimizer("rmsprop_steps", "rmsprop", 1e-3, 0.0, 88.7, 16, 75.16),
        _optimizer("nesterov_steps", "nesterov", 0.01, 5e-4, 89.7, 14, 82.27),
    ),
)
LOSSES = Trainings(
    "losses",
    "Losses",
    f"{NORMED} with its recipe, but the loss: cross-entropy (the model above), focal (gamma 2), label "
    "smoothing (0.1), cross-entropy and center loss. The training loss is each one's own.",
    (
        _model(NORMED, "cross_entropy"),
        _normed("focal", "--loss", "focal", notebook=Published(59.87)),
        _normed("label_smoothing", "--loss", "label_smoothing"),
        _normed("center", "--loss", "center"),
    ),
)
AUGMENTATIONS = Trainings(
    "augmentations",
    "Augmentations",
    f"{NORMED} with its recipe, but the augmentation: crop and flip is the recipe's (the model above), the "
    "others but `none` add to it Cutout, AutoAugment, CutMix, colour jitter, rotation.",
    (
        _normed("none", "--augment", "none"),
        _model(NORMED, "crop_flip"),
        _normed("cutout", "--augment", "cutout"),
        _normed("autoaugment", "--augment", "autoaugment"),
        _normed("cutmix", "--augment", "cutmix", notebook=Published(87.75)),
        _normed("jitter", "--augment", "jitter"),
        _normed("rotation", "--augment", "rotation"),
    ),
)
