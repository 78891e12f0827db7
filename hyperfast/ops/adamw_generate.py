"""`adamw_generate`: AdamW on rank-one generator gradients and the next weights, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops._library import _cpu, check_backend, check_generators, kernel_dtype, library
from hyperfast.reference import AdamWCoefficients

library.define(
    "adamw_generate(Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] biases, Tensor(e!)[] bias_exp_avgs, Tensor(f!)[] bias_exp_avg_sqs, Tensor[] dws, "
    "Tensor[] zs, Tensor[] new_zs, Tensor(g!)[] next_weights, float[] coefficients, "
    "float[] bias_coefficients, float grad_scale) -> ()"
)


def _rows(flat: Sequence[float]) -> list[AdamWCoefficients]:
    return [AdamWCoefficients(*flat[i : i + 6]) for i in range(0, len(flat), 6)]


@torch.library.impl(library, "adamw_generate", "CompositeExplicitAutograd")
def _adamw_reference(*args):
    *tensors, coefficients, bias_coefficients, grad_scale = args
    for column in (4, 5):  # an empty moment means none: torch cannot functionalise lists of optional tensors
        tensors[column] = [None if t.numel() == 0 else t for t in tensors[column]]
    reference.adamw_generate(*tensors, _rows(coefficients), _rows(bias_coefficients), grad_scale)


@torch.library.impl(library, "adamw_generate", "CPU")
def _adamw_cpu(*args):
    *tensors, coefficients, bias_coefficients, grad_scale = args
    *updated, dws, zs, new_zs, next_weights = tensors
    dtype = kernel_dtype(updated[0])
    if dtype is None:
        return _adamw_reference(*args)
    dws, zs, new_zs = ([t.contiguous() for t in ts] for ts in (dws, zs, new_zs))
    columns = (*updated, dws, zs, new_zs, next_weights)
    segments = [
        (*(t.data_ptr() if t.numel() else 0 for t in row), *row[0].shape)
        for row in zip(*columns, strict=True)
    ]
    both = [(*w, *b) for w, b in zip(_rows(coefficients), _rows(bias_coefficients), strict=True)]
    _cpu.adamw_generate(segments, both, grad_scale, dtype, torch.get_num_threads())


@torch.library.register_fake("hyperfast::adamw_generate", lib=library)
def _adamw_fake(*args):
    return None


def adamw_generate(
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_exp_avgs: Sequence[Tensor | None],
    bias_exp_avg_sqs: Sequence[Tensor | None],
    dws: Sequence[Tensor],
    zs: Sequence[Tensor],
    new_zs: Sequence[Tensor],
    next_weights: Sequence[Tensor],
    coefficients: Sequence[AdamWCoefficients],
    bias_coefficients: Sequence[AdamWCoefficients],
    grad_scale: float = 1.0,
    *,
    backend: str = "auto",
) -> None:
    """One AdamW step of every generator from its factored gradient, and the weights of the next forward, in
    one pass.

    For each layer: weight, exp_avg, exp_avg_sq [N, K] with the gradient grad_scale dw outer z; bias [N] and
    its moments [N] (None: not trained) with grad_scale dw; next_weights [N] = weight new_z + bias, bit for
    bit what `generate` would return. zs and new_zs [K] are the embeddings before and after their own update.
    Arguments written to must be contiguous and share no memory. Raises ValueError or TypeError otherwise,
    before anything is changed.
    """
    check_backend(backend)
    written = {
        "weight": (list(weights), "NK"),
        "exp_avg": (list(exp_avgs), "NK"),
        "exp_avg_sq": (list(exp_avg_sqs), "NK"),
        "bias": (list(biases), "N"),
        "bias_exp_avg": (list(bias_exp_avgs), "N?"),
        "bias_exp_avg_sq": (list(bias_exp_avg_sqs), "N?"),
        "next_weight": (list(next_weights), "N"),
    }
    read = {"dw": (list(dws), "N"), "z": (list(zs), "K"), "new_z": (list(new_zs), "K")}
    check_generators(written["weight"][0], **written, **read)
    _check_written(written, read)
    coefficients = _checked_rows("coefficients", coefficients, len(weights))
    bias_coefficients = _checked_rows("bias_coefficients", bias_coefficients, len(weights))
    grad_scale = float(grad_scale)
    if not len(weights):
        return
    *updated, made = (tensors for tensors, _ in written.values())
    lists = [*updated, *(tensors for tensors, _ in read.values()), made]
    with torch.no_grad():
        if backend == "reference":
            reference.adamw_generate(*lists, coefficients, bias_coefficients, grad_scale)
            return
        flat = ([x for row in rows for x in row] for rows in (coefficients, bias_coefficients))
        filled = [[weights[0].new_empty(0) if t is None else t for t in column] for column in lists]
        torch.ops.hyperfast.adamw_generate(*filled, *flat, grad_scale)
        # raw kernels do not: autograd must notice that saved tensors were overwritten
        torch.autograd.graph.increment_version(
            [t for column in (*updated, made) for t in column if t is not None]
        )


def _checked_rows(name: str, rows: Sequence[AdamWCoefficients], count: int) -> list[AdamWCoefficients]:
    """`rows` as floats; ValueError or TypeError unless they are `count` times AdamWCoefficients."""
    if len(rows) != count:
        raise ValueError(f"{count} weights but {len(rows)} of {name}")
    for i, row in enumerate(rows):
        if len(row) != len(AdamWCoefficients._fields):
            raise ValueError(f"{name} {i} must be {len(AdamWCoefficients._fields)} numbers, got {len(row)}")
    return [AdamWCoefficients(*map(float, row)) for row in rows]


Columns = dict[str, tuple[list[Tensor | None], str]]


def _check_written(written: Columns, read: Columns) -> None:
    """ValueError unless moments come in pairs and what is updated in place is contiguous, may be updated and
    overlaps nothing."""
    for i, moments in enumerate(zip(written["bias_exp_avg"][0], written["bias_exp_avg_sq"][0], strict=True)):
        if (moments[0] is None) != (moments[1] is None):
            raise ValueError(f"bias_exp_avg {i} and bias_exp_avg_sq {i} must both be tensors or both None")
    spans = []  # first byte, end, name, whether it is written
    for columns in (written, read):
        for name, (tensors, _) in columns.items():
            for i, tensor in enumerate(tensors):
                if tensor is None:
                    continue
                if columns is written:
                    _check_writable(f"{name} {i}", tensor)
                if tensor.numel() == 0 or tensor.is_meta:
                    continue
                last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                spans.append((start, start + (last + 1) * tensor.itemsize, f"{name} {i}", columns is written))
    spans.sort()
    reach = {True: (0, ""), False: (0, "")}  # how far written and read tensors reach so far
    for start, end, name, is_written in spans:
        for other_written, (other_end, other) in reach.items():
            if start < other_end and (is_written or other_written):
                raise ValueError(f"{name} shares memory with {other}: one of them is updated in place")
        reach[is_written] = max(reach[is_written], (end, name))


def _check_writable(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is updated in place and must be contiguous, got strides {tensor.stride()}")
    if tensor.is_neg():
        raise ValueError(f"{name} is updated in place and must not be lazily negated: resolve_neg() it")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made under inference_mode and cannot be updated outside of it")
