"""VGG-A on CIFAR-10, with and without batch norm, plain or as a hypernetwork:
`python -m train.vgg --model vgg_a_bn [--hyper linear|two_layer|shared]`.

Every model has the published recipe; options override it. Published, best epoch of 30 on CIFAR-10's test set,
which that report calls validation: vgg_a 86.43 %, vgg_a_bn 89.54 %, vgg_a_residual 91.36 %. Here the test
accuracy is the one at the best epoch on validation images of our own.

`--subset N` trains on N images, a tenth of them for validation, and tests on N at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import hyperfast
from hyperfast.nn import parameter_counts
from hyperfast.nn.init import INITIALISATIONS
from train import checkpoint, command, report
from train.augment import normalize
from train.augmentations import AUGMENTATIONS, MIXES
from train.checkpoint import CheckpointError
from train.command import (
    COUNT,
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
from train.loop import Trainer, constant, cosine, piecewise
from train.losses import LOSSES, WithCenters
from train.models.vgg import HYPERS, MODELS, VGG, build_vgg
from train.ranks import processes

MEAN = STD = (0.5, 0.5, 0.5)
CLASSES = 10
VALIDATION = 5000
PART = 10  # of a subset one image in so many is for validation
DROPS = 2 / 3, 5 / 6  # of the epochs, after which "steps" divides the learning rate by ten: 20 and 25 of 30
GENERATION = ("init", "z_dim", "hidden_dim", "generated_l2")  # options that need --hyper


@dataclass
class Published(report.Published):
    """train_accuracy: after 30 epochs. parameters: as published, where they were."""

    what: str = "best of 30 epochs on CIFAR-10's test set"
    train_accuracy: float = 0.0
    parameters: int | None = None


PUBLISHED = {
    "vgg_a": Published(86.43, train_accuracy=92.00, parameters=9_231_114),
    "vgg_a_bn": Published(89.54, train_accuracy=95.47, parameters=9_233_418),
    "vgg_a_residual": Published(91.36, train_accuracy=97.13, parameters=9_512_458),
    "vgg_a_residual_dropout": Published(84.49, train_accuracy=86.08),
    "vgg_a_gelu": Published(89.42, train_accuracy=96.53),
}


@dataclass(frozen=True)
class Recipe(command.Recipe):
    """How a model is trained. schedule: a name in SCHEDULES, by epoch. loss, augment: names in LOSSES and
    AUGMENTATIONS. clip 100: in practice none."""

    optimizer: str = "sgd"
    schedule: str = "steps"
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 5e-4
    clip: float = 100.0
    patience: int = 0
    loss: str = "cross_entropy"
    augment: str = "crop_flip"


RECIPES = {"report": {name: Recipe() if own.batch_norm else Recipe(lr=0.01) for name, own in MODELS.items()}}
# where --optimizer and not --lr or --weight-decay is given; the optimizer study's
USUAL = {"adam": {"lr": 1e-3}, "adamw": {"lr": 1e-3, "weight_decay": 0.01}, "rmsprop": {"lr": 1e-3}}
SCHEDULES: dict[str, Callable[[argparse.Namespace, int], Callable[[int, int], float]]] = {
    # by options and steps of an epoch
    "steps": lambda args, steps: piecewise(
        [args.lr, args.lr / 10, args.lr / 100], [round(args.epochs * share) * steps for share in DROPS]
    ),
    "cosine": lambda args, steps: cosine(args.epochs, args.lr, 0.0),
    "constant": lambda args, steps: constant(args.lr),
}


def parser() -> Parser:
    """The command line; None where the model's recipe decides."""
    p = Parser(
        "python -m train.vgg",
        description="Train VGG-A on CIFAR-10, with and without batch norm, plain or with generated weights.",
        epilog="Recipes. " + command.describe_recipes(RECIPES) + " The learning rate of adam, adamw and "
        "rmsprop is 1e-3 unless given, adamw's weight decay 0.01.",
    )
    inits = ("keep", *INITIALISATIONS)
    command.add_run_options(p, "CIFAR-10", MODELS, "vgg_a_bn", "runs/vgg_MODEL", inits, init=None)
    p.set_defaults(state_dtype="fp32")
    command.add_shard_option(p)
    add = p.add_argument
    add("--hyper", choices=["none", *HYPERS], default="none", help="generate the weights: by a linear "
        "generator each, by one two-layer generator (3 x 3 kernels but the first), from one shared "
        "core")  # fmt: skip
    sizes = {name: [f"{kind} {getattr(h, name)}" for kind, h in HYPERS.items() if getattr(h, name)]
             for name in ("z_dim", "hidden_dim")}  # fmt: skip
    add("--z-dim", type=COUNT, help=f"of the embeddings ({', '.join(sizes['z_dim'])})")
    add("--hidden-dim", type=COUNT, help=f"of the generator ({', '.join(sizes['hidden_dim'])})")
    add("--subset", type=number(int, PART), metavar="N", help="train on N images, a tenth of them for "
        "validation, and test on N at most")  # fmt: skip
    own = command.add_recipe_options(
        p, RECIPES, "report: as published", SCHEDULES, optimizers=command.OPTIMIZERS
    )
    own("--loss", choices=list(LOSSES))
    own("--augment", choices=list(AUGMENTATIONS))
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the model's recipe filled in. Exits with status 2 and one line for bad ones."""
    options = parser()
    args = options.parse_args(arguments)
    _check_hyper(args, options)
    for name, value in USUAL.get(args.optimizer, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.loss == "center" and processes() > 1:
        options.error("--loss center is for one process: its centers are of whole batches")
    if args.hyper != "none":
        args.out = args.out or Path("runs") / f"vgg_{args.model}_{args.hyper}"
    fill_in(args, options, RECIPES, "vgg")
    if args.shard_generator and args.hyper not in ("linear", "shared"):
        options.error(command.NOT_SHARDED.format(called(args)))
    return args


def _check_hyper(args: argparse.Namespace, options: Parser) -> None:
    """Fills in how weights are generated; exits with one line for options that this is no use to."""
    if args.hyper == "none":
        for name in GENERATION:
            if getattr(args, name):
                options.error(f"--{name.replace('_', '-')} needs --hyper")
        args.init = "xavier"
        return
    own = HYPERS[args.hyper]
    if args.hidden_dim and not own.hidden_dim:
        options.error(f"--hidden-dim: a {args.hyper} generator has none")
    if args.init == "keep" and own.init != "keep":
        options.error(f"--init keep: a {args.hyper} generator cannot start from a given weight")
    for name in ("z_dim", "hidden_dim", "init"):
        setattr(args, name, getattr(args, name) or getattr(own, name))


def load_data(args: argparse.Namespace) -> tuple[ImageData, int]:
    """The three parts of CIFAR-10, or of a subset of it, and a check sum of the labels."""
    part = {"part": (args.subset, args.seed)} if args.subset else {}
    data = load_images("cifar10", args.data, **part)
    augment, plain = AUGMENTATIONS[args.augment](MEAN, STD), partial(normalize, mean=MEAN, std=STD)
    mix = MIXES[args.augment](CLASSES) if args.augment in MIXES else None
    options = {"criterion": LOSSES[args.loss](), "mix": mix}
    return image_data(data, _validation(args), args.seed, augment, plain, **options)


def _validation(args: argparse.Namespace) -> int:
    return args.subset // PART if args.subset else VALIDATION


def build(args: argparse.Namespace) -> Built:
    """Network, optimizer and step function of the recipe."""
    model = _network(vars(args), args.fused)
    if not command.OPTIMIZERS[args.optimizer].fused:
        hyperfast.factored_(model, False)  # the kernels stay, gradients are dense
    hyperfast.nn.generated_l2_(model, args.generated_l2)
    model = placed(model, args)
    return model, *make_optimizer(model, args)


def _network(options: dict, fused: bool) -> nn.Module:
    """As the options, or the recipe of a run, say."""
    how = {name: options[name] for name in ("hyper", "z_dim", "hidden_dim", "init") if name in options}
    network = build_vgg(options["model"], CLASSES, fused, **(how if how["hyper"] != "none" else {}))
    return WithCenters(network, CLASSES) if options["loss"] == "center" else network


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe; prints how many parameters are trained."""
    torch.manual_seed(args.seed)
    built = build(args)
    print(f"{called(args)}: {_count(built[0])}", flush=True)
    recipe = recipe_values(args, Recipe) | {"hyper": args.hyper, "subset": args.subset or "all"}
    recipe |= {name: getattr(args, name) for name in ("z_dim", "hidden_dim") if getattr(args, name)}
    recipe |= {"validation_images": _validation(args), "label_checksum": checksum}
    schedule = SCHEDULES[args.schedule](args, len(data.train[1]) // args.batch_size)
    return command.make_trainer(args, data, built, schedule, recipe)


def called(args: argparse.Namespace) -> str:
    """The network in words."""
    return args.model if args.hyper == "none" else f"{args.model}, {args.hyper} hypernetwork"


def _count(model: nn.Module) -> str:
    counts = parameter_counts(model)
    text = f"{counts['total']:,} parameters"
    if not counts["generated"]:
        return text
    parts = ", ".join(f"{kind} {counts[kind]:,}" for kind in ("generator", "embedding", "other"))
    return f"{text} ({parts}), {counts['generated'] + counts['other']:,} in the main network"


def load_trained(folder: Path) -> nn.Module:
    """The network of a run with the weights of its best epoch, on the CPU, in evaluation mode. Raises
    CheckpointError."""
    path = folder / "best.pt"
    state = checkpoint.load(path, ("model", "recipe"))
    recipe = state["recipe"]
    if recipe.get("model") not in MODELS:
        raise CheckpointError(f"{path}: {recipe.get('model')} is no model of train.vgg")
    model = _network(recipe, fused=True)
    checkpoint.load_model(model, state["model"], path)
    return (model.network if isinstance(model, WithCenters) else model).eval()


def published(args: argparse.Namespace) -> report.Published | None:
    """What was reported of the model, None for a hypernetwork and for a part of the data."""
    return None if args.hyper != "none" or args.subset else PUBLISHED[args.model]


def published_table(trainer: Trainer, args: argparse.Namespace) -> str:
    """The figures of the report and this run's, as a section of report.md."""
    rows = []
    for name, theirs in PUBLISHED.items():
        counted = f"{theirs.parameters:,}" if theirs.parameters else ""
        with torch.device("meta"):
            true = sum(p.numel() for p in VGG(name).parameters())
        rows.append(
            [name, f"{theirs.train_accuracy:.2f} %", f"{theirs.accuracy:.2f} %", counted, f"{true:,}"]
        )
        if name == args.model:
            last, best = trainer.history[-1], trainer.best
            figures = [trainer.metric.cell(last, "train"), trainer.metric.cell(best, "test")]
            rows.append(
                [
                    f"**{called(args)}, this run**",
                    *figures,
                    "",
                    f"{parameter_counts(trainer.model)['total']:,}",
                ]
            )
    header = ["model", "train accuracy, last epoch", "test accuracy, best epoch", "parameters, published"]
    note = (
        "Published: 30 epochs, best epoch by the test set itself, which the report calls validation. This "
        "run: best epoch by validation images of its own."
    )
    return f"## Published\n\n{report.table([*header, 'parameters, counted'], rows)}\n\n{note}\n"


COMMAND = Command(
    "vgg",
    "CIFAR-10",
    tuple(MODELS),
    parser,
    parse,
    make_trainer=lambda args: make_trainer(args, *load_data(args)),
    published=published,
    extra=published_table,
    called=called,
    build=build,
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    sys.exit(main())
