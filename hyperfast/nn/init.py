"""Initialisations of generators, by name.

With AdamW every entry of weight, bias and z moves by about lr a step, so the generated weight moves by about
lr (1 + sum|z|): the scale of z sets the main network's learning rate. Unit-normal z (sum|z| about 13 at K =
16) diverges at lr 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def report_(weight: Tensor, bias: Tensor | None, z: Tensor, fan: int) -> None:
    """Weight and z normal with std 0.01, bias 0: generated weights start at std 1e-4 sqrt(K) whatever the
    layer."""
    nn.init.normal_(weight, std=0.01)
    nn.init.normal_(z, std=0.01)


def hyperfan_(weight: Tensor, bias: Tensor | None, z: Tensor, fan: int) -> None:
    """Hyperfan-in (Chang, Flokas, Lipson, "Principled weight initialization for hypernetworks", ICLR 2020):
    Var z = 1/K, Var weight = 2 / (fan_in K Var z), bias 0; generated weights have He's variance 2 / fan_in. z
    normal and scaled to norm 1, so that this holds for each layer and not on average alone. hyperfan_out is
    the same with fan_out."""
    embeddings_(z)
    nn.init.normal_(weight, std=math.sqrt(2 / fan))


def he_bias_(weight: Tensor, bias: Tensor | None, z: Tensor, fan: int) -> None:
    """He's initialisation of the main network (normal, variance 2 / fan_in), carried by the generator's bias;
    weight and z normal with std 0.01. A generator without bias gets hyperfan's."""
    if bias is None:
        return hyperfan_(weight, bias, z, fan)
    report_(weight, bias, z, fan)
    nn.init.normal_(bias, std=math.sqrt(2 / fan))


def kaiming_(weight: Tensor, bias: Tensor | None, z: Tensor, fan: int) -> None:
    """He's initialisation of the generator itself (weight normal, variance 2 / K), z normal with std 0.01,
    bias 0: generated weights start at std 0.014 whatever the layer."""
    nn.init.normal_(weight, std=math.sqrt(2 / weight.shape[1]))
    nn.init.normal_(z, std=0.01)


INITIALISATIONS = {
    "report": report_,
    "hyperfan": hyperfan_,
    "hyperfan_out": hyperfan_,
    "he_bias": he_bias_,
    "kaiming": kaiming_,
}
DEFAULT = "he_bias"


def check(name: str | None) -> str:
    """`name`, or the default for None; ValueError for an unknown one."""
    if name is None:
        return DEFAULT
    if name not in INITIALISATIONS:
        raise ValueError(f"init must be one of {', '.join(INITIALISATIONS)}, got {name!r}")
    return name


def fan(shape: Sequence[int], name: str, fan_in: int | None = None, fan_out: int | None = None) -> int:
    """The fan that initialisation `name` scales a main layer's weight by, of a weight `shape` (out, in,
    *kernel) where it is not given: fan_out for "hyperfan_out", else fan_in."""
    if name == "hyperfan_out":
        return fan_out or shape[0] * math.prod(shape[2:])
    return fan_in or max(1, math.prod(shape[1:]))


def fans(
    shapes: Sequence[Sequence[int]],
    name: str,
    fan_in: int | Sequence[int] | None = None,
    fan_out: int | Sequence[int] | None = None,
) -> list[int]:
    """`fan` of each of `shapes`; fan_in, fan_out: one number for all, or one for each. ValueError for
    another number of them."""
    given = []
    for argument, value in (("fan_in", fan_in), ("fan_out", fan_out)):
        values = [value] * len(shapes) if value is None or isinstance(value, int) else list(value)
        if len(values) != len(shapes):
            raise ValueError(f"{argument} must have {len(shapes)} numbers like shapes, got {len(values)}")
        given.append(values)
    return [fan(shape, name, *own) for shape, *own in zip(shapes, *given, strict=True)]


def embeddings_(z: Tensor, norms: Tensor | float = 1.0) -> None:
    """z [..., K] normal, every embedding scaled to its norm, [...] or one for all."""
    nn.init.normal_(z)
    z.mul_((torch.as_tensor(norms, dtype=z.dtype, device=z.device) / z.norm(dim=-1)).unsqueeze(-1))


