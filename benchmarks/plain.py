"""`full` as users write it today: one nn.Linear for each layer, generated in the forward, nothing of
hyperfast.

Parameter names are those of published checkpoints, so `train.models` loads its state dict and both compute
the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_SHAPES = [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3)]
LINEAR_SHAPES = [(1024, 512), (512, 1024), (100, 512)]
SHAPES = {f"conv{i}": shape for i, shape in enumerate(CONV_SHAPES, 1)} | {
    f"fc{i}": shape for i, shape in enumerate(LINEAR_SHAPES, 1)
}
NUM_GENERATED = 5_009_088


class PlainHyperNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, 100]."""

    def __init__(self, z_dim: int = 16):
        super().__init__()
        for name, shape in SHAPES.items():
            n = torch.Size(shape).numel()
            self.register_parameter(f"z_signal_{name}", nn.Parameter(torch.randn(1, z_dim) * 0.01))
            hyper = nn.Linear(z_dim, n)
            nn.init.normal_(hyper.weight, std=0.01)
            nn.init.normal_(hyper.bias, std=(2 / (n // shape[0])) ** 0.5)
            self.add_module(f"hyper_{name}", hyper)
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(shape[0])))
        for i, shape in enumerate(CONV_SHAPES, 1):
            self.add_module(f"bn{i}", nn.BatchNorm2d(shape[0]))
        self.dropout = nn.Dropout(0.5)

    def generate(self, name: str) -> Tensor:
        hyper = self.get_submodule(f"hyper_{name}")
        return hyper(self.get_parameter(f"z_signal_{name}")).view(SHAPES[name])

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 6):
            x = F.conv2d(x, self.generate(f"conv{i}"), self.get_parameter(f"conv{i}_bias"), padding=1)
            x = F.relu(self.get_submodule(f"bn{i}")(x))
            if i < 5:
                x = F.max_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = self.dropout(F.relu(F.linear(x, self.generate("fc1"), self.fc1_bias)))
        x = self.dropout(F.relu(F.linear(x, self.generate("fc2"), self.fc2_bias)))
        return F.linear(x, self.generate("fc3"), self.fc3_bias)
