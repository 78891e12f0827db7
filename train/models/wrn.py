"""Wide residual networks for CIFAR-10 and the hypernetwork that makes their kernels.

Zagoruyko and Komodakis, "Wide Residual Networks" (2016), with the blocks of the public PyTorch version of Ha,
Dai, Le, "HyperNetworks" (ICLR 2017): conv -> BN -> ReLU -> conv -> BN, plus the shortcut, then ReLU. The
shortcut is the identity, or a 1x1 conv with bias and without BN where channels change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hyperfast
from hyperfast.nn import BatchNormReLUMaxPool2d, Conv2d, TwoLayerGenerator
from train.models.layers import check_classes

BLOCKS = 6  # of each of three stages: 40 layers
UNIT = (16, 16, 3, 3)
Z_DIM = HIDDEN_DIM = 64


class Block(nn.Module):
    """x [B, I, H, W] -> [B, O, H / stride, W / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, backend: str):
        super().__init__()
        conv = nn.Conv2d if backend == "reference" else Conv2d
        self.conv1 = conv(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNormReLUMaxPool2d(channels, pool=1, backend=backend)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNormReLUMaxPool2d(channels, pool=1, backend=backend)
        same = in_channels == channels
        self.reslayer = nn.Identity() if same else conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.reslayer(x))


class WideResNet(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes]: stages of 16, 32, 64 channels, times `width`.

    backend: "auto" (fused kernels where there are any) or "reference" (plain PyTorch). Ordinary weights start
    at He's normal with fan in, biases at 0.
    """

    def __init__(self, width: int = 1, num_classes: int = 10, backend: str = "auto"):
        super().__init__()
        check_classes(num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = BatchNormReLUMaxPool2d(16, pool=1, backend=backend)
        self.res_net = nn.ModuleList()
        channels = 16
        for stage in range(3):
            for block in range(BLOCKS):
                before, channels = channels, 16 * width * 2**stage
                self.res_net.append(Block(before, channels, 2 if stage and not block else 1, backend))
        self.final = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        for block in self.res_net:
            x = block(x)
        return self.final(x.mean((2, 3)))

    def kernels(self) -> dict[str, Tensor]:
        """The 3x3 kernels of the blocks by name, in the network's order: what the hypernetwork makes."""
        return {
            f"res_net.{i}.{conv}.weight": block.get_submodule(conv).weight
            for i, block in enumerate(self.res_net)
            for conv in ("conv1", "conv2")
        }


@dataclass(frozen=True)
class Model:
    """A network of this width; hyper: its 3x3 kernels are generated."""

    width: int
    hyper: bool


MODELS = {
    "hyper_wrn_40_1": Model(1, True),
    "hyper_wrn_40_2": Model(2, True),
    "wrn_40_1": Model(1, False),
    "wrn_40_2": Model(2, False),
}


def build_wrn(name: str, num_classes: int = 10, fused: bool = True, init: str = "hyperfan") -> nn.Module:
    """The network `name` of `MODELS`: images float [B, 3, 32, 32] -> logits [B, num_classes].

    A hypernetwork is a `hyperfast.nn.HyperModule` with one `TwoLayerGenerator` for all kernels. fused: fused
    kernels, otherwise plain PyTorch. init: of the generator, a name in
    `hyperfast.nn.init.INITIALISATIONS`. `load_state_dict` also takes the names of published checkpoints.
    Raises ValueError for an unknown model or initialisation.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    model, backend = MODELS[name], "auto" if fused else "reference"
    network = WideResNet(model.width, num_classes, backend)
    if not model.hyper:
        return network
    kernels = network.kernels()
    shapes = [kernel.shape for kernel in kernels.values()]
    generator = TwoLayerGenerator(shapes, Z_DIM, HIDDEN_DIM, UNIT, init=init, backend=backend)
    network = hyperfast.hyperize(network, generator, targets=kernels, init=init, backend=backend)
    network.register_load_state_dict_pre_hook(_rename_published)
    return network


def model_of(state: Mapping[str, Tensor]) -> str | None:
    """The name in `MODELS` of the network with the state dict `state`, None for another network."""
    hyper = "generators.all.z" in state
    final = state.get("module.final.weight" if hyper else "final.weight")
    for name, model in MODELS.items():
        if final is not None and model.hyper == hyper and final.shape[1:] == (64 * model.width,):
            return name
    return None


def _rename_published(module, state_dict, prefix, *_) -> None:
    if not prefix:
        rename_published_(state_dict)


def rename_published_(state: dict[str, Tensor]) -> None:
    """Gives the entries of a published checkpoint of a hypernetwork the names of `build_wrn`, in place;
    anything else stays as it is.

    hope.{w1,b1,w2,b2}: the generator; zs.{i}.z_list.{j}: the embeddings of kernel i, rows of blocks in order;
    all other names are those of `WideResNet`, all with "module." before them if saved from DataParallel.
    Checkpoints of the time have no num_batches_tracked.
    """
    wrapped = "module." if "module.hope.w1" in state else ""  # by DataParallel
    if f"{wrapped}hope.w1" not in state:
        return
    theirs = {name.removeprefix(wrapped): tensor for name, tensor in state.items()}
    state.clear()
    embeddings = [name for name in theirs if name.startswith("zs.")]
    in_order = sorted(embeddings, key=lambda name: [int(part) for part in name.split(".")[1::2]])
    state["generators.all.z"] = torch.stack([theirs[name] for name in in_order])
    for name, tensor in theirs.items():
        if name.startswith("hope."):
            state["generators.all." + name.removeprefix("hope.")] = tensor
        elif name not in embeddings:
            state["module." + name] = tensor
            if name.endswith("running_mean"):
                count = "module." + name.replace("running_mean", "num_batches_tracked")
                state.setdefault(count, torch.zeros((), dtype=torch.int64))
