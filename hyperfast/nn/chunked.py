"""A generator that makes its weights in chunks of one size, each from an embedding of its own."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperfast.nn import init as initialisations
from hyperfast.nn.generator import AffineMap, Generator, check_shapes
from hyperfast.nn.per_sample import PerSampleWeight
from hyperfast.ops._library import autocast_dtype, check_backend, no_autocast
from hyperfast.ops.generate import penalize_l2


class ChunkedGenerator(Generator):
    """Chunks c_e = weight z_e + bias of C numbers, laid end to end: one small generator for all layers.

    A layer of N weights takes ceil(N / C) chunks and leaves the rest of the last. Parameters: z [E, K],
    weight [C, K], bias [C], with C `chunk_size`. The gradient of weight has rank E: dense. shapes: of one
    layer, or of several. fan_in, fan_out: one for all layers or one for each; init: a name in
    `hyperfast.nn.init.INITIALISATIONS`. Raises ValueError for sizes below 1 and unknown names. von Oswald,
    Henning, Grewe, Sacramento, "Continual learning with hypernetworks" (ICLR 2020), section 2.3, with a
    linear generator.
    """

    def __init__(
        self,
        shapes: Sequence[int] | Sequence[Sequence[int]],
        z_dim: int = 16,
        chunk_size: int = 4096,
        *,
        fan_in: int | Sequence[int] | None = None,
        fan_out: int | Sequence[int] | None = None,
        init: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shapes = check_shapes(shapes, z_dim=z_dim, chunk_size=chunk_size)
        self.z_dim, self.chunk_size = operator.index(z_dim), operator.index(chunk_size)
        self.counts = tuple(math.ceil(math.prod(shape) / self.chunk_size) for shape in self.shapes)
        self.backend = check_backend(backend)
        self.init = initialisations.check(init)
        self.fans = initialisations.fans(self.shapes, self.init, fan_in, fan_out)
        kind = {"device": device, "dtype": dtype}
        self.z = nn.Parameter(torch.empty(sum(self.counts), self.z_dim, **kind))
        self.weight = nn.Parameter(torch.empty(self.chunk_size, self.z_dim, **kind))
        self.bias = nn.Parameter(torch.empty(self.chunk_size, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        own = self.weight, self.bias, self.z
        initialisations.initialise_chunked_(*own, self.fans, self.counts, self.init)

    def forward(self, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """The weights, views of one tensor. z: other embeddings than the generator's own, of the same
        shape, or of each sample, [B, E, K]."""
        z = self._check_z(z)
        *batch, _, K = z.shape
        with no_autocast([z]):  # as in `ops.generate`: the product in the dtype of the parameters
            chunks = torch.addmm(self.bias, z.reshape(-1, K), self.weight.t())
        chunks = chunks.view(*z.shape[:-1], self.chunk_size).split(self.counts, dim=-2)
        dtype = autocast_dtype(self.weight) or self.weight.dtype
        weights = []
        for own, shape in zip(chunks, self.shapes, strict=True):
            w = own.flatten(-2)[..., : math.prod(shape)].reshape(*batch, *shape)
            w = penalize_l2(w, self.l2).to(dtype)
            weights.append(PerSampleWeight.ready(w) if batch else w)
        return tuple(weights)

    def embeddings(self) -> tuple[Tensor, ...]:
        return self.z.split(self.counts)

    def affine_maps(self) -> tuple[tuple[AffineMap, ...], ...]:
        return tuple((AffineMap(count, self.weight, self.bias),) for count in self.counts)

    def extra_repr(self) -> str:
        sizes = f"z_dim={self.z_dim}, chunk_size={self.chunk_size}"
        return f"{len(self.shapes)} weights, E={sum(self.counts)}, {sizes}"
