"""The CIFAR network of `fixed`, `all_layers`, `mnist_style` and their plain twin `standard`.

Convs 3-32 (5x5), 32-64 (5x5), 64-128 (3x3), each conv -> ReLU -> 2x2 max-pool, fully connected
2048-256-classes with ReLU and dropout 0.5 in between.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import generate_layers
from train.models.layers import Layers, check_classes


class FixedNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes]. layers: which weights are generated, and
    how."""

    LAYERS = ("conv1", "conv2", "conv3", "fc1", "fc2")

    def __init__(self, num_classes: int = 100, layers: Layers | None = None):
        super().__init__()
        check_classes(num_classes)
        layers = layers or Layers()
        self.conv1 = layers.conv("conv1", 3, 32, 5)
        self.conv2 = layers.conv("conv2", 32, 64, 5)
        self.conv3 = layers.conv("conv3", 64, 128, 3)
        self.fc1 = layers.linear("fc1", 2048, 256)
        self.fc2 = layers.linear("fc2", 256, num_classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = generate_layers(self)

        def layer(name: str, x: Tensor) -> Tensor:
            module = self.get_submodule(name)
            return module(x, weights[name]) if name in weights else module(x)

        for name in ("conv1", "conv2", "conv3"):
            x = F.relu(F.max_pool2d(layer(name, x), 2))  # pool first: equal, a quarter of the ReLU
        x = self.dropout(F.relu(layer("fc1", x.flatten(1))))
        return layer("fc2", x)
