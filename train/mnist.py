"""A hypernetwork on MNIST beside its plain twin: `python -m train.mnist`.

It trains both, each an ordinary run in OUT/MODEL, and compares them in OUT: accuracy by epoch, filters,
embeddings, parameters (`train.twins`). Twins have the same recipe: the published one, or `tuned` for
`single`. Published: `shared` 99.05 % against 98.98 % plain after 10 epochs, `single` (Ha, Dai, Le,
"HyperNetworks", ICLR 2017) 99.24 % against 99.28 %. Here the test accuracy is the one at the best validation
epoch. `--no-twin` trains the one model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import hyperfast
from hyperfast.nn.init import INITIALISATIONS
from train import checkpoint, command, compare, report, twins
from train.augment import Augment, normalize
from train.checkpoint import CheckpointError
from train.command import (
    POSITIVE,
    RATE,
    Built,
    Command,
    Parser,
    fill_in,
    image_data,
    make_optimizer,
    number,
    placed,
    recipe_values,
)
from train.data import load_images
from train.images import ImageData
from train.loop import Interrupted, RunError, Trainer, exponential_by_step, make_folder, one_cycle
from train.models.mnist import MODELS, build_mnist
from train.ranks import goes_on, joined, mark, unmark, was_restarted

MEAN, STD = (0.1307,), (0.3081,)
VALIDATION = 10_000
PLAIN_AUGMENT = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "hue", "erasing"), 0)
AUGMENTS = {  # options of Augment
    "none": None,
    "shift": PLAIN_AUGMENT | {"crop_padding": 1, "degrees": 5},
}


@dataclass
class Published(report.Published):
    """best_epoch; first_error: validation error after epoch 1, percent."""

    best_epoch: int | None = None
    first_error: float | None = None


PUBLISHED = {
    "shared": Published(99.05, what="best epoch", best_epoch=8, first_error=4.04),
    "shared_plain": Published(98.98, what="best epoch", best_epoch=10, first_error=4.99),
    "single": Published(99.24, what="Ha, Dai, Le"),
    "single_plain": Published(99.28, what="Ha, Dai, Le"),
}


@dataclass(frozen=True)
class Recipe(command.Recipe):
    """How a model is trained. schedule, both by step: decay, times lr_decay down to min_lr; one_cycle, up to
    lr over the share warm_up of all steps and down to min_lr. augment: a name in AUGMENTS. clip 100: in
    practice none."""

    optimizer: str = "adam"
    schedule: str = "decay"
    epochs: int = 10
    batch_size: int = 1000
    lr: float = 5e-3
    weight_decay: float = 0.0
    clip: float = 100.0
    patience: int = 0
    min_lr: float = 1e-4
    lr_decay: float = 0.999
    warm_up: float = 0.1
    augment: str = "none"


TUNED = Recipe("adam", "one_cycle", epochs=20, batch_size=200, lr=4e-3, min_lr=0.0, augment="shift")
RECIPES = {  # of a hypernetwork and of its plain twin the same
    "report": dict.fromkeys(MODELS, Recipe()),
    "tuned": dict.fromkeys(("single", "single_plain"), TUNED),
}
SCHEDULES = {  # by options and steps of an epoch
    "decay": lambda args, steps: exponential_by_step(args.lr, args.lr_decay, args.min_lr),
    "one_cycle": lambda args, steps: one_cycle(args.epochs * steps, args.lr, args.min_lr, args.warm_up),
}


def parser() -> Parser:
    """The command line; None where the model or its recipe decides."""
    p = Parser(
        "python -m train.mnist",
        description="Train an MNIST hypernetwork and its plain twin, and compare them.",
        epilog="Recipes. " + command.describe_recipes(RECIPES),
    )
    inits = ("keep", *INITIALISATIONS)
    command.add_run_options(p, "MNIST", MODELS, "shared", "runs/mnist_MODEL", inits, init=None)
    command.add_state_option(p)
    command.add_shard_option(p)
    p.set_defaults(save_frozen=True)
    p.add_argument("--twin", action=argparse.BooleanOptionalAction, default=True, help="train the plain twin "
        "of a hypernetwork too, and compare them (%(default)s)")  # fmt: skip
    own = command.add_recipe_options(p, RECIPES, "report: as published (the default); tuned: this "
        "project's, for single", SCHEDULES)  # fmt: skip
    own("--min-lr", type=RATE, help="end of the learning rate")
    own("--lr-decay", type=POSITIVE, help="factor of the schedule decay, each step")
    own("--warm-up", type=number(float, 0, high=1), metavar="SHARE", help="of all steps, in one_cycle")
    own("--augment", choices=list(AUGMENTS), help="shift: by a pixel at most, rotated by 5 degrees at most")
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the model's recipe filled in. Exits with status 2 and one line for bad ones."""
    options = parser()
    args = options.parse_args(arguments)
    fill_in(args, options, RECIPES, "mnist")
    if args.min_lr > args.lr:
        options.error(f"--min-lr {args.min_lr} is larger than --lr {args.lr}")
    args.init = args.init or MODELS[args.model].init
    args.shard_generator = args.shard_generator and MODELS[args.model].twin is not None  # else it has none
    if args.shard_generator and args.model != "shared":
        options.error(command.NOT_SHARDED.format(args.model))
    if args.model == "single" and args.init == "keep":
        options.error("--init keep: the generator of single cannot start from a given weight")
    return args


