"""The generated weights of a model and their names: what counting, conversion, freezing and reports rest on.

Names are those of the plain network, in which every generated weight is a parameter.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.factored import trained_parameters, whole_numel
from hyperfast.nn.generator import Generator, generate_together
from hyperfast.ops._library import no_autocast


class Host(nn.Module):
    """A module some of whose parameters come from generators: `HyperLayer` and `HyperModule` are.

    network: name of the child that is the network itself, whose name is then no part of a weight's; "" where
    it is the module.
    """

    network: str = ""

    @abstractmethod
    def generated_parameters(self) -> Iterator[tuple[str, Generator, int]]:
        """(name, generator, index) of every parameter that is `generator()[index]`; under all of its
        names."""

    @abstractmethod
    def frozen(self, weights: Callable[[Generator], Sequence[nn.Parameter]], memo: dict) -> nn.Module:
        """A plain module in place of this one, with new parameters: `weights(generator)` for what is
        generated, `copy.deepcopy(..., memo)` of everything else."""


def join(prefix: str, name: str) -> str:
    """The name of `name` in the module `prefix`."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def plain_namer(model: nn.Module) -> Callable[[str], str]:
    """From names in `model` to names in the plain network."""
    hosts = [(name, m.network) for name, m in model.named_modules(remove_duplicate=False) if _is_wrapper(m)]
    hosts.sort(key=lambda host: -len(host[0]))  # from the inside out

    def plain(name: str) -> str:
        for host, network in hosts:
            inside = join(host, network)
            if name == inside or name.startswith(inside + "."):
                name = join(host, name[len(inside) + 1 :])
        return name

    return plain


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, Host) and bool(module.network)


def generated_parameters(model: nn.Module) -> Iterator[tuple[str, Generator, int]]:
    """(name, generator, index) of every parameter of the plain network that is `generator()[index]` here; a
    weight that layers share comes under each of its names."""
    plain = plain_namer(model)
    for prefix, host in model.named_modules(remove_duplicate=False):
        if isinstance(host, Host):
            for name, generator, index in host.generated_parameters():
                yield plain(join(prefix, name)), generator, index


def named_weights(model: nn.Module) -> Iterator[tuple[str, Generator, int]]:
    """(name, generator, index) of every generated weight of `model`: `generator()[index]`, made from
    `generator.embeddings()[index]`.

    name: that of the layer in the plain network, as "layer1.0.conv1", "" for `model` itself; the full name
    for a parameter not called weight. Each weight once, under its first name, however many layers share it.
    """
    seen: set[tuple[int, int]] = set()
    for name, generator, index in generated_parameters(model):
        if (id(generator), index) not in seen:
            seen.add((id(generator), index))
            layer, _, last = name.rpartition(".")
            yield (layer if last == "weight" else name), generator, index


def named_generators(model: nn.Module) -> Iterator[tuple[str, Generator]]:
    """(name of the first weight it makes, generator) of every generator of `named_weights`."""
    return ((name, generator) for name, generator, index in named_weights(model) if index == 0)


@torch.inference_mode(False)  # parameters made within it would never train
@torch.no_grad()
def freeze(model: nn.Module, z: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A plain copy of `model`: every generated weight an ordinary parameter, and no generator left.

    The network that was hyperized comes back in place of a `HyperModule`, with tied weights tied, and
    `hyperfast.nn.Conv2d`, `hyperfast.nn.Linear` in place of `HyperConv2d`, `HyperLinear`, under their names.
    Outputs equal those of generating and then multiplying bit for bit. Shares no tensor with `model`, which
    stays as it is. z: other embeddings than the generators' own, of their shapes, by the generators' names
    (`named_generators`): the network at that z.

    Raises ValueError for a generator whose weights belong to no layer and `HyperModule`, unknown names in z,
    and a z that its generator refuses.
    """
    used = dict(_used_generators(model))
    makers = {name: m for name, m in model.named_modules() if isinstance(m, Generator)}
    inside = tuple(f"{name}." for name, m in makers.items() if id(m) in used)
    for name, maker in makers.items():
        if id(maker) not in used and not name.startswith(inside):
            raise ValueError(
                f"generator {name!r} makes weights of no layer: only the code that calls it knows where they "
                "go; use HyperLinear, HyperConv2d or hyperize"
            )
    made = _made(model, used, z or {})
    memo: dict[int, Any] = dict.fromkeys(used)  # a generator under a name of its own is None in the copy
    for host in reversed(list(model.modules())):  # from the inside out
        if isinstance(host, Host):
            memo[id(host)] = host.frozen(lambda generator: made[id(generator)], memo)
    return copy.deepcopy(model, memo)


def _used_generators(model: nn.Module) -> Iterator[tuple[int, Generator]]:
    return ((id(generator), generator) for _, generator in named_generators(model))


def _made(
    model: nn.Module, used: Mapping[int, Generator], z: Mapping[str, Tensor]
) -> dict[int, list[nn.Parameter]]:
    """New contiguous parameters in place of every generator's weights."""
    names = {name: id(generator) for name, generator in named_generators(model)}
    for name in z:
        if name not in names:
            raise ValueError(f"z has no generator {name!r}; there are {', '.join(names) or 'none'}")
        shape = used[names[name]].z.shape
        if z[name].shape != shape:
            got = f"{list(z[name].shape)}: a plain network has one weight for all samples"
            raise ValueError(f"z of {name!r} must be {list(shape)}, got shape {got}")
    given = {names[name]: own for name, own in z.items()}
    own = {key: generator for key, generator in used.items() if key not in given}
    with no_autocast(list(model.parameters())):
        made = dict(zip(own, generate_together(own.values()), strict=True))
        made |= {key: used[key](own) for key, own in given.items()}
    layout = {"memory_format": torch.contiguous_format}
    return {key: [nn.Parameter(w.clone(**layout)) for w in weights] for key, weights in made.items()}


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of `freeze(model)`, the plain twin of `model`: `conv1.generator.{weight,bias,z}` becomes
    `conv1.weight`, a `HyperModule` gets the names of the network it was made from, everything else keeps its
    name. Contiguous tensors that share no memory with `model` nor with each other."""
    taken: set[int] = set()
    state = {}
    for name, t in freeze(model).state_dict().items():
        memory = t.untyped_storage().data_ptr()
        state[name] = t.clone(memory_format=torch.contiguous_format) if memory in taken else t.contiguous()
        taken.add(memory)
    return state


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, of a sharded model those of all ranks: `total`, `generator` (weights and
    biases), `embedding` (z), `other`, and `generated`, the weights the generators make, which are no
    parameters."""
    trained = {id(p): whole_numel(p) for p in trained_parameters(model)}
    counts = {"total": sum(trained.values()), "generator": 0, "embedding": 0, "generated": 0}
    for _, generator in named_generators(model):
        for p in generator.parameters():
            counts["embedding" if p is generator.z else "generator"] += trained.get(id(p), 0)
        counts["generated"] += sum(math.prod(shape) for shape in generator.shapes)
    counts["other"] = counts["total"] - counts["generator"] - counts["embedding"]
    return counts
