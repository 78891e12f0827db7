"""The CIFAR network of `full`, `enhanced` and their plain twin `standard_deep`.

Convs 3-64-128-256-512-512 (3x3), each conv -> batch norm -> ReLU, 2x2 max-pool after the first four, global
average pool, fully connected 512-1024-512-classes with ReLU and dropout 0.5 after the first two.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import BatchNormReLUMaxPool2d, generate_layers
from train.models.layers import Layers, check_classes

CHANNELS = (3, 64, 128, 256, 512, 512)


class FullNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes]. layers: which weights are generated, and how.

    `load_state_dict` also takes the names of published checkpoints: z_signal_conv1 [1, K],
    hyper_conv1.weight, hyper_conv1.bias, conv1_bias and so on.
    """

    LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2", "fc3")

    def __init__(self, num_classes: int = 100, layers: Layers | None = None):
        super().__init__()
        check_classes(num_classes)
        layers = layers or Layers()
        features = (512, 1024, 512, num_classes)
        for i in range(1, 6):
            self.add_module(f"conv{i}", layers.conv(f"conv{i}", CHANNELS[i - 1], CHANNELS[i], 3))
            pool = 2 if i < 5 else 1
            self.add_module(f"bn{i}", BatchNormReLUMaxPool2d(CHANNELS[i], pool, backend=layers.backend))
        for i in range(1, 4):
            self.add_module(f"fc{i}", layers.linear(f"fc{i}", features[i - 1], features[i]))
        self.dropout = nn.Dropout(0.5)
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
    rename_published_(state_dict, prefix)


def rename_published_(state: dict[str, Tensor], prefix: str = "") -> None:
    """Gives the entries of a published checkpoint the names of `FullNet`, in place; others stay."""
    for name in FullNet.LAYERS:
        renames = {
            f"hyper_{name}.weight": f"{name}.generator.weight",
            f"hyper_{name}.bias": f"{name}.generator.bias",
            f"z_signal_{name}": f"{name}.generator.z",
            f"{name}_bias": f"{name}.bias",
        }
        for published, own in renames.items():
            if prefix + published in state:
                tensor = state.pop(prefix + published)
                state[prefix + own] = tensor.reshape(-1) if published.startswith("z_signal") else tensor
