"""`lstm`: one layer of an LSTM over a whole sequence, with layer normalisation, recurrent dropout and a hyper
LSTM if wanted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import (
    _DTYPES,
    _cpu,
    _cuda,
    address,
    check_backend,
    check_dense,
    dtype_name,
    engine,
    has_tangent,
    is_transformed,
    library,
    needs_function,
    no_autocast,
    triton_kernels,
)
from hyperfast.reference import HyperCell, LSTMState, Norms

# state: h, c, hyper_h, hyper_c, the last two None without a hyper LSTM. weights: weight_ih, weight_hh, bias,
# the hyper LSTM's, z_weight, z_bias, d_weight, norms (4), hyper norms (4), None where there is none. Returns
# h, c, hyper_h, hyper_c of every row, the last of each sequence, and what else the backward reads: h_gates
# [N, 4H] = h_{t-1} weight_hh^T and hyper_gates [N, 4M], the hyper LSTM's gates before normalisation. What
# there is none of is empty, and without `keep` all rows but those of h.
library.define(
    "lstm(Tensor x, Tensor?[] state, Tensor?[] weights, Tensor? batch_sizes, Tensor? key, float dropout, "
    "float eps, bool keep) -> Tensor[]"
)
# grads: of h of every row and of the last h, c, hyper_h, hyper_c; None is zero. kept: h, c, hyper_h,
# hyper_c, h_gates, hyper_gates of the forward. needed: whether x and the weights need a gradient; those that
# are products over all rows are empty where not. Returns the gradients of x, state and weights.
library.define(
    "lstm_backward(Tensor?[] grads, Tensor x, Tensor?[] state, Tensor?[] weights, Tensor[] kept, "
    "Tensor? batch_sizes, Tensor? key, float dropout, float eps, bool[] needed) -> Tensor[]"
)


_NONE = (None,) * 4
_PRODUCTS = (0, 1, 3, 4, 5, 6, 7)  # the weights whose gradients are products, or sums, over all rows
# Rows that the CPU takes at once: enough for the products of all of them to run at the rate of large ones. B
# 32, H 512: with 256, 768, 1280, 2048, 3200 rows of 3200 a step takes 1.80, 1.75, 1.78, 1.78, 1.81 ms and 67,
# 77, 87, 101, 123 MiB.
CPU_ROWS = 1024


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What c, norms and their gradients are held in, and the reference computes in."""
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def _flat(weight_ih, weight_hh, bias, norms: Norms | None, hyper: HyperCell | None) -> list:
    """The weights as the ops take them."""
    of_hyper = (None,) * 6 if hyper is None else hyper[:6]
    return [weight_ih, weight_hh, bias, *of_hyper, *(norms or _NONE), *(hyper and hyper.norms or _NONE)]


def _structured(weights: Sequence[Tensor | None]) -> tuple:
    """weight_ih, weight_hh, bias, norms and hyper as `reference.lstm` takes them."""
    norms, hyper_norms = (None if n[0] is None else Norms(*n) for n in (weights[9:13], weights[13:]))
    hyper = None if weights[3] is None else HyperCell(*weights[3:9], hyper_norms)
    return *weights[:3], norms, hyper


def _in_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """x, state and weights in `dtype`, but c and norms at least in float32."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    kinds = [wide if i in (2, 4) or i >= 14 else dtype for i in range(len(tensors))]
    return [None if t is None else t.to(kind) for t, kind in zip(tensors, kinds, strict=True)]


def _expression(tensors: Sequence[Tensor | None], batch_sizes, key, dropout, eps) -> list[Tensor]:
    """h of every row and the last state by the reference, of x, state and weights; half precision in
    float32, and h rounded."""
    x, *rest = _in_dtype(tensors, _compute_dtype(tensors[0]))
    with no_autocast([x]):
        output, last = reference.lstm(
            x, LSTMState(*rest[:4]), *_structured(rest[4:]), batch_sizes, key, dropout, eps
        )
    made = zip((output, *last), (tensors[1], *tensors[1:5]), strict=True)
    return [m.to(like.dtype) for m, like in made if m is not None]


def _differentiable_backward(tensors, given: tuple, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of `_expression`, which can be differentiated again; None where none is needed."""
    # views: a tensor may be among them twice, or be made of another
    leaves = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]
    used = [(o, d) for o, d in zip(_expression(leaves, *given), grads, strict=True) if d is not None]
    made: list[Tensor | None] = [None] * len(leaves)
    if not used:
        return made
    outputs, grads = zip(*used, strict=True)
    inputs = [leaves[i] for i in wanted]
    found = torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True)
    for i, gradient in zip(wanted, found, strict=True):
        made[i] = gradient
    return made


# ---- the rows of a sequence


