"""`lstm`: one layer of an LSTM over a whole sequence, with layer normalisation, recurrent dropout and a hyper
LSTM if wanted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

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

# state: h, c, hyper_h, hyper_c, the last two None without a hyper LSTM. weights: weight_hh, bias,
# hyper_weight_xh, hyper_weight_hh, z_weight, z_bias, d_weight, norms (4), hyper norms (4), None where there
# is none. Returns h, c, hyper_h, hyper_c of every row, the last of each sequence, and with `keep` what else
# the backward reads: h_gates [N, 4H] = h_{t-1} weight_hh^T and hyper_gates [N, 4M], the hyper LSTM's gates
# before normalisation. What there is none of is empty.
library.define(
    "lstm(Tensor x_gates, Tensor? hyper_x_gates, Tensor?[] state, Tensor?[] weights, Tensor? batch_sizes, "
    "Tensor? key, float dropout, float eps, bool keep) -> Tensor[]"
)
# grads: of h of every row and of the last h, c, hyper_h, hyper_c; None is zero. kept: h, c, hyper_h,
# hyper_c, h_gates, hyper_gates of the forward. needed: which weights need a gradient; those of the others are
# empty. Returns the gradients of x_gates, hyper_x_gates, state and weights.
library.define(
    "lstm_backward(Tensor?[] grads, Tensor x_gates, Tensor? hyper_x_gates, Tensor?[] state, "
    "Tensor?[] weights, Tensor[] kept, Tensor? batch_sizes, Tensor? key, float dropout, float eps, "
    "bool[] needed) -> Tensor[]"
)


_NONE = (None,) * 4
_PRODUCTS = (0, 2, 3, 4, 5)  # the weights whose gradients are products over all rows


def _compute_dtype(x_gates: Tensor) -> torch.dtype:
    """What c, norms and their gradients are held in, and the reference computes in."""
    return torch.float32 if x_gates.dtype.itemsize == 2 else x_gates.dtype


def _flat(weight_hh: Tensor, bias: Tensor, norms: Norms | None, hyper: HyperCell | None) -> list:
    """The weights as the ops take them."""
    of_hyper = (None,) * 5 if hyper is None else hyper[1:6]
    return [weight_hh, bias, *of_hyper, *(norms or _NONE), *(hyper and hyper.norms or _NONE)]


def _structured(weights: Sequence[Tensor | None], hyper_x_gates: Tensor | None = None) -> tuple:
    """weight_hh, bias, norms and hyper as `reference.lstm` takes them."""
    norms, hyper_norms = (None if n[0] is None else Norms(*n) for n in (weights[7:11], weights[11:]))
    hyper = None if weights[2] is None else HyperCell(hyper_x_gates, *weights[2:7], hyper_norms)
    return weights[0], weights[1], norms, hyper


def _in_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """x_gates, hyper_x_gates, state and weights in `dtype`, but c and norms at least in float32."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    kinds = [wide if i in (3, 5) or i >= 13 else dtype for i in range(len(tensors))]
    return [None if t is None else t.to(kind) for t, kind in zip(tensors, kinds, strict=True)]


def _expression(tensors: Sequence[Tensor | None], batch_sizes, key, dropout, eps) -> list[Tensor]:
    """h of every row and the last state by the reference, of x_gates, hyper_x_gates, state and weights; half
    precision in float32, and h rounded."""
    x_gates, hyper_x_gates, *rest = _in_dtype(tensors, _compute_dtype(tensors[0]))
    weights = _structured(rest[4:], hyper_x_gates)
    with no_autocast([x_gates]):
        output, last = reference.lstm(x_gates, LSTMState(*rest[:4]), *weights, batch_sizes, key, dropout, eps)
    made = zip((output, *last), (tensors[2], *tensors[2:6]), strict=True)
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
            f"the {N} rows of x_gates, got {shown}, sum {sum(sizes)}"
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