@torch.no_grad()
def initialise_(weight: Tensor, bias: Tensor | None, z: Tensor, fan: int, name: str | None = None) -> None:
    """Initialises weight [N, K], bias [N] or None and z [K] in place for a main layer of `fan` inputs (or
    outputs, for "hyperfan_out")."""
    if bias is not None:
        nn.init.zeros_(bias)
    INITIALISATIONS[check(name)](weight, bias, z, fan)


def _layer_norms(fans: Sequence[int], counts: Sequence[int], z: Tensor) -> Tensor:
    """For the z of several layers on one generator of the smallest of `fans`: the norm of each of
    sum(counts) embeddings that brings its layer to 2 / fan."""
    norms = torch.tensor([math.sqrt(min(fans) / fan) for fan in fans], dtype=z.dtype)
    return norms.repeat_interleave(torch.tensor(counts)).view(z.shape[:-1]).to(z.device)


@torch.no_grad()
def initialise_two_layer_(
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    z: Tensor,
    fans: Sequence[int],
    counts: Sequence[int],
    name: str | None = None,
) -> None:
    """Initialises a two-layer generator, kernel = (z w2 + b2) w1 + b1, in place; biases start at 0. w1
    [D, C], w2 [K, I D], z [E, K] or [K]; fans, counts: of each layer, its fan and number of embeddings.

    report: all normal with std 0.01. kaiming: both layers He's, z std 0.01. hyperfan: every stage keeps its
    variance, over the embeddings there are and not on average alone, and the norm of a layer's z gives its
    generated weights He's, 2 / fan; he_bias is the same, b1 cannot carry a weight of its own for every input
    channel.
    """
    name = check(name)
    if name in ("report", "kaiming"):
        for tensor in (w1, w2):
            nn.init.normal_(tensor, std=0.01 if name == "report" else math.sqrt(2 / tensor.shape[0]))
        nn.init.normal_(z, std=0.01)
    else:
        nn.init.normal_(w1, std=math.sqrt(2 / min(fans)))
        nn.init.normal_(w2)
        embeddings_(z)
        w2.div_((z.view(-1, w2.shape[0]) @ w2).square().mean().mul(w1.shape[0]).sqrt())
        for own, fan in zip(z.view(-1, w2.shape[0]).split(counts), fans, strict=True):
            units = (own @ w2).view(-1, w1.shape[0]) @ w1
            own.mul_(math.sqrt(2 / fan) / units.square().mean().sqrt())
    for bias in (b1, b2):
        nn.init.zeros_(bias)


@torch.no_grad()
def initialise_chunked_(
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    fans: Sequence[int],
    counts: Sequence[int],
    name: str | None = None,
) -> None:
    """Initialises a generator of chunks, weight [C, K], bias [C], z [E, K], in place. As `initialise_`, but
    he_bias is hyperfan: one bias serves all chunks and would make them equal. fans, counts: as in
    `initialise_two_layer_`."""
    name = check(name)
    nn.init.zeros_(bias)
    if name in ("report", "kaiming"):
        INITIALISATIONS[name](weight, bias, z, min(fans))
    else:
        nn.init.normal_(weight, std=math.sqrt(2 / min(fans)))
        embeddings_(z, _layer_norms(fans, counts, z))


@torch.no_grad()
def initialise_core_(weight: Tensor, bias: Tensor, z: Tensor, name: str | None = None) -> None:
    """Initialises a shared core, h = weight z + bias, weight [D, K], bias [D], z [L, K], in place; bias
    starts at 0.

    report: normal with std 0.01. kaiming: He's, z std 0.01. Otherwise embeddings of norm about 1: he_bias
    gives h of std 0.01, hyperfan scales each so that its h has norm 1; heads then start as a linear generator
    does on its z.
    """
    name = check(name)
    nn.init.zeros_(bias)
    if name in ("report", "kaiming"):
        nn.init.normal_(weight, std=0.01 if name == "report" else math.sqrt(2 / weight.shape[1]))
        nn.init.normal_(z, std=0.01)
    else:
        nn.init.normal_(weight, std=0.01 if name == "he_bias" else 1 / math.sqrt(weight.shape[0]))
        embeddings_(z)
        if name != "he_bias":
            z.div_((z @ weight.t()).norm(dim=-1, keepdim=True))
