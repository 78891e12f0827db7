"""A CIFAR-10 network with weights of its own for every image: `python -m train.conditional`.

`--model conditional`: an encoder makes the embeddings of the generators from the image (dynamic, or
conditionally parameterized convolution: Yang et al., "CondConv", NeurIPS 2019). `static`: the same generators
with one embedding for each layer. `plain`: the same network with ordinary weights. Side by side:
`python -m train.compare --command conditional --epochs 1 --out runs/conditional`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hyperfast
from hyperfast.analysis import LayerEmbeddings, ZReport, table
from hyperfast.nn import named_generators
from train import cifar10, command
from train.command import (
    COUNT,
    Built,
    Command,
    Parser,
    fill_in,
    make_optimizer,
    number,
    placed,
    recipe_values,
)
from train.data import batches
from train.images import EVAL_BATCH, ImageData
from train.loop import Trainer, one_cycle
from train.models.conditional import MODELS, Z_DIM, ConditionalNet, build_conditional

LEAST_SHIFT = 1e-3  # of the norm of the mean z: what is below is rounding
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@dataclass(frozen=True)
class Recipe(command.Recipe):
    """How a model is trained. one_cycle: up to lr over the share warm_up of all steps, then down to 0."""

    schedule: str = "one_cycle"
    epochs: int = 20
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.02
    patience: int = 0
    warm_up: float = 0.2


RECIPES = {"own": dict.fromkeys(MODELS, Recipe())}
SCHEDULES = {
    "one_cycle": lambda args, steps: one_cycle(args.epochs * steps, args.lr, 0.0, args.warm_up),
}


def parser() -> Parser:
    """The command line; None where the recipe decides."""
    p = Parser(
        "python -m train.conditional",
        description="Train a CIFAR-10 network whose weights depend on the image, or its twins.",
        epilog="Recipe. " + command.describe_recipes(RECIPES),
    )
    command.add_run_options(p, "CIFAR-10", MODELS, "conditional", "runs/conditional_MODEL", init="hyperfan")
    p.set_defaults(state_dtype="fp32")
    command.add_shard_option(p)
    p.add_argument("--z-dim", type=COUNT, default=Z_DIM, help="of the embeddings (%(default)s)")
    own = command.add_recipe_options(p, RECIPES, "own: this project's", SCHEDULES)
    own("--warm-up", type=number(float, 0, high=1), metavar="SHARE", help="of all steps, in one_cycle")
    return p


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the recipe filled in. Exits with status 2 and one line for bad ones."""
    options = parser()
    args = options.parse_args(arguments)
    fill_in(args, options, RECIPES, "conditional")
    for name in ("save_frozen", "generated_l2"):
        if MODELS[args.model].conditional and getattr(args, name):
            options.error(
                f"--{name.replace('_', '-')}: {args.model} has weights for every image, not one set"
            )
    if args.shard_generator and args.model != "static":
        options.error(command.NOT_SHARDED.format(args.model))
    return args


def build(args: argparse.Namespace) -> Built:
    """Network, optimizer and step function of the recipe."""
    model = build_conditional(args.model, fused=args.fused, init=args.init, z_dim=args.z_dim)
    hyperfast.nn.generated_l2_(model, args.generated_l2)
    model = placed(model, args)
    return model, *make_optimizer(model, args)


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe."""
    torch.manual_seed(args.seed)
    built = build(args)
    recipe = recipe_values(args, Recipe) | {"z_dim": args.z_dim}
    recipe |= {"validation_images": cifar10.VALIDATION, "label_checksum": checksum}
    schedule = SCHEDULES[args.schedule](args, len(data.train[1]) // args.batch_size)
    return command.make_trainer(args, data, built, schedule, recipe)


# -- what the conditioning does ------------------------------------------------------------------


@torch.no_grad()
def conditioning(trainer: Trainer, args: argparse.Namespace) -> str:
    """A section of the report of `conditional`: how z moves with the image, and what that is worth."""
    model = trainer.model
    if not isinstance(model, ConditionalNet):
        return ""
    model.eval()
    made, labels = zip(*((model.embeddings(x), y) for x, y in _test_batches(trainer)), strict=True)
    labels = torch.cat(labels).cpu()
    z = {layer: torch.cat([own[layer] for own in made]) for layer in made[0]}
    means = {layer: own.mean(0) for layer, own in z.items()}
    names = (name for name, _ in named_generators(model))  # those of the table of costs
    by_name = zip(names, z.values(), strict=True)
    rows = [[name, *_variation(own.double().cpu(), labels)] for name, own in by_name]
    header = ["layer", "norm of the mean z", "deviation of an image", "of its square between classes"]
    one_set = _accuracy(trainer, lambda x: model.network(x, z=means))
    classes = _classes(torch.cat(list(z.values()), 1), labels)
    return (
        f"## Conditioning\n\n{table(header, rows)}\n\nOver the test images; the deviation is the root mean "
        "square distance of an image's z from the mean. Test accuracy with the mean z for all images instead "
        f"of each with its own: {one_set:.2f} %.\n\n{classes}\n\nThe generators' work "
        "above is that of one set of weights.\n"
    )


def _classes(z: Tensor, labels: Tensor) -> str:
    """Cosines between the classes' shifts of z [n, K], as a table, unless z hardly depends on the image."""
    z = z.double().cpu()
    shifts = z - z.mean(0)
    if not _moves(z.mean(0), shifts):
        return (
            f"The z of all images are the same to {LEAST_SHIFT:g} of their norm: no cosines between classes."
        )
    by_class = ((name, shifts[labels == i]) for i, name in enumerate(CLASSES))
    report = ZReport(
        tuple(LayerEmbeddings(name, own.mean(0, keepdim=True)) for name, own in by_class if len(own))
    )
    (similarity,) = report.similarities()
    return (
        "Cosine between the mean shifts of z of two classes, all layers together:\n\n"
        f"{similarity.to_markdown()}"
    )


def _moves(mean: Tensor, shifts: Tensor) -> bool:
    """Whether shifts [n, K] from the mean z [K] are more than rounding."""
    return bool(shifts.square().sum(1).mean().sqrt() > LEAST_SHIFT * mean.norm())


def _variation(z: Tensor, labels: Tensor) -> list[str]:
    """Norm of the mean of z [n, K], root mean square deviation, and the share of its square that is between
    the means of the classes, blank where z hardly depends on the image."""
    shifts = z - z.mean(0)
    total = shifts.square().sum(1).mean()
    between = sum(
        shifts[labels == i].mean(0).square().sum() * (labels == i).double().mean() for i in labels.unique()
    )
    share = f"{100 * between / total:.1f} %" if _moves(z.mean(0), shifts) else ""
    return [f"{z.mean(0).norm():.3f}", f"{total.sqrt():.3f}", share]


def _test_batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches on which the trainer evaluates."""
    order = batches(*trainer.data.test, EVAL_BATCH, shuffle=None, drop_last=False)
    for x, y in itertools.islice(order, trainer.config.eval_batches):
        yield trainer.data.normalize(x), y


def _accuracy(trainer: Trainer, network: Callable[[Tensor], Tensor]) -> float:
    """Percent of the test images."""
    right = torch.cat([network(x).argmax(1) == y for x, y in _test_batches(trainer)])
    return 100 * right.double().mean().item()


COMMAND = Command(
    "conditional",
    "CIFAR-10",
    tuple(MODELS),
    parser,
    parse,
    make_trainer=lambda args: make_trainer(args, *cifar10.load_data(args)),
    published=lambda args: None,
    extra=conditioning,
    build=build,
)
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    sys.exit(main())