def _previous_rows(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where the rows one step before those of all steps but the first lie, in their order: from, to. One
    range where every step has as many rows."""
    ranges: list[tuple[int, int]] = []
    for start, size in zip(_starts(sizes), sizes[1:], strict=False):
        first = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
        ranges.append((first, start + size))
    return ranges


def _rows(t: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Those rows of t; a view if they are one range."""
    parts = [t[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat([t[:0], *parts])


# ---- the engines: all take (T, N, B, H, M, Z), the step sizes int64 [T] on the CPU, weights, key, dropout,
# eps and tensors, contiguous, None for what there is none of.
# Forward: x_gates, hyper_x_gates, state (4); to be written h, c, hyper_h, hyper_c, h_gates, hyper_gates, the
# last two None if not kept.
# Backward: x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z [N, 12Z], the gradients of h and of the
# last h, c, hyper_h, hyper_c; to be written those of x_gates, h_gates (None without hyper: x_gates'),
# hyper_gates, z, state (4), bias, d_weight, norms (4), hyper norms (4).


def _engine(x_gates: Tensor, sizes: Sequence[int], step_sizes: Tensor, backward: bool) -> str:
    """Which kernels serve. On a GPU Triton's; the persistent CUDA kernel, for weights that fit on chip, runs
    where HYPERFAST_ENGINE asks for it until a measurement says where it wins (csrc/cuda/lstm.cu predicts: up
    to 32 rows and 512 units in float32). The CPU's take no half precision: `lstm` widens it."""
    if not x_gates.numel():
        return "reference"
    name = engine(x_gates, cuda="lstm")
    if name == "cuda":
        with torch.cuda.device(x_gates.device):
            refused = _cuda.lstm_refuses(sizes, step_sizes.data_ptr(), dtype_name(x_gates), backward)
        return "reference" if refused else name
    return "reference" if name == "cpu" and x_gates.dtype.itemsize == 2 else name


def _widened(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(_compute_dtype(t)) for t in tensors]


def _forward_reference(sizes, step_sizes, weights, key, dropout, eps, tensors) -> None:
    x_gates, hyper_x_gates, *state = _widened(tensors[:6])
    *states, h_gates, hyper_gates = tensors[6:]
    weight_hh, bias, norms, hyper = _structured(_widened(weights))
    now, start = LSTMState(*state), 0
    for size in step_sizes.tolist():
        rows = slice(start, start + size)
        now = reference.map_state(now, lambda s, size=size: s[:size])
        if h_gates is not None:
            h_gates[rows] = now.h @ weight_hh.mT
        if hyper is not None:
            hyper = hyper._replace(x_gates=hyper_x_gates[rows])
            if hyper_gates is not None:
                hyper_gates[rows] = torch.addmm(hyper.x_gates, now.h, hyper.weight_xh.mT)
                hyper_gates[rows] += now.hyper_h @ hyper.weight_hh.mT
        options = hyper, torch.arange(start, start + size, device=x_gates.device), key, dropout, eps
        now = reference.lstm_step(x_gates[rows], now, weight_hh, bias, norms, *options)
        for made, s in zip(states, now, strict=True):
            if s is not None:
                made[rows] = s
        start += size


def _backward_reference(sizes, step_sizes, weights, key, dropout, eps, inputs, outputs) -> None:
    *inputs, dh, dh_last, dc_last, dhyper_h_last, dhyper_c_last = _widened(inputs)
    _, N, B, H, M, _ = sizes
    shapes = (N, H), (B, H), (B, H), *([(B, M), (B, M)] if M else [])
    grads = dh, dh_last, dc_last, dhyper_h_last, dhyper_c_last
    dh, *dlast = (
        inputs[0].new_zeros(shape) if d is None else d for d, shape in zip(grads, shapes, strict=False)
    )
    options = *_structured(_widened(weights)), key, dropout, eps
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


def _forward_cpu(sizes, step_sizes, weights, key, dropout, eps, tensors) -> None:
    options = _addresses(weights), address(key), dropout, eps, _addresses(tensors)
    _cpu.lstm(sizes, step_sizes.data_ptr(), *options, dtype_name(tensors[0]), torch.get_num_threads())


def _backward_cpu(sizes, step_sizes, weights, key, dropout, eps, inputs, outputs) -> None:
    options = _addresses(weights), address(key), dropout, eps, _addresses(inputs), _addresses(outputs)
    dtype, threads = dtype_name(inputs[0]), torch.get_num_threads()
    _cpu.lstm_backward(sizes, step_sizes.data_ptr(), *options, dtype, threads)


def _cuda_arguments(sizes, step_sizes, x_gates, backward) -> tuple:
    """What comes last: the scratch, dtype and stream."""
    dtype = dtype_name(x_gates)
    floats = _cuda.lstm_scratch(sizes, step_sizes.data_ptr(), dtype, backward)
    scratch = x_gates.new_empty(floats, dtype=torch.float32)
    return scratch, dtype, torch.cuda.current_stream().cuda_stream


def _forward_cuda(sizes, step_sizes, weights, key, dropout, eps, tensors) -> None:
    with torch.cuda.device(tensors[0].device):
        options = _addresses(weights), address(key), dropout, eps, _addresses(tensors)
        scratch, *last = _cuda_arguments(sizes, step_sizes, tensors[0], False)
        _cuda.lstm(sizes, step_sizes.data_ptr(), *options, scratch.data_ptr(), *last)


def _backward_cuda(sizes, step_sizes, weights, key, dropout, eps, inputs, outputs) -> None:
    with torch.cuda.device(inputs[0].device):
        options = _addresses(weights), address(key), dropout, eps, _addresses(inputs), _addresses(outputs)
        scratch, *last = _cuda_arguments(sizes, step_sizes, inputs[0], True)
        _cuda.lstm_backward(sizes, step_sizes.data_ptr(), *options, scratch.data_ptr(), *last)


def _forward_triton(*arguments) -> None:
    triton_kernels("lstm").run(*arguments)


def _backward_triton(*arguments) -> None:
    triton_kernels("lstm").run_backward(*arguments)


_FORWARD = {
    "reference": _forward_reference,
    "cpu": _forward_cpu,
    "triton": _forward_triton,
    "cuda": _forward_cuda,
}
_BACKWARD = {
    "reference": _backward_reference,
    "cpu": _backward_cpu,
    "triton": _backward_triton,
    "cuda": _backward_cuda,
}


# ---- the ops


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Optional tensors come as they are: what is lazily negated in them is for the op to negate."""
    return [None if t is None else t.contiguous().resolve_neg() for t in tensors]


def _sizes(x_gates, state, weights, step_sizes: Sequence[int]) -> tuple[int, ...]:
    """T, N, B, H, M, Z."""
    M, Z = (0, 0) if weights[6] is None else (weights[3].shape[1], weights[6].shape[2])
    return len(step_sizes), *x_gates.shape[:1], *state[0].shape, M, Z


@torch.library.impl(library, "lstm", "CompositeExplicitAutograd")
def _forward(x_gates, hyper_x_gates, state, weights, batch_sizes, key, dropout, eps, keep) -> list[Tensor]:
    made = _forward_fake(x_gates, hyper_x_gates, state, weights, batch_sizes, key, dropout, eps, keep)
    x_gates, hyper_x_gates, key, *state = _contiguous((x_gates, hyper_x_gates, key, *state))
    weights = _contiguous(weights)
    steps = _step_sizes(batch_sizes, x_gates.shape[0], state[0].shape[0])
    kept = (t if keep and like is not None else None for t, like in zip(made[8:], state[::2], strict=True))
    rows = [None if s is None else t for t, s in zip(made, state, strict=False)]
    sizes, step_sizes = _sizes(x_gates, state, weights, steps), torch.tensor(steps, dtype=torch.int64)
    tensors = [x_gates, hyper_x_gates, *state, *rows, *kept]
    with no_autocast([x_gates]):
        forward = _FORWARD[_engine(x_gates, sizes, step_sizes, False)]
        forward(sizes, step_sizes, weights, key if dropout else None, dropout, eps, tensors)
    for last, t, initial in zip(made[4:8], rows, state, strict=True):
        if initial is not None:
            torch.cat([t[start:end] for start, end in _last_rows(steps)] or [initial], out=last)
    return made


@torch.library.register_fake("hyperfast::lstm", lib=library)
def _forward_fake(
    x_gates, hyper_x_gates, state, weights, batch_sizes, key, dropout, eps, keep
) -> list[Tensor]:
    N = x_gates.shape[0]
    rows = [x_gates.new_empty(0) if s is None else s.new_empty(N, s.shape[1]) for s in state]
    last = [x_gates.new_empty(0) if s is None else s.new_empty(s.shape) for s in state]
    kept = [x_gates.new_empty(t.shape if keep and t is not None else 0) for t in (x_gates, hyper_x_gates)]
    return [*rows, *last, *kept]


@torch.library.impl(library, "lstm_backward", "CompositeExplicitAutograd")
def _backward(
    grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
) -> list[Tensor]:
    made = _backward_fake(
        grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
    )
    x_gates, key, *state = _contiguous((x_gates, key, *state))
    weights, kept, grads = map(_contiguous, (weights, kept, grads))
    steps = _step_sizes(batch_sizes, x_gates.shape[0], state[0].shape[0])
    sizes = _sizes(x_gates, state, weights, steps)
    h, c, hyper_h, hyper_c, h_gates, hyper_gates = kept
    z = dz = dh_gates = None
    dx_gates, dhyper_gates, *rest = made
    if hyper_x_gates is None:
        hyper_h = hyper_c = hyper_gates = dhyper_gates = None
    with no_autocast([x_gates]):
        if hyper_x_gates is not None:
            z = torch.addmm(weights[5], hyper_h, weights[4].t())
            dz, dh_gates = torch.empty_like(z), torch.empty_like(x_gates)
        inputs = x_gates, state[1], state[3], c, hyper_c, h_gates, hyper_gates, z, *grads
        gradients = [None if t is None else d for t, d in zip((*state, *weights), rest, strict=True)]
        outputs = dx_gates, dh_gates, dhyper_gates, dz, *gradients[:4], gradients[5], *gradients[10:]
        step_sizes = torch.tensor(steps, dtype=torch.int64)
        backward = _BACKWARD[_engine(x_gates, sizes, step_sizes, True)]
        options = weights, key if dropout else None, dropout, eps
        backward(sizes, step_sizes, *options, inputs, outputs)
        dgates = dx_gates if dh_gates is None else dh_gates
        wanted = [d if need else None for d, need in zip(gradients[4:], needed, strict=True)]
        _weight_gradients(wanted, dgates, dhyper_gates, dz, state, h, hyper_h, _previous_rows(steps))
    return made


def _weight_gradients(wanted, dgates, dhyper_gates, dz, state, h, hyper_h, previous) -> None:
    """Writes those of weight_hh, hyper_weight_xh, hyper_weight_hh, z_weight and z_bias that are wanted."""

    def product(out: Tensor, d: Tensor, first: Tensor, before: Tensor) -> None:
        B = min(len(first), len(d))  # no steps: nothing to sum
        torch.mm(d[B:].t(), before, out=out).addmm_(d[:B].t(), first[:B])

    dweight_hh, _, dweight_xh, dhyper_weight_hh, dz_weight, dz_bias = wanted[:6]
    if dweight_hh is not None or dweight_xh is not None:
        before = _rows(h, previous)
        if dweight_hh is not None:
            product(dweight_hh, dgates, state[0], before)
        if dweight_xh is not None:
            product(dweight_xh, dhyper_gates, state[0], before)
    if dhyper_weight_hh is not None:
        product(dhyper_weight_hh, dhyper_gates, state[2], _rows(hyper_h, previous))
    if dz_weight is not None:
        torch.mm(dz.t(), hyper_h, out=dz_weight)
    if dz_bias is not None:
        torch.sum(dz, 0, out=dz_bias)


@torch.library.register_fake("hyperfast::lstm_backward", lib=library)
def _backward_fake(
    grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
) -> list[Tensor]:
    weights = [w if needed[i] or i not in _PRODUCTS else None for i, w in enumerate(weights)]
    tensors = x_gates, hyper_x_gates, *state, *weights
    return [x_gates.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


class LSTMFunction(torch.autograd.Function):
    """h of every row, then the last h, c (and hyper_h, hyper_c), differentiable in all tensors.

    tensors: x_gates, hyper_x_gates, state (4) and weights (15) as the ops take them. Saved for each row,
    without and with a hyper LSTM: x_gates, h, c, h_gates, 10 H numbers; hyper_x_gates, hyper_h, hyper_c and
    hyper_gates, 10 M (of these hyper_x_gates for a second derivative alone). The rest is computed again.

    No setup_context, as in `batch_norm_relu_max_pool`: under torch.func, and in forward mode, the reference
    runs.
    """

    @staticmethod
    def forward(ctx, batch_sizes, key, dropout: float, eps: float, *tensors):
        x_gates, hyper_x_gates, *rest = tensors
        given = batch_sizes, key, dropout, eps
        made = torch.ops.hyperfast.lstm(x_gates, hyper_x_gates, rest[:4], rest[4:], *given, True)
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
            x_gates, hyper_x_gates, *rest = tensors
            grads = [*grads, *[None] * (5 - len(grads))]
            made = torch.ops.hyperfast.lstm_backward(
                grads, x_gates, hyper_x_gates, rest[:4], rest[4:], kept, *given, needed[6:]
            )
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


def _check_sizes(x_gates, state: LSTMState, hyper: HyperCell | None) -> dict[str, int]:
    """N, B, H, M, Z of the arguments that define them, and these are checked."""
    defining = {"x_gates": (x_gates, "[N, 4H]"), "state.h": (state.h, "[B, H]")}
    if hyper is not None:
        defining["hyper.weight_hh"] = hyper.weight_hh, "[4M, M]"
        defining["hyper.d_weight"] = hyper.d_weight, "[12, H, Z]"
    for name, (tensor, shape) in defining.items():
        check_dense(name, tensor)
        if tensor.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got shape {list(tensor.shape)}")
    if x_gates.dtype not in _DTYPES:
        raise TypeError(
            f"x_gates must be floating point ({', '.join(_DTYPES.values())}), got {x_gates.dtype}"
        )
    N, gates = x_gates.shape
    if gates % 4 or not gates:
        raise ValueError(f"x_gates must be [N, 4H] with H at least 1, got shape {list(x_gates.shape)}")
    sizes = {"N": N, "B": state.h.shape[0], "H": gates // 4}
    if hyper is not None:
        sizes |= {"M": hyper.weight_hh.shape[1], "Z": hyper.d_weight.shape[2]}
        if not sizes["M"] or not sizes["Z"]:
            raise ValueError(
                f"hyper.weight_hh must be [4M, M] and hyper.d_weight [12, H, Z] with M and Z at least 1, got "
                f"shapes {list(hyper.weight_hh.shape)} and {list(hyper.d_weight.shape)}"
            )
    return sizes


def _shapes(state: LSTMState, weight_hh, bias, norms, hyper) -> Iterator[tuple[str, Tensor, str, bool]]:
    """Every argument but x_gates: name, tensor, shape in letters, whether it may be float32 beside half
    precision."""
    yield "state.h", state.h, "B H", False
    yield "state.c", state.c, "B H", True
    yield "weight_hh", weight_hh, "4H H", False
    yield "bias", bias, "4H", False
    if norms is not None:
        for field, shape in zip(Norms._fields, ("4H", "4H", "H", "H"), strict=True):
            yield f"norms.{field}", getattr(norms, field), shape, True
    if hyper is None:
        return
    yield "state.hyper_h", state.hyper_h, "B M", False
    yield "state.hyper_c", state.hyper_c, "B M", True
    shapes = "N 4M", "4M H", "4M M", "12Z M", "12Z", "12 H Z"
    for field, shape in zip(HyperCell._fields, shapes, strict=False):
        yield f"hyper.{field}", getattr(hyper, field), shape, False
    if hyper.norms is not None:
        for field, shape in zip(Norms._fields, ("4M", "4M", "M", "M"), strict=True):
            yield f"hyper.norms.{field}", getattr(hyper.norms, field), shape, True


def _in_numbers(shape: str, sizes: dict[str, int]) -> list[int]:
    """What "4H H" is for these sizes."""
    return [int(part.rstrip("NBHMZ") or 1) * sizes.get(part[-1], 1) for part in shape.split()]


def _check(x_gates, state: LSTMState, weight_hh, bias, norms, hyper) -> None:
    """ValueError or TypeError unless all shapes, dtypes and devices fit."""
    sizes = _check_sizes(x_gates, state, hyper)
    narrow = [dtype for dtype in _DTYPES if dtype != torch.float64] if _is_autocast(x_gates) else []
    for name, tensor, letters, wide in _shapes(state, weight_hh, bias, norms, hyper):
        check_dense(name, tensor)
        shape = _in_numbers(letters, sizes)
        if list(tensor.shape) != shape:
            of = ", ".join(f"{letter} = {n}" for letter, n in sizes.items())
            wanted = f"[{', '.join(letters.split())}] = {shape}"
            raise ValueError(f"{name} must be {wanted} for {of}, got {list(tensor.shape)}")
        if tensor.dtype not in ([x_gates.dtype, *([_compute_dtype(x_gates)] if wide else []), *narrow]):
            raise TypeError(f"{name} must be {x_gates.dtype} like x_gates, got {tensor.dtype}")
        if tensor.device != x_gates.device:
            raise ValueError(f"{name} must be on {x_gates.device} like x_gates, got {tensor.device}")
    if hyper is None and (state.hyper_h is not None or state.hyper_c is not None):
        raise ValueError("state.hyper_h and state.hyper_c must be None without hyper")


def _check_options(x_gates, state: LSTMState, batch_sizes, key, dropout: float, eps: float) -> None:
    """The same for what is not differentiable; the numbers in batch_sizes are checked where they are read."""
    N, B = x_gates.shape[0], state.h.shape[0]
    if batch_sizes is not None:
        check_dense("batch_sizes", batch_sizes)
        if batch_sizes.dim() != 1:
            raise ValueError(f"batch_sizes must be [T], got shape {list(batch_sizes.shape)}")
        if batch_sizes.dtype != torch.int64:
            raise TypeError(f"batch_sizes must be torch.int64, got {batch_sizes.dtype}")
        if batch_sizes.device.type != "cpu":
            raise ValueError(f"batch_sizes must be on the CPU, got {batch_sizes.device}")
    elif N % B if B else N:
        raise ValueError(f"x_gates must have T B rows for the {B} sequences of the state, got {N}")
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
    if key.device != x_gates.device:
        raise ValueError(f"key must be on {x_gates.device} like x_gates, got {key.device}")


def _is_autocast(x_gates: Tensor) -> bool:
    device = x_gates.device.type
    return device != "meta" and x_gates.dtype != torch.float64 and torch.is_autocast_enabled(device)


def lstm(
    x_gates: Tensor,
    state: LSTMState,
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

    x_gates [N, 4H] = x weight_ih^T, gates in the order i, f, g, o, rows in the order of
    `PackedSequence.data`, step by step; state: h, c [B, H] and with `hyper` hyper_h, hyper_c [B, M];
    weight_hh [4H, H], bias [4H]; norms and hyper: `hyperfast.reference.Norms` and `HyperCell`, which name
    their shapes. batch_sizes: int64 [T] on the CPU, the rows of each step, falling from B, their sum N; None:
    every step has B. dropout: the share of candidates that recurrent dropout drops, by key, int64 [1], with a
    mask for every step: another key, another mask. eps: of the layer normalisations.
    `hyperfast.reference.lstm` has the equations and their sources.

    All tensors have x_gates' dtype and device; beside half precision c and norms may be float32, and the last
    c is float32. Under autocast everything but c and norms is converted to its dtype. float32 and float64
    have CPU kernels; half precision is computed in float32 there and h rounded. Saved for the backward are 40
    H bytes a row in float32, 40 M more with a hyper LSTM (x_gates, h, c and weight_hh h; the same of the
    hyper LSTM), and without gradients nothing. Raises ValueError or TypeError for wrong shapes, dtypes or
    devices.
    """
    check_backend(backend)
    dropout, eps, state = float(dropout), float(eps), _named(LSTMState, "state", state)
    norms = None if norms is None else _named(Norms, "norms", norms)
    hyper = None if hyper is None else _named(HyperCell, "hyper", hyper)
    if hyper is not None and hyper.norms is not None:
        hyper = hyper._replace(norms=_named(Norms, "hyper.norms", hyper.norms))
    _check(x_gates, state, weight_hh, bias, norms, hyper)
    _check_options(x_gates, state, batch_sizes, key, dropout, eps)
    hyper_x_gates = None if hyper is None else hyper.x_gates
    tensors = [x_gates, hyper_x_gates, *state, *_flat(weight_hh, bias, norms, hyper)]
    dtype = torch.get_autocast_dtype(x_gates.device.type) if _is_autocast(x_gates) else x_gates.dtype
    tensors = _in_dtype(tensors, dtype)
    given = batch_sizes, key, dropout, eps
    with_function = needs_function(batch_sizes, key, *tensors)
    if backend == "reference" or is_transformed() or has_tangent(*tensors):
        _step_sizes(batch_sizes, x_gates.shape[0], state.h.shape[0])
        output, *last = _expression(tensors, *given)
        return output, LSTMState(*last)
    if dtype.itemsize == 2 and engine(tensors[0]) in ("cpu", "reference"):
        tensors = _in_dtype(tensors, torch.float32)
    if torch.compiler.is_compiling():  # torch 2.11: half the gradient of a tensor given twice
        tensors = [None if t is None else t.view_as(t) for t in tensors]
    if with_function:
        output, *last = LSTMFunction.apply(*given, *tensors)
    else:
        x_gates, hyper_x_gates, *rest = tensors
        made = torch.ops.hyperfast.lstm(x_gates, hyper_x_gates, rest[:4], rest[4:], *given, False)
        output, last = made[0], made[4 : 6 if hyper is None else 8]
    narrowed = (s.to(dtype) if i in (0, 2) else s for i, s in enumerate(last))
    return output.to(dtype), LSTMState(*narrowed)
