"""What a training step sends, holds and takes on several ranks: python -m hyperfast.distributed.plan

For one rank of R, in bytes, with W the weights [N, K] of the generators that can be factored (linear ones,
heads of shared cores), b their biases, w [N] what they make, o all other trained parameters (embeddings, the
main network, other generators), all that is not trained and buffers f, and s for the bytes of the optimizer's
states of a parameter over its own (two moments of Adam or AdamW: 2):

  dense     sent        2 (R - 1) / R (W + b + o)
            parameters  W + b + o + f
            gradients   W + b + o
            states      s (W + b + o)
  factored  sent        2 (R - 1) / R (w + o)
            parameters  W + b + o + f
            gradients   w + o
            states      s (W + b + o)
  sharded   sent        2 (R - 1) / R (o + w')
            parameters  (W + b) / R + o + f
            gradients   w / R + o
            states      s ((W + b) / R + o)

w' is w with each layer's rows filled up to a multiple of 32 R. An all-reduce sends 2 (R - 1) / R of its
bytes; sharded, dw is reduce-scattered in the backward and w gathered in the forward, (R - 1) / R each. Not
counted: a few bytes for the norm, and the buffers that DDP broadcasts unless `broadcast_buffers=False`.

DDP's buckets hold all the gradients it sends a second time, unless they are views of them
(`gradient_as_bucket_view=True`). Of generated weights, factored holds w for the next step, sharded the own
rows of it and all of w'. That is what a rank holds between steps (`held`); in a step come activations and
(`passing`) w, sharded dw of w' bytes on its way (twice with gloo) instead.

Memory traffic is that of `hyperfast.analysis.generator_costs`: a factored weight moves 7 times, every other
trained parameter 13 times, w twice (once more sharded, into its message), and what goes through buckets 4
times more. The predicted time of a step is

    T / 3 + max(2/3 T, sent gradients / bandwidth) + traffic / memory bandwidth + sent weights / bandwidth

with T the forward and backward of the main network on one rank: gradients are sent while the backward, two
thirds of T, runs; generators, optimizer and the gathering of w come one after the other. Dense steps are
those of torch's fused AdamW: its default one takes longer.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast import states
from hyperfast.analysis.costs import DENSE, FACTORED, GENERATES, WRITTEN_AND_READ
from hyperfast.analysis.table import table
from hyperfast.distributed.rows import RowShard
from hyperfast.factored import Factors, is_stand_in
from hyperfast.nn.generator import factored_, generators
from hyperfast.optim.factored_optimizer import STORAGES

MOMENTS = 2  # of Adam and AdamW
THROUGH_BUCKET = 4  # a gradient is read into its bucket and back
COPIED = 2**28  # bytes of the copy that measures memory
STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"}


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank, the first of `ranks`, in a step; way: "dense", "factored" or "sharded".

    sent_gradients, sent_weights: through the network. parameters (with buffers), gradients, buckets, states,
    weights: held between steps. passing: what a step holds beyond that, activations apart. moved: memory
    traffic of generators and optimizer.
    """

    way: str
    ranks: int
    sent_gradients: int
    sent_weights: int
    parameters: int
    gradients: int
    buckets: int
    states: int
    weights: int
    passing: int
    moved: int

    @property
    def sent(self) -> int:
        return self.sent_gradients + self.sent_weights

    @property
    def held(self) -> int:
        return self.parameters + self.gradients + self.buckets + self.states + self.weights

    def seconds(self, bandwidth: float, memory_bandwidth: float, main: float = 0.0) -> float:
        """Predicted time of a step. bandwidth: bytes a second that a rank sends; memory_bandwidth: that it
        reads and writes; main: seconds of the main network's forward and backward."""
        overlapped = max(2 / 3 * main, self.sent_gradients / bandwidth)
        return main / 3 + overlapped + self.moved / memory_bandwidth + self.sent_weights / bandwidth


@dataclass(frozen=True)
class Layer:
    """A factored generator: its weight [N, K], what carries dw [N], whether that is a trained bias, and
    whether the optimizer makes its next weights."""

    weight: Tensor
    bias: Tensor
    has_bias: bool
    next_weights: bool

    @classmethod
    def of(cls, f: Factors) -> Layer:
        return cls(f.weight, f.bias, f.bias_is_trained, f.z_is_parameter)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias] if self.has_bias else [self.weight]


