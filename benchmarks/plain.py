"""`full` and the hyper wide residual networks as users write them today, nothing of hyperfast: one nn.Linear
for each layer, or a kernel for each embedding, generated in the forward.

Parameter names are those of published checkpoints, so `train.models` loads their state dicts and both compute
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


class PlainHyperWideResNet(nn.Module):
    """Hyper WRN-40-1 (width 1) or 40-2: every 16 x 16 x 3 x 3 unit by itself from its embedding, units put
    together with cat. Ha, Dai, Le, "HyperNetworks" (ICLR 2017). images float [B, 3, 32, 32] -> logits
    [B, num_classes]. Starts where `train.models.wrn` does: generated kernels at about He's scale."""

    def __init__(self, width: int = 1, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.hope = nn.ParameterDict(
            {
                "w1": torch.randn(64, 144) * (2 / 144) ** 0.5,
                "b1": torch.zeros(144),
                "w2": torch.randn(64, 1024) / 8,
                "b2": torch.zeros(1024),
            }
        )
        self.zs, self.res_net = nn.ModuleList(), nn.ModuleList()
        self.blocks: list[tuple[int, int]] = []  # channels in and out
        channels = 16
        for stage in range(3):
            for _ in range(6):
                before, channels = channels, 16 * width * 2**stage
                self.blocks.append((before, channels))
                block = nn.ModuleDict({"bn1": nn.BatchNorm2d(channels), "bn2": nn.BatchNorm2d(channels)})
                if before != channels:
                    block["reslayer"] = nn.Conv2d(before, channels, 1, self._stride(len(self.blocks) - 1))
                self.res_net.append(block)
                for inputs in (before, channels):
                    count = inputs * channels // 256
                    z = [torch.randn(64) / 8 * (16 / inputs) ** 0.5 for _ in range(count)]
                    self.zs.append(nn.ModuleDict({"z_list": nn.ParameterList(z)}))
        self.final = nn.Linear(channels, num_classes)

    @staticmethod
    def _stride(block: int) -> int:
        return 2 if block in (6, 12) else 1

    def unit(self, z: Tensor) -> Tensor:
        a = (z @ self.hope["w2"] + self.hope["b2"]).view(16, 64)
        return (a @ self.hope["w1"] + self.hope["b1"]).view(16, 16, 3, 3)

    def kernel(self, i: int, inputs: int, outputs: int) -> Tensor:
        z, columns = self.zs[i]["z_list"], inputs // 16
        rows = [
            torch.cat([self.unit(z[row * columns + column]) for column in range(columns)], 1)
            for row in range(outputs // 16)
        ]
        return torch.cat(rows, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i, (block, (inputs, outputs)) in enumerate(zip(self.res_net, self.blocks, strict=True)):
            shortcut = block["reslayer"](x) if "reslayer" in block else x
            out = F.conv2d(x, self.kernel(2 * i, inputs, outputs), stride=self._stride(i), padding=1)
            out = F.relu(block["bn1"](out))
            out = F.conv2d(out, self.kernel(2 * i + 1, outputs, outputs), padding=1)
            x = F.relu(block["bn2"](out) + shortcut)
        return self.final(F.avg_pool2d(x, 8).flatten(1))
