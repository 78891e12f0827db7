"""`train.cifar100` with a tiny network and random images, for the tests on several ranks. Nothing in a step
depends on chance or on the other images of a batch, so that a run is the same on any number of ranks.

As a program, `torchrun ... joined.py [FAULT@RANK@STEP] OPTIONS`, one rank has a fault in that step.
"""

import os
import signal
import sys
import time

import torch
from torch import nn

import hyperfast
from train import checkpoint, cifar100, report
from train.augment import normalize
from train.data import ImageSet

VALIDATION = 20


class Net(nn.Module):
    """Generators of more rows than two ranks have in one unit, of 32."""

    def __init__(self, backend, width=20, classes=100):
        super().__init__()
        self.conv = hyperfast.nn.HyperConv2d(3, width, 3, padding=1, z_dim=3, backend=backend)
        self.fc = hyperfast.nn.HyperLinear(width, classes, z_dim=3, backend=backend)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def build_model(name, fused=False, **_):
    """Stands for every model."""
    model = Net("auto" if fused else "reference")
    return hyperfast.factored_(model) if fused else model


def load_images(name, root):
    g = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(n) % 100

    return ImageSet(*images(VALIDATION + 48), *images(21), [])


def install() -> None:
    """Puts the tiny network and its images in the place of the real ones."""
    cifar100.build_model, cifar100.load_images, cifar100.VALIDATION = build_model, load_images, VALIDATION
    cifar100.Augment = lambda mean, std, **options: lambda images, chance: normalize(images, mean, std)


def run(out, *options) -> int:
    """Three epochs of six steps; the exit status."""
    return cifar100.main(["--out", str(out), "--epochs", "3", "--batch-size", "8", *map(str, options)])


# ---- faults ----


def kill(trainer):
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(trainer):
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def nan(trainer):
    """Of this rank's loss alone."""
    real = trainer.data.loss

    def loss(*args):
        value, score = real(*args)
        return value * float("nan"), score

    trainer.data.loss = loss


def full(trainer):
    """Of the disk, from here on."""

    def save(content, file):
        raise OSError(28, "No space left on device")

    checkpoint.torch.save = save


def slow_report(trainer):
    def write(*args):
        time.sleep(8)
        return real(*args)

    real, report.write = report.write, write


def faulty(fault, rank, step) -> None:
    """Lets `fault` happen on `rank` before its step counted from 0, unless torchrun restarted it."""
    if os.environ["RANK"] != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    real = cifar100.Trainer._checked_step

    def checked_step(self, *args):
        if self.steps == int(step):
            globals()[fault](self)
        return real(self, *args)

    cifar100.Trainer._checked_step = checked_step


if __name__ == "__main__":
    install()
    arguments = sys.argv[1:]
    while arguments and "@" in arguments[0]:
        faulty(*arguments.pop(0).split("@"))
    own = f"--rank{os.environ['RANK']}="  # options of one rank
    shared = [text for text in arguments if not text.startswith("--rank")]
    sys.exit(run(*shared, *(text.removeprefix(own) for text in arguments if text.startswith(own))))
