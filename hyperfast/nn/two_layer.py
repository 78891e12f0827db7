"""The two-layer generator of Ha, Dai, Le, "HyperNetworks" (ICLR 2017), section 3.1."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperfast.nn import init as initialisations
from hyperfast.nn.generator import AffineMap, Generator, check_shapes
from hyperfast.nn.per_sample import PerSampleWeight
from hyperfast.ops._library import check_backend
from hyperfast.ops.generate_units import two_layer


class TwoLayerGenerator(Generator):
    """Weights of any number of layers, tiled from units that two small layers make from embeddings.

    For a unit (O, I, *kernel), and D `hidden_dim`: `a = z w2 + b2` viewed as [I, D], `a w1 + b1`
    [I, O prod(kernel)] viewed directly as the unit, as the public code does. A layer (O_l, I_l, *kernel) has
    (O_l / O) (I_l / I) units side by side, in rows of blocks. shapes: of one layer, or of several. unit: its
    shape, needed for several layers; default: the layer's own. Parameters: z [E, K] for E units, [K] where
    there is one, w2 [K, I D], b2 [I D], w1 [D, O prod(kernel)], b1 [O prod(kernel)]. fan_in, fan_out: as in
    `LinearGenerator`, one for all layers or one for each; init: a name in
    `hyperfast.nn.init.INITIALISATIONS`. Its gradients are dense, in factored mode as well. Raises ValueError
    for sizes below 1, shapes that units do not tile and unknown names.
    """

    per_layer = True
    channels_last = False  # the layout of what it makes

    def __init__(
        self,
        shapes: Sequence[int] | Sequence[Sequence[int]],
        z_dim: int = 4,
        hidden_dim: int | None = None,
        unit: Sequence[int] | None = None,
        *,
        fan_in: int | Sequence[int] | None = None,
        fan_out: int | Sequence[int] | None = None,
        init: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shapes = check_shapes(shapes, z_dim=z_dim, hidden_dim=1 if hidden_dim is None else hidden_dim)
        self.unit = torch.Size(self.shapes[0] if unit is None else unit)
        self.counts = tuple(self._units_of(shape) for shape in self.shapes)
        self.z_dim = operator.index(z_dim)
        self.hidden_dim = operator.index(hidden_dim or z_dim)
        self.backend = check_backend(backend)
        self.init = initialisations.check(init)
        self.fans = initialisations.fans(self.shapes, self.init, fan_in, fan_out)
        K, D, E = self.z_dim, self.hidden_dim, sum(self.counts)
        rows, columns = self.unit[1], math.prod(self.unit) // self.unit[1]
        sizes = {"z": (E, K) if E > 1 else (K,), "w2": (K, rows * D), "b2": (rows * D,)}
        sizes |= {"w1": (D, columns), "b1": (columns,)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self.reset_parameters()

    def _units_of(self, shape: torch.Size) -> int:
        """How many units make a layer; ValueError where they do not tile it."""
        unit = self.unit
        if len(unit) < 2 or min(unit) < 1 or len(shape) != len(unit) or shape[2:] != unit[2:]:
            raise ValueError(f"unit must be (out, in, *kernel) like shape {tuple(shape)}, got {tuple(unit)}")
        if shape[0] % unit[0] or shape[1] % unit[1]:
            raise ValueError(f"shape {tuple(shape)} is not made of whole units {tuple(unit)}")
        return (shape[0] // unit[0]) * (shape[1] // unit[1])

    def reset_parameters(self) -> None:
        parameters = self.w1, self.b1, self.w2, self.b2, self.z
        initialisations.initialise_two_layer_(*parameters, self.fans, self.counts, self.init)

    def forward(self, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """The weights. z: other embeddings than the generator's own, of the same shape, or of each sample:
        [B, E, K], [B, K] where there is one unit."""
        z = self._check_z(z)
        if z.dim() > self.z.dim():
            return self._of_samples(z)
        return self._make(z.reshape(-1, self.z_dim), self.shapes, self.l2)

    def _make(self, z: Tensor, shapes: Sequence[Sequence[int]], l2: float) -> tuple[Tensor, ...]:
        generator = self.w2, self.b2, self.w1, self.b1
        options = {"l2": l2, "channels_last": self.channels_last, "backend": self.backend}
        return two_layer(z, *generator, shapes, self.unit, **options)

    def _of_samples(self, z: Tensor) -> tuple[PerSampleWeight, ...]:
        """Of z [B, E, K] or [B, K]: the weights of a layer for all samples are tiled as one layer with B
        times its outputs. No sample: one is made, and cut off."""
        B, l2 = len(z), self.l2
        if not B:
            z, l2 = torch.cat([z, z.new_zeros(1, *z.shape[1:])]), 0.0
        layers = z.reshape(len(z), -1, self.z_dim).split(self.counts, dim=1)
        shapes = [(len(z) * shape[0], *shape[1:]) for shape in self.shapes]
        made = self._make(torch.cat([own.flatten(0, 1) for own in layers]), shapes, l2)
        weights = (w.unflatten(0, (-1, shape[0]))[:B] for w, shape in zip(made, self.shapes, strict=True))
        return tuple(PerSampleWeight.ready(w) for w in weights)

    def _apply(self, fn, recurse=True):
        """`.to(memory_format=)` means the weights made here too, whose layout no parameter has."""
        super()._apply(fn, recurse)
        if len(self.unit) == 4:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            made = fn(torch.empty(2, 2, 2, 2).contiguous(memory_format=layout))
            self.channels_last = made.is_contiguous(memory_format=torch.channels_last)
        return self

    def embeddings(self) -> tuple[Tensor, ...]:
        return self.z.view(-1, self.z_dim).split(self.counts)

    def affine_maps(self) -> tuple[tuple[AffineMap, ...], ...]:
        I = self.unit[1]
        return tuple(
            (AffineMap(count, self.w2, self.b2), AffineMap(count * I, self.w1, self.b1))
            for count in self.counts
        )

    def extra_repr(self) -> str:
        sizes = f"z_dim={self.z_dim}, hidden_dim={self.hidden_dim}"
        if len(self.shapes) == 1 and self.unit == self.shapes[0]:
            return f"{tuple(self.unit)}, {sizes}"
        return f"{len(self.shapes)} weights, unit={tuple(self.unit)}, E={sum(self.counts)}, {sizes}"
