"""CIFAR-100 with a linear generator for every layer: `python -m train.cifar100 --fused`.

Published for `full`: 54.16 % best test accuracy in 100 epochs, 325 MB. Here the test accuracy is the one at
the best validation epoch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

import hyperfast
from hyperfast.nn.init import DEFAULT, INITIALISATIONS
from train import report
from train.allocator import keep_freed_memory
from train.augment import Augment, normalize
from train.checkpoint import CheckpointError, write_atomically
from train.data import DataError, load_cifar, split
from train.loop import Config, ImageData, Interrupted, RunError, Trainer, cosine, open_run
from train.models import MODELS, build_model

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
VALIDATION = 5000
BETAS = (0.9, 0.999)
STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"}
PUBLISHED = {
    "full": report.Published(
        accuracy=54.16,
        megabytes=325,
        z_ranges={"conv1": (-2.18, 1.20), "conv3": (-0.32, 1.09), "fc1": (-0.12, 0.14), "fc3": (-0.40, 0.27)},
    )
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
    """The command line."""
    p = Parser("python -m train.cifar100", description="Train a CIFAR-100 hypernetwork or its plain twin.")
    count, rate = number(int, 1), number(float, 0)
    add = p.add_argument
    boolean = argparse.BooleanOptionalAction
    add(
        "--fused", action=boolean, default=True, help="factored gradients and fused kernels, or plain PyTorch"
    )
    add("--model", choices=list(MODELS), default="full")
    add("--init", choices=list(INITIALISATIONS), default=DEFAULT, help="how generators start (%(default)s)")
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
    add("--epochs", type=count, default=100)
    add("--batch-size", type=count, default=64)
    add("--lr", type=number(float, 0, above=True), default=1e-3)
    add("--min-lr", type=rate, default=1e-6, help="end of the cosine (%(default)s)")
    add("--weight-decay", type=rate, default=1e-4)
    add("--clip", type=number(float, 0, above=True), default=1.0, help="gradient norm (%(default)s)")
    add(
        "--patience", type=count, default=15, help="epochs without a better validation accuracy (%(default)s)"
    )
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


def adamw(
    model: nn.Module, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, Callable[[], Tensor | float]]:
    """AdamW with clipping, fused or plain: the optimizer, and what makes a step and returns the norm."""
    options: dict[str, Any] = {"lr": args.lr, "betas": BETAS, "weight_decay": args.weight_decay}
    if args.fused:
        state_dtype = STATE_DTYPES[args.state_dtype]
        fused = hyperfast.optim.AdamW(model, max_grad_norm=args.clip, state_dtype=state_dtype, **options)

        def fused_step() -> float:
            fused.step()
            return fused.grad_norm

        return fused, fused_step
    plain = torch.optim.AdamW(model.parameters(), **options)

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


def make_trainer(args: argparse.Namespace, data: ImageData, checksum: int) -> Trainer:
    """Model, optimizer and loop of the recipe."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, fused=args.fused, init=args.init)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer, step = adamw(model, args)
    same = "model init precision state_dtype epochs batch_size lr min_lr weight_decay clip seed".split()
    recipe = {name: getattr(args, name) for name in (*same, "eval_batches")}
    recipe |= {"validation_images": VALIDATION, "label_checksum": checksum}
    free = ("fused", "device", "patience", "max_steps", "save_every")
    circumstances = {name: getattr(args, name) for name in free}
    circumstances |= {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    config = Config(
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        patience=args.patience,
        precision=args.precision,
        device=args.device,
        max_steps=args.max_steps,
        eval_batches=args.eval_batches,
        save_every=args.save_every,
    )
    schedule = cosine(args.epochs, args.lr, args.min_lr)
    return Trainer(model, data, optimizer, step, schedule, config, args.out, recipe, circumstances)


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


def run(args: argparse.Namespace, command: str) -> None:
    """Train and report. Raises RunError, CheckpointError, DataError, Interrupted."""
    if args.min_lr > args.lr:
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
    reason = trainer.fit()
    trainer.load_best()
    frozen = args.out / "frozen.safetensors" if args.save_frozen else None
    if frozen:
        save_frozen(trainer.model, frozen)
    name = f"CIFAR-100, {args.model}"
    path = report.write(trainer, name, reason, command, PUBLISHED.get(args.model), frozen)
    epoch, accuracy = trainer.best["epoch"], trainer.best["test_accuracy"]
    print(f"{reason}; test accuracy {accuracy:.2f} % at the best validation epoch, {epoch}; {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after an error (one line on stderr), 128 + signal after an interruption."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(arguments)
    args.out = args.out or Path("runs") / f"cifar100_{args.model}"
    command = f"python -m train.cifar100 {shlex.join(arguments)}".strip()
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
