"""CIFAR-100 hypernetworks and their plain twins: `python -m train.cifar100 --model full --fused`.

Every model has the published recipe; options override it. Published for `full`: 54.16 % best test accuracy
in 100 epochs, 325 MB. Here the test accuracy is the one at the best validation epoch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

import hyperfast
from hyperfast.nn import LinearGenerator
from hyperfast.nn.init import DEFAULT, INITIALISATIONS
from train import checkpoint, report, summary
from train.allocator import keep_freed_memory
from train.augment import Augment, normalize
from train.checkpoint import CheckpointError, write_atomically
from train.data import DataError, load_cifar, split
from train.layer_options import describe, parse_layers, parse_sizes, parse_stages
from train.loop import (
    Config,
    ImageData,
    Interrupted,
    RunError,
    Stages,
    Trainer,
    cosine,
    exponential,
    open_run,
)
from train.models import MODELS, build_model
from train.models.fixed import FixedNet
from train.models.full import rename_published_
from train.transfer import start_from_

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
VALIDATION = 5000
BETAS = (0.9, 0.999)
STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"}
PUBLISHED = {
    "full": report.Published(
        accuracy=54.16,
        megabytes=325,
        z_ranges={"conv1": (-2.18, 1.20), "conv3": (-0.32, 1.09), "fc1": (-0.12, 0.14), "fc3": (-0.40, 0.27)},
    ),
    "enhanced": report.Published(accuracy=63.44, megabytes=42),
    "fixed": report.Published(accuracy=33.52, megabytes=4.2),
    "all_layers": report.Published(accuracy=36.13),
    "mnist_style": report.Published(accuracy=30, megabytes=2.6),
    "standard": report.Published(accuracy=16.23, megabytes=2.6),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; `schedule` is cosine to min_lr or exponential, times lr_decay each epoch."""

    optimizer: str = "adamw"
    schedule: str = "cosine"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    min_lr: float = 1e-6
    lr_decay: float = 0.995
    weight_decay: float = 1e-4
    clip: float = 1.0
    patience: int = 15


