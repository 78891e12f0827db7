"""Models side by side: `python -m train.compare --models full,standard_deep --epochs 1 --out runs/compare`.

Every model is an ordinary run of `python -m train.cifar100`, or of another --command, in OUT/MODEL, in a
process of its own, so that times and peak memory are those of the model alone and a model that fails leaves
the others. All other options go to it. compare.md, its tables and pictures, is written anew after every
model; `--runs` adds runs that were finished before, or compares those alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from train import comparison
from train.checkpoint import CheckpointError
from train.command import PARENT, Command, Parser
from train.loop import Interrupted, RunError, make_folder
from train.ranks import alone
from train.summary import FILE, Run, load_run

COMMANDS = ("cifar100", "cifar10", "vgg", "conditional", "mnist", "charlm")


def training_command(name: str) -> Command:
    """The command `python -m train.NAME`."""
    return importlib.import_module(f"train.{name}").COMMAND


def program(training: Command) -> list[str]:
    """What starts it in a process of its own."""
    return [sys.executable, "-m", f"train.{training.name}"]


class Refused(RunError):
    """A training ended with status 2: it has said, in one line, what is wrong with its input."""


@dataclass
class Plan:
    """A run to make: what it is called, its folder, and the arguments of the training command but
    `--resume`."""

    training: Command
    name: str
    folder: Path
    arguments: list[str]

    @property
    def started(self) -> bool:
        return (self.folder / "last.pt").exists()

    @property
    def command(self) -> str:
        return self.training.line([*self.arguments, *self.resume])

    @property
    def resume(self) -> list[str]:
        return ["--resume"] if self.started else []

    def finished(self) -> Run | None:
        """The run if it is finished and was made with these very arguments."""
        if not (self.folder / FILE).exists():
            return None
        run = load_run(self.folder)
        command = run.summary["command"].removesuffix(" --resume")
        return run if command == self.training.line(self.arguments) else None


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is for the training command."""
    p = Parser(
        "python -m train.compare",
        description="Train several models and compare them.",
        epilog="All other options go to python -m train.cifar100, or to what --command names.",
        allow_abbrev=False,  # --model is not --models
    )
    p.add_argument("--command", choices=COMMANDS, default=COMMANDS[0], help="trains them (%(default)s)")
    p.add_argument("--models", help="names with commas between them (all of the command; none with --runs)")
    p.add_argument("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="finished runs to add")
    p.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (%(default)s)")
    p.add_argument("--resume", action="store_true", help="continue: finished models are not trained again")
    return p


def _models(text: str, choices: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise RunError(f"--models: unknown model {name!r}; choose from {', '.join(choices)}")
        if names.count(name) > 1:
            raise RunError(f"--models: {name} is named twice")
    return names


def plan(args: argparse.Namespace, options: list[str]) -> list[Plan]:
    """The runs to make. Raises RunError for options that belong to one run, and for runs that exist."""
    training = training_command(args.command)
    models = [] if args.runs else list(training.models)
    if args.models is not None:
        models = _models(args.models, training.models)
    if options and not models:
        raise RunError(f"{shlex.join(options)}: options of the training, but no --models to train")
    own = training.parser()
    own.set_defaults(model=None)
    if own.parse_args(options).model is not None:
        raise RunError("--model: every model is one of --models")
    plans = []
    for model in models:
        folder = args.out / model
        arguments = [*training.alone, "--model", model, "--out", str(folder), *options]
        plans.append(Plan(training, model, folder, arguments))
        made = training.parse(arguments).model  # leaves with one line if an option does not fit the model
        if made != model:
            raise RunError(f"--models {model}: the other options make it {made}; name that one instead")
    if not args.resume:
        check_new(plans)
    return plans


def check_new(plans: Sequence[Plan]) -> None:
    """Raises RunError for runs that exist."""
    if exist := [str(p.folder) for p in plans if p.started]:
        raise RunError(f"{', '.join(exist)}: already there; continue with --resume, or choose another --out")


def train(p: Plan) -> tuple[int, int | None]:
    """Make one run in a process of its own: its exit status, and the signal that came meanwhile, if any.

    Its process group is its own too: a signal reaches it once, from here, and it stops after a whole step.
    Under torchrun it is made here, by the ranks that there are.
    """
    if "RANK" in os.environ:
        os.environ[PARENT] = "1"
        try:
            status = p.training.main([*p.arguments, *p.resume])
        finally:
            del os.environ[PARENT]
        return status, status - 128 if status > 128 else None
    received: list[int] = []
    process: subprocess.Popen | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    command = [*program(p.training), *p.arguments, *p.resume]
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, process_group=0, env={**os.environ, PARENT: "1"})
        if received:  # before there was a process to forward it to
            process.send_signal(received[0])
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, received[0] if received else None


def run(args: argparse.Namespace, options: list[str], command: str) -> int:
    """Train what is to be trained, compare what there is; the exit status.

    Raises RunError, CheckpointError, before anything is trained, for bad input; Interrupted.
    """
    alone("train.compare")
    earlier = [load_run(folder) for folder in args.runs]
    plans = plan(args, options)
    make_folder(args.out)

    def write(finished: list[Run], failures: dict[str, str]) -> None:
        if finished or earlier:
            comparison.write([*finished, *earlier], args.out, command, failures)

    finished, failures = train_all(plans, write)
    if not plans:
        write([], {})
    if finished or earlier:
        print(f"\n{args.out / comparison.FILE}")
    return 1 if failures else 0


def train_all(
    plans: list[Plan],
    write: Callable[[list[Run], dict[str, str]], None],
    stops: Callable[[Plan], bool] = lambda plan: False,
) -> tuple[list[Run], dict[str, str]]:
    """Train what is not finished, one after the other: the runs, and why a plan has none, by name.

    write(runs, failures) after each with what there is so far. stops(plan): what this one refuses is no use
    to the next. Raises Interrupted, CheckpointError; Refused where it stops.
    """
    before = [p.finished() for p in plans]
    finished: list[Run] = []
    failures: dict[str, str] = {}
    for i, (p, done) in enumerate(zip(plans, before, strict=True), start=1):
        print(f"\n== {p.name}, {i} of {len(plans)}: {'finished before' if done else p.command}", flush=True)
        if done is None:
            status, stopped = train(p)
            if stopped is not None:
                write(finished, failures)
                raise Interrupted(stopped)
            try:
                done = _outcome(p, status)
            except (RunError, CheckpointError) as error:
                if isinstance(error, Refused) and stops(p):
                    raise
                failures[p.name] = str(error)
        if done is not None:
            finished.append(done)
        write(finished, failures)
    for name, why in failures.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    return finished, failures


def _outcome(p: Plan, status: int) -> Run:
    """The run that a training with this exit status left. Raises RunError, Refused at status 2, or
    CheckpointError if none."""
    if status == 2:
        raise Refused(f"exit status 2; continue with: {p.command}")
    if status:
        ending = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        raise RunError(f"{ending}; continue with: {p.command}")
    return load_run(p.folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a model failed, 2 after an error (one line), 128 + signal if interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args, options = parser().parse_known_args(arguments)
    command = f"python -m train.compare {shlex.join(arguments)}".strip()
    try:
        return run(args, options, command)
    except (RunError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        again = command if args.resume else f"{command} --resume"
        print(f"stopped; continue with: {again}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
