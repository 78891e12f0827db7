"""Main networks of the training commands, by name."""

from __future__ import annotations

from torch import nn

import hyperfast
from train.models.full import FullNet

MODELS = {"full": "hypernetwork, every weight generated (K = 16)", "standard_deep": "the same network, plain"}


def build_model(name: str, num_classes: int = 100, fused: bool = False, init: str | None = None) -> nn.Module:
    """The network `name` of `MODELS`: images float [B, 3, 32, 32] -> logits [B, num_classes].

    fused: factored gradients and fused kernels, to be trained with `hyperfast.optim`; otherwise the plain
    PyTorch expressions of `hyperfast.reference` with dense gradients, for any optimizer. init: initialisation
    of the generators, a name in `hyperfast.nn.init.INITIALISATIONS`. Raises ValueError for an unknown model
    or initialisation.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
    model = FullNet(num_classes, hyper=name == "full", init=init, backend="auto" if fused else "reference")
    return hyperfast.factored_(model) if fused else model