# the report gives no learning rate for this family: Adam's usual one
FIXED_FAMILY = Recipe("adam", "exponential", batch_size=128, weight_decay=0.0, clip=100.0, patience=0)
RECIPES = {name: FIXED_FAMILY if model.network is FixedNet else Recipe() for name, model in MODELS.items()}

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}  # both in hyperfast.optim and in torch.optim
SCHEDULES = {
    "cosine": lambda args: cosine(args.epochs, args.lr, args.min_lr),
    "exponential": lambda args: exponential(args.lr, args.lr_decay),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind: type, low: float, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` that is at least `low` (`above`: larger than it)."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if above else low <= value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}, got {text}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line; None where the model's recipe decides."""
    p = Parser(
        "python -m train.cifar100",
        description="Train a CIFAR-100 hypernetwork or its plain twin.",
        epilog="Recipes. " + " ".join(_recipes()),
    )
    count, rate = number(int, 1), number(float, 0)
    add = p.add_argument
    boolean = argparse.BooleanOptionalAction
    add(
        "--fused", action=boolean, default=True, help="factored gradients and fused kernels, or plain PyTorch"
    )
    add("--model", choices=list(MODELS), default="full")
    add("--init", choices=list(INITIALISATIONS), default=DEFAULT, help="how generators start (%(default)s)")
    add("--init-from", type=Path, metavar="FILE", help="start from this network, plain or not: best.pt of a "
        "run, frozen.safetensors, a published checkpoint")  # fmt: skip
    add("--generate", metavar="LAYERS", help="which weights are generated: conv2,conv3,fc1 or all or none")
    add("--z-dim", metavar="SIZES", help="of the embeddings, for all layers or by name, as in 16,conv5=8")
    add("--progressive", nargs="+", default=[], metavar="LAYERS@EPOCHS", help="leave these layers ordinary "
        "for so many epochs, as in conv4,conv5@10 fc1@20; each switch keeps the outputs")  # fmt: skip
    add("--generated-l2", type=rate, default=0.0, metavar="C", help="C / 2 |w|^2 of every generated weight w")
    add("--data", type=Path, help="folder with CIFAR-100, torchvision's or the hub's Parquet layout; "
        "otherwise HYPERFAST_DATA, otherwise it is downloaded")  # fmt: skip
    add("--out", type=Path, help="folder of the run (runs/cifar100_MODEL)")
    add("--resume", action="store_true", help="continue the run in --out")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=found, help="cpu, cuda or cuda:N (cuda where there is one)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add(
        "--state-dtype",
        choices=list(STATE_DTYPES),
        default="fp32",
        help="how the moments of generators are stored; needs --fused (%(default)s)",
    )
    add("--threads", type=count, help="CPU threads (torch's choice)")
    recipe = p.add_argument_group("recipe (each model has its own, see below)")
    own = recipe.add_argument
    own("--optimizer", choices=list(OPTIMIZERS))
    own("--schedule", choices=list(SCHEDULES), help="of the learning rate, by epoch")
    own("--epochs", type=count)
    own("--batch-size", type=count)
    own("--lr", type=number(float, 0, above=True))
    own("--min-lr", type=rate, help="end of the cosine")
    own("--lr-decay", type=number(float, 0, above=True), help="factor of the exponential schedule")
    own("--weight-decay", type=rate)
    own("--clip", type=number(float, 0, above=True), help="gradient norm")
    own("--patience", type=number(int, 0), help="epochs without a better validation accuracy, 0: any number")
    add("--seed", type=number(int, 0), default=42)
    add("--max-steps", type=count, help="stop the run after so many steps")
    add("--eval-batches", type=count, help="evaluate on so many batches only")
    add("--save-every", type=count, default=1, help="epochs between two last.pt (%(default)s)")
    add(
        "--save-frozen",
        action="store_true",
        help="write the plain network of the best epoch, frozen.safetensors",
    )
    return p


def _recipes() -> Iterator[str]:
    for recipe in dict.fromkeys(RECIPES.values()):
        values = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in vars(recipe).items())
        yield f"{', '.join(name for name, own in RECIPES.items() if own == recipe)}: {values}."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the model's recipe filled in. Exits with status 2 and one line for bad ones.

    generated_from: for each layer to generate the epochs until then. z_dims: its embedding size.
    """
    options = parser()
    args = options.parse_args(arguments)
    for name, value in vars(RECIPES[args.model]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"cifar100_{args.model}"
    try:
        _name_layers(args)
    except ValueError as error:
        options.error(str(error))
    return args


def _name_layers(args: argparse.Namespace) -> None:
    """Sets z_dims and generated_from; raises ValueError for names, sizes and epochs that do not fit."""
    model = MODELS[args.model]
    layers = model.generated
    if args.generate is not None:
        layers = parse_layers(args.generate, model.network.LAYERS)
    args.z_dims = parse_sizes(args.z_dim or str(model.z_dim), layers, model.z_dim)
    args.generated_from = parse_stages(args.progressive, layers, args.epochs)
    if args.progressive and not issubclass(model.generator, LinearGenerator):
        raise ValueError(f"--progressive: the generators of {args.model} cannot start from a trained weight")


def make_optimizer(
    model: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Callable[[], Tensor | float]]:
    """Optimizer with clipping, fused or plain, and what makes a step and returns the norm."""
    options: dict[str, Any] = {"lr": args.lr, "betas": BETAS, "weight_decay": args.weight_decay}
    if args.fused:
        fused = getattr(hyperfast.optim, OPTIMIZERS[args.optimizer])(
            model, max_grad_norm=args.clip, state_dtype=STATE_DTYPES[args.state_dtype], **options
        )

        def fused_step() -> float:
            fused.step()
            return fused.grad_norm

        return fused, fused_step
    plain = getattr(torch.optim, OPTIMIZERS[args.optimizer])(model.parameters(), **options)

    def plain_step() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        plain.step()
        return norm

    return plain, plain_step


def load_data(args: argparse.Namespace) -> tuple[ImageData, int]:
    """The three parts of CIFAR-100, and a check sum of the labels: it tells other data or another order."""
    data = load_cifar("cifar100", args.data)
    parts = [
        (data.train_images[index], data.train_labels[index])
        for index in split(len(data.train_labels), VALIDATION, args.seed)
    ]
    test = (data.test_images, data.test_labels)
    labels = torch.cat((data.train_labels, data.test_labels)).to(torch.uint8)
    images = ImageData(*parts, test, Augment(MEAN, STD), partial(normalize, mean=MEAN, std=STD))
    return images, zlib.crc32(labels.numpy())


def build(
    args: argparse.Namespace, epoch: int
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor | float]]:
    """Network, optimizer and step function as `epoch`, counted from 0, trains them."""
    generated = [layer for layer, start in args.generated_from.items() if start <= epoch]
    model = build_model(args.model, fused=args.fused, init=args.init, generated=generated, z_dim=args.z_dims)
    hyperfast.nn.generated_l2_(model, args.generated_l2)
    model = model.to(args.device, memory_format=torch.channels_last)
    return model, *make_optimizer(model, args)


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe."""
    torch.manual_seed(args.seed)
    model, optimizer, step = build(args, 0)
    if args.init_from and not args.resume:
        state = checkpoint.load_weights(args.init_from)
        rename_published_(state)
        start_from_(model, state, args.init_from)
    at = tuple(sorted({epoch for epoch in args.generated_from.values() if epoch}))
    stages = Stages(at, partial(build, args)) if at else None
    same = ("model", "init", "precision", "state_dtype", *vars(RECIPES[args.model]), "seed", "eval_batches")
    recipe = {name: getattr(args, name) for name in same if name != "patience"}
    recipe |= describe(args.generated_from, args.z_dims)
    recipe |= {"generated_l2": args.generated_l2, "init_from": str(args.init_from or "none")}
    recipe |= {"validation_images": VALIDATION, "label_checksum": checksum}
    free = ("fused", "device", "patience", "max_steps", "save_every")
    circumstances = {name: getattr(args, name) for name in free}
    circumstances |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    config = Config(
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        patience=args.patience or None,
        precision=args.precision,
        device=args.device,
        max_steps=args.max_steps,
        eval_batches=args.eval_batches,
        save_every=args.save_every,
    )
    schedule = SCHEDULES[args.schedule](args)
    return Trainer(model, data, optimizer, step, schedule, config, args.out, recipe, circumstances, stages)


def save_frozen(model: nn.Module, path: Path) -> None:
    """The plain network as safetensors: generated weights under their layers' names, float32."""
    content = safetensors.torch.save(hyperfast.nn.plain_state_dict(model), {"format": "pt"})
    write_atomically(path, lambda file: file.write(content))


def check_device(name: str) -> None:
    """Raises RunError for a device that does not exist here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from error


def run(args: argparse.Namespace, command: str) -> Trainer:
    """Train and report; returns the trainer with its records and the best epoch's weights.

    args: from `parse`. Raises RunError, CheckpointError, DataError, Interrupted.
    """
    if args.schedule == "cosine" and args.min_lr > args.lr:
        raise RunError(f"--min-lr {args.min_lr} is larger than --lr {args.lr}")
    if args.state_dtype != "fp32" and not args.fused:
        raise RunError(f"--state-dtype {args.state_dtype} needs --fused")
    check_device(args.device)
    keep_freed_memory()
    open_run(args.out, args.resume)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer = make_trainer(args, *load_data(args))
    if args.resume:
        for difference in trainer.resume():
            print(f"note: {difference}")
        print(f"resumed {args.out} after epoch {len(trainer.history)}")
    summary.discard(args.out)
    reason = trainer.fit()
    trainer.load_best()
    frozen = args.out / "frozen.safetensors" if args.save_frozen else None
    if frozen:
        save_frozen(trainer.model, frozen)
    name = f"CIFAR-100, {args.model}"
    as_published = not (args.generate or args.z_dim or args.progressive or args.init_from)
    published = PUBLISHED.get(args.model) if as_published else None
    path = report.write(trainer, name, reason, command, published, frozen)
    epoch, accuracy = trainer.best["epoch"], trainer.best["test_accuracy"]
    print(f"{reason}; test accuracy {accuracy:.2f} % at the best validation epoch, {epoch}; {path}")
    return trainer


def command_line(arguments: Sequence[str]) -> str:
    """The command that has these arguments, as it stands in reports."""
    return f"python -m train.cifar100 {shlex.join(arguments)}".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after an error (one line on stderr), 128 + signal after an interruption."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    command = command_line(arguments)
    try:
        run(args, command)
    except (RunError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        again = command if args.resume else f"{command} --resume"
        print(
            f"\nstopped by {stop}; {args.out} holds the last epoch's end. Continue with: {again}",
            file=sys.stderr,
        )
        return 128 + stop.number
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
