"""Collectives between ranks that send no more than they must, each on one flat tensor.

Bytes sent by each of R ranks, of a tensor of n bytes: all-reduce 2 (R - 1) / R n; all-gather and reduce-
scatter of n bytes in all, (R - 1) / R n. gloo's own reduce-scatter is an all-reduce, so without NCCL the
parts are exchanged and added here, in the order of the ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ReduceScatter:
    """The mean over ranks of `parts` [R, n], of which this rank gets its own row: begun when made.

    `parts` must stay as it is until `wait`, which returns [n]. On a GPU nothing waits but the current stream.
    """

    def __init__(self, parts: Tensor, group: dist.ProcessGroup | None = None):
        self.ranks = dist.get_world_size(group)
        if parts.dim() != 2 or len(parts) != self.ranks or not parts.is_contiguous():
            raise ValueError(f"parts must be contiguous [{self.ranks}, n], got {list(parts.shape)}")
        self.exchanged = not _is_nccl(parts.device, group)
        if self.exchanged:
            self.out = torch.empty_like(parts)
            self.work = dist.all_to_all_single(self.out, parts, group=group, async_op=True)
        else:
            self.out = torch.empty_like(parts[0])
            self.work = dist.reduce_scatter_tensor(
                self.out, parts.view(-1), dist.ReduceOp.AVG, group=group, async_op=True
            )

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.exchanged:
                self.out = self.out.mean(0)
        return self.out


def _is_nccl(device: torch.device, group: dist.ProcessGroup | None) -> bool:
    """Whether NCCL serves tensors on `device`: a group may have one backend for each kind of device."""
    served = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return "nccl" in served.get(device.type, "")


def all_gather(part: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[R, n, ...] from every rank's `part` [n, ...]."""
    ranks = dist.get_world_size(group)
    whole = part.new_empty(ranks * len(part), *part.shape[1:])  # one after the other: gloo stacks none
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole.view(ranks, *part.shape)
