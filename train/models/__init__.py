"""Main networks of the training commands, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

import hyperfast
from hyperfast.nn import Generator, LinearGenerator, TwoLayerGenerator
from train.models import vgg
from train.models.fixed import FixedNet
from train.models.full import FullNet
from train.models.layers import Layers


@dataclass(frozen=True)
class Model:
    """A network and which of its layers are generated from embeddings of z_dim.

    report_init, report_std: what the initialisation "report" means here, for generators (a name in
    `hyperfast.nn.init.INITIALISATIONS`) and for ordinary weights (normal with this std, None for He's).
    """

    network: type[FullNet] | type[FixedNet]
    generated: tuple[str, ...] = ()
    z_dim: int = 16
    generator: type[Generator] = LinearGenerator
    report_init: str = "report"
    report_std: float | None = None


MODELS = {
    "full": Model(FullNet, FullNet.LAYERS),
    "enhanced": Model(FullNet, ("conv2", "conv3"), report_init="kaiming"),
    "standard_deep": Model(FullNet),
    "fixed": Model(FixedNet, ("conv2",), z_dim=8, report_std=0.01),
    "all_layers": Model(FixedNet, FixedNet.LAYERS, z_dim=8, report_std=0.01),
    "mnist_style": Model(FixedNet, ("conv2",), z_dim=8, generator=TwoLayerGenerator, report_std=0.01),
    "standard": Model(FixedNet, z_dim=8, report_std=0.01),
}


def build_model(
    name: str,
    num_classes: int = 100,
    fused: bool = False,
    init: str | None = None,
    generated: Collection[str] | None = None,
    z_dim: int | Mapping[str, int] | None = None,
) -> nn.Module:
    """The network `name` of `MODELS` or of `train.models.vgg.MODELS`: images float [B, 3, 32, 32] -> logits
    [B, num_classes].

    fused: factored gradients and fused kernels, to be trained with `hyperfast.optim`; otherwise the plain
    PyTorch expressions of `hyperfast.reference` with dense gradients, for any optimizer. init: a name in
    `hyperfast.nn.init.INITIALISATIONS`; "report" also starts the ordinary weights as published, any other
    leaves them at He's. generated: names of the layers with generated weights instead of the model's own.
    z_dim: size of the embeddings instead of the model's, for all layers or by name. (VGG's own: Xavier's
    initialisation, which linear generators keep, and no generated layer; `build_vgg` knows more of them.)
    Raises ValueError for an unknown model, initialisation or layer.
    """
    if name in vgg.MODELS:
        hyper = "linear" if generated else None
        return vgg.build_vgg(name, num_classes, fused, hyper, z_dim, init=init, targets=generated)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join([*MODELS, *vgg.MODELS])}")
    model = MODELS[name]
    generated = model.generated if generated is None else generated
    sizes = z_dim if isinstance(z_dim, Mapping) else {}
    if unknown := [layer for layer in (*generated, *sizes) if layer not in model.network.LAYERS]:
        raise ValueError(
            f"{name} has no layer {unknown[0]!r}; its layers are {', '.join(model.network.LAYERS)}"
        )
    default = z_dim if isinstance(z_dim, int) else model.z_dim
    report = init == "report"
    layers = Layers(
        generated=generated,
        z_dim={layer: sizes.get(layer, default) for layer in generated},
        generator=model.generator,
        init=model.report_init if report else init,
        std=model.report_std if report else None,
        backend="auto" if fused else "reference",
    )
    network = model.network(num_classes, layers)
    return hyperfast.factored_(network) if fused else network
