"""Starting a network from the weights of another one, whichever of their layers are generated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hyperfast.nn import LinearGenerator, TwoLayerGenerator, hyper_layers
from train.checkpoint import CheckpointError, load_model, one_line


@torch.no_grad()
def start_from_(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Gives `model` the main network of the state dict `state`: outputs are equal to rounding.

    Layers generated in both by generators of equal sizes take them over. Where only the weight can be had,
    ordinary in `state` or made by its generator, a generated layer of `model` keeps it
    (`LinearGenerator.keep_`) and an ordinary one copies it. source: the name in errors. Raises
    CheckpointError for another network and for a generator that cannot start from a weight.
    """
    own, state = model.state_dict(), dict(state)
    hyper = {f"{name}.generator.": layer.generator for name, layer in hyper_layers(model)}
    for prefix in [name.removesuffix("z") for name in state if name.endswith(".generator.z")]:
        parts = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        if prefix in hyper and _shapes(hyper[prefix].state_dict()) == _shapes(parts):
            continue
        weight = prefix.removesuffix("generator.") + "weight"
        shape = hyper[prefix].shapes[0] if prefix in hyper else own[weight].shape if weight in own else None
        if shape is not None:
            state = {name: t for name, t in state.items() if not name.startswith(prefix)}
            state[weight] = _made_by(parts, shape, f"{source}: {prefix.removesuffix('.')}")
    kept = {}
    for prefix, generator in hyper.items():
        weight = prefix.removesuffix("generator.") + "weight"
        if weight in state:
            kept[generator] = state.pop(weight)
            state |= {prefix + name: tensor for name, tensor in generator.state_dict().items()}
            if kept[generator].shape != generator.shapes[0]:
                shapes = f"{tuple(kept[generator].shape)}, wanted {tuple(generator.shapes[0])}"
                raise CheckpointError(f"{source}: weights of another model: {weight} has shape {shapes}")
    load_model(model, state, source)
    for generator, weight in kept.items():
        try:
            generator.keep_(weight.to(generator.z.device))
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None


def carry_moments(
    old_model: nn.Module, old: torch.optim.Optimizer, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Gives `optimizer` of `model` the state that `old` has for the parameters of `old_model`, by name.

    A layer generated since: d bias = dw, so its generator's bias takes the state of the ordinary weight.
    """
    before = {name: p for name, p in old_model.named_parameters() if p in old.state}
    for name, p in model.named_parameters():
        source = name
        if name not in before and name.endswith(".generator.bias"):
            source = name.removesuffix("generator.bias") + "weight"
        if source in before:
            shape = before[source].shape  # of moments; steps and low-precision states have another one
            optimizer.state[p] = {
                key: (value.reshape(p.shape) if value.shape == shape else value).clone()
                for key, value in old.state[before[source]].items()
            }


def _made_by(parts: dict[str, Tensor], shape: torch.Size, source: str) -> Tensor:
    """The weight that the generator with the state dict `parts` makes."""
    if "w1" in parts:
        generator = TwoLayerGenerator(shape, parts["z"].numel())
    else:
        generator = LinearGenerator(shape, parts["z"].numel(), "bias" in parts)
    try:
        generator.load_state_dict(parts)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: weights of another model: {one_line(error)}") from None
    return generator()[0]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