def load_data(args: argparse.Namespace) -> tuple[ImageData, int]:
    """The three parts of MNIST, and a check sum of the labels."""
    data = load_images("mnist", args.data)
    plain = partial(normalize, mean=MEAN, std=STD)
    options = AUGMENTS[args.augment]
    augment = Augment(MEAN, STD, **options) if options else lambda images, chance: plain(images)
    return image_data(data, VALIDATION, args.seed, augment, plain)


def build(args: argparse.Namespace) -> Built:
    """Network, optimizer and step function of the recipe."""
    model = build_mnist(args.model, fused=args.fused, init=args.init)
    hyperfast.nn.generated_l2_(model, args.generated_l2)
    model = placed(model, args)
    return model, *make_optimizer(model, args)


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe."""
    torch.manual_seed(args.seed)
    recipe = recipe_values(args, Recipe) | {"validation_images": VALIDATION, "label_checksum": checksum}
    schedule = SCHEDULES[args.schedule](args, len(data.train[1]) // args.batch_size)
    return command.make_trainer(args, data, build(args), schedule, recipe)


def load_trained(folder: Path) -> nn.Module:
    """The network of a run with the weights of its best epoch, on the CPU, in evaluation mode. Raises
    CheckpointError."""
    path = folder / "best.pt"
    state = checkpoint.load(path, ("model", "recipe"))
    recipe = state["recipe"]
    if recipe.get("model") not in MODELS:
        raise CheckpointError(f"{path}: {recipe.get('model')} is no MNIST model")
    model = build_mnist(recipe["model"], fused=True, init=recipe["init"])
    checkpoint.load_model(model, state["model"], path)
    return model.eval()


def own_section(trainer: Trainer, args: argparse.Namespace) -> str:
    """What report.md of one run says beyond the usual."""
    sections = twins.embeddings_section(trainer.model, trainer.out), twins.counting_section(trainer.model)
    return "\n".join(filter(None, sections))


COMMAND = Command(
    "mnist",
    "MNIST",
    tuple(MODELS),
    parser,
    parse,
    make_trainer=lambda args: make_trainer(args, *load_data(args)),
    published=lambda args: PUBLISHED[args.model],
    extra=own_section,
    alone=("--no-twin",),
    build=build,
)


def plan_twins(args: argparse.Namespace, arguments: Sequence[str]) -> list[compare.Plan]:
    """The runs of a hypernetwork and of its plain twin, there or not. args: from `parse(arguments)`."""
    own = Parser(add_help=False, allow_abbrev=False)  # what is not for the single runs
    for name in ("--model", "--out"):
        own.add_argument(name)
    own.add_argument("--resume", action="store_true")
    own.add_argument("--twin", action="store_true")
    _, options = own.parse_known_args(arguments)
    pair = f"{args.model},{MODELS[args.model].twin}"
    runs = argparse.Namespace(command=COMMAND.name, models=pair, runs=[], out=args.out, resume=True)
    return compare.plan(runs, options)


def open_twins(args: argparse.Namespace, plans: Sequence[compare.Plan], restarted: bool) -> list[bool]:
    """Sure that the runs are there just when they are continued: which of them are not finished."""
    started = any(plan.started for plan in plans)
    if args.resume and not started:
        raise RunError(f"--resume: no run in {args.out}")
    if not (args.resume or goes_on(args.out, restarted)):
        compare.check_new(plans)
    left = [plan.finished() is None for plan in plans]
    make_folder(args.out)
    mark(args.out)
    return left


def run_twins(args: argparse.Namespace, arguments: Sequence[str], line: str) -> int:
    """Train a hypernetwork and its plain twin, the first process compares them; the exit status.

    args: from `parse(arguments)`. Raises RunError, CheckpointError, Interrupted.
    """
    plans = plan_twins(args, arguments)
    with joined(args) as ranks:  # which each training leaves: the report waits for nobody
        restarted = was_restarted(ranks)
        left = ranks.on_first(lambda: open_twins(args, plans, restarted))
    if not ranks.first:
        statuses = (compare.train(plan)[0] for plan in itertools.compress(plans, left))
        return next(filter(None, statuses), 0)
    try:
        finished, failures = compare.train_all(
            plans, lambda finished, failures: None, stops=lambda plan: True
        )
    except compare.Refused:
        if not any(plan.started for plan in plans):  # bad input leaves no folder
            unmark(args.out)
            with contextlib.suppress(OSError):
                args.out.rmdir()
        return 2
    if failures:
        return 1
    models = [load_trained(run.folder) for run in finished]
    path = twins.write(finished, models, [PUBLISHED[plan.name] for plan in plans], args.out, line)
    print(f"\n{path}")
    unmark(args.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a model failed, 2 after an error (one line; then nothing more is trained), 128 +
    signal if interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    if not (args.twin and MODELS[args.model].twin):
        return COMMAND.main(arguments)
    line, pair = COMMAND.line(arguments), (args.model, MODELS[args.model].twin)

    def how_to_go_on() -> str:
        saved = any((args.out / name / "last.pt").exists() for name in pair)
        return f"continue with: {line} --resume" if saved and not args.resume else f"continue with: {line}"

    def work() -> int:
        try:
            return run_twins(args, arguments, line)
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT) from None

    return command.exit_status(work, how_to_go_on)


if __name__ == "__main__":
    sys.exit(main())
