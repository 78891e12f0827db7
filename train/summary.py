"""summary.json: the figures of a finished run, from which report.md is written and runs are compared.

The rows of the epochs are in metrics.csv beside it. A run has a summary just while it is finished.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hyperfast
from hyperfast.analysis import generator_costs
from hyperfast.nn import named_weights, parameter_counts, plain_state_dict
from train.checkpoint import CheckpointError, write_atomically
from train.task import ACCURACY, Metric, Row

if TYPE_CHECKING:
    from torch import nn

    from train.loop import Trainer
    from train.report import Published

FILE, METRICS = "summary.json", "metrics.csv"
FORMAT, VERSION = "hyperfast-run", 1
MB = 2**20
Summary = dict[str, Any]  # plain JSON values


@dataclass
class Run:
    """A finished run: its folder, its summary, one row for each epoch."""

    folder: Path
    summary: Summary
    history: list[Row]

    @property
    def model(self) -> str:
        return self.summary["recipe"].get("model", self.summary["title"])

    @property
    def metric(self) -> Metric:
        return Metric(**self.summary["metric"]) if "metric" in self.summary else ACCURACY

    @property
    def unit(self) -> str:
        return self.summary.get("unit", "images")

    @property
    def reported(self) -> str:
        """The part whose figure the run reports, at the best validation epoch."""
        return self.summary.get("reported", "test")

    @property
    def result(self) -> float:
        return self.metric.of(self.summary["best"], self.reported)

    @property
    def layers(self) -> list[str]:
        """The generated layers."""
        return list(self.summary["parameters"]["layers"])


def collect(
    trainer: Trainer,
    title: str,
    reason: str,
    command: str,
    published: Published | None = None,
    frozen: Path | None = None,
) -> Summary:
    """The figures of a run that has ended; the model holds the best epoch's weights.

    Sizes in bytes, times in seconds. frozen: the plain network's file, if written.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "metric": dataclasses.asdict(trainer.metric),
        "unit": trainer.data.unit,
        "reported": trainer.reported,
        "command": command,
        "reason": reason,
        "epochs": len(trainer.history),
        "planned_epochs": trainer.config.epochs,
        "steps": trainer.steps,
        "eval_batches": trainer.config.eval_batches,
        "cut_short": trainer.best["steps"] < trainer.steps_per_epoch,  # the best epoch, by --max-steps
        "best": trainer.best,
        "target": _target(trainer),
        "recipe": trainer.recipe,
        "circumstances": trainer.circumstances,
        "parameters": _parameters(trainer.model),
        "bytes": _sizes(trainer, frozen),
        "plain_file": frozen.name if frozen else None,
        "time": _time(trainer) | _gpu_memory(trainer.device),
        "machine": _machine(trainer.device),
        "published": dataclasses.asdict(published) if published else None,
    }


def write(out: Path, summary: Summary) -> None:
    """Write summary.json into the run's folder, atomically. Raises CheckpointError."""
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(out / FILE, lambda file: file.write(text.encode()))


def discard(out: Path) -> None:
    """The run goes on: what it had to sum up is out of date."""
    (out / FILE).unlink(missing_ok=True)


def load_run(folder: Path) -> Run:
    """Read a finished run. Raises CheckpointError, one line, for a run without summary or damaged files."""
    path = folder / FILE
    try:
        summary = json.loads(path.read_text())
        with open(folder / METRICS, newline="") as file:
            history = [_row(line) for line in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file; is {folder} a finished run?") from None
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read, {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: {FILE} or {METRICS} is damaged ({error})") from error
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the summary of a run of this project")
    if summary["version"] != VERSION:
        raise CheckpointError(f"{path}: format version {summary['version']}, this program reads {VERSION}")
    if len(history) != summary["epochs"]:
        raise CheckpointError(
            f"{folder}: {METRICS} has {len(history)} epochs, {FILE} {summary['epochs']}: continue the run"
        )
    return Run(folder, summary, history)


def _row(line: dict[str, str]) -> Row:
    """Numbers by column; a column may begin or end in the middle of a run."""
    return {name: int(text) if text.isdigit() else float(text) for name, text in line.items() if text}


def _parameters(model: nn.Module) -> dict[str, Any]:
    """`parameter_counts`, and for each generated layer the weights made, the parameters that make it alone,
    and the entries of its z; shared: parameters that make several layers."""
    costs = generator_costs(model)
    layers = {
        cost.name: {"generated": cost.generated, "generator": cost.generator, "embedding": cost.embedding}
        for cost in costs.layers
    }
    return parameter_counts(model) | {
        "shared": sum(cost.parameters for cost in costs.shared),
        "layers": layers,
    }


def _sizes(trainer: Trainer, frozen: Path | None) -> dict[str, int]:
    sizes = {name: (trainer.out / f"{name}.pt").stat().st_size for name in ("best", "last")}
    if frozen:
        sizes["plain"] = frozen.stat().st_size
    elif any(named_weights(trainer.model)) and not getattr(trainer.model, "conditional", False):
        sizes["plain"] = sum(t.nbytes for t in plain_state_dict(trainer.model).values())
    return sizes


def _time(trainer: Trainer) -> dict[str, float]:
    """Means over the epochs; step: a training step once its graph is captured, startup: all of what came
    before, input: share of training spent on data."""
    history, rate = trainer.history, f"{trainer.data.unit}_per_second"
    keys = ("seconds", "evaluation_seconds", "input_seconds", "steps")
    seconds, evaluation, waited, steps = (sum(row[key] for row in history) for key in keys)
    startup = sum(row.get("startup_seconds", 0.0) for row in history)
    count = sum(row[rate] * row["seconds"] for row in history)
    return {
        "epoch": seconds / len(history),
        "evaluation": evaluation / len(history),
        "step": (seconds - startup) / steps,
        "startup": startup,
        "input": waited / seconds,
        rate: count / seconds,
        "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _gpu_memory(device: torch.device) -> dict[str, int]:
    """Most bytes of tensors at a time, those of captured graphs included."""
    return {"gpu_memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _target(trainer: Trainer) -> dict[str, Any] | None:
    """The target, and if it was reached: after which epoch, and the seconds until then."""
    if trainer.config.target is None:
        return None
    row, target = trainer.target_row(), {trainer.metric.name: trainer.config.target}
    if row is None:
        return target | {"epoch": None}
    until = trainer.history[: row["epoch"]]
    return target | {
        "epoch": row["epoch"],
        "seconds": row["training_seconds"],
        "startup_seconds": sum(r.get("startup_seconds", 0.0) for r in until),
        "evaluation_seconds": sum(r["evaluation_seconds"] for r in until),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "CPU": cpu_name(),
        **gpu,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "hyperfast": hyperfast.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
