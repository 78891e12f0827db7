"""Generators: modules that make the weights of a main network from embeddings.

The protocol is `Generator`; models, optimizers, conversion and distribution know nothing else of a generator.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import factored, ops
from hyperfast.factored import Factors
from hyperfast.nn import init as initialisations
from hyperfast.nn.per_sample import PerSampleWeight
from hyperfast.ops._library import autocast_dtype, check_backend, no_autocast, run_first
from hyperfast.ops.generate import penalize_l2
from hyperfast.ops.next_weights import record

if TYPE_CHECKING:
    from hyperfast.distributed.rows import RowShard
    from hyperfast.distributed.sharding import Gathered


class AffineMap(NamedTuple):
    """One step of generation: `rows` vectors times `weight` (a matrix, either way round), plus `bias`."""

    rows: int
    weight: nn.Parameter
    bias: nn.Parameter | None


class Generator(nn.Module):
    """What every generator does.

    shapes: shapes of the weights it makes, in order. z: its embeddings. backend: "auto" (fused kernels) or
    "reference" (plain PyTorch). factored: whether `weight.grad` stays None and the optimizer works on
    `factors()`. l2: the backward adds l2 w to the gradient of every generated weight w (`generated_l2_` sets
    it). per_layer: makes one weight, so that a network needs one generator for each layer. shard: the rows of
    this rank, which are all it has (`hyperfast.distributed.shard_`), None for all.

    A generator whose gradients are all dense has no factors and needs `forward` and `embeddings` alone. Its
    forward must return `hyperfast.nn.penalize_l2(w, self.l2)` of each weight w, before any cast: nothing else
    applies `l2`, since fused kernels add it in a pass they make anyway.
    """

    shapes: tuple[torch.Size, ...]
    z: Tensor
    backend: str
    factored: bool = False
    l2: float = 0.0
    per_layer: bool = False
    shard: RowShard | None = None

    @abstractmethod
    def forward(self, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """The weights, one tensor for each of `shapes`; from `z`, of the shape of its own embeddings, instead
        of those if given. z with a batch dimension before that shape: a `PerSampleWeight` for each."""

    @abstractmethod
    def embeddings(self) -> tuple[Tensor, ...]:
        """For each of `shapes` the embeddings it is made from, views [E_l, K] of `z`."""

    def affine_maps(self) -> tuple[tuple[AffineMap, ...], ...]:
        """For each of `shapes` what makes it, one after the other; empty where a kind does not say. The costs
        of `hyperfast.analysis` are those of these products."""
        return ((),) * len(self.shapes)

    def factors(self) -> list[Factors]:
        """The factors of every factored gradient: triples (weight, bias, z) with the z last used."""
        return []

    def next_weights(self) -> list[Tensor]:
        """For each of `factors()`, the buffer [N] into which the optimizer writes the weights of the next
        forward."""
        return []

    def next_weights_written(self) -> None:
        """Called by the optimizer after it filled `next_weights()`."""

    def drop_next_weights(self) -> None:
        """Forgets the next weights; the next forward generates."""

    def set_factored(self, enabled: bool) -> None:
        """Switches factored gradients; `hyperfast.factored_` calls it."""

    def ddp_ignored_names(self) -> list[str]:
        """Own parameters and buffers that distributed data parallel is to leave alone."""
        return []

    def keep_(self, *weights: Tensor) -> None:
        """Starts from trained weights of `shapes`: from now on, until trained, makes just those.

        Raises ValueError where this kind of generator cannot make a given weight, and for a wrong shape.
        """
        raise ValueError(f"{type(self).__name__} cannot start from a given weight")

    def _check_z(self, z: Tensor | None) -> Tensor:
        """z, or the own embeddings for None; ValueError for another shape, and in factored mode."""
        if z is None:
            return self.z
        own = self.z.shape
        if z.shape != own and (z.dim() != len(own) + 1 or z.shape[1:] != own):
            batched = f"[B{''.join(f', {n}' for n in own)}] for B samples"
            raise ValueError(
                f"z must be {list(own)}, got shape {list(z.shape)}, which is not {batched} either"
            )
        if self.factored:
            raise ValueError(
                f"a {type(self).__name__} in factored mode generates from its own z only: the gradient of "
                "another embedding is not the rank-one gradient the optimizer knows; "
                "hyperfast.factored_(module, False) for dense gradients"
            )
        return z


def check_shapes(shapes: Sequence[int] | Sequence[Sequence[int]], **sizes: int) -> tuple[torch.Size, ...]:
    """shapes, of one weight or of several, as a tuple. Raises ValueError for none, empty ones, and those or
    other `sizes` below 1, TypeError for what is no integer."""
    one = bool(shapes) and not isinstance(shapes[0], Sequence)
    checked = tuple(torch.Size(shape) for shape in ([shapes] if one else shapes))
    low = not checked or any(not shape or min(shape) < 1 for shape in checked)
    if low or min(map(operator.index, sizes.values())) < 1:
        given = ", ".join(f"{name} {value}" for name, value in sizes.items())
        shown = ", ".join(str(tuple(shape)) for shape in checked)
        raise ValueError(f"shape and {', '.join(sizes)} must be at least 1, got shape {shown}, {given}")
    return checked


class LinearGenerator(Generator):
    """w = weight z + bias, reshaped to `shape`: its own embedding and its own generator for one layer.

    Parameters: weight [N, K], bias [N] (None with bias=False), z [K], with N the number of elements of
    `shape`, K `z_dim`. fan_in, fan_out: inputs of one output of the main network's layer and outputs that one
    input reaches, for the initialisation; default: as `shape` (out, in, *kernel) says. init: a name in
    `hyperfast.nn.init.INITIALISATIONS`, default `hyperfast.nn.init.DEFAULT`. Raises ValueError for sizes
    below 1 and unknown names. Ha, Dai, Le, "HyperNetworks" (ICLR 2017), equation 1 without hidden layer.
    """

    per_layer = True
    early = False  # in factored mode dw reaches its parameter before the backward ends: several ranks wait

    def __init__(
        self,
        shape: Sequence[int],
        z_dim: int = 16,
        bias: bool = True,
        *,
        fan_in: int | None = None,
        fan_out: int | None = None,
        init: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shapes = check_shapes([shape], z_dim=z_dim)
        self.z_dim = z_dim = operator.index(z_dim)
        self.backend = check_backend(backend)
        self.factored = False
        self.init = initialisations.check(init)
        self.fan = initialisations.fan(self.shapes[0], self.init, fan_in, fan_out)
        n = math.prod(shape)
        self.weight = nn.Parameter(torch.empty(n, z_dim, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if bias else None
        )
        self.z = nn.Parameter(torch.empty(z_dim, device=device, dtype=dtype))
        self.next_weight: Tensor | None = None  # no buffer: it belongs to no copy of the module
        self.gathered: Gathered | None = None  # nor does this, the weights of all ranks' rows
        self.generate_sharded: Callable[[Sequence[LinearGenerator]], list[Tensor]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._refuse_sharded("new start")
        self.drop_next_weights()
        initialisations.initialise_(self.weight, self.bias, self.z, self.fan, self.init)

    def forward(self, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """The weight, [*shape]. z [K]: another embedding than the generator's own, [B, K]: one for each
        sample (`PerSampleWeight`); refused in factored mode."""
        if z is None:
            return _generate_linear([self])[0]
        if self._check_z(z).dim() == 2:
            return (self.weight_of_samples(z),)
        options = {"l2": [self.l2], "backend": self.backend}
        (w,) = ops.generate([self.weight], [self.bias], [z], **options)
        return (w.view(self.shapes[0]),)

    def weight_of_samples(self, z: Tensor) -> PerSampleWeight:
        """What z [B, K] makes. With L2 all of it is made at once: the gradient of each weight needs it."""
        shape, operands = self.shapes[0], (self.weight, self.bias)
        if not self.l2:
            path = "separate" if self.backend == "reference" else "auto"
            return PerSampleWeight.generated(shape, *operands, z, path)
        with no_autocast([z]):
            w = F.linear(z, *operands)
        w = penalize_l2(w, self.l2).to(autocast_dtype(w) or w.dtype)
        return PerSampleWeight.ready(w.view(len(z), *shape))

    @torch.no_grad()
    def keep_(self, weight: Tensor) -> None:
        """Starts from a trained weight [*shape]: bias = weight, own weight 0, z normal with std 0.01.

        The weight made is equal bit for bit, and all three train from there. As d bias = dw, an optimizer's
        moments of the old weight are those of the bias. Raises ValueError for a generator without bias and
        for a wrong shape.
        """
        if self.bias is None:
            raise ValueError("a generator without bias cannot start from a given weight")
        if weight.shape != self.shapes[0]:
            raise ValueError(f"weight must be {list(self.shapes[0])}, got shape {list(weight.shape)}")
        self._refuse_sharded("new start")
        self.drop_next_weights()
        self.weight.zero_()
        self.bias.copy_(weight.reshape(-1))
        nn.init.normal_(self.z, std=0.01)

    def embeddings(self) -> tuple[Tensor, ...]:
        return (self.z.view(1, -1),)

    def affine_maps(self) -> tuple[tuple[AffineMap, ...], ...]:
        return ((AffineMap(1, self.weight, self.bias),),)

    @property
    def gradient_bias(self) -> nn.Parameter | None:
        """The parameter whose gradient is dw: the bias, or what stands in for it in factored mode."""
        return self._parameters.get("carrier") if self.bias is None else self.bias

    def factors(self) -> list[Factors]:
        if not self.factored:
            return []
        return [Factors(self.weight, self.gradient_bias, self.z, True, self.bias is not None)]

    def next_weights(self) -> list[Tensor]:
        if self.next_weight is None:
            self.next_weight = self.weight.new_empty(self.weight.shape[0])
        return [self.next_weight]

    def next_weights_written(self) -> None:
        record(self.next_weight, self.weight, self.gradient_bias, self.z)

    def drop_next_weights(self) -> None:
        self.next_weight = self.gathered = None

    def set_factored(self, enabled: bool) -> None:
        if not enabled:
            self._refuse_sharded("dense gradients")
        if enabled and self._parameters.get("weight") is not self.weight:
            raise ValueError("factored mode needs a plain weight parameter, not a parametrised or pruned one")
        if enabled and self.bias is not None and self.weight.requires_grad and not self.bias.requires_grad:
            raise ValueError(
                "factored mode carries dw in bias.grad: a generator with a frozen bias trains dense"
            )
        self.factored = enabled
        self.drop_next_weights()
        if self.bias is None and enabled and "carrier" not in self._parameters:
            # always zero, never saved, its gradient is dw
            self.register_parameter("carrier", nn.Parameter(self.weight.new_zeros(self.weight.shape[0])))
        elif not enabled:
            self._parameters.pop("carrier", None)
        self._register()

    def ddp_ignored_names(self) -> list[str]:
        if not self.factored:
            return []
        own = ("weight",) if self.shard is None else ("weight", "bias", "carrier")
        return [name for name in own if self._parameters.get(name) is not None]

    def sharded_parameters(self) -> list[nn.Parameter]:
        """Those of which a rank has its own rows alone where `shard` says so."""
        return [p for p in (self.weight, self.gradient_bias) if p is not None]

    def set_shard(
        self,
        shard: RowShard | None,
        generate: Callable[[Sequence[LinearGenerator]], list[Tensor]] | None,
    ) -> None:
        """Says of which rows the parameters are, in factored mode, and what makes the weights from those of
        all ranks."""
        factored.unregister(self.weight, self)
        self.drop_next_weights()
        self.shard, self.generate_sharded = shard, generate
        self._register()

    def made_from(self) -> tuple[Tensor, ...]:
        """The tensors that tell, unchanged, that the weight is as it was; of a sharded one."""
        return self.weight, self.gradient_bias, self.z

    def _refuse_sharded(self, what: str) -> None:
        if self.shard is not None:
            raise ValueError(
                f"a sharded generator takes no {what}: hyperfast.distributed.unshard_(model) first"
            )

    def _register(self) -> None:
        if self.factored:
            factored.register(self.weight, self, self._parameters.get("carrier"))
        else:
            factored.unregister(self.weight, self)

    # Whatever replaces or copies parameters drops the next weights and marks the new ones.
    def register_parameter(self, name, param):
        replaced = self._parameters.get(name)
        super().register_parameter(name, param)
        if replaced is not None and name in ("weight", "bias", "carrier"):
            factored.unregister(replaced, self)
            self._register()

    def _apply(self, fn, recurse=True):
        self.drop_next_weights()
        # parameters cannot be swapped while weak references watch them
        factored.unregister(self.weight, self)
        super()._apply(fn, recurse)
        self._register()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self.drop_next_weights()
        missing: list[str] = []
        own, faults = self._own_rows(state_dict, prefix)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        error_msgs += faults
        missing_keys += [n for n in missing if n != prefix + "carrier" and n not in state_dict]
        self._register()

    def _own_rows(self, state_dict, prefix):
        """`state_dict` with the rows of this rank in place of sharded or whole tensors; without those that do
        not fit, and why."""
        own, faults = dict(state_dict), []
        for name in ("weight", "bias") if self.shard is not None else ():
            value = own.get(prefix + name)
            if value is None or self._parameters[name] is None:
                continue
            try:
                own[prefix + name] = self.shard.take(value)
            except ValueError as error:
                del own[prefix + name]
                faults.append(f"{prefix}{name}: {error}")
        return own, faults

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "carrier", None)
        for name in ("weight", "bias") if self.shard is not None else ():
            if prefix + name in destination:
                destination[prefix + name] = self.shard.sharded(destination[prefix + name])

    def __getstate__(self):
        return self.__dict__ | {"next_weight": None, "gathered": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._register()

    def extra_repr(self) -> str:
        shape, bias, shard = tuple(self.shapes[0]), self.bias is not None, self.shard
        rows = "" if shard is None else f", rows {shard.start} to {shard.stop}"
        sizes = f"N={self.shapes[0].numel()}, z_dim={self.weight.shape[1]}"
        return f"{shape}, {sizes}, bias={bias}, factored={self.factored}{rows}"


def generate_together(generators: Iterable[Generator]) -> list[tuple[Tensor, ...]]:
    """The weights of several generators, in their order; linear ones of one kind in one launch, each made
    once. One with hooks or a forward of its own is called."""
    generators = list(generators)
    made: dict[int, tuple[Tensor, ...]] = {}
    batches: dict[tuple, list[LinearGenerator]] = {}
    for g in generators:
        if id(g) in made:
            continue
        made[id(g)] = ()
        if _is_plain_linear(g):
            where = None if g.shard is None else id(g.shard.group)
            kind = (g.factored, g.backend, g.weight.dtype, g.weight.device, g.shard is None, where)
            batches.setdefault(kind, []).append(g)
        else:
            made[id(g)] = g()
    for batch in batches.values():
        for g, weights in zip(batch, _generate_linear(batch), strict=True):
            made[id(g)] = weights
    return [made[id(g)] for g in generators]


def _is_plain_linear(g: Generator) -> bool:
    """Whether calling g does just what `_generate_linear` does: no forward of its own, and no hooks."""
    if type(g).forward is not LinearGenerator.forward or "forward" in g.__dict__:
        return False
    forward, backward = (g._forward_pre_hooks, g._forward_hooks), (g._backward_pre_hooks, g._backward_hooks)
    return not any((*forward, *backward))


def _generate_linear(batch: Sequence[LinearGenerator]) -> list[tuple[Tensor, ...]]:
    """The weights of linear generators of one dtype, device, backend and kind of gradients, in one launch;
    all of them sharded, over one process group, or none."""
    if batch[0].shard is not None:
        return [(w,) for w in batch[0].generate_sharded(batch)]
    early = any(g.early for g in batch)
    weights = ops.generate(
        [g.weight for g in batch],
        [g.gradient_bias for g in batch],
        [g.z for g in batch],
        next_weights=[g.next_weight for g in batch],
        factored=batch[0].factored,
        early=early,
        l2=[g.l2 for g in batch],
        backend=batch[0].backend,
    )
    shaped = [w.view(g.shapes[0]) for g, w in zip(batch, weights, strict=True)]
    return [(run_first(w) if early else w,) for w in shaped]


def generators(module: nn.Module) -> Iterator[tuple[str, Generator]]:
    """(name, generator) of every generator in `module`, each once."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, Generator))


