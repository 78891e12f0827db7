"""A CIFAR-10 network whose weights depend on the image, and its twins with one set of weights.

Convs 3-32-64-128-128 (3x3), each conv -> batch norm -> ReLU, 2x2 max-pool after the first three, global
average pool, fully connected 128-classes. The convolutions after the first and the fully connected layer are
made by linear generators. In `conditional` an encoder, a small strided network, reads the image and shifts
the embedding of each: image b has the weights w_lb = W_l z_lb + b_l with z_lb = z_l + A_l e(x_b). The columns
of W_l are experts and z_lb their routing weights: conditionally parameterized convolution (Yang, Bender, Le,
Ngiam, "CondConv", NeurIPS 2019), but with signed weights and routed from the image once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import hyperfast
from hyperfast.nn import BatchNormReLUMaxPool2d, Conv2d, HyperModule, named_generators
from train.models.layers import check_classes

CHANNELS = (3, 32, 64, 128, 128)
POOLS = (2, 2, 2, 1)
GENERATED = ("conv2", "conv3", "conv4", "fc")
Z_DIM = 4
FEATURES = 64  # of the encoder


class SmallNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes]. backend: "auto" (fused kernels where there are
    any) or "reference" (plain PyTorch). Weights start at He's normal, biases at 0."""

    def __init__(self, num_classes: int = 10, backend: str = "auto"):
        super().__init__()
        check_classes(num_classes)
        conv = nn.Conv2d if backend == "reference" else Conv2d
        for i, pool in enumerate(POOLS, start=1):
            self.add_module(f"conv{i}", conv(CHANNELS[i - 1], CHANNELS[i], 3, padding=1, bias=False))
            self.add_module(f"bn{i}", BatchNormReLUMaxPool2d(CHANNELS[i], pool, backend=backend))
        self.fc = nn.Linear(CHANNELS[-1], num_classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, len(CHANNELS)):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
        return self.fc(x.mean((2, 3)))


class Encoder(nn.Sequential):
    """images [B, 3, 32, 32] -> features [B, FEATURES] of norm sqrt(FEATURES): two strided convolutions, to
    8x8 and 4x4, and a mean over what is left."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, FEATURES // 2, 5, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(FEATURES // 2, FEATURES, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(FEATURES),
        )


class ConditionalNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, classes], every image with weights of its own.

    network: a hyperized network of linear generators. The shifts of z start at 0: the network then is the
    hypernetwork that it is made from.
    """

    conditional = True  # there is no one plain network to deploy
    network: HyperModule

    def __init__(self, network: HyperModule):
        super().__init__()
        self.network, self.encoder = network, Encoder()
        self.shifts = nn.ModuleDict(
            {layer: nn.Linear(FEATURES, g.z_dim, bias=False) for layer, g in named_generators(network)}
        )
        for shift in self.shifts.values():
            nn.init.zeros_(shift.weight)

    def embeddings(self, x: Tensor) -> dict[str, Tensor]:
        """z [B, K] by layer, for the images x."""
        features = self.encoder(x) / FEATURES**0.5
        return {layer: g.z + self.shifts[layer](features) for layer, g in named_generators(self.network)}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, z=self.embeddings(x))


@dataclass(frozen=True)
class Model:
    """generated: by linear generators; conditional: from embeddings of each image."""

    generated: bool
    conditional: bool = False


MODELS = {"conditional": Model(True, True), "static": Model(True), "plain": Model(False)}


def build_conditional(
    name: str, num_classes: int = 10, fused: bool = True, init: str = "hyperfan", z_dim: int = Z_DIM
) -> nn.Module:
    """The network `name` of `MODELS`: images float [B, 3, 32, 32] -> logits [B, num_classes].

    conditional: weights for each image; static: the same generators with one embedding for each layer;
    plain: ordinary weights. fused: fused kernels, otherwise plain PyTorch; static has factored gradients
    then, those of weights for each sample have rank B and are dense. init: of the generators, a name in
    `hyperfast.nn.init.INITIALISATIONS`. Raises ValueError for an unknown model or initialisation.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    model, backend = MODELS[name], "auto" if fused else "reference"
    network: nn.Module = SmallNet(num_classes, backend)
    if model.generated:
        options = {"z_dim": z_dim, "init": init, "backend": backend}
        network = hyperfast.hyperize(network, "linear", targets=GENERATED, **options)
    if model.conditional:
        return ConditionalNet(network)
    return hyperfast.factored_(network, fused)
