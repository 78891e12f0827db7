"""What a rank really sends, as the kernel counts it, and what it holds between training steps."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperfast.nn.generator import generators

BYTES_SENT, RETRANSMITTED = 200, 208  # offsets in struct tcp_info of Linux 4.19 and later


def _sockets() -> Iterator[socket.socket]:
    """The TCP sockets that are open in this process, gloo's and the store's among them."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    yield found
        except OSError:  # closed meanwhile
            continue


def bytes_sent() -> int:
    """Payload that left through the TCP sockets open now, repetitions not counted. Linux only: OSError where
    the kernel does not tell."""
    total = 0
    for found in _sockets():
        info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < RETRANSMITTED + 8:
            raise OSError("this kernel's TCP_INFO does not count the bytes sent")
        total += struct.unpack_from("Q", info, BYTES_SENT)[0]
        total -= struct.unpack_from("Q", info, RETRANSMITTED)[0]
    return total


def sent_by(function: Callable[[], object]) -> int:
    """Bytes that this rank sends in `function`, which all ranks call. Whatever a rank sent before has left
    when it passes a barrier; the second barrier's own few hundred bytes are counted too."""
    dist.barrier()
    before = bytes_sent()
    function()
    dist.barrier()
    return bytes_sent() - before


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the tensors that this process holds, by the names of `hyperfast.distributed.plan.Plan`; DDP's
    buckets are not among them."""
    states = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()
    ]
    return {
        "parameters": _storages([*model.parameters(), *model.buffers()]),
        "gradients": _storages(p.grad for p in model.parameters()),
        "states": _storages(states),
        "weights": _storages(_generated(model)),
    }


def _generated(model: nn.Module) -> Iterator[Tensor | None]:
    """The generated weights that generators keep for the next forward."""
    for _, g in generators(model):
        yield getattr(g, "next_weight", None)
        yield getattr(getattr(g, "gathered", None), "w", None)


def _storages(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all that the tensors keep alive."""
    kept = (t.untyped_storage() for t in tensors if t is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
