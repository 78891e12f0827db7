"""The CIFAR network `full` and its plain twin `standard_deep`.

Convs 3-64-128-256-512-512 (3x3), each conv -> batch norm -> ReLU, 2x2 max-pool after the first four, global
average pool, fully connected 512-1024-512-classes with ReLU and dropout 0.5 after the first two.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import BatchNormReLUMaxPool2d, HyperConv2d, HyperLinear, generate_layers

CHANNELS = (3, 64, 128, 256, 512, 512)


class FullNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes]. hyper: every weight is generated from an
    embedding of z_dim.

    `load_state_dict` also takes the names of published checkpoints: z_signal_conv1 [1, K],
    hyper_conv1.weight, hyper_conv1.bias, conv1_bias and so on.
    """

    def __init__(
        self,
        num_classes: int = 100,
        hyper: bool = True,
        z_dim: int = 16,
        init: str | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        features = (512, 1024, 512, num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        options = {"z_dim": z_dim, "init": init, "backend": backend} if hyper else {}
        conv = functools.partial(HyperConv2d if hyper else nn.Conv2d, kernel_size=3, padding=1, **options)
        linear = functools.partial(HyperLinear if hyper else nn.Linear, **options)
        for i in range(1, 6):
            self.add_module(f"conv{i}", conv(CHANNELS[i - 1], CHANNELS[i]))
            pool = 2 if i < 5 else 1
            self.add_module(f"bn{i}", BatchNormReLUMaxPool2d(CHANNELS[i], pool, backend=backend))
        for i in range(1, 4):
            self.add_module(f"fc{i}", linear(features[i - 1], features[i]))
        self.dropout = nn.Dropout(0.5)
        if not hyper:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)
        self.register_load_state_dict_pre_hook(_rename_published)

    def forward(self, x: Tensor) -> Tensor:
        weights = generate_layers(self)

        def layer(name: str, x: Tensor) -> Tensor:
            module = self.get_submodule(name)
            return module(x, weights[name]) if name in weights else module(x)

        for i in range(1, 6):
            x = self.get_submodule(f"bn{i}")(layer(f"conv{i}", x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = self.dropout(F.relu(layer("fc1", x)))
        x = self.dropout(F.relu(layer("fc2", x)))
        return layer("fc3", x)


def _rename_published(module, state_dict, prefix, *_) -> None:
    for name in [f"conv{i}" for i in range(1, 6)] + [f"fc{i}" for i in range(1, 4)]:
        renames = {
            f"hyper_{name}.weight": f"{name}.generator.weight",
            f"hyper_{name}.bias": f"{name}.generator.bias",
            f"z_signal_{name}": f"{name}.generator.z",
            f"{name}_bias": f"{name}.bias",
        }
        for published, own in renames.items():
            if prefix + published in state_dict:
                tensor = state_dict.pop(prefix + published)
                state_dict[prefix + own] = tensor.reshape(-1) if published.startswith("z_signal") else tensor
