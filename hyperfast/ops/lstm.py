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
    check_backend,
    check_dense,
    is_transformed,
    library,
    needs_function,
    no_autocast,
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


def _compute_dtype(x_gates: Tensor) -> torch.dtype:
    """What c, norms and their gradients are held in, and the reference computes in."""
    return torch.float32 if x_gates.dtype.itemsize == 2 else x_gates.dtype


def _flat(weight_hh: Tensor, bias: Tensor, norms: Norms | None, hyper: HyperCell | None) -> list:
    """The weights as the ops take them."""
    none = (None,) * 4
    of_hyper = (None,) * 5 if hyper is None else hyper[1:6]
    hyper_norms = none if hyper is None else hyper.norms or none
    return [weight_hh, bias, *of_hyper, *(norms or none), *hyper_norms]


def _reference(tensors: Sequence[Tensor | None], batch_sizes, key, dropout, eps) -> list[Tensor]:
    """h of every row and the last state, of x_gates, hyper_x_gates, state and weights as the ops take them;
    in float32 where these have half precision, and h rounded."""
    widened = [None if t is None else t.to(_compute_dtype(tensors[0])) for t in tensors]
    with no_autocast([tensors[0]]):
        output, last = reference.lstm(*_structured(widened), batch_sizes, key, dropout, eps)
    made = output, *(s for s in last if s is not None)
    likes = tensors[2], *(s for s in tensors[2:6] if s is not None)
    return [m.to(like.dtype) for m, like in zip(made, likes, strict=True)]


def _structured(tensors: Sequence[Tensor | None]) -> tuple:
    """x_gates, state, weight_hh, bias, norms, hyper as `reference.lstm` takes them."""
    x_gates, hyper_x_gates, *rest = tensors
    state, weights = LSTMState(*rest[:4]), rest[4:]
    norms, hyper_norms = (None if n[0] is None else Norms(*n) for n in (weights[7:11], weights[11:]))
    hyper = None if hyper_x_gates is None else HyperCell(hyper_x_gates, *weights[2:7], hyper_norms)
    return x_gates, state, weights[0], weights[1], norms, hyper


def _gradients(leaves: Sequence[Tensor | None], given, grads, create_graph: bool) -> list[Tensor | None]:
    """The gradients of the `leaves` of `_reference` that require one, by autograd; None for the others."""
    wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]
    made: list[Tensor | None] = [None] * len(leaves)
    with torch.enable_grad():
        outputs = _reference(leaves, *given)
        used = [(o, d) for o, d in zip(outputs, grads, strict=False) if d is not None and o.requires_grad]
        if not used:
            return made
        outputs, grads = zip(*used, strict=True)
        inputs = [leaves[i] for i in wanted]
        found = torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, allow_unused=True)
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


# ---- the ops


@torch.library.impl(library, "lstm", "CompositeExplicitAutograd")
def _forward_reference(
    x_gates, hyper_x_gates, state, weights, batch_sizes, key, dropout, eps, keep
) -> list[Tensor]:
    outputs = _forward_fake(x_gates, hyper_x_gates, state, weights, batch_sizes, key, dropout, eps, keep)
    rows, last, kept = outputs[:4], outputs[4:8], outputs[8:]
    tensors = x_gates, hyper_x_gates, *state, *weights
    widened = [None if t is None else t.to(_compute_dtype(x_gates)) for t in tensors]
    x_gates, now, weight_hh, bias, norms, hyper = _structured(widened)
    sizes = _step_sizes(batch_sizes, len(x_gates), len(now.h))
    with no_autocast([x_gates]):
        for start, size in zip(_starts(sizes), sizes, strict=True):
            now = LSTMState(*(None if s is None else s[:size] for s in now))
            at = torch.arange(start, start + size, device=x_gates.device)
            part = None if hyper is None else hyper._replace(x_gates=hyper.x_gates[start : start + size])
            now = reference.lstm_step(
                x_gates[start : start + size], now, weight_hh, bias, norms, part, at, key, dropout, eps
            )
            for made, s in zip(rows, now, strict=True):
                if s is not None:
                    made[start : start + size] = s
        _gather_last(rows, state, sizes, last)
        if keep:
            _keep(kept, rows, state, hyper_x_gates, weights, _previous_rows(sizes))
    return outputs


def _gather_last(rows, state, sizes: Sequence[int], last) -> None:
    for made, t, initial in zip(last, rows, state, strict=True):
        if initial is not None:
            torch.cat([t[start:end] for start, end in _last_rows(sizes)] or [initial], out=made)


