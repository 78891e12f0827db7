"""The generated weights of a model and their names: what counting, conversion, freezing and reports rest on.

Names are those of the plain network, in which every generated weight is a parameter.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hyperfast.factored import trained_parameters
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


def join(prefix: str, name: str) -> str:
    """The name of `name` in the module `prefix`."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _plain_namer(model: nn.Module) -> Callable[[str], str]:
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
    plain = _plain_namer(model)
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


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain twin of `model`: every generator replaced by the weights it makes.

    A layer's `conv1.generator.{weight,bias,z}` becomes `conv1.weight`; a `HyperModule` gets the names of the
    network it was made from; everything else keeps its name. Contiguous copies that share no memory with
    `model` nor with each other.
    """
    parameters = list(generated_parameters(model))
    used = {id(generator): generator for _, generator, _ in parameters}
    with no_autocast(list(model.parameters())):
        made = dict(zip(used, generate_together(used.values()), strict=True))
    state = {name: made[id(generator)][index] for name, generator, index in parameters}
    modules = model.named_modules(remove_duplicate=False)
    prefixes = tuple(f"{name}." for name, m in modules if id(m) in used)
    plain = _plain_namer(model)
    state |= {plain(name): t for name, t in model.state_dict().items() if not name.startswith(prefixes)}
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total`, `generator` (weights and biases), `embedding` (z), `other`, and
    `generated`, the weights the generators make, which are no parameters."""
    trained = {id(p): p.numel() for p in trained_parameters(model)}
    counts = {"total": sum(trained.values()), "generator": 0, "embedding": 0, "generated": 0}
    for _, generator in named_generators(model):
        for p in generator.parameters():
            counts["embedding" if p is generator.z else "generator"] += trained.get(id(p), 0)
        counts["generated"] += sum(math.prod(shape) for shape in generator.shapes)
    counts["other"] = counts["total"] - counts["generator"] - counts["embedding"]
    return counts
