"""The MNIST networks of `python -m train.mnist`, plain and as hypernetworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IN_CHANNELS, CLASSES = 1, 10


class ConvNet(nn.Module):
    """Convolutions `conv1`, ... that keep the size of the image, each -> ReLU -> 2x2 max-pool, then `fc`:
    images float [B, 1, 28, 28] -> logits [B, 10].

    channels: of each convolution's output. kernel_size: of all of them, odd. He's initialisation, biases 0.
    """

    def __init__(self, channels: tuple[int, ...], kernel_size: int, size: int = 28):
        super().__init__()
        self.convs = len(channels)
        for i, (before, after) in enumerate(zip((IN_CHANNELS, *channels), channels, strict=False), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2))
            size //= 2
        self.fc = nn.Linear(channels[-1] * size * size, CLASSES)
        for layer in self.children():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.convs + 1):
            x = F.relu(F.max_pool2d(self.get_submodule(f"conv{i}")(x), 2))  # pool first: equal, less to do
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Model:
    """A network and how `hyperfast.hyperize` generates the weights of `targets`; plain without targets."""

    network: Callable[[], nn.Module]
    targets: tuple[str, ...] = ()
    generator: str = "linear"
    z_dim: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)


def three_convs() -> ConvNet:
    return ConvNet((16, 32, 64), 5)


def two_convs() -> ConvNet:
    return ConvNet((16, 16), 7)


MODELS = {
    "shared": Model(three_convs, ("conv1", "conv2", "conv3"), "shared", 4, {"hidden_dim": 64}),
    "shared_plain": Model(three_convs),
    "single": Model(two_convs, ("conv2",), "two_layer", 4),
    "single_plain": Model(two_convs),
}
