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
    one_cycle,
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


AUGMENTS = {  # options of Augment
    "report": {},
    "crop_flip": dict.fromkeys(("degrees", "brightness", "contrast", "saturation", "hue", "erasing"), 0),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. schedule: cosine to min_lr, or exponential, times lr_decay, by epoch; one_cycle
    by step, up to lr over the share warm_up of all steps and down to min_lr. augment: a name in AUGMENTS."""

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
    warm_up: float = 0.2
    augment: str = "report"


# the report gives no learning rate for this family: Adam's usual one
FIXED_FAMILY = Recipe("adam", "exponential", batch_size=128, weight_decay=0.0, clip=100.0, patience=0)
REPORT = {name: FIXED_FAMILY if model.network is FixedNet else Recipe() for name, model in MODELS.items()}
# to the published accuracy of `full` in few epochs; no claim is made for what comes after
FAST = Recipe(
    "adamw", "one_cycle", epochs=20, batch_size=256, weight_decay=0.02, patience=0, augment="crop_flip"
)
RECIPES = {
    "report": REPORT,
    "fast": {name: FAST for name, model in MODELS.items() if model.network is not FixedNet},
}

OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}  # both in hyperfast.optim and in torch.optim
SCHEDULES = {  # by options and steps of an epoch
    "cosine": lambda args, steps: cosine(args.epochs, args.lr, args.min_lr),
    "exponential": lambda args, steps: exponential(args.lr, args.lr_decay),
    "one_cycle": lambda args, steps: one_cycle(args.epochs * steps, args.lr, args.min_lr, args.warm_up),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind: type, low: float, above: bool = False, high: float = float("inf")) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` from `low` (`above`: larger than it) to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low < value if above else low <= value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}, got {text}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {text}")
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
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="fp32 (the default): float32, "
        "without TF32; tf32: matrix products and convolutions in TF32, on a GPU; bf16: autocast")  # fmt: skip
    add("--cuda-graph", action=boolean, help="the whole step as one CUDA graph (on a GPU: yes)")
    add(
        "--state-dtype",
        choices=list(STATE_DTYPES),
        default="fp32",
        help="how the moments of generators are stored; needs --fused (%(default)s)",
    )
    add("--threads", type=count, help="CPU threads (torch's choice)")
    recipe = p.add_argument_group("recipe (each model has its own, see below)")
    own = recipe.add_argument
    own("--recipe", choices=list(RECIPES), default="report", help="report: as published (the default); fast: "
        "to the published accuracy of full in few epochs")  # fmt: skip
    own("--optimizer", choices=list(OPTIMIZERS))
    own("--schedule", choices=list(SCHEDULES), help="of the learning rate")
    own("--epochs", type=count)
    own("--batch-size", type=count)
    own("--lr", type=number(float, 0, above=True))
    own("--min-lr", type=rate, help="end of the cosine and of one_cycle")
    own("--lr-decay", type=number(float, 0, above=True), help="factor of the exponential schedule")
    own("--warm-up", type=number(float, 0, high=1), metavar="SHARE", help="of all steps, in one_cycle")
    own("--augment", choices=list(AUGMENTS), help="all of the published augmentation, or crop and flip")
    own("--weight-decay", type=rate)
    own("--clip", type=number(float, 0, above=True), help="gradient norm")
    own("--patience", type=number(int, 0), help="epochs without a better validation accuracy, 0: any number")
    add("--seed", type=number(int, 0), default=42)
    add("--max-steps", type=count, help="stop the run after so many steps")
    accuracy = number(float, 0, above=True, high=100)
    add("--target-accuracy", type=accuracy, metavar="PERCENT", help="stop after the first epoch whose test "
        "accuracy reaches this, and say how long the training took")  # fmt: skip
    add("--eval-batches", type=count, help="evaluate on so many batches only")
    add("--save-every", type=count, default=1, help="epochs between two last.pt (%(default)s)")
    add(
        "--save-frozen",
        action="store_true",
        help="write the plain network of the best epoch, frozen.safetensors",
    )
    return p


def _recipes() -> Iterator[str]:
    for kind, recipes in RECIPES.items():
        for recipe in dict.fromkeys(recipes.values()):
            values = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in vars(recipe).items())
            models = ", ".join(name for name, own in recipes.items() if own == recipe)
            yield f"{kind}, {models}: {values}."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options with the model's recipe filled in. Exits with status 2 and one line for bad ones.

    generated_from: for each layer to generate the epochs until then. z_dims: its embedding size.
    """
    options = parser()
    args = options.parse_args(arguments)
    recipes = RECIPES[args.recipe]
    if args.model not in recipes:
        options.error(f"--recipe {args.recipe} is for {', '.join(recipes)}, not for {args.model}")
    for name, value in vars(recipes[args.model]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"cifar100_{args.model}"
    _choose_device_options(args, options)
    try:
        _name_layers(args)
    except ValueError as error:
        options.error(str(error))
    return args


def _choose_device_options(args: argparse.Namespace, options: Parser) -> None:
    """Sets cuda_graph where it was not given; refuses what needs a GPU elsewhere."""
    on_gpu = args.device.partition(":")[0] == "cuda"
    if not on_gpu and args.cuda_graph:
        options.error(f"--cuda-graph needs --device cuda, got {args.device}")
    if not on_gpu and args.precision == "tf32":
        options.error(f"--precision tf32 needs --device cuda, got {args.device}")
    if args.cuda_graph is None:
        args.cuda_graph = on_gpu


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
    """Optimizer with clipping, fused or plain, and what makes a step and returns the norm.

    In a CUDA graph both leave the norm on the device. The fused one then skips a step without a finite norm
    instead of raising; the plain one takes it, as it does without a graph.
    """
    options: dict[str, Any] = {"lr": args.lr, "betas": BETAS, "weight_decay": args.weight_decay}
    if args.fused:
        capturable = {"capturable": True, "nonfinite": "skip"} if args.cuda_graph else {}
        options |= {"max_grad_norm": args.clip, "state_dtype": STATE_DTYPES[args.state_dtype]}
        fused = getattr(hyperfast.optim, OPTIMIZERS[args.optimizer])(model, **options, **capturable)

        def fused_step() -> Tensor | float:
            fused.step()
            return fused.grad_norm

        return fused, fused_step
    capturable = {"capturable": True, "fused": True} if args.cuda_graph else {}
    plain = getattr(torch.optim, OPTIMIZERS[args.optimizer])(model.parameters(), **options, **capturable)

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
    augment = Augment(MEAN, STD, **AUGMENTS[args.augment])
    images = ImageData(*parts, test, augment, partial(normalize, mean=MEAN, std=STD))
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
    same = ("model", "init", "precision", "state_dtype", *vars(REPORT[args.model]), "seed", "eval_batches")
    recipe = {name: getattr(args, name) for name in same if name != "patience"}
    recipe |= describe(args.generated_from, args.z_dims)
    recipe |= {"generated_l2": args.generated_l2, "init_from": str(args.init_from or "none")}
    recipe |= {"validation_images": VALIDATION, "label_checksum": checksum}
    free = ("fused", "device", "cuda_graph", "patience", "max_steps", "target_accuracy", "save_every")
    circumstances = {name: getattr(args, name) for name in free}
    circumstances |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    config = Config(
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        patience=args.patience or None,
        precision=args.precision,
        device=args.device,
        cuda_graph=args.cuda_graph,
        target_accuracy=args.target_accuracy,
        max_steps=args.max_steps,
        eval_batches=args.eval_batches,
        save_every=args.save_every,
    )
    schedule = SCHEDULES[args.schedule](args, len(data.train[1]) // args.batch_size)
    return Trainer(model, data, optimizer, step, schedule, config, args.out, recipe, circumstances, stages)


def save_frozen(model: nn.Module, path: Path) -> None:
    """The plain network as safetensors: generated weights under their layers' names, float32."""
    content = safetensors.torch.save(hyperfast.nn.plain_state_dict(model), {"format": "pt"})
    write_atomically(path, lambda file: file.write(content))


def check_device(name: str) -> None:
    """Makes a GPU the current one. Raises RunError for a device that does not exist here."""
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_precision(precision: str) -> None:
    """How a GPU multiplies float32: in TF32 only where `precision` is "tf32". torch's own default has TF32 in
    convolutions. cuDNN tries its algorithms once for each shape: shapes are fixed."""
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def run(args: argparse.Namespace, command: str) -> Trainer:
    """Train and report; returns the trainer with its records and the best epoch's weights.

    args: from `parse`. Raises RunError, CheckpointError, DataError, Interrupted.
    """
    if args.schedule != "exponential" and args.min_lr > args.lr:
        raise RunError(f"--min-lr {args.min_lr} is larger than --lr {args.lr}")
    if args.state_dtype != "fp32" and not args.fused:
        raise RunError(f"--state-dtype {args.state_dtype} needs --fused")
    check_device(args.device)
    if torch.device(args.device).type == "cuda":
        set_precision(args.precision)
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
    if reached := trainer.target_row():
        reason += f", {reached['training_seconds']:.1f} s of training"
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