def _keep(kept, rows, state, hyper_x_gates, weights, previous: Sequence[tuple[int, int]]) -> None:
    """h_gates and hyper_gates of what the forward made."""
    h_gates, hyper_gates = kept
    h, hyper_h = (
        None if s is None else torch.cat([s, _rows(t, previous)])[: len(t)]
        for t, s in ((rows[0], state[0]), (rows[2], state[2]))
    )
    torch.mm(h, weights[0].t(), out=h_gates)
    if hyper_x_gates is not None:
        torch.addmm(hyper_x_gates, h, weights[2].t(), out=hyper_gates)
        hyper_gates.addmm_(hyper_h, weights[3].t())


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
def _backward_reference(
    grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
) -> list[Tensor]:
    outputs = _backward_fake(
        grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
    )
    tensors = x_gates, hyper_x_gates, *state, *weights
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    given = grads[:3] if hyper_x_gates is None else grads
    made = _gradients(leaves, (batch_sizes, key, dropout, eps), given, create_graph=False)
    for output, gradient in zip(outputs, made, strict=True):
        if gradient is None:
            output.zero_()
        elif output.numel():
            output.copy_(gradient)
    return outputs


@torch.library.register_fake("hyperfast::lstm_backward", lib=library)
def _backward_fake(
    grads, x_gates, hyper_x_gates, state, weights, kept, batch_sizes, key, dropout, eps, needed
) -> list[Tensor]:
    weights = [w if need else None for w, need in zip(weights, needed, strict=True)]
    tensors = x_gates, hyper_x_gates, *state, *weights
    return [x_gates.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


class LSTMFunction(torch.autograd.Function):
    """h of every row, then the last h, c (and hyper_h, hyper_c), differentiable in all tensors.

    tensors: x_gates, hyper_x_gates, state (4) and weights (15) as the ops take them. Saved for each row,
    without and with a hyper LSTM: x_gates, h, c, h_gates, 10 H numbers; hyper_x_gates, hyper_h, hyper_c and
    hyper_gates, 10 M (of these hyper_x_gates for a second derivative alone). The rest is computed again.

    No setup_context, as in `batch_norm_relu_max_pool`: under torch.func the reference runs.
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
            # views: a tensor may be here twice, or be made of another
            leaves = [None if t is None else t.view_as(t) for t in tensors]
            made = _gradients(leaves, given, grads, create_graph=True)
        else:
            x_gates, hyper_x_gates, *rest = tensors
            grads = [*grads, *[None] * (5 - len(grads))]
            made = torch.ops.hyperfast.lstm_backward(
                grads, x_gates, hyper_x_gates, rest[:4], rest[4:], kept, *given, needed[6:]
            )
        return *[None] * 4, *(d if need else None for d, need in zip(made, needed, strict=True))


# ---- the public function


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


def _in_dtypes(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """x_gates, hyper_x_gates, state and weights in `dtype`; c and norms at least in float32."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    kinds = [wide if i in (3, 5) or i >= 13 else dtype for i in range(len(tensors))]
    return [None if t is None else t.to(kind) for t, kind in zip(tensors, kinds, strict=True)]


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
    dropout, eps, state = float(dropout), float(eps), LSTMState(*state)
    _check(x_gates, state, weight_hh, bias, norms, hyper)
    _check_options(x_gates, state, batch_sizes, key, dropout, eps)
    hyper_x_gates = None if hyper is None else hyper.x_gates
    tensors = [x_gates, hyper_x_gates, *state, *_flat(weight_hh, bias, norms, hyper)]
    dtype = torch.get_autocast_dtype(x_gates.device.type) if _is_autocast(x_gates) else x_gates.dtype
    tensors = _in_dtypes(tensors, dtype)
    given = batch_sizes, key, dropout, eps
    with_function = needs_function(batch_sizes, key, *tensors)
    if backend == "reference" or is_transformed():
        _step_sizes(batch_sizes, x_gates.shape[0], state.h.shape[0])
        output, *last = _reference(tensors, *given)
        return output, LSTMState(*last)
    if torch.compiler.is_compiling():  # torch 2.11: half the gradient of a tensor given twice
        tensors = [None if t is None else t.view_as(t) for t in tensors]
    if with_function:
        output, *last = LSTMFunction.apply(*given, *tensors)
    else:
        x_gates, hyper_x_gates, *rest = tensors
        made = torch.ops.hyperfast.lstm(x_gates, hyper_x_gates, rest[:4], rest[4:], *given, False)
        output, last = made[0], made[4 : 6 if hyper is None else 8]
    return output, LSTMState(*last)
