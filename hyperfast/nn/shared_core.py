"""A generator whose layers share a core: z -> core -> one linear head for each layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import factored
from hyperfast.factored import Factors
from hyperfast.nn import init as initialisations
from hyperfast.nn.generator import (
    AffineMap,
    Generator,
    LinearGenerator,
    check_shapes,
    generate_together,
)
from hyperfast.ops._library import check_backend, is_transformed, no_autocast


class Head(LinearGenerator):
    """w = weight z + bias, where z [K] is no parameter but what another module made last, for a backward.

    The gradient of weight is dw outer z as in any linear generator, but the optimizer does not know the z of
    the next step, so every forward generates.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.z
        self.z = self.weight.detach().new_zeros(self.z_dim)
        self.core: tuple[Tensor, ...] = ()  # what z was made from, in a forward of the whole generator

    def factors(self) -> list[Factors]:
        return [f._replace(z_is_parameter=False) for f in super().factors()]

    def next_weights_written(self) -> None:
        pass  # from the old z

    def made_from(self) -> tuple[Tensor, ...]:
        return self.weight, self.gradient_bias, *(self.core or (self.z,))


class SharedCoreGenerator(Generator):
    """w_l = W_l h_l + c_l with h_l = W z_l + b: one core for all layers, a linear head for each.

    No nonlinearity in between. Parameters: z [L, K], core_weight W [D, K], core_bias b [D], `heads[l]` with
    weight W_l [N_l, D] and bias c_l [N_l], with D `hidden_dim`. In factored mode the heads, nearly all of the
    parameters, have factored gradients (dw_l, h_l). shapes: of one layer, or of several. fan_in, fan_out:
    one for all layers or one for each; init: a name in `hyperfast.nn.init.INITIALISATIONS`. Raises ValueError
    for sizes below 1 and unknown names.
    """

    def __init__(
        self,
        shapes: Sequence[int] | Sequence[Sequence[int]],
        z_dim: int = 4,
        hidden_dim: int = 64,
        *,
        fan_in: int | Sequence[int] | None = None,
        fan_out: int | Sequence[int] | None = None,
        init: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shapes = check_shapes(shapes, z_dim=z_dim, hidden_dim=hidden_dim)
        self.z_dim, self.hidden_dim = operator.index(z_dim), operator.index(hidden_dim)
        self.backend = check_backend(backend)
        self.init = initialisations.check(init)
        fans = initialisations.fans(self.shapes, self.init, fan_in, fan_out)
        kind = {"device": device, "dtype": dtype}
        self.z = nn.Parameter(torch.empty(len(self.shapes), self.z_dim, **kind))
        self.core_weight = nn.Parameter(torch.empty(self.hidden_dim, self.z_dim, **kind))
        self.core_bias = nn.Parameter(torch.empty(self.hidden_dim, **kind))
        options = {"init": self.init, "backend": backend, **kind}
        self.heads = nn.ModuleList(
            Head(shape, self.hidden_dim, fan_in=fan, fan_out=fan, **options)
            for shape, fan in zip(self.shapes, fans, strict=True)
        )
        self._reset_core()

    def reset_parameters(self) -> None:
        for head in self.heads:
            head.reset_parameters()
        self._reset_core()

    def _reset_core(self) -> None:
        initialisations.initialise_core_(self.core_weight, self.core_bias, self.z, self.init)

    @property
    def factored(self) -> bool:
        return self.heads[0].factored

    def forward(self, z: Tensor | None = None) -> tuple[Tensor, ...]:
        """The weights. z [L, K]: other embeddings than the generator's own, [B, L, K]: those of each sample;
        refused in factored mode."""
        z = self._check_z(z)
        if z.dim() == 3:
            with no_autocast([z]):
                hidden = F.linear(z, self.core_weight, self.core_bias).unbind(1)
            return tuple(head.weight_of_samples(h) for head, h in zip(self.heads, hidden, strict=True))
        with no_autocast([z]):
            hidden = torch.addmm(self.core_bias, z, self.core_weight.t()).unbind()
        last = [head.z for head in self.heads]
        try:
            for head, h in zip(self.heads, hidden, strict=True):
                head.z, head.core = h, (z, self.core_weight, self.core_bias)
            made = generate_together(self.heads)
        finally:
            for head, h in zip(self.heads, last, strict=True):
                head.z, head.core = h, ()
        if self._is_trained(z):
            for head, h in zip(self.heads, hidden, strict=True):
                head.z = h.detach()
        return tuple(w for (w,) in made)

    def _is_trained(self, z: Tensor) -> bool:
        """Whether a backward may bring the heads' own biases the dw that go with this forward's z: not in an
        evaluation, under a transform, or with parameters of somebody else (`torch.func.functional_call`)."""
        own = all(isinstance(p, nn.Parameter) for p in (z, self.core_weight, self.core_bias))
        if not own or not torch.is_grad_enabled() or is_transformed():
            return False
        head = self.heads[0]
        return (
            not self.factored or torch.compiler.is_compiling() or factored.generator_of(head.weight) is head
        )

    def embeddings(self) -> tuple[Tensor, ...]:
        return self.z.split(1)

    def affine_maps(self) -> tuple[tuple[AffineMap, ...], ...]:
        core = AffineMap(1, self.core_weight, self.core_bias)
        return tuple((core, *head.affine_maps()[0]) for head in self.heads)

    def keep_(self, *weights: Tensor) -> None:
        """Starts from a trained weight for each of `shapes`: the bias of its head takes it
        (`LinearGenerator.keep_`)."""
        if len(weights) != len(self.heads):
            raise ValueError(f"this generator makes {len(self.heads)} weights, got {len(weights)}")
        for head, weight in zip(self.heads, weights, strict=True):
            head.keep_(weight)

    def extra_repr(self) -> str:
        return f"{len(self.shapes)} weights, z_dim={self.z_dim}, hidden_dim={self.hidden_dim}"
