"""VGG-A and batch norm on CIFAR-10, the whole study: `python -m train.vgg_study all --out runs/vgg_study`.

Parts: `models` (with and without batch norm), `optimizers`, `losses`, `augmentations` compare trainings of
`python -m train.vgg`; `lr_finder`, `landscape`, `gradients`, `activations`, `weights`, look at the
networks of `models` with the functions of `hyperfast.analysis`, as they start and trained. Every table is a
CSV, every picture a PNG, in OUT/PART; OUT/report.md puts them together with the published figures beside and
says where batch norm's effect is the reported one. The same command again continues: what is finished is
kept.

`--subset N` is a quick look: N images, one epoch, few batches in the analyses.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from train import compare
from train.checkpoint import CheckpointError
from train.command import COUNT, Parser, number, set_up_device
from train.data import CIFAR10, DataError
from train.loop import Interrupted, RunError, make_folder
from train.models.vgg import HYPERS, MODELS
from train.studies import document
from train.studies.analyses import PARTS, Part, Subjects
from train.studies.study import NORMED, PLAIN, Options, Study
from train.studies.trainings import AUGMENTATIONS, LOSSES, OPTIMIZERS, models

EPOCHS, QUICK_EPOCHS = 15, 1  # the notebook's, and those of a subset
COMPARED = OPTIMIZERS, LOSSES, AUGMENTATIONS
NAMES = ("models", *(part.name for part in (*COMPARED, *PARTS)))


def parser() -> Parser:
    p = Parser(
        "python -m train.vgg_study",
        description="Study VGG-A with and without batch norm on CIFAR-10, one part or all of it. The same "
        "command again continues.",
        epilog="For all other options see python -m train.vgg.",
    )
    add = p.add_argument
    add("part", choices=(*NAMES, "all"), metavar="part", help=", ".join((*NAMES, "all")))
    add("--models", default=f"{PLAIN},{NORMED}", help="networks to compare (%(default)s)")
    add("--hyper", choices=list(HYPERS), help="all of them as hypernetworks, as in train.vgg")
    add("--epochs", type=COUNT, help=f"of every training ({EPOCHS}; {QUICK_EPOCHS} of a subset)")
    add("--subset", type=COUNT, metavar="N", help="a quick look: N images, few batches in the analyses")
    add("--seed", type=number(int, 0), default=42)
    add("--out", type=Path, default=Path("runs/vgg_study"), help="folder (%(default)s)")
    add("--data", type=Path, help="folder with CIFAR-10, as in train.vgg")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=found, help="cpu, cuda or cuda:N (cuda where there is one)")
    precisions = ("fp32", "tf32", "bf16")
    add("--precision", choices=precisions, default="fp32", help="of the trainings (%(default)s)")
    add("--threads", type=COUNT, help="CPU threads (torch's choice)")
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; exits with status 2 and one line for bad ones."""
    p = parser()
    args = p.parse_args(arguments)
    args.models = tuple(name.strip() for name in args.models.split(","))
    for name in args.models:
        if name not in MODELS:
            p.error(f"--models: unknown model {name!r}; choose from {', '.join(MODELS)}")
    if len(set(args.models)) < max(len(args.models), 2):
        p.error(f"--models: two different models at least are compared, got {', '.join(args.models)}")
    if args.subset and args.subset > CIFAR10.train_rows:
        p.error(f"--subset: CIFAR-10 has {CIFAR10.train_rows} training images, got {args.subset}")
    args.epochs = args.epochs or (QUICK_EPOCHS if args.subset else EPOCHS)
    return args


def run(args: argparse.Namespace, command: str) -> int:
    """The part, or all parts; the exit status, 1 where a training failed.

    Raises RunError (compare.Refused where a training has said why), CheckpointError, DataError, Interrupted.
    """
    set_up_device(argparse.Namespace(**vars(args) | {"precision": "fp32"}))  # in which networks are looked at
    options = Options(args.models, args.hyper, args.epochs, args.subset, args.precision, args.seed)
    study = Study(args.out, options, args.data, args.device, args.threads, command)
    trainings = {part.name: part for part in (models(args.models), *COMPARED)}
    wanted = NAMES if args.part == "all" else (args.part,)
    if any(name not in trainings for name in wanted):
        wanted = tuple(dict.fromkeys(("models", *wanted)))  # the others look at these networks

    for name in trainings.keys() & set(wanted):
        trainings[name].plans(study)  # bad options are seen before anything is written
    make_folder(args.out)
    study.begin()

    def report() -> Path:
        return document.write(study, [*trainings.values()], PARTS)

    failed, subjects = [], Subjects(study)
    for name in wanted:
        if name in trainings:
            failed += [name] if trainings[name].run(study, report) else []
        elif "models" in failed:
            raise RunError(f"{name}: not all networks of models are trained")
        else:
            run_analyses(next(part for part in PARTS if part.name == name), study, subjects, report)
    print(f"\n{report()}")
    return 1 if failed else 0


def run_analyses(part: Part, study: Study, subjects: Subjects, report: Callable[[], Path]) -> None:
    """Those that are not finished."""
    for analysis in part.analyses:
        if study.figures(part.name, analysis.name) is None:
            analysis.run(study, part.name, subjects)
            report()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a training failed, 2 after an error (one line), 128 + signal if interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    command = f"python -m train.vgg_study {shlex.join(arguments)}"
    try:
        return run(args, command)
    except compare.Refused:
        return 2
    except (RunError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"stopped; continue with: {command}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
