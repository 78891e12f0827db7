"""Layers of a main network whose weights are generated: drop-in for `nn.Linear` and `nn.Conv2d`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from hyperfast import ops
from hyperfast.nn.generator import Generator, LinearGenerator, generate_together
from hyperfast.nn.per_sample import PerSampleWeight
from hyperfast.nn.weights import Host
from hyperfast.ops._library import autocast_dtype, needs_function
from hyperfast.ops.hyper_layers import geometry_of, merged_wins


class HyperLayer(Host):
    """A layer with a generated weight and an ordinary bias.

    `forward(x)` generates the weight itself; `forward(x, weight)` takes one made elsewhere
    (`generate_layers`: all layers of a network in one launch); `forward(x, z=z)` generates it from another
    embedding, or from z [B, K] a weight for each of the B samples of x, without a loop.
    """

    generator: Generator

    def __init__(
        self, shape: tuple[int, ...], bias: bool, z_dim: int, init, generator, backend, device, dtype
    ):
        super().__init__()
        if min(shape) < 1:
            raise ValueError(f"all sizes must be at least 1, got a weight of shape {shape}")
        if generator is None:
            generator = LinearGenerator(shape, z_dim, init=init, backend=backend, device=device, dtype=dtype)
        elif generator.shapes != (torch.Size(shape),):
            raise ValueError(
                f"this layer needs a generator of one weight {shape}, got shapes {generator.shapes}"
            )
        self.generator = generator
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None
        )

    def generated_parameters(self) -> Iterator[tuple[str, Generator, int]]:
        yield "weight", self.generator, 0

    def frozen(self, weights: Callable[[Generator], Sequence[nn.Parameter]], memo: dict) -> nn.Module:
        plain = self._plain()
        own = {k: v for k, v in self.__dict__.items() if k not in ("_parameters", "_modules", "generator")}
        plain.__dict__.update(copy.deepcopy(own, memo))  # modes and hooks too
        (plain.weight,) = weights(self.generator)
        plain.bias = copy.deepcopy(self.bias, memo)
        return plain

    @abstractmethod
    def _plain(self) -> nn.Module:
        """The ordinary layer of this size."""

    def generated_weight(self) -> Tensor:
        return self.generator()[0]

    def _is_watched(self) -> bool:
        """Whether someone hooks into the calls of the generator."""
        return bool(self.generator._forward_hooks or self.generator._forward_pre_hooks)

    def operands_of(self, z: Tensor, weight: Tensor | None) -> tuple[Tensor | None, ...] | None:
        """(z, weight, bias) of the generator, for `ops.hyper_linear` and `ops.hyper_conv2d`, or None where it
        is not plainly linear. ValueError where the layer is given a weight too."""
        if weight is not None:
            raise ValueError("give weight or z, not both")
        g = self.generator
        if type(g) is not LinearGenerator or g.backend != "auto" or g.l2 or self._is_watched():
            return None
        return g._check_z(z), g.weight, g.bias

    def operands(self, x: Tensor, rows: int, convolution: bool = False) -> tuple[Tensor | None, ...] | None:
        """(z, weight, bias) of the generator, to be merged with this layer's product of `rows` rows, or None
        where the weight is to be generated first: `ops.hyper_layers.merged_wins` says so, the next weights
        are at hand, or the generator is sharded or not plainly linear."""
        g = self.generator
        if type(g) is not LinearGenerator or g.backend != "auto" or g.next_weight is not None:
            return None
        if (
            self._is_watched()
            or g.shard is not None
            or x.dtype not in (g.weight.dtype, autocast_dtype(g.weight))
            or x.device != g.weight.device
        ):
            return None
        operands = g.z, g.weight, g.gradient_bias
        wins = merged_wins(rows, g.weight, needs_function(x, *operands, self.bias), convolution)
        return operands if wins else None


class HyperLinear(HyperLayer):
    """`nn.Linear` with a generated weight [out_features, in_features]: x [..., in] -> [..., out].

    z_dim, init, backend: see `LinearGenerator`; generator: use this one instead (several layers may share
    it).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        z_dim: int = 16,
        init: str | None = None,
        generator: Generator | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__((out_features, in_features), bias, z_dim, init, generator, backend, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, weight: Tensor | None = None, *, z: Tensor | None = None) -> Tensor:
        if z is not None:
            if (operands := self.operands_of(z, weight)) is not None:
                return ops.hyper_linear(x, *operands, self.bias)
            (weight,) = self.generator(z)
        if weight is None and isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.in_features:
            if (operands := self.operands(x, x.numel() // self.in_features)) is not None:
                factored = self.generator.factored
                return ops.hyper_linear(x, *operands, self.bias, factored=factored, path="merged")
        return F.linear(x, self.generated_weight() if weight is None else weight, self.bias)

    def _plain(self) -> Linear:
        sizes = self.in_features, self.out_features, self.bias is not None
        return Linear(*sizes, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class HyperConv2d(HyperLayer):
    """`nn.Conv2d` with a generated weight [out, in / groups, R, S]: x [B, in, H, W] -> [B, out, H', W'].

    kernel_size, stride, dilation: int or pair; padding: int, pair, "same" or "valid". z_dim, init, backend:
    see `LinearGenerator`; generator: use this one instead (several layers may share it). Raises ValueError
    where channels are not divisible by groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        z_dim: int = 16,
        init: str | None = None,
        generator: Generator | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"channels must be divisible by groups: in {in_channels}, out {out_channels}, groups {groups}"
            )
        kernel_size = _pair(kernel_size)
        if len(kernel_size) != 2:
            raise ValueError(f"kernel_size must be an int or a pair, got {kernel_size}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f'padding must be a size, "same" or "valid", got {padding!r}')
        if padding == "same" and _pair(stride) != (1, 1):
            raise ValueError('padding="same" needs stride 1')
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, bias, z_dim, init, generator, backend, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.dilation, self.groups = _pair(stride), _pair(dilation), groups
        self.padding = padding if isinstance(padding, str) else _pair(padding)

    def forward(self, x: Tensor, weight: Tensor | None = None, *, z: Tensor | None = None) -> Tensor:
        options = self.stride, self.padding, self.dilation, self.groups
        if z is not None:
            if (operands := self.operands_of(z, weight)) is not None:
                return ops.hyper_conv2d(x, *operands, self.bias, self.kernel_size, *options)
            (weight,) = self.generator(z)
        if isinstance(weight, PerSampleWeight):
            return F.conv2d(x, weight, self.bias, *options)
        if weight is None and isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == self.in_channels:
            rows = geometry_of(x, self.kernel_size, *options).rows(x)
            if (operands := self.operands(x, rows, convolution=True)) is not None:
                arguments = self.kernel_size, *options
                return ops.hyper_conv2d(
                    x, *operands, self.bias, *arguments, factored=self.generator.factored, path="merged"
                )
        weight = self.generated_weight() if weight is None else weight
        path = "torch" if self.generator.backend == "reference" else "auto"
        return ops.conv2d(x, weight, self.bias, *options, path=path)

    def _plain(self) -> Conv2d:
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding
        plain = Conv2d(*sizes, self.dilation, self.groups, self.bias is not None, device="meta")
        plain.path = "torch" if self.generator.backend == "reference" else "auto"
        return plain

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


class Linear(nn.Linear):
    """`nn.Linear` whose forward takes a weight made elsewhere as well, as that of `HyperLinear` does:
    `hyperfast.freeze` puts it in its place."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight if weight is None else weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` computed by `hyperfast.ops.conv2d`, for the ordinary layers of a main network and in place
    of `HyperConv2d` in frozen ones: forward takes a weight made elsewhere as well. path: see
    `hyperfast.ops.conv2d`; an exported network has torch's convolution."""

    path = "auto"

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        ordinary = self.padding_mode == "zeros" and not isinstance(weight, PerSampleWeight)
        if not ordinary or torch.compiler.is_exporting():
            return self._conv_forward(x, weight, self.bias)
        options = self.stride, self.padding, self.dilation, self.groups
        return ops.conv2d(x, weight, self.bias, *options, path=self.path)


def hyper_layers(model: nn.Module) -> Iterator[tuple[str, HyperLayer]]:
    """(name, layer) of every layer of `model` whose weight is generated; a layer under several names once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, HyperLayer))


def generate_layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers of `model` by layer name: generated ones, all in one launch, and those of
    `hyperfast.nn.Conv2d` and `Linear`, which a frozen network has instead."""
    layers = dict(hyper_layers(model))
    made = generate_together(layer.generator for layer in layers.values())
    weights = {name: own[0] for name, own in zip(layers, made, strict=True)}
    return weights | {n: m.weight for n, m in model.named_modules() if isinstance(m, (Conv2d, Linear))}
