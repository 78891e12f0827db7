"""What the tests of the optimizers share: a network with every kind of layer, and its steps."""

import torch
import torch.nn.functional as F
from torch import nn

from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator, generate_layers

OPTIONS = {"lr": 1e-2, "weight_decay": 0.05}
CLIP = 0.5


class Net(nn.Module):
    """Every kind of layer: ordinary, generated, generator without bias, shared generator, never used."""

    def __init__(self):
        super().__init__()
        bare = LinearGenerator((4, 2, 3, 3), 5, bias=False)
        # no bias before the batch norm: its gradient is rounding, of which AdamW makes whole steps
        self.conv = HyperConv2d(2, 4, 3, padding=1, bias=False, generator=bare)
        self.norm = nn.BatchNorm2d(4)
        self.a = HyperLinear(4, 6, z_dim=3)
        self.b = HyperLinear(6, 6, z_dim=17)
        self.c = HyperLinear(6, 6, bias=False, generator=self.b.generator)
        self.unused = HyperLinear(2, 2, z_dim=2)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        weights = generate_layers(self)

        def layer(name, x):
            module = self.get_submodule(name)
            return module(x, weights[name]) if name in weights else module(x)

        x = F.relu(self.norm(layer("conv", x))).mean((2, 3))
        x = torch.tanh(layer("a", x))
        return self.out(layer("c", torch.tanh(layer("b", x))))


def batch(i: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(5, 2, 6, 6, generator=generator, dtype=dtype), torch.randint(
        3, (5,), generator=generator
    )


def backward(model, i: int) -> torch.Tensor:
    x, y = batch(i, next(model.parameters()).dtype)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train_step(model, optimizer, i: int, clip: float | None = None) -> torch.Tensor:
    optimizer.zero_grad()
    loss = backward(model, i)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss


def assert_steps_agree(ours, theirs, optimizer, reference, check, steps, clip=None, start=0, tolerance=1e-9):
    for i in range(start, start + steps):
        loss, expected = train_step(ours, optimizer, i), train_step(theirs, reference, i, clip)
        torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)
    check(ours, theirs, tolerance)
