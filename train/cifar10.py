"""Wide residual networks on CIFAR-10, their kernels learned or made by a hypernetwork:
`python -m train.cifar10 --model hyper_wrn_40_1`.

Ha, Dai, Le, "HyperNetworks" (ICLR 2017). Test error there: WRN-40-1 6.73 %, hyper WRN-40-1 8.02 %, WRN-40-2
5.66 %, hyper WRN-40-2 7.23 %. Here the test accuracy is the one at the best validation epoch.

`--speed-test --model-path FILE` measures a trained network instead: images/s and test accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hyperfast
from train import checkpoint, command, report, speed_test
from train.augment import CROP_FLIP, Augment, normalize
from train.command import (
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
from train.loop import Trainer, one_cycle, piecewise
from train.models.wrn import MODELS, build_wrn, rename_published_
from train.ranks import alone

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
VALIDATION = 5000
SPEED_TEST_BATCH = 100


@dataclass
class Published(report.Published):
    """parameters: of the network, in millions, as published."""

    what: str = "Ha, Dai, Le"
    parameters: float = 0.0


PUBLISHED = {
    "wrn_40_1": Published(accuracy=93.27, parameters=0.563),
    "hyper_wrn_40_1": Published(accuracy=91.98, parameters=0.097),
    "wrn_40_2": Published(accuracy=94.34, parameters=2.236),
    "hyper_wrn_40_2": Published(accuracy=92.77, parameters=0.148),
}


@dataclass(frozen=True)
class Recipe(command.Recipe):
    """How a model is trained. schedule: a name in SCHEDULES. decay: which weights weight_decay is for, all or
    the convolutions' kernels. generated_l2: the same for generated kernels. warm_up: the share of all steps
    in which one_cycle goes up. clip 100: in practice none."""

    optimizer: str = "adam"
    schedule: str = "halving"
    epochs: int = 200
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 5e-4
    clip: float = 100.0
    patience: int = 0
    decay: str = "all"
    generated_l2: float = 0.0
    warm_up: float = 0.2


# 672k steps of 128 out of 45,000 images
PAPER = Recipe(schedule="paper", epochs=1915, weight_decay=5e-6, decay="kernels", generated_l2=5e-6)
RECIPES = {"report": dict.fromkeys(MODELS, Recipe()), "paper": dict.fromkeys(MODELS, PAPER)}

HALVED = (0.168, 0.336, 0.4, 0.45, 0.55, 0.6)  # the public code: 168k, 336k, ... of 1M steps
PAPER_RATES = (1, 0.5, 0.1, 0.025)  # 2e-3, 1e-3, 2e-4, 5e-5, each for a quarter of 672k steps


def _piecewise(args: argparse.Namespace, steps: int, factors: Sequence[float], shares: Sequence[float]):
    """lr times `factors`, which change after `shares` of all steps."""
    return piecewise([args.lr * f for f in factors], [args.epochs * steps * share for share in shares])


SCHEDULES: dict[str, Callable[[argparse.Namespace, int], Callable[[int, int], float]]] = {
    # by options and steps of an epoch
    "halving": lambda args, steps: _piecewise(args, steps, [2.0**-i for i in range(7)], HALVED),
    "paper": lambda args, steps: _piecewise(args, steps, PAPER_RATES, (0.25, 0.5, 0.75)),
    "one_cycle": lambda args, steps: one_cycle(args.epochs * steps, args.lr, 0.0, args.warm_up),
}


def parser() -> Parser:
    """The command line; None where the model's recipe decides."""
    p = Parser(
        "python -m train.cifar10",
        description="Train a wide residual network, plain or with generated kernels, on CIFAR-10.",
        epilog="Recipes. " + command.describe_recipes(RECIPES),
    )
    command.add_run_options(p, "CIFAR-10", MODELS, "hyper_wrn_40_1", "runs/cifar10_MODEL", init="hyperfan")
    # nothing here is factored; how much L2 is a matter of the recipe
    p.set_defaults(state_dtype="fp32", generated_l2=None)
    add = p.add_argument
    add("--checkpoint-path", type=Path, dest="out", metavar="OUT", help="the same as --out")
    add("--init-from", type=Path, metavar="FILE", help="start from this network: best.pt of a run, a "
        "published checkpoint")  # fmt: skip
    own = command.add_recipe_options(
        p, RECIPES, "report: the public version's (the default); paper: the paper's", SCHEDULES
    )
    own("--decay", choices=("all", "kernels"), help="what the weight decay is for")
    own("--warm-up", type=number(float, 0, high=1), metavar="SHARE", help="of all steps, in one_cycle")
    test = p.add_argument_group("speed test, instead of a training").add_argument
    test("--speed-test", action="store_true", help="images/s and test accuracy of --model-path, in batches "
         f"of --batch-size ({SPEED_TEST_BATCH})")  # fmt: skip
    test("--model-path", type=Path, metavar="FILE", help="best.pt, last.pt or frozen.safetensors of a run, a "
         "published checkpoint; it says which model it is, and --model must not say another")  # fmt: skip
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the model's recipe filled in. Exits with status 2 and one line for bad ones.

    wanted_model: --model as it was given, None where it was not.
    """
    options = parser()
    default = options.get_default("model")
    options.set_defaults(model=None)
    args = options.parse_args(arguments)
    args.wanted_model, args.model = args.model, args.model or default
    if args.speed_test != (args.model_path is not None):
        options.error("--speed-test and --model-path need each other")
    if args.speed_test and args.batch_size is None:
        args.batch_size = SPEED_TEST_BATCH
    fill_in(args, options, RECIPES, "cifar10")
    return args


def load_data(args: argparse.Namespace) -> tuple[ImageData, int]:
    """The three parts of CIFAR-10, and a check sum of the labels."""
    data = load_images("cifar10", args.data)
    augment = Augment(MEAN, STD, **CROP_FLIP)
    return image_data(data, VALIDATION, args.seed, augment, partial(normalize, mean=MEAN, std=STD))


def parameter_groups(model: nn.Module, decay: str) -> list[dict[str, Any]] | None:
    """None: weight decay is for all parameters. "kernels": for those of ordinary convolutions alone."""
    if decay == "all":
        return None
    kernels = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    return [{"params": kernels}, {"params": others, "weight_decay": 0.0}]


def build(args: argparse.Namespace) -> Built:
    """Network, optimizer and step function of the recipe."""
    model = build_wrn(args.model, fused=args.fused, init=args.init)
    if args.init_from and not args.resume:
        state = checkpoint.load_weights(args.init_from)
        rename_published_(state)
        checkpoint.load_model(model, state, args.init_from)
    hyperfast.nn.generated_l2_(model, args.generated_l2)
    model = placed(model, args)
    return model, *make_optimizer(model, args, parameter_groups(model, args.decay))


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe."""
    torch.manual_seed(args.seed)
    built = build(args)
    recipe = recipe_values(args, Recipe) | {"init_from": str(args.init_from or "none")}
    recipe |= {"validation_images": VALIDATION, "label_checksum": checksum}
    schedule = SCHEDULES[args.schedule](args, len(data.train[1]) // args.batch_size)
    return command.make_trainer(args, data, built, schedule, recipe)


def published_table(trainer: Trainer, args: argparse.Namespace) -> str:
    """The figures of the paper and this run's, as a section of the report."""
    rows = [
        [name, f"{100 - p.accuracy:.2f} %", f"{p.parameters:.3f} M", "", ""] for name, p in PUBLISHED.items()
    ]
    count = sum(p.numel() for p in trainer.model.parameters())
    for row in rows:
        if row[0] == args.model:
            row[3:] = f"{100 - trainer.best['test_accuracy']:.2f} %", f"{count / 1e6:.3f} M"
    header = ["model", "test error, published", "parameters, published", "test error", "parameters"]
    note = (
        'Ha, Dai, Le, "HyperNetworks" (ICLR 2017): 672k steps, recipe `paper`. Parameters here are all that '
        "is trained, shortcuts included."
    )
    return f"## Published\n\n{report.table(header, rows)}\n\n{note}\n"


class Cifar10(Command):
    """The command, with another thing to do than to train."""

    def run(self, args: argparse.Namespace, command: str) -> Trainer | None:
        if not args.speed_test:
            return super().run(args, command)
        alone("--speed-test")
        speed_test.run(args, lambda: load_data(args)[0])
        return None


COMMAND = Cifar10(
    "cifar10",
    "CIFAR-10",
    tuple(MODELS),
    parser,
    parse,
    make_trainer=lambda args: make_trainer(args, *load_data(args)),
    published=lambda args: None if args.init_from else PUBLISHED[args.model],
    extra=published_table,
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    sys.exit(main())
