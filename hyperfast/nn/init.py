"""Initialisations of linear generators, by name.

With AdamW every entry of weight, bias and z moves by about lr a step, so the generated weight moves by about
lr (1 + sum|z|): the scale of z sets the main network's learning rate. Unit-normal z (sum|z| about 13 at K =
16) diverges at lr 1e-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def report_(weight: Tensor, bias: Tensor | None, z: Tensor, fan_in: int) -> None:
    """Weight and z normal with std 0.01, bias 0: generated weights start at std 1e-4 sqrt(K) whatever the
    layer."""
    nn.init.normal_(weight, std=0.01)
    nn.init.normal_(z, std=0.01)


def hyperfan_(weight: Tensor, bias: Tensor | None, z: Tensor, fan_in: int) -> None:
    """Hyperfan-in (Chang, Flokas, Lipson, "Principled weight initialization for hypernetworks", ICLR 2020): z
    normal with Var z = 1/K, Var weight = 2 / (fan_in K Var z), bias 0; generated weights have He's variance 2
    / fan_in."""
    nn.init.normal_(z, std=1 / math.sqrt(z.numel()))
    nn.init.normal_(weight, std=math.sqrt(2 / fan_in))


def he_bias_(weight: Tensor, bias: Tensor | None, z: Tensor, fan_in: int) -> None:
    """He's initialisation of the main network (normal, variance 2 / fan_in), carried by the generator's bias;
    weight and z normal with std 0.01. A generator without bias gets hyperfan's."""
    if bias is None:
        return hyperfan_(weight, bias, z, fan_in)
    report_(weight, bias, z, fan_in)
    nn.init.normal_(bias, std=math.sqrt(2 / fan_in))


def kaiming_(weight: Tensor, bias: Tensor | None, z: Tensor, fan_in: int) -> None:
    """He's initialisation of the generator itself (weight normal, variance 2 / K), z normal with std 0.01,
    bias 0: generated weights start at std 0.014 whatever the layer."""
    nn.init.normal_(weight, std=math.sqrt(2 / z.numel()))
    nn.init.normal_(z, std=0.01)


INITIALISATIONS = {"report": report_, "hyperfan": hyperfan_, "he_bias": he_bias_, "kaiming": kaiming_}
DEFAULT = "he_bias"


def check(name: str | None) -> str:
    """`name`, or the default for None; ValueError for an unknown one."""
    if name is None:
        return DEFAULT
    if name not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {name!r}")
    return name


@torch.no_grad()
def initialise_(weight: Tensor, bias: Tensor | None, z: Tensor, fan_in: int, name: str | None = None) -> None:
    """Initialises weight [N, K], bias [N] or None and z [K] in place for a main layer of `fan_in` inputs."""
    if bias is not None:
        nn.init.zeros_(bias)
    INITIALISATIONS[check(name)](weight, bias, z, fan_in)


@torch.no_grad()
def initialise_two_layer_(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, z: Tensor, fan_in: int, name: str | None = None
) -> None:
    """Initialises a two-layer generator, kernel = (z w2 + b2) w1 + b1, in place; biases start at 0.

    report: all normal with std 0.01. kaiming: both layers He's, z std 0.01. hyperfan: every stage keeps its
    variance and generated weights have He's, 2 / fan_in; he_bias is the same, b1 cannot carry a weight of its
    own for every input channel.
    """
    k = z.numel()
    stds = {"report": (0.01, 0.01, 0.01), "kaiming": (math.sqrt(2 / k), math.sqrt(2 / k), 0.01)}
    hyperfan = (math.sqrt(2 / fan_in), 1 / math.sqrt(k), 1 / math.sqrt(k))
    for tensor, std in zip((w1, w2, z), stds.get(check(name), hyperfan), strict=True):
        nn.init.normal_(tensor, std=std)
    for bias in (b1, b2):
        nn.init.zeros_(bias)
