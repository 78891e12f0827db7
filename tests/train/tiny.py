"""A run of seconds for the tests of train/: tiny hypernetwork, random data.

As a program, `python tiny.py OUT step|fsync|replace COUNT`, it kills itself at that call of the function.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import hyperfast
from train.images import ImageData
from train.loop import Config, Trainer, cosine


class Net(nn.Module):
    """Generated conv and linear layer, batch norm and dropout: all that draws numbers or keeps state."""

    def __init__(self, width=4, classes=5, backend="auto"):
        super().__init__()
        self.conv = hyperfast.nn.HyperConv2d(3, width, 3, padding=1, z_dim=3, backend=backend)
        self.bn = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.3)
        self.fc = hyperfast.nn.HyperLinear(width, classes, z_dim=3, backend=backend)

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def augment(x, generator):
    return x.float() / 255 + 0.1 * torch.rand(x.shape, generator=generator, device=generator.device)


def data(train=50):
    g = torch.Generator().manual_seed(1)

    def part(n):
        return torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=g), torch.arange(n) % 5

    return ImageData(part(train), part(23), part(17), augment, lambda x: x.float() / 255)


def make(out, fused=True, net=Net, parts=None, recipe=None, **config):
    torch.manual_seed(0)
    config = Config(**({"epochs": 3, "batch_size": 8} | config))
    model = net(backend="auto" if fused else "reference").to(config.device)
    if fused:
        hyperfast.factored_(model)
        capturable = {"capturable": True, "nonfinite": "skip"} if config.cuda_graph else {}
        optimizer = hyperfast.optim.AdamW(model, lr=0.01, max_grad_norm=1.0, **capturable)

        def step():
            optimizer.step()
            return optimizer.grad_norm

    else:
        # torch refuses capturable=True on the CPU; fused takes the rate as a tensor there too
        capturable = {"fused": True, "capturable": config.device != "cpu"} if config.cuda_graph else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **capturable)

        def step():
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return norm

    schedule = cosine(config.epochs, 0.01, 1e-4)
    out.mkdir(exist_ok=True)
    recipe = {"seed": config.seed} if recipe is None else recipe
    return Trainer(model, parts or data(), optimizer, step, schedule, config, out, recipe, {"fused": fused})


def run_and_kill(out, moment, count):
    trainer = make(Path(out))
    owner = trainer if moment == "step" else os
    real, calls = getattr(owner, moment), iter(range(1, 1000))

    def counted(*args):
        if next(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(owner, moment, counted)
    trainer.fit()


if __name__ == "__main__":
    run_and_kill(*sys.argv[1:])