def plans(
    model: nn.Module,
    ranks: int,
    state_dtype: torch.dtype | str | None = None,
    gradient_as_bucket_view: bool = False,
) -> tuple[Plan, Plan, Plan]:
    """Dense, factored and sharded training of `model` on `ranks` ranks; nothing is run, `model` may be on the
    meta device and stays as it is. On one rank there is no DDP.

    state_dtype: of `hyperfast.optim`, for factored and sharded generators. gradient_as_bucket_view: DDP's.
    Raises ValueError for less than one rank, a sharded model, and generators that factored mode refuses.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if any(getattr(g, "shard", None) is not None for _, g in generators(model)):
        raise ValueError("plan a model before it is sharded: this one has the rows of one rank")
    if state_dtype not in STORAGES:
        raise ValueError(f"state_dtype must be None, torch.bfloat16 or '8bit', got {state_dtype!r}")
    model = factored_(_skeleton(model))
    layers = {id(f.weight): Layer.of(f) for _, g in generators(model) for f in g.factors()}
    of_layers = {id(p) for layer in layers.values() for p in (layer.weight, layer.bias)}
    others = [p for p in model.parameters() if id(p) not in of_layers and not is_stand_in(p)]
    buffers = sum(b.nbytes for b in model.buffers())
    step = _Step(
        list(layers.values()), others, buffers, ranks, STORAGES[state_dtype], gradient_as_bucket_view
    )
    return step.dense(), step.factored(), step.sharded()


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy without values."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class _Step:
    """layers: factored or not; others: all other parameters; buffers: bytes."""

    layers: Sequence[Layer]
    others: Sequence[Tensor]
    buffers: int
    ranks: int
    storage: str
    bucket_view: bool

    def dense(self) -> Plan:
        trained = _bytes(filter(_is_trained, (p for layer in self.layers for p in layer.parameters)))
        trained += self._others()
        w = sum(layer.bias.nbytes for layer in self.layers)
        buckets = self._buckets(trained)
        return Plan(
            "dense",
            self.ranks,
            sent_gradients=self._all_reduced(trained),
            sent_weights=0,
            parameters=self._whole_parameters(),
            gradients=trained,
            buckets=buckets,
            states=MOMENTS * trained,
            weights=0,
            passing=w,
            moved=DENSE * trained + WRITTEN_AND_READ * w + THROUGH_BUCKET * buckets,
        )

    def factored(self) -> Plan:
        gradients = (
            sum(layer.bias.nbytes for layer in self.layers if _is_trained(layer.bias)) + self._others()
        )
        w = sum(layer.bias.nbytes for layer in self.layers)
        buckets = self._buckets(gradients)
        return Plan(
            "factored",
            self.ranks,
            sent_gradients=self._all_reduced(gradients),
            sent_weights=0,
            parameters=self._whole_parameters() + _bytes(la.bias for la in self.layers if not la.has_bias),
            gradients=gradients,
            buckets=buckets,
            states=self._states(1) + MOMENTS * self._others(),
            weights=sum(layer.bias.nbytes for layer in self.layers if _is_trained(layer.weight)),
            passing=w,
            moved=self._moved(1) + WRITTEN_AND_READ * w + THROUGH_BUCKET * buckets,
        )

    def sharded(self) -> Plan:
        others, padded = self._others(), sum(self.ranks * self._chunk(layer) for layer in self.layers)
        sent = padded * (self.ranks - 1) // self.ranks
        own = [self._own(layer.bias) for layer in self.layers]
        gradients = (
            sum(n for n, layer in zip(own, self.layers, strict=True) if _is_trained(layer.bias)) + others
        )
        buckets = self._buckets(others)
        next_weights = sum(n for n, la in zip(own, self.layers, strict=True) if _is_trained(la.weight))
        return Plan(
            "sharded",
            self.ranks,
            sent_gradients=self._all_reduced(others) + sent,
            sent_weights=sent,
            parameters=sum(self._own(layer.weight) for layer in self.layers)
            + sum(own)
            + _bytes(self.others)
            + self.buffers,
            gradients=gradients,
            buckets=buckets,
            states=self._states(self.ranks) + MOMENTS * others,
            weights=next_weights + padded,
            passing=padded,
            moved=self._moved(self.ranks) + (WRITTEN_AND_READ + 1) * padded + THROUGH_BUCKET * buckets,
        )

    def _rows(self, t: Tensor, ranks: int) -> int:
        """Of the first of `ranks`."""
        return RowShard(len(t), 0, ranks).stop

    def _own(self, t: Tensor) -> int:
        return self._rows(t, self.ranks) * t[:1].nbytes

    def _chunk(self, layer: Layer) -> int:
        """Bytes of w that one rank sends: its rows, filled up."""
        return RowShard(len(layer.bias), 0, self.ranks).chunk * layer.bias.element_size()

    def _others(self) -> int:
        return _bytes(filter(_is_trained, self.others))

    def _whole_parameters(self) -> int:
        return (
            _bytes(p for layer in self.layers for p in layer.parameters) + _bytes(self.others) + self.buffers
        )

    def _all_reduced(self, nbytes: int) -> int:
        return 2 * (self.ranks - 1) * nbytes // self.ranks

    def _buckets(self, nbytes: int) -> int:
        return 0 if self.bucket_view or self.ranks == 1 else nbytes

    def _states(self, ranks: int) -> int:
        """Of the rows of one of `ranks`, of weights and biases."""
        total = 0
        for p in (p for layer in self.layers for p in layer.parameters if _is_trained(p)):
            shape = (self._rows(p, ranks), *p.shape[1:])
            total += MOMENTS * _state_bytes(torch.empty(shape, dtype=p.dtype, device="meta"), self.storage)
        return total

    def _moved(self, ranks: int) -> int:
        """By the update of the rows of one of `ranks`, and of all others."""
        total = DENSE * self._others()
        for layer in self.layers:
            share = self._rows(layer.weight, ranks) / max(1, len(layer.weight))
            times = FACTORED if layer.next_weights else GENERATES
            total += share * (times * layer.weight.nbytes + DENSE * layer.bias.nbytes)
        return round(total)


def _is_trained(p: Tensor) -> bool:
    return p.requires_grad


def _bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _state_bytes(like: Tensor, storage: str) -> int:
    state = states.zeros(like, storage)
    return state.codes.nbytes + state.scales.nbytes if storage == "8bit" else state.nbytes


def memory_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes here, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.ones(COPIED // 4, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / min(seconds[1:])


def load(name: str) -> nn.Module:
    """The model `name` of `train.models`, or what `package.module:callable` makes: on the meta device, or for
    real where its initialisation computes with values.

    Raises ValueError for what is not there, TypeError where the callable makes something else.
    """
    module, _, attribute = name.partition(":")
    build = _imported(module, attribute) if attribute else _named(name)
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):
        model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} made a {type(model).__name__}, wanted a torch.nn.Module")
    return model


def _imported(module: str, attribute: str) -> Callable[[], nn.Module]:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"cannot import {module}: {error}") from None
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"{module} has no callable {attribute!r}")
    return getattr(found, attribute)


def _named(name: str) -> Callable[[], nn.Module]:
    try:
        models = importlib.import_module("train.models")
    except ImportError as error:
        raise ValueError(
            f"the models of the training commands, {name!r}, cannot be imported: {error}; run from the "
            "repository's root, or name your own as package.module:callable"
        ) from None
    return lambda: models.build_model(name)


LEGEND = """MB are 10^6 bytes. sent: through the network; held: between steps; passing: what a step holds
beyond that, activations apart. step: predicted, its formula in hyperfast/distributed/plan.py."""


def rows(
    made: Sequence[Plan], bandwidth: float, memory: float, main: float
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; MB are 10^6 bytes."""
    header = ["way", "ranks", "sent, MB", "sent: gradients", "sent: weights", "held, MB"]
    header += [f"held: {what}" for what in ("parameters", "gradients", "buckets", "states", "weights")]
    header += ["passing", "step, ms"]
    lines = []
    for p in made:
        sent = (p.sent, p.sent_gradients, p.sent_weights)
        held = (p.held, p.parameters, p.gradients, p.buckets, p.states, p.weights, p.passing)
        cells = [f"{n / 1e6:,.2f}" if n else "" for n in (*sent, *held)]
        seconds = p.seconds(bandwidth, memory, main)
        lines.append([p.way, str(p.ranks), *cells, f"{1e3 * seconds:,.2f}"])
    return header, lines


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m hyperfast.distributed.plan",
        description="Bytes sent, memory and predicted time of a training step with AdamW on one rank: dense "
        "generators, factored ones, sharded ones. The formulas: hyperfast/distributed/plan.py.",
    )
    p.add_argument(
        "--model", required=True,
        help="a name in train/models (full, ...; a wrong one lists all), or package.module:callable",
    )  # fmt: skip
    p.add_argument(
        "--ranks", type=int, nargs="+", required=True, help="number of processes; several: a table"
    )
    p.add_argument(
        "--bandwidth", type=_positive, required=True,
        help="bytes, not bits, a second that one rank can send: 50e9 for 400 Gbit/s",
    )  # fmt: skip
    p.add_argument(
        "--memory-bandwidth",
        type=_positive,
        help="of a rank, bytes a second (default: a copy here, measured)",
    )
    p.add_argument(
        "--main", type=_positive, default=0.0, metavar="SECONDS",
        help="forward and backward of the main network on one rank (default: 0, the time of the rest alone)",
    )  # fmt: skip
    p.add_argument("--state-dtype", choices=STATE_DTYPES, default="fp32", help="of factored generators")
    p.add_argument("--gradient-as-bucket-view", action="store_true", help="DDP's option: no second copy")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        model = load(args.model)
        options = STATE_DTYPES[args.state_dtype], args.gradient_as_bucket_view
        made = [p for ranks in args.ranks for p in plans(model, ranks, *options)]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    memory = args.memory_bandwidth or memory_bandwidth()
    header, lines = rows(made, args.bandwidth, memory, args.main)
    rates = f"network {args.bandwidth / 1e9:g} GB/s, memory {memory / 1e9:.3g} GB/s"
    print(f"{args.model}: one rank, a step; {rates}, main network {1e3 * args.main:g} ms\n")
    print(table(header, lines))
    print(f"\n{LEGEND}")


if __name__ == "__main__":
    main()
