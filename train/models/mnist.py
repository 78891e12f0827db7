"""The MNIST networks of `python -m train.mnist`, plain and as hypernetworks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast

IN_CHANNELS, CLASSES = 1, 10


class ConvNet(nn.Module):
    """Convolutions `conv1`, ... that keep the size of the image, each -> ReLU -> 2x2 max-pool, then `fc`:
    images float [B, 1, 28, 28] -> logits [B, 10].

    channels: of each convolution's output. kernel_size: of all of them, odd. torch's initialisation.
    """

    def __init__(self, channels: tuple[int, ...], kernel_size: int, size: int = 28):
        super().__init__()
        self.convs = len(channels)
        for i, (before, after) in enumerate(zip((IN_CHANNELS, *channels), channels, strict=False), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2))
            size //= 2
        self.fc = nn.Linear(channels[-1] * size * size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.convs + 1):
            x = F.relu(F.max_pool2d(self.get_submodule(f"conv{i}")(x), 2))  # pool first: equal, less to do
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Model:
    """A network and how `hyperfast.hyperize` generates the weights of `targets`; plain without targets.

    twin: the name of the same network with ordinary weights. init: as `hyperize` takes it.
    """

    network: Callable[[], ConvNet]
    targets: tuple[str, ...] = ()
    generator: str = "linear"
    init: str = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None


def three_convs() -> ConvNet:
    return ConvNet((16, 32, 64), 5)


def two_convs() -> ConvNet:
    return ConvNet((16, 16), 7)


MODELS = {
    "shared": Model(
        three_convs,
        ("conv1", "conv2", "conv3"),
        "shared",
        "keep",
        {"z_dim": 4, "hidden_dim": 64},
        "shared_plain",
    ),
    "shared_plain": Model(three_convs),
    "single": Model(two_convs, ("conv2",), "two_layer", "hyperfan", {"z_dim": 4}, "single_plain"),
    "single_plain": Model(two_convs),
}


def build_mnist(name: str, fused: bool = False, init: str | None = None) -> nn.Module:
    """The network `name` of `MODELS`: images float [B, 1, 28, 28] -> logits [B, 10].

    fused: as in `train.models.build_model`. init: "keep", or a name in
    `hyperfast.nn.init.INITIALISATIONS`; default: the model's own. A hypernetwork draws the numbers of its
    plain twin first: with "keep" both start as the same network. Raises ValueError for unknown names and for
    "keep" where the generator cannot start from a given weight.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    model = MODELS[name]
    network = model.network()
    if not model.targets:
        return network
    backend = "auto" if fused else "reference"
    made = hyperfast.hyperize(
        network,
        model.generator,
        targets=model.targets,
        init=init or model.init,
        backend=backend,
        **model.options,
    )
    return hyperfast.factored_(made) if fused else made
