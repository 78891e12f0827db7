"""What the embeddings z of a hypernetwork look like: figures for each layer, and how alike they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.analysis.table import table
from hyperfast.nn import named_weights

STATISTICS = ("min", "max", "mean", "std", "norm")
MATRIX_LIMIT = 12  # layers of a similarity matrix that is still readable as a table


@dataclass(frozen=True, eq=False)
class LayerEmbeddings:
    """The embeddings z [E_l, K] of the generated layer `name`, float64 on the CPU."""

    name: str
    z: Tensor

    def statistics(self) -> dict[str, float]:
        """min, max, mean, std (population) and norm over all E_l K entries."""
        z = self.z
        figures = (z.min(), z.max(), z.mean(), z.std(correction=0), z.norm())
        return {name: float(value) for name, value in zip(STATISTICS, figures, strict=True)}

    def norms(self) -> Tensor:
        """Norm of every embedding, [E_l]."""
        return self.z.norm(dim=1)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosines between all embeddings of the layers whose embeddings have z_dim numbers.

    layers: their names; counts: embeddings of each; matrix [E, E], in the order of the layers: cosines, 0 for
    an embedding that is zero.
    """

    z_dim: int
    layers: tuple[str, ...]
    counts: tuple[int, ...]
    matrix: Tensor

    def between(self) -> Tensor:
        """Mean cosine of the pairs of an embedding of one layer and one of another, [L, L]; on the diagonal
        of two different ones of a layer, NaN where it has one alone."""
        counts = torch.tensor(self.counts)
        member = torch.repeat_interleave(torch.arange(len(counts)), counts)
        member = F.one_hot(member, len(counts)).to(self.matrix.dtype)  # [E, L]
        without_self = self.matrix - torch.diag(self.matrix.diagonal())
        pairs = torch.outer(counts, counts) - torch.diag(counts)
        return (member.T @ without_self @ member) / pairs

    def to_markdown(self) -> str:
        """`between` as a table."""
        rows = [
            [name, *("" if math.isnan(cosine) else f"{cosine:.3f}" for cosine in row)]
            for name, row in zip(self.layers, self.between().tolist(), strict=True)
        ]
        return table([f"K = {self.z_dim}", *self.layers], rows)


@dataclass(frozen=True, eq=False)
class ZReport:
    """The embeddings of all generated layers of a model. Nothing is drawn or printed: `to_markdown` does."""

    layers: tuple[LayerEmbeddings, ...]

    def statistics(self) -> dict[str, dict[str, float]]:
        """`LayerEmbeddings.statistics` by layer."""
        return {layer.name: layer.statistics() for layer in self.layers}

    def similarities(self) -> list[Similarity]:
        """One for each size of embeddings that occurs, in the order of the layers."""
        by_size: dict[int, list[LayerEmbeddings]] = {}
        for layer in self.layers:
            by_size.setdefault(layer.z.shape[1], []).append(layer)
        found = []
        for z_dim, layers in by_size.items():
            unit = F.normalize(torch.cat([layer.z for layer in layers]), dim=1)
            names, counts = zip(*((layer.name, len(layer.z)) for layer in layers), strict=True)
            found.append(Similarity(z_dim, names, counts, unit @ unit.T))
        return found

    def rows(self) -> list[dict[str, float | int | str]]:
        """For each layer: layer, embeddings (E_l), z_dim (K), its statistics, norm_min and norm_max of single
        embeddings, within (mean cosine of its own), most_similar (another layer of equal K, or "") and
        cosine, the mean one with that."""
        others: dict[str, tuple[float, str, float]] = {}
        for similarity in self.similarities():
            between = similarity.between()
            within = between.diagonal().tolist()
            best = between.fill_diagonal_(-math.inf).max(dim=1)
            for i, name in enumerate(similarity.layers):
                cosine = best.values[i].item()
                alone = cosine == -math.inf
                nearest = "" if alone else similarity.layers[best.indices[i]]
                others[name] = within[i], nearest, math.nan if alone else cosine
        rows = []
        for layer in self.layers:
            within, nearest, cosine = others[layer.name]
            norms = layer.norms()
            row = {"layer": layer.name, "embeddings": len(layer.z), "z_dim": layer.z.shape[1]}
            row |= layer.statistics() | {"norm_min": norms.min().item(), "norm_max": norms.max().item()}
            rows.append(row | {"within": within, "most_similar": nearest, "cosine": cosine})
        return rows

    def to_markdown(self) -> str:
        """A table of the layers, and one of the cosines between them for every K with 2 to 12 layers."""
        cells = []
        for row in self.rows():
            numbers = (row[key] for key in (*STATISTICS, "norm_min", "norm_max", "within"))
            similar = f"{row['most_similar']} ({row['cosine']:.3f})" if row["most_similar"] else ""
            shown = ("" if math.isnan(value) else f"{value:.4f}" for value in numbers)
            cells.append([row["layer"], row["embeddings"], row["z_dim"], *shown, similar])
        header = ["layer", "embeddings", "K", *STATISTICS, "smallest norm", "largest norm"]
        parts = [table([*header, "cosine within", "most similar layer (cosine)"], cells)]
        for similarity in self.similarities():
            if 2 <= len(similarity.layers) <= MATRIX_LIMIT:
                parts.append(similarity.to_markdown())
        return "\n\n".join(parts)


@torch.no_grad()
def z_report(model: nn.Module) -> ZReport:
    """The embeddings of every generated layer of `model`: range, mean, std, norms, pairwise similarity.

    Layers have the names of `hyperfast.nn.named_weights`; a plain network has none.
    """
    return ZReport(
        tuple(
            LayerEmbeddings(name, generator.embeddings()[index].detach().double().cpu())
            for name, generator, index in named_weights(model)
        )
    )
