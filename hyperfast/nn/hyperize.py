"""Turning plain layers into layers with generated weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from hyperfast.nn.generator import Generator, LinearGenerator
from hyperfast.nn.layers import Conv2d, HyperConv2d, HyperLayer, HyperLinear

KINDS = (nn.Linear, nn.Conv2d, Conv2d)


def hyperize(
    module: nn.Module,
    z_dim: int | Mapping[str, int] = 16,
    *,
    targets: Iterable[str] | None = None,
    generator: type[Generator] = LinearGenerator,
    init: str = "keep",
    backend: str = "auto",
) -> nn.Module:
    """Turns `nn.Linear` and `nn.Conv2d` layers of `module` into layers with generated weights, in place.

    z_dim: size of the embeddings, one for all or by name. targets: names of the layers (those of
    `named_modules`), default every one. init: "keep" starts each generator from the layer's weight, which it
    then makes bit for bit (`LinearGenerator.keep_`); otherwise a name in
    `hyperfast.nn.init.INITIALISATIONS`. Biases stay the parameters they are; hooks of the replaced layers are
    lost. A layer under several names stays one layer. Returns `module`, or its replacement if it is such a
    layer itself.

    Raises ValueError, `module` unchanged, for a target that is no such layer, a layer without a size in
    z_dim, padding other than zeros, unknown names, and "keep" with a generator that cannot keep.
    """
    found = {n: m for n, m in module.named_modules(remove_duplicate=False) if type(m) in KINDS}
    targets = list(found) if targets is None else list(targets)
    replaced: dict[int, HyperLayer] = {}
    for name in targets:
        if name not in found:
            raise ValueError(
                f"no nn.Linear or nn.Conv2d named {name!r}; there are {', '.join(found) or 'none'}"
            )
        if not isinstance(z_dim, int) and name not in z_dim:
            raise ValueError(f"z_dim has no size for {name!r}, it names {', '.join(z_dim) or 'none'}")
        layer, size = found[name], z_dim if isinstance(z_dim, int) else z_dim[name]
        if id(layer) not in replaced:
            replaced[id(layer)] = _hyper(layer, size, generator, init, backend)
    for name in targets:
        parent, _, own = name.rpartition(".")
        layer = replaced[id(found[name])]
        if not name:
            return layer
        setattr(module.get_submodule(parent), own, layer)
    return module


def _hyper(
    layer: nn.Linear | nn.Conv2d, z_dim: int, kind: type[Generator], init: str, backend: str
) -> HyperLayer:
    weight = layer.weight
    options = {"device": weight.device, "dtype": weight.dtype}
    made = kind(weight.shape, z_dim, init=None if init == "keep" else init, backend=backend, **options)
    if init == "keep":
        made.keep_(weight)
    if isinstance(layer, nn.Linear):
        hyper = HyperLinear(layer.in_features, layer.out_features, bias=False, generator=made)
    else:
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be zeros, got {layer.padding_mode!r}")
        size = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        hyper = HyperConv2d(*size, layer.dilation, layer.groups, bias=False, generator=made)
    hyper.bias = layer.bias
    return hyper.train(layer.training)
