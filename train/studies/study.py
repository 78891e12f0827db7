"""A study: its options, which all its parts share, and the files that say what is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train import vgg
from train.checkpoint import CheckpointError, write_atomically
from train.compare import Plan
from train.loop import RunError
from train.summary import cpu_name

FILE, FORMAT, VERSION = "study.json", "hyperfast-vgg-study", 1
PLAIN, NORMED = "vgg_a", "vgg_a_bn"  # without and with batch norm
Figures = dict[str, Any]  # plain JSON values


@dataclass(frozen=True)
class Effort:
    """How much an analysis looks at. batches: of BATCH images; activation_batches: of them, for activations;
    landscape_steps: of the training at each rate; range_steps: of the learning rate range test."""

    batches: int
    activation_batches: int
    landscape_steps: int
    range_steps: int


BATCH = 128
FULL = Effort(batches=50, activation_batches=5, landscape_steps=200, range_steps=100)
QUICK = Effort(batches=4, activation_batches=4, landscape_steps=10, range_steps=30)


@dataclass(frozen=True)
class Options:
    """What the figures of a study depend on. subset: training images, None for all. precision: of the
    trainings; networks are looked at in float32."""

    models: tuple[str, ...]
    hyper: str | None
    epochs: int
    subset: int | None
    precision: str
    seed: int

    def plain(self) -> dict[str, Any]:
        """As in the file."""
        return vars(self) | {"models": ",".join(self.models)}


@dataclass(frozen=True)
class Study:
    """command: the line that continues it. data, device, threads: as for `python -m train.vgg`."""

    out: Path
    options: Options
    data: Path | None
    device: str
    threads: int | None
    command: str

    @property
    def effort(self) -> Effort:
        return FULL if self.options.subset is None else QUICK

    def plan(self, folder: str, name: str, arguments: Sequence[str]) -> Plan:
        """A run of `python -m train.vgg` with these arguments, in a folder of the study. Exits with one line
        where the options do not fit."""
        own = self.options
        given = {
            "out": self.out / folder,
            "epochs": own.epochs,
            "seed": own.seed,
            "hyper": own.hyper,
            "subset": own.subset,
            "precision": own.precision,
            "data": self.data,
            "device": self.device,
            "threads": self.threads,
        }
        texts = [
            text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))
        ]
        plan = Plan(vgg.COMMAND, name, self.out / folder, [*vgg.COMMAND.alone, *arguments, *texts])
        vgg.COMMAND.parse(plan.arguments)
        return plan

    def begin(self) -> None:
        """Write down the options. Raises RunError where the folder has runs of a study with others."""
        path = self.out / FILE
        if path.exists() and any(self.out.rglob("last.pt")):
            then, now = _read(path)["options"], self.options.plain()
            differ = [
                f"{name} was {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]
            ]
            if differ:
                raise RunError(
                    f"{path}: the study has other options: {'; '.join(differ)}; choose another --out"
                )
        else:
            _write(path, {"options": self.options.plain()})

    def path(self, part: str, name: str, suffix: str) -> Path:
        """Of a file of a part: OUT/PART/NAME.SUFFIX."""
        return self.out / part / f"{name}.{suffix}"

    def figures(self, part: str, name: str) -> Figures | None:
        """What `save` wrote; None if nothing was."""
        path = self.path(part, name, "json")
        return _read(path) if path.exists() else None

    def save(self, part: str, name: str, figures: Figures) -> None:
        """The figures of a table or picture, its last file: whoever reads it finds the others."""
        machine = {
            "device": _device(self.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        _write(self.path(part, name, "json"), machine | figures)


def _device(name: str) -> str:
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else cpu_name()


def _write(path: Path, content: Figures) -> None:
    text = json.dumps(_finite({"format": FORMAT, "version": VERSION, **content}), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> Figures:
    """Raises CheckpointError for a file that is damaged or not of a study."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a file of a study of this project")
    if content["version"] != VERSION:
        raise CheckpointError(f"{path}: format version {content['version']}, this program reads {VERSION}")
    return content
