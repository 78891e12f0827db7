"""`hyperize`: any network becomes a hypernetwork, its weights become the outputs of generators.

`hyperfast.freeze` is the way back.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from hyperfast.nn import init as initialisations
from hyperfast.nn.chunked import ChunkedGenerator
from hyperfast.nn.generator import Generator, LinearGenerator, generate_together, generators
from hyperfast.nn.shared_core import SharedCoreGenerator
from hyperfast.nn.two_layer import TwoLayerGenerator
from hyperfast.nn.weights import Host, join, plain_namer
from hyperfast.ops._library import _DTYPES, is_transformed

GENERATORS: dict[str, type[Generator]] = {
    "linear": LinearGenerator,
    "two_layer": TwoLayerGenerator,
    "shared": SharedCoreGenerator,
    "chunked": ChunkedGenerator,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class HyperModule(Host):
    """A network some of whose parameters are made by generators, all at once, as forward begins.

    module: the network; the generated parameters are None in it. generators: by names without dots. targets:
    for each generator, in order, for each weight it makes, the parameters of `module` that it is (several
    where layers share it). `hyperize` makes one. Like `torch.func.functional_call` forward puts the weights
    into `module` while it runs, so one HyperModule serves one thread at a time; freeze it to serve several.
    """

    network = "module"

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
        self._backward: int | None = None  # the backward during which weights stand in `module`
        self.register_state_dict_pre_hook(_remove_left)
        self.register_load_state_dict_pre_hook(_remove_left)

    def generate(self, z: Tensor | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The generated weights by the names of the parameters of `module` they stand for; z as in
        `forward`."""
        given = self._by_generator(z)
        own = [g for name, g in self.generators.items() if name not in given]
        alone = iter(generate_together(own))
        made = [g(given[name]) if name in given else next(alone) for name, g in self.generators.items()]
        return {
            name: weight
            for weights, own in zip(made, self.targets, strict=True)
            for weight, names in zip(weights, own, strict=True)
            for name in names
        }

    def _by_generator(self, z: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The embeddings that are given, by generator; ValueError for a name there is not, or given twice."""
        if not isinstance(z, Mapping):
            return {} if z is None else dict.fromkeys(self.generators, z)
        known = {name: name for name in self.generators}
        for generator, own in zip(self.generators, self.targets, strict=True):
            for target in own[0] if len(own) == 1 else ():
                known |= {target: generator, target.removesuffix(".weight"): generator}
        given: dict[str, Tensor] = {}
        for name, own in z.items():
            if name not in known or known[name] in given:
                why = "names a generator twice" if name in known else "there is none"
                raise ValueError(f"z of {name!r}: {why}; the generators are {', '.join(self.generators)}")
            given[known[name]] = own
        return given

    @contextmanager
    def generated(self, z: Tensor | Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Within it `module`, which it gives, has its weights, made once: for other methods than forward. z
        as in `forward`."""
        with self._holding(self.generate(z)):
            yield self.module

    def forward(self, *args: Any, z: Tensor | Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """What `module` makes of the other arguments. z: embeddings instead of the generators' own; with a
        batch dimension before their shape, [B, K] for a linear generator, every sample of the batch has
        weights of its own (`PerSampleWeight`), without a loop. One tensor is for all generators; by name of a
        generator, or of the parameter or layer that is all it makes, the others keep their own. Refused by
        generators in factored mode. Raises ValueError for unknown names and other shapes."""
        weights = self.generate(z)
        with self._holding(weights):
            out = self.module(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed():
            self._hold_in_backward(weights, out)
        return out

    def generated_parameters(self) -> Iterator[tuple[str, Generator, int]]:
        for generator, own in zip(self.generators.values(), self.targets, strict=True):
            for index, names in enumerate(own):
                for name in names:
                    yield join(self.network, name), generator, index

    def frozen(self, weights: Callable[[Generator], Sequence[nn.Parameter]], memo: dict) -> nn.Module:
        _remove_left(self)
        plain, plain_name = copy.deepcopy(self.module, memo), plain_namer(self.module)
        for generator, own in zip(self.generators.values(), self.targets, strict=True):
            for weight, names in zip(weights(generator), own, strict=True):
                _Places(plain, map(plain_name, names)).put([weight] * len(names))
        return plain

    @contextmanager
    def _holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        if self._backward is not None and torch._C._current_graph_task_id() == -1:
            _remove_left(self)
        places = _Places(self.module, weights)
        before = places.get()
        places.put(weights.values())
        try:
            yield
        finally:
            places.put(before)  # some in `generated`, and in a backward: of a checkpoint around this

    def _hold_in_backward(self, weights: Mapping[str, Tensor], out: Any) -> None:
        """Activation checkpoints run parts of the network again during the backward."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(_PutBack(self, weights))

    def _end_backward(self, backward: int) -> None:
        if self._backward == backward:
            _remove_left(self)

    def __getstate__(self) -> dict[str, Any]:
        _remove_left(self)
        return super().__getstate__()

    def extra_repr(self) -> str:
        return f"{sum(map(len, self.targets))} generated weights"


class _PutBack:
    """Hook of an output of forward: its weights stand in the network until the backward ends, in the place of
    those of a later forward. Holds them for as long as the graph of the output does."""

    def __init__(self, model: HyperModule, weights: Mapping[str, Tensor]):
        self.model = model
        self.weights: Mapping[str, Tensor] | None = weights

    def __call__(self, _: Tensor) -> None:
        model, engine = self.model, Variable._execution_engine
        if self.weights is None:
            return
        places = _Places(model.module, self.weights)
        if model._backward is None:
            if any(w is not None for w in places.get()):
                return  # within `generated`
            model._backward = torch._C._current_graph_task_id()
            end = partial(model._end_backward, model._backward)
            weakref.finalize(end, model._end_backward, model._backward)  # also called where it fails
            engine.queue_callback(end)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            engine.queue_callback(self.clear)
        places.put(self.weights.values())

    def clear(self) -> None:
        self.weights = None


def _remove_left(model: HyperModule, *_: Any) -> None:
    """Takes the weights of a backward out of the network."""
    if model._backward is not None:
        model._backward = None
        _Places(model.module, (n for own in model.targets for names in own for n in names)).clear()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return module.get_submodule(parent), last


class _Places:
    """Where parameters of a module stand, found once for several uses."""

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.owners: list[tuple[nn.Module, str]] = []
        for name in names:
            owner, (*path, last) = module, name.split(".")
            for part in path:  # get_submodule takes ten times as long, for its errors
                owner = owner._modules[part]
            self.owners.append((owner, last))

    def get(self) -> list[Tensor | None]:
        return [owner._parameters[last] for owner, last in self.owners]

    def put(self, tensors: Iterable[Tensor | None]) -> None:
        for (owner, last), tensor in zip(self.owners, tensors, strict=True):
            owner._parameters[last] = tensor
            if isinstance(owner, nn.RNNBase):  # computes with a list of its own
                owner._flat_weights = [owner._parameters[n] for n in owner._flat_weights_names]

    def clear(self) -> None:
        self.put([None] * len(self.owners))


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
    """Turns `module` into a hypernetwork; `hyperfast.freeze` turns it back.

    generator: "linear" or "two_layer", one for each weight ("two_layer" with a `unit`: one for all); "shared"
    or "chunked", one for all of them; a class of generators; or a generator that makes just the targets, in
    order, which has its z_dim, backend and options already. z_dim: size of the embeddings, one for all or,
    where each weight has a generator, by target. targets: names of layers, whose `weight` is meant, or of
    parameters of any kind; default: the weights of every linear layer, convolution and attention. A weight
    that layers share stays one, and a target named twice counts once. init: "keep" starts each generator from
    the present weight, so that outputs stay as they are; otherwise a name in
    `hyperfast.nn.init.INITIALISATIONS` for generators made here. options: of the generators, as hidden_dim.

    `module` becomes a part of the result and is no longer usable by itself; other parameters and all buffers
    stay where they are. Frozen weights get generators that train. `module` may be a `HyperModule`, whose
    other weights get generators then, and may have layers with generated weights, which stay as they are.

    Raises ValueError or TypeError, `module` unchanged, for a target that does not exist, belongs to a
    generator, is parametrised, not initialised yet or no floating-point number; weights of several dtypes or
    devices for one generator; a generator of other shapes; a z_dim of what is no target; "keep" with a
    generator that cannot start from a given weight; and what the generators refuse.
    """
    network, before, own = module, {}, []
    if isinstance(module, HyperModule):
        network, before, own = module.module, dict(module.generators.items()), list(module.targets)
    found = _find(network, targets)
    weights = {names[0]: network.get_parameter(names[0]) for names in found}
    for name, weight in weights.items():
        _check_weight(name, weight)
    if isinstance(generator, Generator):
        if options:
            raise TypeError(f"a generator that is made already takes no {', '.join(options)}")
        initialisations.check(None if init == "keep" else init)
        made = {_free_name(before): generator}
    else:
        options |= {"init": None if init == "keep" else init, "backend": backend}
        made = _make(generator, network, found, z_dim, options, _free_name(before))
    _check_made(made, weights)
    if init == "keep":
        _keep_(made.values(), weights.values())
    left = iter(found)
    own += [[next(left) for _ in g.shapes] for g in made.values()]
    result = HyperModule(network, before | made, own)
    for name in (name for names in found for name in names):
        owner, last = _owner(network, name)
        owner.register_parameter(last, None)
        _Places(network, [name]).clear()
    result.training = module.training  # submodules keep their own modes
    result.generators.train(module.training)
    return result


def _free_name(taken: Iterable[str]) -> str:
    """Of a generator of several weights."""
    return next(name for name in ["all", *(f"all{i}" for i in range(2, 1000))] if name not in taken)


def _find(module: nn.Module, targets: Iterable[str] | None) -> list[tuple[str, ...]]:
    """The parameters to generate, each with all its names."""
    if isinstance(targets, str):
        raise TypeError(f"targets must be a list of names, got the string {targets!r}")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    targets = _default_targets(module) if targets is None else list(targets)
    if not targets:
        raise ValueError("no layer to generate: name layers or parameters in targets")
    wanted: dict[int, None] = {}
    for target in targets:
        name = target if target in parameters else join(target, "weight")
        if name not in parameters:
            raise ValueError(_why_no_parameter(module, target, parameters))
        wanted[id(parameters[name])] = None
    found = [tuple(n for n, p in parameters.items() if id(p) == key) for key in wanted]
    for names in found:
        _check_owners(module, names)
    return found


def _default_targets(module: nn.Module) -> list[str]:
    """The weights of linear layers, convolutions and attentions that are not generated yet, nor parts of a
    generator."""
    kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    inside = {id(part) for _, maker in generators(module) for part in maker.modules()}
    found = []
    for prefix, m in module.named_modules(remove_duplicate=False):
        if id(m) in inside:
            continue
        own = ["weight"] if isinstance(m, kinds) else []
        own += ATTENTION_WEIGHTS if isinstance(m, nn.MultiheadAttention) else []
        found += [join(prefix, name) for name in own if getattr(m, name) is not None]
    return found


def _why_no_parameter(module: nn.Module, target: str, parameters: Iterable[str]) -> str:
    for name in (target, join(target, "weight")):
        try:
            owner, last = _owner(module, name)
        except AttributeError:
            continue
        if last in owner._parameters:
            return f"{target!r} is generated already, or None"
        if isinstance(getattr(owner, last, None), Tensor) and last not in owner._buffers:
            return (
                f"{target!r} is computed from other parameters (weight_norm, a parametrisation, pruning): "
                "make it a parameter first, as torch.nn.utils.parametrize.remove_parametrizations does"
            )
    return f"no layer or parameter named {target!r}; there are {', '.join(parameters) or 'none'}"


def _check_owners(module: nn.Module, names: Iterable[str]) -> None:
    """ValueError for parameters of generators."""
    makers = [name for name, _ in generators(module)]
    for name in names:
        for maker in makers:
            if not maker or name.startswith(maker + "."):
                raise ValueError(f"{name!r} belongs to a generator: generate something else")


def _check_weight(name: str, weight: Tensor) -> None:
    if is_lazy(weight):
        raise ValueError(f"{name} has no shape yet: run the network once before hyperize")
    if weight.dtype not in _DTYPES or weight.layout != torch.strided:
        kind = weight.dtype if weight.layout == torch.strided else weight.layout
        raise TypeError(f"{name} must be dense and one of {', '.join(_DTYPES.values())}, got {kind}")


def _make(
    generator: str | type[Generator],
    module: nn.Module,
    found: Sequence[tuple[str, ...]],
    z_dim: int | Mapping[str, int],
    options: Mapping[str, Any],
    name_of_one: str,
) -> dict[str, Generator]:
    """New generators by name: one for each weight, or one for all."""
    kind = GENERATORS.get(generator) if isinstance(generator, str) else generator
    if not (isinstance(kind, type) and issubclass(kind, Generator)):
        raise ValueError(
            f"generator must be one of {', '.join(GENERATORS)}, a class of generators or a generator, "
            f"got {generator!r}"
        )
    fans = [_fans(module, names[0]) for names in found]
    weights = [module.get_parameter(names[0]) for names in found]
    if kind.per_layer and options.get("unit") is None:
        if isinstance(z_dim, Mapping):
            _check_sizes(z_dim, found)
        made = {}
        for names, w, (fan_in, fan_out) in zip(found, weights, fans, strict=True):
            own = options | {"fan_in": fan_in, "fan_out": fan_out, "dtype": w.dtype, "device": w.device}
            size, name = _size(z_dim, names), names[0]
            try:
                made[name.replace(".", "/")] = kind(w.shape, size, **own)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return made
    if not isinstance(z_dim, int):
        raise TypeError(f"z_dim must be one number where one generator makes all weights, got {z_dim}")
    first = weights[0]
    fan_in, fan_out = zip(*fans, strict=True)
    own = options | {"fan_in": fan_in, "fan_out": fan_out, "dtype": first.dtype, "device": first.device}
    return {name_of_one: kind([w.shape for w in weights], z_dim, **own)}


def _check_made(made: Mapping[str, Generator], weights: Mapping[str, Tensor]) -> None:
    """Errors unless the generators make just these weights."""
    made_of = [(g, shape) for g in made.values() for shape in g.shapes]
    if len(made_of) != len(weights):
        raise ValueError(f"generator makes {len(made_of)} weights, there are {len(weights)} targets")
    for (name, w), (g, shape) in zip(weights.items(), made_of, strict=True):
        if w.shape != shape:
            raise ValueError(f"generator makes {tuple(shape)} for {name}, which is {tuple(w.shape)}")
        if (w.dtype, w.device) != (g.z.dtype, g.z.device):
            raise ValueError(
                f"a generator makes weights of one dtype on one device, here {g.z.dtype} on {g.z.device}; "
                f"{name} is {w.dtype} on {w.device}: convert it, or give it a generator of its own"
            )


def _keep_(made: Iterable[Generator], weights: Iterable[Tensor]) -> None:
    left = iter(weights)
    for generator in made:
        try:
            generator.keep_(*(next(left) for _ in generator.shapes))
        except ValueError as error:
            raise ValueError(
                f'{error}: init="keep" needs "linear" or "shared"; init="hyperfan" starts anew'
            ) from None


def _check_sizes(z_dim: Mapping[str, int], found: Iterable[tuple[str, ...]]) -> None:
    known = {name for names in found for name in names}
    known |= {name.removesuffix(".weight") for name in known}
    for name in z_dim:
        if name not in known:
            raise ValueError(f"z_dim of {name!r}: no such target")


def _size(z_dim: int | Mapping[str, int], names: Sequence[str]) -> int:
    if not isinstance(z_dim, Mapping):
        return z_dim
    for name in names:
        for known in (name, name.removesuffix(".weight")):
            if known in z_dim:
                return z_dim[known]
    raise ValueError(f"z_dim has no size for {names[0]!r}, it names {', '.join(z_dim) or 'none'}")


def _fans(module: nn.Module, name: str) -> tuple[int | None, int | None]:
    """fan_in and fan_out of the layer that owns parameter `name`; None where the shape says it."""
    layer, last = _owner(module, name)
    if last == "in_proj_weight" and isinstance(layer, nn.MultiheadAttention):
        return None, layer.embed_dim  # three projections in one
    if last != "weight" or not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return None, None
    receptive, strides = math.prod(layer.kernel_size), math.prod(layer.stride)
    fan_in = layer.in_channels // layer.groups * receptive
    fan_out = layer.out_channels // layer.groups * receptive
    if isinstance(layer, TRANSPOSED):
        return max(1, fan_in // strides), fan_out
    return fan_in, max(1, fan_out // strides)
