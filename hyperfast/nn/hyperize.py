"""Turning any network into a hypernetwork: its weights become the outputs of generators."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.nn.chunked import ChunkedGenerator
from hyperfast.nn.generator import Generator, LinearGenerator, generate_together
from hyperfast.nn.shared_core import SharedCoreGenerator
from hyperfast.nn.two_layer import TwoLayerGenerator

GENERATORS: dict[str, type[Generator]] = {
    "linear": LinearGenerator,
    "two_layer": TwoLayerGenerator,
    "shared": SharedCoreGenerator,
    "chunked": ChunkedGenerator,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class HyperModule(nn.Module):
    """A network whose weights named in `targets` come from `generators`, all made as forward begins.

    module: the network; the generated parameters are None in it. generators: by a name of their own.
    targets: for each generator, in order, for each weight it makes, the parameters of `module` that it is
    (several where layers share it). `hyperize` makes one.
    """

    def __init__(
        self,
        module: nn.Module,
        generators: Mapping[str, Generator],
        targets: Sequence[Sequence[tuple[str, ...]]],
    ):
        super().__init__()
        self.module = module
        self.generators = nn.ModuleDict(generators)
        self.targets = tuple(map(tuple, targets))

    def generate(self) -> dict[str, Tensor]:
        """The generated weights by the names of the parameters they stand for."""
        made = generate_together(self.generators.values())
        return {
            name: weight
            for weights, own in zip(made, self.targets, strict=True)
            for weight, names in zip(weights, own, strict=True)
            for name in names
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.generate(), args, kwargs)


def hyperize(
    module: nn.Module,
    generator: str | type[Generator] | Generator = "linear",
    z_dim: int | Mapping[str, int] = 16,
    targets: Iterable[str] | None = None,
    init: str = "keep",
    *,
    backend: str = "auto",
    **options: Any,
) -> HyperModule:
    """Turns `module` into a hypernetwork; `freeze` turns it back.

    generator: "linear" or "two_layer", one for each weight; "shared" or "chunked", one for all of them; a
    class of generators, or a generator of just the shapes of the targets, in order. z_dim: size of the
    embeddings, one for all or by target. targets: names of layers, whose `weight` is meant, or of parameters
    of any kind; default: the weights of every linear layer and convolution. A weight under several names
    stays one. init: "keep" starts each generator from the present weight, so that outputs stay as they are;
    otherwise a name in `hyperfast.nn.init.INITIALISATIONS`. options: of the generators, as hidden_dim.
    `module` becomes a part of the result and is no longer usable by itself.

    Raises ValueError, `module` unchanged, for a target that does not exist, one without a size in z_dim,
    unknown names, and "keep" with a generator that cannot start from a given weight.
    """
    found = _find(module, targets)
    names = [own[0] for own in found]
    weights = [module.get_parameter(name) for name in names]
    if not found:
        raise ValueError("module has no linear layer or convolution: name the parameters in targets")
    options = options | {"init": None if init == "keep" else init, "backend": backend}
    fans = [_fans(module, name) for name in names]
    if isinstance(generator, Generator):
        made = {"all": generator}
        if generator.shapes != tuple(w.shape for w in weights):
            raise ValueError(
                f"generator makes {generator.shapes}, the targets are {[w.shape for w in weights]}"
            )
    else:
        kind = GENERATORS.get(generator) if isinstance(generator, str) else generator
        if kind is None:
            raise ValueError(f"generator must be one of {', '.join(GENERATORS)}, got {generator!r}")
        if kind.per_layer:
            made = {}
            for name, w, (fan_in, fan_out) in zip(names, weights, fans, strict=True):
                own = options | {"fan_in": fan_in, "fan_out": fan_out, "dtype": w.dtype, "device": w.device}
                made[name.replace(".", "/")] = kind(w.shape, _size(z_dim, name), **own)
        else:
            fan_in, fan_out = zip(*fans, strict=True)
            own = options | {"fan_in": fan_in, "fan_out": fan_out}
            own |= {"dtype": weights[0].dtype, "device": weights[0].device}
            made = {"all": kind([w.shape for w in weights], z_dim, **own)}
    if init == "keep":
        left = list(weights)
        for g in made.values():
            g.keep_(*(left.pop(0) for _ in g.shapes))
    own = iter(found)
    result = HyperModule(module, made, [[next(own) for _ in g.shapes] for g in made.values()])
    for name in (name for names in found for name in names):
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent).register_parameter(last, None)
    return result.train(module.training)


def _size(z_dim: int | Mapping[str, int], name: str) -> int:
    if isinstance(z_dim, int):
        return z_dim
    layer = name.rpartition(".")[0]
    if name not in z_dim and layer not in z_dim:
        raise ValueError(f"z_dim has no size for {name!r}, it names {', '.join(z_dim) or 'none'}")
    return z_dim.get(name, z_dim.get(layer))


def _find(module: nn.Module, targets: Iterable[str] | None) -> list[tuple[str, ...]]:
    """The parameters to generate, each with all its names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    layers = dict(module.named_modules(remove_duplicate=False))
    if targets is None:
        kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
        targets = [f"{name}.weight".lstrip(".") for name, m in layers.items() if isinstance(m, kinds)]
        targets += [
            f"{name}.{own}".lstrip(".")
            for name, m in layers.items()
            if isinstance(m, nn.MultiheadAttention)
            for own in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            if getattr(m, own) is not None
        ]
    wanted: dict[int, None] = {}
    for target in targets:
        name = target if target in parameters else f"{target}.weight".lstrip(".")
        if name not in parameters:
            raise ValueError(f"no layer or parameter named {target!r}; there are {', '.join(parameters)}")
        wanted[id(parameters[name])] = None
    return [tuple(n for n, p in parameters.items() if id(p) == key) for key in wanted]


def _fans(module: nn.Module, name: str) -> tuple[int | None, int | None]:
    """fan_in and fan_out of the layer that owns parameter `name`; None where the shape says it."""
    layer = module.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return None, None
    receptive, strides = math.prod(layer.kernel_size), math.prod(layer.stride)
    fan_in = layer.in_channels // layer.groups * receptive
    fan_out = layer.out_channels // layer.groups * receptive
    if isinstance(layer, TRANSPOSED):
        return max(1, fan_in // strides), fan_out
    return fan_in, max(1, fan_out // strides)
