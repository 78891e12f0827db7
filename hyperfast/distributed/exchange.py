"""dw on its way to the ranks that own its rows, while the backward goes on.

The graph of layers that one forward generated together, as the backward walks it:

    main network -> `Send` of each layer -> `Receive`, one for all -> bias, z

`Send` runs as soon as the dw of its layer is there and begins the message once all layers of its bucket have
come. `Receive` runs when nothing else can: it waits for the messages and has dw of the own rows, which is the
gradient of bias, and all dz. z stays a parameter of DDP, which takes the mean of its gradient over ranks:
each gives ranks times what its rows add, so the mean is the sum over all rows.

Every rank must generate and use the same layers in the same order. One that no rank uses has no gradient, but
DDP gives its z zeros unless it looks for unused parameters.

A loss of a forward in `no_sync` must not share a backward with one outside: its dw may come when the messages
have left. It stays with the gradient of bias then, and a step raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.distributed.collectives import ReduceScatter
from hyperfast.distributed.rows import RowShard
from hyperfast.ops._library import run_first
from hyperfast.ops.generate_backward import backward_op

if TYPE_CHECKING:
    from hyperfast.nn.generator import LinearGenerator

BUCKET = 25 * 2**20  # bytes of dw in one message, as in DDP
LAST = 0  # sequence number: of the nodes that are ready the engine runs the largest


class Unsent:
    """dw [N] of backwards whose gradients DDP was told not to send (`no_sync`), added up.

    It belongs to the gradient of bias, which waits for it, and goes with it when that is set to None. passes:
    how many backwards it is from.
    """

    def __init__(self, dw: Tensor, version: int):
        self.dw, self.passes, self.version = dw, 1, version

    @staticmethod
    def of(bias: Tensor) -> Unsent | None:
        found = getattr(bias.grad, "unsent", None)
        if found is not None and found.version != bias.grad._version:
            raise RuntimeError(
                "the gradient of a sharded generator has changed while an accumulation in no_sync goes on: "
                "begin anew with zero_grad(set_to_none=True)"
            )
        return found

    @classmethod
    def add(cls, bias: Tensor, dw: Tensor) -> None:
        found = cls.of(bias)
        if found is not None:
            found.dw += dw
            found.passes += 1
            return
        if bias.grad is None:
            bias.grad = torch.zeros_like(bias)
        bias.grad.unsent = cls(dw.to(bias.dtype, copy=True), bias.grad._version)

    @classmethod
    def take(cls, bias: Tensor) -> Unsent | None:
        found = cls.of(bias)
        if found is not None:
            del bias.grad.unsent
        return found


class Bucket:
    """One message: for each rank a row [n], of dw of its rows of every layer, and then the number of
    backwards that each layer's dw is from, 0 where it was not used."""

    def __init__(self, layers: Sequence[int], shards: Sequence[RowShard], biases: Sequence[Tensor]):
        """layers: positions in `shards` and `biases`."""
        self.layers, self.shards, self.biases = layers, shards, biases
        self.columns, n = {}, 0
        for i in layers:
            self.columns[i] = slice(n, n := n + shards[i].chunk)
        self.passes = {i: n + k for k, i in enumerate(layers)}
        self.parts = biases[layers[0]].new_empty(shards[layers[0]].ranks, n + len(layers))
        self.parts[:, n:] = 0
        self.here: set[int] = set()  # layers of which this rank sends dw
        self.message: ReduceScatter | None = None

    def put(self, i: int, dw: Tensor, passes: int = 1) -> None:
        """Adds dw [N], of any dtype."""
        columns = self.parts[:, self.columns[i]]  # [R, chunk]
        chunk = columns.shape[1]
        rows, left = divmod(len(dw), chunk)
        pieces = [(columns[:rows], dw[: rows * chunk].view(rows, chunk))]
        pieces += [(columns[rows, :left], dw[rows * chunk :])] if left else []
        if i not in self.here:
            columns[rows:] = 0
        for place, piece in pieces:
            place.add_(piece) if i in self.here else place.copy_(piece)
        self.parts[:, self.passes[i]] += passes
        self.here.add(i)

    def send(self) -> None:
        for i in self.layers:
            unsent = Unsent.take(self.biases[i])
            if unsent is not None:
                self.put(i, unsent.dw, unsent.passes)
            if i not in self.here:
                self.parts[:, self.columns[i]] = 0
        self.message = ReduceScatter(self.parts, self.shards[self.layers[0]].group)

    def receive(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, dw of the own rows, number of backwards []), means over ranks, of the layers that a rank
        used. The host waits only where this one did not."""
        row = self.message.wait()
        for i in self.layers:
            if i in self.here or row[self.passes[i]].item():
                first, shard = self.columns[i].start, self.shards[i]
                yield i, row[first : first + shard.stop - shard.start], row[self.passes[i]]


class Exchange:
    """Of the layers that one forward generated together; its graph owns it. sends: False adds dw up."""

    def __init__(self, batch: Sequence[LinearGenerator], sends: bool):
        self.shards = [g.shard for g in batch]
        self.biases = [g.gradient_bias for g in batch]
        # without a gradient of bias there is nothing to which unsent dw could belong
        self.sent = [i for i, bias in enumerate(self.biases) if sends or not bias.requires_grad]
        self.plan = self._plan()
        self.bucket_of = {i: k for k, layers in enumerate(self.plan) for i in layers}
        self._begin(-1)

    def _plan(self) -> list[list[int]]:
        """Layers of each bucket, in the order in which they are sent: dw of the last layer comes first."""
        plan: list[list[int]] = []
        room = 0
        for i in reversed(self.sent):
            nbytes = self.shards[i].rows * self.biases[i].element_size()
            if not plan or nbytes > room:
                plan.append([])
                room = BUCKET
            plan[-1].append(i)
            room -= nbytes
        return plan

    def _begin(self, backward: int) -> None:
        """What a failed backward left is dropped."""
        self.backward, self.buckets, self.begun = backward, {}, 0

    def _bucket(self, k: int) -> Bucket:
        if k not in self.buckets:
            self.buckets[k] = Bucket(self.plan[k], self.shards, self.biases)
        return self.buckets[k]

    def _enter(self) -> None:
        if self.backward != (backward := torch._C._current_graph_task_id()):
            self._begin(backward)

    def put(self, i: int, dw: Tensor) -> None:
        """dw [N] of layer i: sent with its bucket, in the order of the plan on every rank."""
        self._enter()
        if i not in self.bucket_of:
            Unsent.add(self.biases[i], dw)
            return
        self._bucket(self.bucket_of[i]).put(i, dw)
        while (k := self.begun) in self.buckets and len(self.buckets[k].here) == len(self.plan[k]):
            self.buckets[k].send()
            self.begun += 1

    def receive(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer: dw of the own rows and how many backwards it is from."""
        self._enter()
        for k in range(self.begun, len(self.plan)):
            self._bucket(k).send()
        received = {
            i: (dw, passes) for k in range(len(self.plan)) for i, dw, passes in self.buckets.pop(k).receive()
        }
        self._begin(-1)
        return received