def linear_generators(module: nn.Module) -> list[LinearGenerator]:
    """Every linear generator in `module`, heads of shared cores included, each once."""
    return [g for _, g in generators(module) if isinstance(g, LinearGenerator)]


def factored_(module: nn.Module, enabled: bool = True) -> nn.Module:
    """Switches every generator in `module` to factored gradients (or back), in place; returns `module`.

    In factored mode train with an optimizer of `hyperfast.optim` and clip with
    `hyperfast.optim.clip_grad_norm_`; a stock optimizer that would step a factored weight raises. Distributed
    data parallel is told to leave the weights alone: dw travels as the gradient of the bias, N numbers
    instead of N K, so start all ranks from equal weights. Call it before wrapping in DDP and on the module
    that is wrapped.
    """
    before = [(generator, generator.factored) for _, generator in generators(module)]
    try:
        for generator, _ in before:
            generator.set_factored(enabled)
    except ValueError:
        for generator, was in before:
            generator.set_factored(was)
        raise
    ignored_by_ddp(module)
    return module


def ignored_by_ddp(module: nn.Module) -> None:
    """Tells distributed data parallel what in `module`, which is to be wrapped, generators want left alone:
    their `ddp_ignored_names`, and no other names of theirs."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, generator in generators(module):
        prefix = f"{name}." if name else ""
        ignored -= {prefix + own for own, _ in generator.named_parameters(recurse=False)}
        ignored |= {prefix + own for own in generator.ddp_ignored_names()}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))


def generated_l2_(module: nn.Module, coefficient: float) -> nn.Module:
    """L2 regularisation of the generated weights (Ha, Dai, Le, "HyperNetworks", ICLR 2017): in place, the
    backward of every generator in `module` acts as if the loss had the term coefficient / 2 |w|^2 for each
    weight w it generates; returns `module`.

    It adds coefficient * w to dw, and so to the gradients of weight, bias and z, factored or dense; the value
    of the loss stays without the term. A weight generated twice in one forward counts twice
    (`generate_layers` generates once). What scales the loss (GradScaler, accumulation) does not scale this
    term, and every backward adds it: for jacobians and second derivatives write it into the loss instead. 0
    switches it off. Raises ValueError for a negative or non-finite coefficient.
    """
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient must be at least 0 and finite, got {coefficient}")
    for _, generator in generators(module):
        generator.l2 = float(coefficient)
    return module


def invalidate(module: nn.Module) -> None:
    """Forgets the next weights of every generator in `module`.

    Needed only after edits that autograd's version counters do not see: through `.data`, or another library's
    view of the memory. A CUDA graph captured before goes on with the forgotten ones: capture again. Of a
    sharded model all ranks must do it, for all gather in the forward that follows.
    """
    for _, generator in generators(module):
        generator.drop_next_weights()
