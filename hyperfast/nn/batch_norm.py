"""Batch norm, ReLU and max pool as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperfast.ops._library import check_backend
from hyperfast.ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool


class BatchNormReLUMaxPool2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` -> ReLU -> max pool of `pool` x `pool`: x [B, C, H, W] -> [B, C, H // pool, W //
    pool].

    Parameters, buffers and state dict are those of `nn.BatchNorm2d`, so state dicts interchange. pool: 1 is
    no pooling. backend: "auto" runs fused kernels where there are any (best in channels_last, see
    `hyperfast.ops.batch_norm_relu_max_pool`), "reference" plain PyTorch. Raises ValueError for an input that
    is not 4-dimensional, is smaller than a window or, in training, has one value per channel.
    `nn.SyncBatchNorm.convert_sync_batchnorm` would replace the whole module, ReLU and pool included: do not
    convert it.
    """

    def __init__(
        self,
        num_features: int,
        pool: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(pool, int) or pool < 1:
            raise ValueError(f"pool must be an integer of at least 1, got {pool!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.pool, self.backend = pool, check_backend(backend)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: like x, added before the ReLU."""
        self._check_input_dim(x)
        momentum, update = self.momentum, self.training and self.track_running_stats
        count = self.num_batches_tracked if update else None
        if momentum is None and count is not None:  # the average over all batches
            momentum = 1.0 / (float(count) + 1.0)
        running = (self.running_mean, self.running_var) if update or not self.training else (None, None)
        training = self.training or running[0] is None
        options = (training, momentum or 0.0, self.eps, self.pool)
        # an export needs no hyperfast
        backend = "reference" if torch.compiler.is_exporting() else self.backend
        return batch_norm_relu_max_pool(
            x, *running, self.weight, self.bias, *options, residual=residual, num_batches_tracked=count,
            backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"