def _step_sizes(batch_sizes: Tensor | None, N: int, B: int) -> list[int]:
    """How many rows each step has, and they are checked: ValueError unless they fall from B, are positive and
    sum to N."""
    if batch_sizes is None:
        return [B] * (N // B if B else 0)
    sizes = batch_sizes.tolist()
    falling = all(a >= b for a, b in itertools.pairwise(sizes))
    if not falling or sum(sizes) != N or (sizes and (sizes[0] != B or sizes[-1] < 1)):
        shown = f"{sizes[:8]}".replace("]", ", ...]") if len(sizes) > 8 else f"{sizes}"
        raise ValueError(
            f"batch_sizes must be positive, never rise, begin with the {B} sequences of the state and sum to "
            f"the {N} rows of x, got {shown}, sum {sum(sizes)}"
        )
    return sizes


def _starts(sizes: Sequence[int]) -> list[int]:
    """The first row of each step."""
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


def _last_rows(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where the last rows of the sequences lie, in their order: from, to."""
    ended = 0
    for size, start in zip(reversed(sizes), reversed(_starts(sizes)), strict=True):
        if size > ended:
            yield start + ended, start + size
            ended = size


class _Chunk(NamedTuple):
    """Steps that a kernel takes at once: their sizes, the first of their rows and the one after the last;
    before: the first row of the step before, -1 where there is none."""

    steps: list[int]
    start: int
    stop: int
    before: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def _chunks(steps: Sequence[int], most: int) -> list[_Chunk]:
    """All steps, in chunks of at most `most` rows, or of one step."""
    chunks: list[_Chunk] = []
    last = -1  # first row of the step before
    for start, size in zip(_starts(steps), steps, strict=True):
        if chunks and start + size - chunks[-1].start <= most:
            chunks[-1].steps.append(size)
            chunks[-1] = chunks[-1]._replace(stop=start + size)
        else:
            chunks.append(_Chunk([size], start, start + size, last))
        last = start
    return chunks


def _before(chunk: _Chunk, first: Tensor, rows: Tensor) -> list[tuple[slice, Tensor]]:
    """What each row of a chunk goes on from, among `rows` of all steps or, in the first step, `first`: which
    of the chunk's rows, and theirs. One range where every step has as many rows."""
    starts = [chunk.before, *(chunk.start + s for s in _starts(chunk.steps))][: len(chunk.steps)]
    ranges: list[tuple[int, int]] = []
    for start, size in zip(starts, chunk.steps, strict=True):
        if start >= 0:
            begin = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
            ranges.append((begin, start + size))
    parts = [rows[begin:end] for begin, end in ranges]
    after = chunk.steps[0] if chunk.before < 0 else 0  # rows of the first step
    made = [(slice(after), first[:after])] if after else []
    if parts:
        made.append((slice(after, None), parts[0] if len(parts) == 1 else torch.cat(parts)))
    return made


# ---- the engines: kernels for a chunk. They take the call, (T, N, B, H, M, Z) of the chunk, its step sizes
# int64 [T] on the CPU, the number of its first row, which dropout counts, and tensors, contiguous, None for
# what there is none of.
# Forward: x_gates = x weight_ih^T, hyper_x_gates with its bias, the state before (4); to be written h, c,
# hyper_h, hyper_c, h_gates, hyper_gates, the last two None if not kept.
# Backward: x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z [N, 12Z], the gradients of h and of the
# last h, c, hyper_h, hyper_c; to be written those of x_gates, h_gates (None without hyper: x_gates'),
# hyper_gates, z, the state before (4), which may be those of the last, bias, d_weight, norms (4), hyper norms
# (4). On the CPU hyper_gates may be hyper_x_gates and the gradient of x_gates may be x_gates.


class _Call:
    """What the chunks of a forward or backward have in common. sizes: (T, N, B, H, M, Z) of all; weights:
    weight_hh, bias, hyper_weight_xh, hyper_weight_hh, z_weight, z_bias, d_weight, norms (4), hyper norms (4);
    of_x: weight_ih, and what the hyper LSTM has for x, [4M, I] and [4M]."""

    def __init__(self, x, state, weights, steps, key, dropout, eps, backward: bool, whole: bool):
        I = x.shape[1]
        M, Z = (0, 0) if weights[8] is None else (weights[4].shape[1], weights[8].shape[2])
        self.sizes = len(steps), len(x), *state[0].shape, M, Z
        weight_x = weight_xh = None
        if M:
            weight_x, weight_xh = weights[3][:, :I], weights[3][:, I:].contiguous()
        self.of_x = weights[0], weight_x, weights[5]
        self.weights = [weights[1], weights[2], weight_xh, weights[4], *weights[6:]]
        self.key, self.dropout, self.eps = key if dropout else None, dropout, eps
        self.engine = _engine(x, self.sizes, torch.tensor(steps, dtype=torch.int64), backward)
        self.in_place = self.engine == "cpu"  # on a GPU a late warp could read what another had written
        self.memory: list[Tensor | None] = [None] * 3
        most = len(x)  # rows of a chunk
        if self.engine == "cpu":
            most = CPU_ROWS
            self._pack(x, backward, whole)
        elif self.engine == "triton":
            most = triton_kernels("lstm").most_rows(self.sizes, x.dtype)
        self.chunks = _chunks(steps, most)
        self.most = max((c.stop - c.start for c in self.chunks), default=0)

    def _pack(self, x: Tensor, backward: bool, whole: bool) -> None:
        """The CPU kernels' scratch, and the weights as they multiply by them. whole: the gates are kept, or
        there are norms."""
        options = dtype_name(x), torch.get_num_threads()
        counts = _cpu.lstm_memory(self.sizes, backward, whole, *options)
        self.memory = [x.new_empty(n, dtype=torch.uint8) if n else None for n in counts]
        addresses = _addresses(self.memory)
        _cpu.lstm_pack(self.sizes, _addresses(self.weights), backward, addresses, *options)

    def of_chunk(self, chunk: _Chunk) -> tuple[tuple[int, ...], Tensor, int]:
        """Its sizes, step sizes and first row, as engines take them."""
        sizes = len(chunk.steps), chunk.stop - chunk.start, chunk.steps[0], *self.sizes[3:]
        return sizes, torch.tensor(chunk.steps, dtype=torch.int64), chunk.start


def _engine(x: Tensor, sizes: Sequence[int], step_sizes: Tensor, backward: bool) -> str:
    """Which kernels serve. On a GPU Triton's; the persistent CUDA kernel, for weights that fit on chip, runs
    where HYPERFAST_ENGINE asks for it until a measurement says where it wins (csrc/cuda/lstm.cu predicts: up
    to 32 rows and 512 units in float32). The CPU's take no half precision: `lstm` widens it."""
    if not x.numel():
        return "reference"
    name = engine(x, cuda="lstm")
    if name == "cuda":
        with torch.cuda.device(x.device):
            refused = _cuda.lstm_refuses(sizes, step_sizes.data_ptr(), dtype_name(x), backward)
        return "reference" if refused else name
    return "reference" if name == "cpu" and x.dtype.itemsize == 2 else name


def _widened(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(_compute_dtype(t)) for t in tensors]


def _reference_weights(weights: Sequence[Tensor | None]) -> tuple:
    """weight_hh, bias, norms and hyper, whose input is h alone, for `reference.lstm_steps`."""
    hh, bias, xh, hyper_hh, z_weight, z_bias, d_weight, *norms = _widened(weights)
    return _structured([None, hh, bias, xh, hyper_hh, None, z_weight, z_bias, d_weight, *norms])[1:]


def _forward_reference(call: _Call, sizes, step_sizes, first_row, tensors) -> None:
    x_gates, hyper_x_gates, *state = _widened(tensors[:6])
    *states, h_gates, hyper_gates = tensors[6:]
    weight_hh, bias, norms, hyper = _reference_weights(call.weights)
    now, start = LSTMState(*state), 0
    for size in step_sizes.tolist():
        rows = slice(start, start + size)
        now = reference.map_state(now, lambda s, size=size: s[:size])
        if h_gates is not None:
            h_gates[rows] = now.h @ weight_hh.mT
        hyper_x = None if hyper is None else hyper_x_gates[rows]
        if hyper_gates is not None:
            made = torch.addmm(hyper_x, now.h, hyper.weight_ih.mT) + now.hyper_h @ hyper.weight_hh.mT
        numbers = torch.arange(first_row + start, first_row + start + size, device=x_gates.device)
        options = hyper, numbers, call.key, call.dropout, call.eps
        now = reference.lstm_step(x_gates[rows], hyper_x, now, weight_hh, bias, norms, *options)
        if hyper_gates is not None:
            hyper_gates[rows] = made
        for made, s in zip(states, now, strict=True):
            if s is not None:
                made[rows] = s
        start += size


def _backward_reference(call: _Call, sizes, step_sizes, first_row, inputs, outputs) -> None:
    assert not first_row  # all rows are one chunk
    *inputs, dh, dh_last, dc_last, dhyper_h_last, dhyper_c_last = _widened(inputs)
    _, N, B, H, M, _ = sizes
    shapes = (N, H), (B, H), (B, H), *([(B, M), (B, M)] if M else [])
    grads = dh, dh_last, dc_last, dhyper_h_last, dhyper_c_last
    dh, *dlast = (
        inputs[0].new_zeros(shape) if d is None else d for d, shape in zip(grads, shapes, strict=False)
    )
    options = *_reference_weights(call.weights), call.key, call.dropout, call.eps
    made = reference.lstm_backward(step_sizes, *options, *inputs, dh, LSTMState(*dlast))
    parts = (
        made.x_gates, made.h_gates, made.hyper_gates, made.z, *made.state, made.bias, made.d_weight,
        *(made.norms or _NONE), *(made.hyper_norms or _NONE),
    )  # fmt: skip
    for output, part in zip(outputs, parts, strict=True):
        if output is not None:
            output.copy_(part)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [address(t) for t in tensors]


def _run_cpu(kernel: Callable, call: _Call, sizes, step_sizes, first_row, *tensors) -> None:
    given = _addresses(call.weights), _addresses(call.memory), address(call.key)
    numbers = call.dropout, first_row, call.eps
    options = *map(_addresses, tensors), dtype_name(tensors[0][0]), torch.get_num_threads()
    kernel(sizes, step_sizes.data_ptr(), *given, *numbers, *options)


def _run_cuda(kernel: Callable, backward: bool, call: _Call, sizes, step_sizes, first_row, *tensors) -> None:
    assert not first_row  # all rows are one chunk
    x_gates = tensors[0][0]
    dtype, steps = dtype_name(x_gates), step_sizes.data_ptr()
    with torch.cuda.device(x_gates.device):
        floats = _cuda.lstm_scratch(sizes, steps, dtype, backward)
        scratch = x_gates.new_empty(floats, dtype=torch.float32)
        given = _addresses(call.weights), address(call.key), call.dropout, call.eps
        last = scratch.data_ptr(), dtype, torch.cuda.current_stream().cuda_stream
        kernel(sizes, steps, *given, *map(_addresses, tensors), *last)


def _run_triton(name: str, call: _Call, sizes, step_sizes, first_row, *tensors) -> None:
    run = getattr(triton_kernels("lstm"), name)
    run(sizes, step_sizes, call.weights, call.key, call.dropout, first_row, call.eps, *tensors)


_FORWARD = {
    "reference": _forward_reference,
    "cpu": lambda *arguments: _run_cpu(_cpu.lstm, *arguments),
    "triton": lambda *arguments: _run_triton("run", *arguments),
    "cuda": lambda *arguments: _run_cuda(_cuda.lstm, False, *arguments),
}
_BACKWARD = {
    "reference": _backward_reference,
    "cpu": lambda *arguments: _run_cpu(_cpu.lstm_backward, *arguments),
    "triton": lambda *arguments: _run_triton("run_backward", *arguments),
    "cuda": lambda *arguments: _run_cuda(_cuda.lstm_backward, True, *arguments),
}


# ---- the ops


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Optional tensors come as they are: what is lazily negated in them is for the op to negate."""
    return [None if t is None else t.contiguous().resolve_neg() for t in tensors]


def _rows_of(tensors: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def _input_gates(call: _Call, x: Tensor, x_gates: Tensor, hyper_x_gates: Tensor | None) -> None:
    """Writes what x [n, I] gives the gates, of the hyper LSTM where it is wanted."""
    weight_ih, weight_x, hyper_bias = call.of_x
    torch.mm(x, weight_ih.t(), out=x_gates)
    if hyper_x_gates is not None:
        torch.addmm(hyper_bias, x, weight_x.t(), out=hyper_x_gates)


@torch.library.impl(library, "lstm", "CompositeExplicitAutograd")
def _forward(x, state, weights, batch_sizes, key, dropout, eps, keep) -> list[Tensor]:
    made = _forward_fake(x, state, weights, batch_sizes, key, dropout, eps, keep)
    x, key, *state = _contiguous((x, key, *state))
    weights = _contiguous(weights)
    steps = _step_sizes(batch_sizes, len(x), len(state[0]))
    with no_autocast([x]):
        call = _Call(x, state, weights, steps, key, dropout, eps, False, keep)
        last = [None if s is None else t for t, s in zip(made[4:8], state, strict=True)]
        for t, s in zip(last, state, strict=True):
            if t is not None:
                t.copy_(s)
        # a buffer serves all chunks for what is not kept
        H, M = call.sizes[3:5]
        buffers = [None if s is None else s.new_empty(call.most, s.shape[1]) for s in state[1:] if not keep]
        in_kept = keep and call.in_place
        x_gates, hyper_x_gates = x.new_empty(call.most, 4 * H), made[9]
        if M and not in_kept:
            hyper_x_gates = x.new_empty(call.most, 4 * M)
        kept = [made[8], made[9] if M else None] if keep else [None, None]
        for chunk in call.chunks:
            first = slice(chunk.stop - chunk.start)
            of_hyper = hyper_x_gates[chunk.rows if in_kept else first] if M else None
            _input_gates(call, x[chunk.rows], x_gates[first], of_hyper)
            before = _rows_of(last, slice(chunk.steps[0]))
            others = made[1:4] if keep else buffers
            others = [None if s is None else t for t, s in zip(others, state[1:], strict=True)]
            rows = [made[0][chunk.rows], *_rows_of(others, chunk.rows if keep else first)]
            tensors = [x_gates[first], of_hyper, *before, *rows, *_rows_of(kept, chunk.rows)]
            _FORWARD[call.engine](call, *call.of_chunk(chunk), tensors)
            for t, s in zip(before, rows, strict=True):
                if t is not None:
                    torch.cat([s[start:end] for start, end in _last_rows(chunk.steps)], out=t)
    return made


@torch.library.register_fake("hyperfast::lstm", lib=library)
def _forward_fake(x, state, weights, batch_sizes, key, dropout, eps, keep) -> list[Tensor]:
    N, H = len(x), state[0].shape[1]
    rows = [x.new_empty(0) if s is None or i and not keep else s.new_empty(N, s.shape[1])
            for i, s in enumerate(state)]  # fmt: skip
    last = [x.new_empty(0) if s is None else s.new_empty(s.shape) for s in state]
    h_gates = x.new_empty((N, 4 * H) if keep else 0)
    hyper_gates = x.new_empty((N, 4 * state[2].shape[1]) if keep and state[2] is not None else 0)
    return [*rows, *last, h_gates, hyper_gates]


@torch.library.impl(library, "lstm_backward", "CompositeExplicitAutograd")
def _backward(grads, x, state, weights, kept, batch_sizes, key, dropout, eps, needed) -> list[Tensor]:
    made = _backward_fake(grads, x, state, weights, kept, batch_sizes, key, dropout, eps, needed)
    x, key, *state = _contiguous((x, key, *state))
    weights, kept, grads = map(_contiguous, (weights, kept, grads))
    steps = _step_sizes(batch_sizes, len(x), len(state[0]))
    with no_autocast([x]):
        call = _Call(x, state, weights, steps, key, dropout, eps, True, weights[9] is not None)
        _Backward(call, grads, x, state, weights, kept, made, needed).run()
    return made


class _Backward:
    """The backward of a call, from the last chunk to the first."""

    def __init__(self, call: _Call, grads, x, state, weights, kept, made, needed):
        self.call, self.x, self.state, self.weights = call, x, state, weights
        hyper = call.sizes[4] > 0
        self.h, self.c, *rest = kept
        self.hyper_h, self.hyper_c, self.h_gates, self.hyper_gates = (
            t if hyper or i == 2 else None for i, t in enumerate(rest)
        )
        self.dh, *dlast = grads
        dx, *rest = made
        self.dx = dx if needed[0] else None
        self.dstate = [None if s is None else d for d, s in zip(rest[:4], state, strict=True)]
        for d, last in zip(self.dstate, dlast, strict=True):
            if d is not None:
                d.zero_() if last is None else d.copy_(last)
        found = [None if w is None else d for d, w in zip(rest[4:], weights, strict=True)]
        self.sums = [found[2], *found[8:]]  # of what the kernels sum up: bias, d_weight, norms
        self.products = [d if i in _PRODUCTS and needed[1 + i] else None for i, d in enumerate(found)]
        # half precision is added up in float32
        self.several = len(call.chunks) > 1
        self.results = [*self.sums, *self.products]
        if self.several:
            self.sums, self.products = _widened(self.sums), _widened(self.products)
        n, H, M, Z = call.most, *call.sizes[3:]
        self.x_gates = x.new_empty(n, 4 * H)
        self.dx_gates = self.x_gates if call.in_place else torch.empty_like(self.x_gates)
        self.parts = [None if t is None else torch.empty_like(t) for t in self.results[: len(self.sums)]]
        self.z = self.dz = self.dh_gates = self.dhyper_gates = None
        if hyper:
            self.dh_gates, self.dhyper_gates = torch.empty_like(self.x_gates), x.new_empty(n, 4 * M)
            self.z, self.dz = x.new_empty(2, n, 12 * Z)

    def run(self) -> None:
        for chunk in reversed(self.call.chunks):
            last = chunk is self.call.chunks[-1]
            self._run_chunk(chunk)
            for total, part in zip(self.sums, self.parts, strict=True):
                if total is not None:
                    total.copy_(part) if last else total.add_(part)
            self._add_products(chunk, last)
        if not self.call.chunks:
            for t in self.results:
                if t is not None:
                    t.zero_()
        elif self.several:
            for t, total in zip(self.results, [*self.sums, *self.products], strict=True):
                if t is not None and t is not total:
                    t.copy_(total)

    def _run_chunk(self, chunk: _Chunk) -> None:
        call, (B, n) = self.call, (chunk.steps[0], chunk.stop - chunk.start)
        x_gates, dh_gates, dhyper_gates, z, dz = _rows_of(
            [self.x_gates, self.dh_gates, self.dhyper_gates, self.z, self.dz], slice(n)
        )
        _input_gates(call, self.x[chunk.rows], x_gates, None)
        rows = self.c, self.hyper_c, self.h_gates, self.hyper_gates
        c, hyper_c, h_gates, hyper_gates = _rows_of(rows, chunk.rows)
        before = (self.state[1], self.state[3]) if chunk.before < 0 else (self.c, self.hyper_c)
        first = max(chunk.before, 0)
        c0, hyper_c0 = _rows_of(before, slice(first, first + B))
        if z is not None:
            torch.addmm(self.weights[7], self.hyper_h[chunk.rows], self.weights[6].t(), out=z)
        dh = None if self.dh is None else self.dh[chunk.rows]
        dstate = _rows_of(self.dstate, slice(B))
        inputs = [x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z, dh, *dstate]
        outputs = [self.dx_gates[:n], dh_gates, dhyper_gates, dz, *dstate, *self.parts]
        _BACKWARD[call.engine](call, *call.of_chunk(chunk), inputs, outputs)

    def _add_products(self, chunk: _Chunk, first: bool) -> None:
        """Adds a chunk's part of the gradients that are products over all rows, and writes that of x."""
        n, I, x = slice(chunk.stop - chunk.start), self.x.shape[1], self.x[chunk.rows]
        weight_ih, weight_hh, _, *of_hyper = self.products[:8]
        dx_gates, dhyper_gates, dz = _rows_of([self.dx_gates, self.dhyper_gates, self.dz], n)
        dgates = dx_gates if self.dh_gates is None else self.dh_gates[n]
        before_h = _before(chunk, self.state[0], self.h)
        _add_product(weight_ih, dx_gates, [(slice(None), x)], first)
        _add_product(weight_hh, dgates, before_h, first)
        if self.dx is not None:
            torch.mm(dx_gates, self.call.of_x[0], out=self.dx[chunk.rows])
        if dz is None:
            return
        hyper_weight_ih, hyper_weight_hh, hyper_bias, z_weight, z_bias = of_hyper
        if hyper_weight_ih is not None:
            _add_product(hyper_weight_ih[:, :I], dhyper_gates, [(slice(None), x)], first)
            _add_product(hyper_weight_ih[:, I:], dhyper_gates, before_h, first)
        if hyper_weight_hh is not None:
            before = _before(chunk, self.state[2], self.hyper_h)
            _add_product(hyper_weight_hh, dhyper_gates, before, first)
        _add_product(z_weight, dz, [(slice(None), self.hyper_h[chunk.rows])], first)
        _add_sum(hyper_bias, dhyper_gates, first)
        _add_sum(z_bias, dz, first)
        if self.dx is not None:
            self.dx[chunk.rows].addmm_(dhyper_gates, self.call.of_x[1])


def _add_product(total: Tensor | None, d: Tensor, before: list[tuple[slice, Tensor]], first: bool) -> None:
    """Adds d^T times what its rows go with to `total`, if it is wanted; to nothing with `first`."""
    for rows, other in before if total is not None else ():
        if total.dtype == d.dtype:
            torch.addmm(total, d[rows].t(), other, beta=0 if first else 1, out=total)
        else:
            part = d[rows].t() @ other
            total.copy_(part) if first else total.add_(part)
        first = False


def _add_sum(total: Tensor | None, d: Tensor, first: bool) -> None:
    """Likewise the sum of d's rows."""
    if total is not None:
        part = d.sum(0, dtype=total.dtype)
        total.copy_(part) if first else total.add_(part)


@torch.library.register_fake("hyperfast::lstm_backward", lib=library)
def _backward_fake(grads, x, state, weights, kept, batch_sizes, key, dropout, eps, needed) -> list[Tensor]:
    wanted = [w if needed[1 + i] or i not in _PRODUCTS else None for i, w in enumerate(weights)]
    tensors = [x if needed[0] else None, *state, *wanted]
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


class LSTMFunction(torch.autograd.Function):
    """h of every row, then the last h, c (and hyper_h, hyper_c), differentiable in all tensors.

    tensors: x, state (4) and weights (17) as the ops take them. Saved for each row, without and with a hyper
    LSTM: x, h, c, h_gates, I + 6 H numbers; hyper_h, hyper_c and hyper_gates, 6 M. The rest is computed
    again.

    No setup_context, as in `batch_norm_relu_max_pool`: under torch.func, and in forward mode, the reference
    runs.
    """

    @staticmethod
    def forward(ctx, batch_sizes, key, dropout: float, eps: float, *tensors):
        x, *rest = tensors
        made = torch.ops.hyperfast.lstm(x, rest[:4], rest[4:], batch_sizes, key, dropout, eps, True)
        ctx.dropout, ctx.eps = dropout, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, key, *tensors, *made[:4], *made[8:])
        return made[0], *(m for m, s in zip(made[4:8], rest[:4], strict=True) if s is not None)

    @staticmethod
    def backward(ctx, *grads):
        batch_sizes, key, *saved = ctx.saved_tensors
        tensors, kept = saved[:-6], saved[-6:]
        given, needed = (batch_sizes, key, ctx.dropout, ctx.eps), ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # differentiable again
            made = _differentiable_backward(tensors, given, grads)
        else:
            x, *rest = tensors
            grads = [*grads, *[None] * (5 - len(grads))]
            wanted = [needed[0], *needed[5:]]
            made = torch.ops.hyperfast.lstm_backward(grads, x, rest[:4], rest[4:], kept, *given, wanted)
        return *[None] * 4, *(d if need else None for d, need in zip(made, needed, strict=True))


# ---- the public function


def _named(kind: type, name: str, value):
    """`value` as that NamedTuple; TypeError unless it has its members."""
    least = len(kind._fields) - len(kind._field_defaults)
    if isinstance(value, (tuple, list)) and least <= len(value) <= len(kind._fields):
        return kind(*value)
    got = (
        f"a {type(value).__name__} of {len(value)}"
        if isinstance(value, (tuple, list))
        else type(value).__name__
    )
    article = "an" if kind is LSTMState else "a"
    raise TypeError(f"{name} must be {article} {kind.__name__} ({', '.join(kind._fields)}), got {got}")


def _check_sizes(x, state: LSTMState, hyper: HyperCell | None) -> dict[str, int]:
    """N, I, B, H, M, Z of the arguments that define them, and these are checked."""
    defining = {"x": (x, "NI"), "state.h": (state.h, "BH")}
    if hyper is not None:
        defining |= {"hyper.weight_hh": (hyper.weight_hh, "_M"), "hyper.d_weight": (hyper.d_weight, "__Z")}
    sizes = {}
    for name, (tensor, letters) in defining.items():
        check_dense(name, tensor)
        shape = {"_M": "[4M, M]", "__Z": "[12, H, Z]"}.get(letters, f"[{', '.join(letters)}]")
        if tensor.dim() != len(letters):
            raise ValueError(f"{name} must be {shape}, got shape {list(tensor.shape)}")
        sizes |= dict(zip(letters, tensor.shape, strict=True))
        if empty := [letter for letter in letters if letter in "IHMZ" and not sizes[letter]]:
            raise ValueError(
                f"{name} must be {shape} with {empty[0]} at least 1, got shape {list(tensor.shape)}"
            )
    sizes.pop("_", None)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be floating point ({', '.join(_DTYPES.values())}), got {x.dtype}")
    return sizes


def _shapes(
    state: LSTMState, weight_ih, weight_hh, bias, norms, hyper
) -> Iterator[tuple[str, Tensor, str, bool]]:
    """Every argument but x: name, tensor, shape in letters, whether it may be float32 beside half
    precision."""
    yield "state.h", state.h, "B H", False
    yield "state.c", state.c, "B H", True
    yield "weight_ih", weight_ih, "4H I", False
    yield "weight_hh", weight_hh, "4H H", False
    yield "bias", bias, "4H", False
    if norms is not None:
        for field, shape in zip(Norms._fields, ("4H", "4H", "H", "H"), strict=True):
            yield f"norms.{field}", getattr(norms, field), shape, True
    if hyper is None:
        return
    yield "state.hyper_h", state.hyper_h, "B M", False
    yield "state.hyper_c", state.hyper_c, "B M", True
    shapes = "4M I+H", "4M M", "4M", "12Z M", "12Z", "12 H Z"
    for field, shape in zip(HyperCell._fields, shapes, strict=False):
        yield f"hyper.{field}", getattr(hyper, field), shape, False
    if hyper.norms is not None:
        for field, shape in zip(Norms._fields, ("4M", "4M", "M", "M"), strict=True):
            yield f"hyper.norms.{field}", getattr(hyper.norms, field), shape, True


def _in_numbers(shape: str, sizes: dict[str, int]) -> list[int]:
    """What "4M I+H" is for these sizes."""

    def number(term: str) -> int:
        return int(term.rstrip("NIBHMZ") or 1) * sizes.get(term[-1], 1)

    return [sum(map(number, part.split("+"))) for part in shape.split()]


def _check(x, state: LSTMState, weight_ih, weight_hh, bias, norms, hyper) -> None:
    """ValueError or TypeError unless all shapes, dtypes and devices fit."""
    sizes = _check_sizes(x, state, hyper)
    narrow = [dtype for dtype in _DTYPES if dtype != torch.float64] if _is_autocast(x) else []
    for name, tensor, letters, wide in _shapes(state, weight_ih, weight_hh, bias, norms, hyper):
        check_dense(name, tensor)
        shape = _in_numbers(letters, sizes)
        if list(tensor.shape) != shape:
            of = ", ".join(f"{letter} = {n}" for letter, n in sizes.items())
            wanted = f"[{', '.join(letters.split())}] = {shape}"
            raise ValueError(f"{name} must be {wanted} for {of}, got {list(tensor.shape)}")
        if tensor.dtype not in ([x.dtype, *([_compute_dtype(x)] if wide else []), *narrow]):
            raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if hyper is None and (state.hyper_h is not None or state.hyper_c is not None):
        raise ValueError("state.hyper_h and state.hyper_c must be None without hyper")


def _check_options(x, state: LSTMState, batch_sizes, key, dropout: float, eps: float) -> None:
    """The same for what is not differentiable; the numbers in batch_sizes are checked where they are read."""
    N, B = x.shape[0], state.h.shape[0]
    if batch_sizes is not None:
        check_dense("batch_sizes", batch_sizes)
        if batch_sizes.dim() != 1:
            raise ValueError(f"batch_sizes must be [T], got shape {list(batch_sizes.shape)}")
        if batch_sizes.dtype != torch.int64:
            raise TypeError(f"batch_sizes must be torch.int64, got {batch_sizes.dtype}")
        if batch_sizes.device.type != "cpu":
            raise ValueError(f"batch_sizes must be on the CPU, got {batch_sizes.device}")
    elif N % B if B else N:
        raise ValueError(f"x must have T B rows for the {B} sequences of the state, got {N}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if key is None:
        if dropout:
            raise ValueError(f"key must be a tensor, int64 [1], for dropout {dropout}, got None")
        return
    check_dense("key", key)
    if key.dtype != torch.int64:
        raise TypeError(f"key must be torch.int64, got {key.dtype}")
    if key.shape != (1,):
        raise ValueError(f"key must be [1], got {list(key.shape)}")
    if key.device != x.device:
        raise ValueError(f"key must be on {x.device} like x, got {key.device}")


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


def lstm(
    x: Tensor,
    state: LSTMState,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    norms: Norms | None = None,
    hyper: HyperCell | None = None,
    batch_sizes: Tensor | None = None,
    key: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, LSTMState]:
    """One layer of an LSTM, or HyperLSTM, over a sequence: h of every step [N, H] and the last state.

    x [N, I], rows in the order of `PackedSequence.data`, step by step; state: h, c [B, H] and with `hyper`
    hyper_h, hyper_c [B, M]; weight_ih [4H, I], weight_hh [4H, H], bias [4H], gates in the order i, f, g, o;
    norms and hyper: `hyperfast.reference.Norms` and `HyperCell`, which name their shapes. batch_sizes: int64
    [T] on the CPU, the rows of each step, falling from B, their sum N; None: every step has B. dropout: the
    share of candidates that recurrent dropout drops, by key, int64 [1], with a mask for every step: another
    key, another mask. eps: of the layer normalisations. `hyperfast.reference.lstm` has the equations and
    their sources.

    All tensors have x's dtype and device; beside half precision c and norms may be float32, and the last c is
    float32. Under autocast everything but c and norms is converted to its dtype. float32 and float64 have CPU
    kernels; half precision is computed in float32 there and h rounded. Saved for the backward are I + 6 H
    numbers a row, 6 M more with a hyper LSTM (x, h, c and weight_hh h; hyper_h, hyper_c and the hyper LSTM's
    gates), and without gradients nothing but h; what else a row needs is made for some steps at a time.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    check_backend(backend)
    dropout, eps, state = float(dropout), float(eps), _named(LSTMState, "state", state)
    norms = None if norms is None else _named(Norms, "norms", norms)
    hyper = None if hyper is None else _named(HyperCell, "hyper", hyper)
    if hyper is not None and hyper.norms is not None:
        hyper = hyper._replace(norms=_named(Norms, "hyper.norms", hyper.norms))
    _check(x, state, weight_ih, weight_hh, bias, norms, hyper)
    _check_options(x, state, batch_sizes, key, dropout, eps)
    tensors = [x, *state, *_flat(weight_ih, weight_hh, bias, norms, hyper)]
    dtype = torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype
    tensors = _in_dtype(tensors, dtype)
    given = batch_sizes, key, dropout, eps
    with_function = needs_function(batch_sizes, key, *tensors)
    if backend == "reference" or is_transformed() or has_tangent(*tensors):
        _step_sizes(batch_sizes, len(x), len(state.h))
        output, *last = _expression(tensors, *given)
        return output, LSTMState(*last)
    if dtype.itemsize == 2 and engine(tensors[0]) in ("cpu", "reference"):
        tensors = _in_dtype(tensors, torch.float32)
    if torch.compiler.is_compiling():  # torch 2.11: half the gradient of a tensor given twice
        tensors = [None if t is None else t.view_as(t) for t in tensors]
    if with_function:
        output, *last = LSTMFunction.apply(*given, *tensors)
    else:
        x, *rest = tensors
        made = torch.ops.hyperfast.lstm(x, rest[:4], rest[4:], *given, False)
        output, last = made[0], made[4 : 6 if hyper is None else 8]
    narrowed = (s.to(dtype) if i in (0, 2) else s for i, s in enumerate(last))
    return output.to(dtype), LSTMState(*narrowed)
