"""Layers of the main networks: with an ordinary weight or a generated one, chosen by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from hyperfast.nn import Conv2d, Generator, HyperConv2d, HyperLinear, LinearGenerator


@dataclass(frozen=True)
class Layers:
    """Makes the layers of a network; biases start at 0.

    generated: names of the layers with generated weights. z_dim: size of their embeddings, one for all or by
    name. generator, init, backend: kind and options of the generators. std: ordinary weights start normal
    with this std, None for He's (variance 2 / fan_in).
    """

    generated: Collection[str] = ()
    z_dim: int | Mapping[str, int] = 16
    generator: type[Generator] = LinearGenerator
    init: str | None = None
    std: float | None = None
    backend: str = "auto"

    def conv(self, name: str, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        """A convolution that keeps the size of images; `kernel_size` is odd."""
        size = (in_channels, out_channels, kernel_size)
        if name in self.generated:
            generator = self._generator(name, (out_channels, in_channels, kernel_size, kernel_size))
            return HyperConv2d(*size, padding=kernel_size // 2, generator=generator)
        kind = nn.Conv2d if self.backend == "reference" else Conv2d
        return self._initialised(nn.utils.skip_init(kind, *size, padding=kernel_size // 2))

    def linear(self, name: str, in_features: int, out_features: int) -> nn.Module:
        """A fully connected layer."""
        if name in self.generated:
            generator = self._generator(name, (out_features, in_features))
            return HyperLinear(in_features, out_features, generator=generator)
        return self._initialised(nn.utils.skip_init(nn.Linear, in_features, out_features))

    def _generator(self, name: str, shape: tuple[int, ...]) -> Generator:
        z_dim = self.z_dim if isinstance(self.z_dim, int) else self.z_dim[name]
        return self.generator(shape, z_dim, init=self.init, backend=self.backend)

    def _initialised(self, layer: nn.Module) -> nn.Module:
        if self.std is None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=self.std)
        nn.init.zeros_(layer.bias)
        return layer


def check_classes(num_classes: int) -> None:
    """Raises ValueError for fewer than one class."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
