"""report.md of a study: what is finished so far, in the order of the published report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperfast.analysis import table
from train.checkpoint import write_atomically
from train.studies.analyses import Part
from train.studies.study import Figures, Study
from train.studies.trainings import Trainings
from train.studies.verdict import Quantity, Values, sentences, summary

FILE = "report.md"
ORDER = (
    "lr_finder",
    "landscape",
    "predictiveness",
    "max_difference",
    "smoothness",
    "activations",
    "health",
    "weights",
)


@dataclass(frozen=True)
class Section:
    """A finished table and picture."""

    title: str
    text: str
    quantities: Sequence[Quantity]
    values: Values
    figures: Figures


def write(study: Study, trainings: Sequence[Trainings], parts: Sequence[Part]) -> Path:
    """Write report.md of what is there; returns its path. Raises CheckpointError."""
    missing: list[str] = []
    found = [*_trainings(study, trainings, missing), *_analyses(study, parts, missing)]
    lines = [f"# VGG-A and batch normalisation on CIFAR-10\n\n{_standing(study)}"]
    if effects := summary([(section.quantities, section.values) for section in found]):
        lines.append(f"## Batch norm's effect\n\n{effects}\n\n{SOURCES}")
    for i, section in enumerate(found, start=1):
        own = [
            f"## {i}. {section.title}",
            section.text,
            "\n".join(sentences(section.quantities, section.values)),
        ]
        lines.append("\n\n".join(filter(None, own)))
    if missing:
        lines.append(f"## Not done yet\n\n{', '.join(missing)}.")
    if found:
        lines.append(_time(found))
    lines.append(f"## Command\n\n```\n{study.command}\n```\n")
    path = study.out / FILE
    write_atomically(path, lambda file: file.write("\n\n".join(lines).encode()))
    return path


SOURCES = (
    "Report and notebook: the published report on VGG-A and its public notebook, 30 and 15 epochs. What they "
    "call validation is CIFAR-10's test set; here the test accuracy is that of the best epoch by validation "
    "images of our own."
)

SECONDS = "Of trainings all their epochs without evaluation; some are in several parts."


def _trainings(study: Study, trainings: Sequence[Trainings], missing: list[str]) -> Iterator[Section]:
    for part in trainings:
        figures = study.figures(part.name, part.name)
        if figures is None or not figures["complete"]:
            missing.append(part.name)
        if figures is not None:
            yield Section(part.title, part.section(figures), part.quantities, part.values(figures), figures)


def _analyses(study: Study, parts: Sequence[Part], missing: list[str]) -> Iterator[Section]:
    by_name = {analysis.name: (part.name, analysis) for part in parts for analysis in part.analyses}
    for name in ORDER:
        part, analysis = by_name[name]
        figures = study.figures(part, name)
        if figures is None:
            missing.append(name)
        else:
            text = analysis.section(part, figures)
            yield Section(analysis.title, text, analysis.quantities, analysis.values(figures), figures)


def _time(found: Sequence[Section]) -> str:
    rows = [
        [section.title, f"{own['seconds']:.0f}", own["device"], own["threads"], own["torch"]]
        for section in found
        for own in (section.figures,)
    ]
    return f"## Time\n\n{table(['', 'seconds', 'machine', 'threads', 'torch'], rows)}\n\n{SECONDS}"


def _standing(study: Study) -> str:
    """What stands behind the figures."""
    own = study.options
    images = "all training images" if own.subset is None else f"{own.subset:,} images"
    rows = [
        [name.replace("_", " "), value if value is not None else ""] for name, value in own.plain().items()
    ]
    text = table(["option", "value"], rows)
    if own.subset is not None:
        text += (
            f"\n\n**A quick look**: every training is {own.epochs} epoch{'s' if own.epochs > 1 else ''} on "
            f"{images}, a tenth of them for validation, and the analyses look at few batches. It shows that "
            "everything runs, not who is right."
        )
    return text
