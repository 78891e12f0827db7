"""Factored gradients: which weights have them, and the guards around them.

The gradient of a linear generator's weight is dw outer z, rank one. In factored mode nobody forms it: dw
arrives as the gradient of the generator's bias, `weight.grad` stays None, and hyperfast's optimizers and
`clip_grad_norm_` use the factors.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from hyperfast.distributed.rows import RowShard
    from hyperfast.nn.generator import Generator


class Factors(NamedTuple):
    """The gradient of `weight` [N, K] is `bias.grad` [N] outer `z` [K].

    `bias` carries dw; `bias_is_trained` is False where it stands in for a generator without bias.
    `z_is_parameter`: z is a parameter of the step, so that next weights can be made from its new value.
    """

    weight: Tensor
    bias: Tensor
    z: Tensor
    z_is_parameter: bool
    bias_is_trained: bool


_generators: WeakIdKeyDictionary = WeakIdKeyDictionary()  # factored weight -> WeakSet of its generators
_stand_ins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters that stand in for a missing bias
_shards: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters of which a rank has its rows alone


def register(weight: Tensor, generator: Generator, stand_in: Tensor | None = None) -> None:
    """Marks `weight` as factored, made by `generator`; `stand_in` takes the place of its missing bias."""
    _generators.setdefault(weight, weakref.WeakSet()).add(generator)
    if stand_in is not None:
        _stand_ins[stand_in] = True
    for p in generator.sharded_parameters() if generator.shard is not None else ():
        _shards[p] = generator.shard


def unregister(weight: Tensor, generator: Generator) -> None:
    """Takes the marks away."""
    for p in generator.sharded_parameters():
        _shards.pop(p, None)
    owners = _generators.get(weight)
    if owners is not None:
        owners.discard(generator)
        if not owners:
            del _generators[weight]


def is_stand_in(parameter: Tensor) -> bool:
    """Whether this parameter only stands in for a missing bias: always zero, never trained or saved."""
    return parameter in _stand_ins


def shard_of(parameter: Tensor) -> RowShard | None:
    """The rows of a sharded generator's weight or bias that this parameter is, None for any other."""
    return _shards.get(parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of the parameter with the rows of all ranks."""
    shard = shard_of(parameter)
    return parameter.shape if shard is None else torch.Size((shard.rows, *parameter.shape[1:]))


def whole_numel(parameter: Tensor) -> int:
    """Elements on all ranks together."""
    return whole_shape(parameter).numel()


def generator_of(weight: Tensor) -> Generator | None:
    """The generator whose factored weight this is, None for any other tensor.

    Raises ValueError if generators with different embeddings share the weight: its gradient is a sum of
    rank-one terms, which factored mode does not train.
    """
    owners = list(_generators.get(weight, ()))
    if len({id(f.z) for owner in owners for f in owner.factors() if f.weight is weight}) > 1:
        raise ValueError(
            f"the factored weight of shape {list(weight.shape)} is shared by generators with different "
            "embeddings; train them dense: hyperfast.factored_(model, False)"
        )
    return owners[0] if owners else None


def trained_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters of `module` without those that only stand in for a generator's missing bias."""
    return [p for p in module.parameters() if not is_stand_in(p)]


def _refuse_stock_optimizers(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not _generators or getattr(optimizer, "takes_factored_gradients", False):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if generator_of(p) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} cannot step a generator in factored mode: its weight of "
                    f"shape {list(p.shape)} has no dense gradient. Use hyperfast.optim.AdamW, Adam or SGD, "
                    "or hyperfast.factored_(model, False) for dense gradients"
                )


def _count_fused_updates(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """torch's fused CPU kernels change parameters without counting up their versions, on which next weights
    rely."""
    if _generators:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_pre_hook(_refuse_stock_optimizers)
register_optimizer_step_post_hook(_count_fused_updates)
