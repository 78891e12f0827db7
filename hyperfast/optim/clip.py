"""Gradient norms of models with factored gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperfast.factored import Factors, generator_of, is_stand_in, shard_of

if TYPE_CHECKING:
    from hyperfast.distributed.rows import RowShard


def parameters_of(source: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters of a module, or the given ones as a list."""
    if isinstance(source, nn.Module):
        return list(source.parameters())
    return [source] if isinstance(source, Tensor) else list(source)


def factors_of(parameters: Iterable[Tensor]) -> list[Factors]:
    """The factors of every factored weight among `parameters`.

    Raises ValueError if a weight is there without its bias or z, RuntimeError if it has a dense gradient as
    well.
    """
    parameters = list(parameters)
    present = {id(p) for p in parameters}
    found = []
    for p in parameters:
        generator = generator_of(p)
        if generator is None or not p.requires_grad:
            continue
        factors = next((f for f in generator.factors() if f.weight is p), None)
        if factors is None:
            raise ValueError(
                f"the factored weight of shape {list(p.shape)} is parametrised or pruned: its generator uses "
                "another tensor; train it dense with hyperfast.factored_(model, False)"
            )
        for name, part in (("weight", p), ("bias", factors.bias)):
            if not part.is_contiguous():
                raise ValueError(f"a factored {name} must be contiguous, got strides {part.stride()}")
        for name, part in (("bias", factors.bias), ("z", factors.z if factors.z_is_parameter else None)):
            if part is not None and id(part) not in present and (part.requires_grad or name == "bias"):
                raise ValueError(
                    f"the factored weight of shape {list(p.shape)} comes without its {name} of shape "
                    f"{list(part.shape)}: weight, bias and z belong together in one optimizer and "
                    "one norm (pass the model, or hyperfast.param_groups(model))"
                )
        if not factors.bias.requires_grad:
            raise ValueError(
                f"the factored weight of shape {list(p.shape)} needs a bias that requires grad: it carries dw"
            )
        if p.grad is not None:
            raise RuntimeError(
                f"the factored weight of shape {list(p.shape)} has a dense gradient too (create_graph=True "
                "makes one); set it to None, or train dense with hyperfast.factored_(model, False)"
            )
        found.append(factors)
    return found


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors by device and dtype, which is what one call of torch's `_foreach` kernels takes."""
    found: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.device, t.dtype), []).append(t)
    return list(found.values())


def _norms(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    """The norm of each; those of one device and dtype in one launch."""
    norm_of: dict[int, Tensor] = {}
    for some in alike(tensors):
        filled = [t if t.numel() else t.new_zeros(1) for t in some]  # torch refuses the largest of none
        norm_of.update(zip(map(id, some), torch._foreach_norm(filled, norm_type), strict=True))
    return [norm_of[id(t)] for t in tensors]


@torch.no_grad()
def grad_norm(parameters: list[Tensor], factors: list[Factors], norm_type: float = 2.0) -> Tensor:
    """Norm of all gradients as one vector, the factored ones included without forming them: a p-norm of dw
    outer z is the product of the p-norms of dw and z. On a GPU nothing waits for it. With sharded generators
    all ranks must call it: they exchange one number and get the same norm."""
    factors = [f for f in factors if f.bias.grad is not None]
    carriers = {id(f.bias) for f in factors}
    for p in parameters:
        _refuse_unsent(p.grad)
    plain = [p for p in parameters if p.grad is not None and id(p) not in carriers and not is_stand_in(p)]
    L, dws, zs = len(factors), [f.bias.grad for f in factors], [f.z for f in factors]
    gradients = [p.grad for p in plain]
    norms = _norms([*gradients, *dws, *zs], norm_type)  # one for each tensor, as torch's get_total_norm
    norms, dws, zs = norms[: len(plain)], norms[len(plain) : len(plain) + L], norms[len(plain) + L :]
    norms += [dw for dw, f in zip(dws, factors, strict=True) if f.bias_is_trained]
    norms += torch._foreach_mul(dws, zs) if factors else []
    biases, weights = (f.bias for f in factors if f.bias_is_trained), (f.weight for f in factors)
    shards = [shard_of(p) for p in (*plain, *biases, *weights)]
    if any(shard is not None for shard in shards):
        norms = _of_all_rows(norms, shards, norm_type)
    if not norms:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    return _joined(norms, norm_type)


def _joined(norms: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all from those of the parts."""
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)


def _of_all_rows(norms: list[Tensor], shards: list[RowShard | None], norm_type: float) -> list[Tensor]:
    """`norms` with, instead of those of this rank's rows, one for each rank and process group."""
    made = [norm for norm, shard in zip(norms, shards, strict=True) if shard is None]
    sharded: dict[int, tuple[RowShard, list[Tensor]]] = {}
    for norm, shard in zip(norms, shards, strict=True):
        if shard is not None:
            sharded.setdefault(id(shard.group), (shard, []))[1].append(norm)
    for shard, own in sharded.values():
        made += shard.of_ranks(_joined(own, norm_type)).unbind()
    return made


def _refuse_unsent(gradient: Tensor | None) -> None:
    if hasattr(gradient, "unsent"):  # set by `hyperfast.distributed.exchange`
        raise RuntimeError(
            f"the gradient of {len(gradient.unsent.dw)} generated weights has not been sent to other ranks: "
            "the last backward before a step must follow a forward outside of no_sync, and have no part of a "
            "forward within it"
        )


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for models that may hold factored gradients; takes the model or its
    parameters.

    Scaling dw scales the factored gradient, so only the gradients at hand are written. Returns the norm
    before clipping. Raises RuntimeError for a non-finite norm if `error_if_nonfinite`, ValueError for a
    factored weight without its bias or z.
    """
    parameters, max_norm, norm_type = parameters_of(parameters), float(max_norm), float(norm_type)
    norm = grad_norm(parameters, factors_of(parameters), norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is non-finite, so it cannot be clipped"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(scale.to(p.grad.device))
    return norm
