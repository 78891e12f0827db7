"""Losses of classification by name: `LOSSES[name]()(output, target)` is the mean of a batch, a scalar.

output: logits float [B, C]; of the center loss what `WithCenters` gives. target: labels int64 [B], or shares
of the classes float [B, C] whose sum is 1 for each sample, as CutMix makes them. Nothing here waits for the
device or has a shape that depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import HyperLinear


class FocalLoss(nn.Module):
    """-(1 - p)^gamma log p of the target's probability p. Lin et al., "Focal Loss for Dense Object Detection"
    (ICCV 2017), equation 4, with the softmax's p; gamma 0 is the cross-entropy. With soft targets the sum of
    that over the classes by their shares. Raises ValueError for a negative gamma."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(output, 1)
        # the power of 0 has no gradient for gamma below 1
        missing = log_p.expm1().neg().clamp_min(torch.finfo(log_p.dtype).tiny)
        each = missing.pow(self.gamma) * log_p
        return F.nll_loss(each, target) if target.ndim == 1 else -(target * each).sum(1).mean()


class CenterLoss(nn.Module):
    """Cross-entropy + weight / 2 |x - c|^2 of the features x and the center c of their class. Wen et al., "A
    Discriminative Feature Learning Approach for Deep Face Recognition" (ECCV 2016), equation 5.

    output: logits [B, C], features [B, F], centers [C, F], from a `WithCenters`. In training every call then
    moves the centers, in place, by the paper's rule (equation 4 and algorithm 1): of class j by
    -rate sum_i (c_j - x_i) / (1 + n_j) over its n_j samples in the batch. A sample with soft targets has the
    mean of the centers by its shares, and counts for each class by its share. weight: lambda there, rate:
    alpha there, both the paper's. Raises ValueError for a negative weight, a rate not in 0 to 1.
    """

    def __init__(self, weight: float = 0.003, rate: float = 0.5) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        self.weight, self.rate = weight, rate

    def forward(self, output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        logits, features, centers = output
        classes = torch.arange(len(centers), device=centers.device)
        shares = target.unsqueeze(1) == classes if target.ndim == 1 else target
        # products in half precision would round the centers
        with torch.autocast(features.device.type, enabled=False):
            features, shares = features.to(centers.dtype), shares.to(centers.dtype)
            distance = (features - shares @ centers).square().sum(1).mean()
            if self.training:
                self._move_(centers, features.detach(), shares)
        return F.cross_entropy(logits, target) + self.weight / 2 * distance

    @torch.no_grad()
    def _move_(self, centers: Tensor, features: Tensor, shares: Tensor) -> None:
        count = shares.sum(0).unsqueeze(1)
        centers.sub_((count * centers - shares.T @ features) / (1 + count), alpha=self.rate)


class WithCenters(nn.Module):
    """A network whose output in training is all that `CenterLoss` needs: logits, features, the centers of the
    classes; in evaluation its logits.

    network: ends with a linear layer, plain or generated, whose input [B, F] are the features. centers: a
    buffer [num_classes, F], zeros, so that checkpoints hold it. The layer is the last linear one of
    `modules()`. Raises ValueError for a network without one, and in training for one whose output is not that
    layer's.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centers", torch.zeros(num_classes, self._head().in_features))

    def _head(self) -> nn.Linear | HyperLinear:
        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear | HyperLinear)]
        if not linear:
            raise ValueError(f"network must end with a linear layer, {type(self.network).__name__} has none")
        return linear[-1]

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return self.network(*inputs)
        seen: list[tuple[Tensor, Tensor]] = []
        # a hook, for the network may have its weights, generated ones, in its own forward alone
        hook = self._head().register_forward_hook(
            lambda layer, given, output: seen.append((given[0], output))
        )
        try:
            logits = self.network(*inputs)
        finally:
            hook.remove()
        if not seen or seen[-1][1] is not logits:
            name = type(self.network).__name__
            raise ValueError(f"{name} must return the output of its last linear layer, got another")
        return logits, seen[-1][0], self.centers


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "focal": FocalLoss,
    "label_smoothing": partial(nn.CrossEntropyLoss, label_smoothing=0.1),
    "center": CenterLoss,
}
