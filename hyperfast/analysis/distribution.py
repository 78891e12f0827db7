"""Distributions of numbers that come in parts, none of which is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 1024  # half of them below 0
CHUNK = {"cpu": 1 << 16, "other": 1 << 22}  # elements in float64 at a time; on the CPU they stay in the cache
SMALLEST = -1000  # exponent of the smallest range: its bins are normal numbers still


@dataclass(frozen=True, eq=False)
class Distribution:
    """Of `count` finite numbers; NaN and infinities are counted in `nonfinite` and nowhere else.

    std: population. near_zero: share of |x| < threshold. NaN where there is no number. counts int64 [bins],
    edges float64 [bins + 1]: a histogram, exact, of bins [edge, next edge) as wide as each other, a power of
    two, of which one edge is 0; from the first bin with something in it to the last.
    """

    count: int
    nonfinite: int
    mean: float
    std: float
    min: float
    max: float
    near_zero: float
    counts: Tensor
    edges: Tensor

    def figures(self) -> dict[str, Any]:
        """All but the histogram, by name."""
        names = ("count", "nonfinite", "mean", "std", "min", "max", "near_zero")
        return {name: getattr(self, name) for name in names}

    def density(self) -> Tensor:
        """The histogram as a density, float64 [bins]: its integral over the bins is 1."""
        return self.counts / (self.counts.sum() * self.edges.diff())


class Tally:
    """Adds up a `Distribution` in one pass over tensors of any shape, floating-point dtype and device.

    Moments in float64: of a chunk about its own mean, chunks and tensors merged as Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances" (1979). The histogram needs no
    range beforehand: it goes from -2^e to 2^e, and where a number lies outside, e grows and bins merge in
    pairs, so that it is the one that the last range would have counted. On a GPU the host waits for each
    tensor.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.moments = 0, 0.0, 0.0  # count, mean, sum of squares about the mean
        self.nonfinite = self.near_zero = 0
        self.min, self.max = math.inf, -math.inf
        self.exponent = SMALLEST
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """All elements of `values`."""
        flat = values.detach().permute(memory_order(values)).reshape(-1)  # a view, where memory is dense
        low, high = _extremes(flat)
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = flat[flat.isfinite()]
            self.nonfinite += flat.numel() - finite.numel()
            flat = finite
            low, high = _extremes(flat)
        if not flat.numel():
            return
        self.min, self.max = min(self.min, low), max(self.max, high)
        self._grow(math.frexp(max(-low, high))[1])
        self._count(flat)

    def merge(self, other: Tally) -> None:
        """All that `other`, of the same threshold, has seen."""
        self.nonfinite += other.nonfinite
        self.near_zero += other.near_zero
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        self._grow(other.exponent)
        self.counts += _coarser(other.counts, self.exponent - other.exponent)
        self._merge_moments(torch.tensor([other.moments], dtype=torch.float64))

    def distribution(self) -> Distribution:
        count, mean, squares = self.moments
        if not count:
            nan = math.nan
            edges = torch.empty(0, dtype=torch.float64)
            return Distribution(0, self.nonfinite, nan, nan, nan, nan, nan, self.counts[:0], edges)
        used = self.counts.nonzero()
        first, end = int(used[0]), int(used[-1]) + 1
        edges = torch.arange(first - BINS // 2, end + 1 - BINS // 2, dtype=torch.float64)
        return Distribution(
            count, self.nonfinite, mean, math.sqrt(squares / count), self.min, self.max,
            self.near_zero / count, self.counts[first:end].clone(), edges / self._scale(),
        )  # fmt: skip

    def _scale(self) -> float:
        """Bins in a unit."""
        return math.ldexp(BINS // 2, -self.exponent)

    def _grow(self, exponent: int) -> None:
        """To numbers below 2^exponent in magnitude."""
        if exponent > self.exponent:
            self.counts = _coarser(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def _count(self, flat: Tensor) -> None:
        scale = self._scale()
        counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
        chunks = flat.split(CHUNK.get(flat.device.type, CHUNK["other"]))
        buffers = [
            flat.new_empty(len(chunks[0]), dtype=dtype) for dtype in 2 * [torch.float64] + [torch.int32]
        ]
        parts = []
        for chunk in chunks:
            x, y, bins = (buffer[: len(chunk)] for buffer in buffers)
            x.copy_(chunk)
            near_zero = torch.abs(x, out=y).lt_(self.threshold).sum()  # of ones: faster than count_nonzero
            # floor before the shift, which would round small negative numbers up to 0
            bins.copy_(torch.mul(x, scale, out=y).floor_()).add_(BINS // 2)
            counts += bins.bincount(minlength=BINS)
            mean = x.mean()
            x -= mean
            parts.append(torch.stack([mean.new_full((), len(x)), mean, x.dot(x), near_zero]))
        parts = torch.stack(parts).cpu()
        self.counts += counts.cpu()
        self.near_zero += int(parts[:, 3].sum())
        self._merge_moments(parts[:, :3])

    def _merge_moments(self, parts: Tensor) -> None:
        """parts [parts, 3]: count, mean and sum of squares about it of each."""
        counts, means, squares = torch.cat([parts, parts.new_tensor([self.moments])]).unbind(1)
        count = int(counts.sum())
        if count:
            mean = (counts * means).sum() / count
            squares = squares.sum() + (counts * (means - mean) ** 2).sum()
            self.moments = count, float(mean), float(squares)


def memory_order(values: Tensor) -> list[int]:
    """The dimensions from that of the largest stride to that of the smallest."""
    return sorted(range(values.dim()), key=lambda d: -values.stride(d))


def _extremes(flat: Tensor) -> tuple[float, float]:
    """NaN where one is; of nothing 0."""
    if not flat.numel():
        return 0.0, 0.0
    low, high = torch.stack(flat.aminmax()).tolist()
    return low, high


def _coarser(counts: Tensor, doublings: int) -> Tensor:
    """The histogram over a range 2^doublings times as large."""
    if not doublings:
        return counts
    bins = torch.arange(-BINS // 2, BINS // 2) >> min(doublings, 62)
    return torch.zeros_like(counts).index_add_(0, bins + BINS // 2, counts)