class Receive(torch.autograd.Function):
    """Makes a token for each layer, which `Send` takes. tensors: L biases, L zs."""

    @staticmethod
    def forward(ctx, exchange: Exchange, batch: Sequence[LinearGenerator], own: Sequence[Tensor], *tensors):
        """own: L own rows of the generated weights."""
        ctx.exchange, ctx.backend = exchange, batch[0].backend
        ctx.l2 = {i: g.l2 for i, g in enumerate(batch) if g.l2}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(g.weight for g in batch), *(own[i] for i in ctx.l2))
        return tuple(z.new_empty(0) for z in tensors[len(batch) :])

    @staticmethod
    def backward(ctx, *tokens):
        L, saved, received = len(tokens), ctx.saved_tensors, ctx.exchange.receive()
        weights, own = saved[:L], dict(zip(ctx.l2, saved[L:], strict=True))
        for i in ctx.l2.keys() & received.keys():
            dw, passes = received[i]
            dw.addcmul_(own[i], passes, value=ctx.l2[i])
        dbias, dz = [None] * L, [None] * L
        for i, (dw, _) in received.items():
            dbias[i] = dw if ctx.needs_input_grad[3 + i] else None
        used = [i for i in received if ctx.needs_input_grad[3 + L + i]]
        if used:
            op = reference.generate_backward if ctx.backend == "reference" else backward_op
            made, _ = op([weights[i] for i in used], [received[i][0] for i in used])
            torch._foreach_mul_(made, ctx.exchange.shards[0].ranks)
            for i, gradient in zip(used, made, strict=True):
                dz[i] = gradient
        return None, None, None, *dbias, *dz


class Send(torch.autograd.Function):
    """The gathered w [N] of layer i in the shape and dtype (None: its own) of its weight."""

    @staticmethod
    def forward(ctx, token, w: Tensor, exchange: Exchange, i: int, shape, dtype: torch.dtype | None):
        ctx.exchange, ctx.i = exchange, i
        ctx.set_materialize_grads(False)
        return w.view(shape) if dtype in (None, w.dtype) else w.to(dtype).view(shape)

    @staticmethod
    def backward(ctx, dw):
        if torch.is_grad_enabled():
            raise RuntimeError("a sharded generator cannot be differentiated twice (create_graph=True)")
        if dw is not None:
            ctx.exchange.put(ctx.i, dw.reshape(-1))
        return (None,) * 6


def exchanged(
    batch: Sequence[LinearGenerator], whole: Sequence[Tensor], dtype: torch.dtype | None, sends: bool
) -> list[Tensor]:
    """`whole`, L gathered weights [N], in the shapes of their layers and `dtype`, as parts of a graph."""
    exchange = Exchange(batch, sends)
    own = [w[g.shard.own] for g, w in zip(batch, whole, strict=True)]
    tokens = Receive.apply(exchange, batch, own, *exchange.biases, *(g.z for g in batch))
    tokens[0].grad_fn._set_sequence_nr(LAST)
    made = []
    for i, (g, token, w) in enumerate(zip(batch, tokens, whole, strict=True)):
        made.append(run_first(Send.apply(token, w, exchange, i, g.shapes[0], dtype)))
    return made
