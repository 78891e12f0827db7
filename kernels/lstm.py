"""lstm: one layer of an LSTM, layer-norm LSTM or HyperLSTM over a sequence.

A step forward is four launches, on one stream and without a wait: cuBLAS's product of [h, hyper_h] with all
recurrent weights; the hyper LSTM's step, whose kernel also makes z of its h; a batched product of cuBLAS for
d = z d_weight; and the LSTM's step: modulation, layer norm, gates, cell. Without a hyper LSTM it is two, the
product and the step. Backward: the LSTM's step, d z = d d_weight^T batched, the hyper LSTM's step with what z
passes on, and one product for the gradients of [h, hyper_h]. What needs no order of steps is done for many
of them at once: d for the backward, d d_weight, sums over rows.

Why so. The product with [[weight_hh, 0], [hyper_weight_xh, hyper_weight_hh]] spends 4 H M multiplications a
row on zeros, 19 % at H 512 and M 128, 11 % at H 1000: under 2 us up to 128 rows in float32, less than the
product of its own that it saves. A layer norm needs whole rows, so a program of the LSTM's step has one: were
it to make d itself, each would read all of d_weight (393 KB at H 512, Z 16, float32), 3.6 us at the 64 bytes
a clock that a multiprocessor gets from the second level cache, with 100 of 132 idle at batch 32; cuBLAS reads
it once for all rows and writes d, 12 H numbers a row. z_weight is small (98 KB): up to Z_ROWS rows the hyper
LSTM's kernel reads it whole in each program, beyond that cuBLAS makes z.

Floor of a step at H 512, M 128, Z 16, batch 32, float32: the recurrent weights, 6.0 MB with z and d weights,
from the second level cache, 1 us; 96e6 operations, 2 us at 50 TFLOP/s; and the launches one after the other,
about 1.5 us each in a CUDA graph, 6 us. PREDICTION, not measured: on an H100 14 us forward and 18 us backward
a step in a CUDA graph in float32, 11 and 14 in bfloat16; launched from Python, 15 to 20 us of it a step each
way, as the processor is then the slower one. The persistent CUDA kernel exists because of these launches.

Rounded to the dtype of the weights is what goes through a product (h, z, d and their gradients, as plain
PyTorch does it); c, its gradient, norms and everything in between are float32, or float64. The gradients of
vectors are written for each row and summed by torch, in an order that does not depend on timing; no atomics.
Rows of up to 2048 columns compile without spills.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.launch import Launch, compute_type, on_device

COLUMNS = 256  # of a program that needs no sum over its row
ELEMENTS = 1024  # of a tile at most, where a row is shorter
PROGRAMS = 2 * 132  # from where on a program takes several rows
Z_ROWS = 132  # of a step, up to which the hyper LSTM's kernels make its products with z_weight
Z_ELEMENTS = 8192  # of a tile of it
MOST_WARPS = 16
CHUNK_BYTES = 1 << 27  # of what the backward makes for all rows of some steps
STEP = ("start", "before", "rows")


@triton.jit
def _load(ptr, offs, mask, COMPUTE: tl.constexpr):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _store(ptr, offs, value, mask):
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    magnitude = tl.abs(x)
    t = tl.exp(-2.0 * magnitude)
    y = (1.0 - t) / (1.0 + t)
    if x.dtype == tl.float32:  # where 1 - t cancels, the series
        q = x * x
        series = 1.0 + q * (-0.33333334 + q * (0.13333334 + q * (-0.053968254 + q * 0.021869488)))
        y = tl.where(magnitude < 0.3, magnitude * series, y)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _normalised(x, mask, eps, n: tl.constexpr):
    """Each row of x [BLOCK_B, BLOCK_N] less its mean over its deviation, 0 outside, and the inverse of the
    deviation."""
    mean = tl.sum(tl.where(mask, x, 0.0), 1) * (1.0 / n)
    d = tl.where(mask, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(d * d, 1) * (1.0 / n) + eps)
    return d * inverse[:, None], inverse


@triton.jit
def _norm_backward(g, xhat, inverse, n: tl.constexpr):
    """The gradient of x, from g, that of xhat; both 0 outside."""
    mean, product = tl.sum(g, 1) * (1.0 / n), tl.sum(g * xhat, 1) * (1.0 / n)
    return inverse[:, None] * (g - mean[:, None] - xhat * product[:, None])


@triton.jit
def _drop_scale(key_ptr, row, offs_n, threshold, scale, STREAM: tl.constexpr, COMPUTE: tl.constexpr):
    """hyperfast.reference.dropout_scale of rows [BLOCK_B, 1] and columns [1, BLOCK_N]."""
    zeros = tl.zeros((row.shape[0], offs_n.shape[1]), tl.uint32)
    columns, rows = zeros + offs_n.to(tl.uint32), zeros + row.to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(key_ptr), columns, rows, zeros + STREAM, zeros)
    return tl.where(bits.to(tl.int64) >= threshold, tl.full((1, 1), scale, COMPUTE), 0.0)


@triton.jit
def _previous(c_ptr, c0_ptr, before, offs_b, offs_n, mask, n: tl.constexpr, COMPUTE: tl.constexpr):
    """c of the step before, whose first row is `before`; -1 in the first step."""
    if before < 0:
        c = _load(c0_ptr, offs_b * n + offs_n, mask, COMPUTE)
    else:
        c = _load(c_ptr, (before + offs_b) * n + offs_n, mask, COMPUTE)
    return c


@triton.jit
def _gate(inputs, norm, kept_ptr, at, eps, GATE: tl.constexpr, n: tl.constexpr, COMPUTE: tl.constexpr):
    """One gate before its activation; and, where there is a normalisation, for its backward, xhat and the
    inverse of the deviation. Keeps r, or, where there is no bias, x + r."""
    x_ptr, r_ptr, bias_ptr, d_ptr = inputs
    weight_ptr, norm_bias_ptr = norm
    of_x, of_r, of_d, offs_n, in_n, mask = at
    y = _load(x_ptr, of_x + GATE * n, mask, COMPUTE)
    if r_ptr is not None:
        r = _load(r_ptr, of_r + GATE * n, mask, COMPUTE)
        if d_ptr is None:
            y += r
        else:
            y *= _load(d_ptr, of_d + GATE * n, mask, COMPUTE)
            y += _load(d_ptr, of_d + (4 + GATE) * n, mask, COMPUTE) * r
            y += _load(d_ptr, of_d + (8 + GATE) * n, mask, COMPUTE)
        if kept_ptr is not None:
            _store(kept_ptr, of_x + GATE * n, y if bias_ptr is None else r, mask)
    if bias_ptr is not None:
        y += _load(bias_ptr, GATE * n + offs_n, in_n, COMPUTE)
    if weight_ptr is None:
        return y, y, y
    else:
        xhat, inverse = _normalised(y, mask, eps, n)
        y = xhat * _load(weight_ptr, GATE * n + offs_n, in_n, COMPUTE)
        return y + _load(norm_bias_ptr, GATE * n + offs_n, in_n, COMPUTE), xhat, inverse


@triton.jit(do_not_specialize=["start", "before", "rows", "first_row", "threshold"])
def lstm_fwd_kernel(
    x_ptr,  # [N, 4n]: the input's part of the gates
    r_ptr,  # [B, R_WIDTH]: of this step, what the products with h, and hyper_h, gave
    bias_ptr,  # [4n]; None for the hyper LSTM, whose x has it
    d_ptr,  # [B, 12, n] of this step, or None
    c0_ptr,  # [B, n]
    c_ptr,  # [N, n]
    h_ptr,  # [N, n]
    state_ptr,  # [B, STATE_WIDTH]: h again, for the next step's product
    kept_ptr,  # [N, 4n]: what the backward reads of the gates, or None
    gates_weight_ptr,  # [4n], and so on, or None
    gates_bias_ptr,
    cell_weight_ptr,
    cell_bias_ptr,
    z_weight_ptr,  # [Q, n] or None
    z_bias_ptr,  # [Q]
    z_ptr,  # [B, Q] of this step
    key_ptr,  # int64 [1], or None
    start,  # the step's first row among all N
    before,  # that of the step before; -1: none
    rows,  # of the step
    first_row,  # what dropout adds to a row's number
    threshold,
    scale: tl.float64,
    eps: tl.float64,
    n: tl.constexpr,
    Q: tl.constexpr,
    R_WIDTH: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    offs_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    in_n, row = offs_n < n, start + offs_b
    mask = (offs_b < rows) & in_n
    of_d = offs_b * (12 * n) + offs_n
    at = (row * (4 * n) + offs_n, offs_b * R_WIDTH + offs_n, of_d, offs_n, in_n, mask)
    inputs, norm = (x_ptr, r_ptr, bias_ptr, d_ptr), (gates_weight_ptr, gates_bias_ptr)
    eps = tl.full((1,), eps, COMPUTE)

    i, _, _ = _gate(inputs, norm, kept_ptr, at, eps, 0, n, COMPUTE)
    f, _, _ = _gate(inputs, norm, kept_ptr, at, eps, 1, n, COMPUTE)
    g, _, _ = _gate(inputs, norm, kept_ptr, at, eps, 2, n, COMPUTE)
    o, _, _ = _gate(inputs, norm, kept_ptr, at, eps, 3, n, COMPUTE)
    g = _tanh(g)
    if key_ptr is not None:
        g *= _drop_scale(key_ptr, first_row + row, offs_n, threshold, scale, STREAM, COMPUTE)
    c = _sigmoid(f) * _previous(c_ptr, c0_ptr, before, offs_b, offs_n, mask, n, COMPUTE) + _sigmoid(i) * g
    _store(c_ptr, row * n + offs_n, c, mask)
    if cell_weight_ptr is not None:
        c, _ = _normalised(c, mask, eps, n)
        c *= _load(cell_weight_ptr, offs_n, in_n, COMPUTE)
        c += _load(cell_bias_ptr, offs_n, in_n, COMPUTE)
    h = (_sigmoid(o) * _tanh(c)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * n + offs_n, h, mask=mask)
    tl.store(state_ptr + offs_b * STATE_WIDTH + offs_n, h, mask=mask)
    if z_weight_ptr is not None:
        seen = tl.where(mask, h.to(COMPUTE), 0.0)  # as the backward will see it; one row
        for first in tl.static_range(0, Q, BLOCK_Q):
            offs_q = first + tl.arange(0, BLOCK_Q)
            in_q = offs_q < Q
            weight = _load(z_weight_ptr, offs_q[:, None] * n + offs_n, in_q[:, None] & in_n, COMPUTE)
            z = tl.sum(weight * seen, 1) + _load(z_bias_ptr, offs_q, in_q, COMPUTE)
            _store(z_ptr, tl.program_id(0).to(tl.int64) * Q + offs_q, z, in_q)


@triton.jit
def _gate_backward(
    dy, xhat, inverse, inputs, weight_ptr, outputs, at, of_dgates, of_shares,
    GATE: tl.constexpr, n: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All that follows from dy, the gradient of a gate before its activation. A row's shares are dbias [4,
    n], if there is one, then dweight [4, n] and dbias [4, n] of the normalisation, if there is one."""
    x_ptr, r_ptr, bias_ptr, d_ptr = inputs
    dx_ptr, dr_ptr, dgates_ptr, dd_ptr, shares_ptr = outputs
    of_x, of_r, of_d, offs_n, in_n, mask = at
    before_norm: tl.constexpr = 0 if bias_ptr is None else 4
    if weight_ptr is not None:
        _store(shares_ptr, of_shares + (before_norm + GATE) * n, dy * xhat, mask)
        _store(shares_ptr, of_shares + (before_norm + 4 + GATE) * n, dy, mask)
        dy *= _load(weight_ptr, GATE * n + offs_n, in_n, COMPUTE)
        dy = _norm_backward(dy, xhat, inverse, n)
    if bias_ptr is not None:
        _store(shares_ptr, of_shares + GATE * n, dy, mask)
    dx, dr = dy, dy
    if d_ptr is not None:
        x = _load(x_ptr, of_x + GATE * n, mask, COMPUTE)
        r = _load(r_ptr, of_r + GATE * n, mask, COMPUTE)
        dx = dy * _load(d_ptr, of_d + GATE * n, mask, COMPUTE)
        dr = dy * _load(d_ptr, of_d + (4 + GATE) * n, mask, COMPUTE)
        _store(dd_ptr, of_d + GATE * n, dy * x, mask)
        _store(dd_ptr, of_d + (4 + GATE) * n, dy * r, mask)
        _store(dd_ptr, of_d + (8 + GATE) * n, dy, mask)
    _store(dx_ptr, of_x + GATE * n, dx, mask)
    if dr_ptr is not None:
        _store(dr_ptr, of_x + GATE * n, dr, mask)
    _store(dgates_ptr, of_dgates + GATE * n, dr, mask)


@triton.jit(do_not_specialize=["start", "before", "rows", "first_row", "threshold"])
def lstm_bwd_kernel(
    x_ptr,  # [N, 4n]: x_gates; of the hyper LSTM all of its gates before normalisation
    r_ptr,  # [N, 4n]: h_gates; None for the hyper LSTM
    bias_ptr,  # as in the forward, to state_ptr
    d_ptr,  # [N, 12, n]
    c0_ptr,
    c_ptr,
    dh_ptr,  # [N, n] or None
    dstate_ptr,  # [B, STATE_WIDTH]: gradient of h by the steps that follow
    dc_ptr,  # [B, n]: of c, read and written
    dz_ptr,  # [N, Q] or None
    z_weight_ptr,  # [Q, n]
    gates_weight_ptr,
    gates_bias_ptr,
    cell_weight_ptr,
    cell_bias_ptr,
    key_ptr,
    dx_ptr,  # [N, 4n]
    dr_ptr,  # [N, 4n] or None
    dgates_ptr,  # [B, R_WIDTH]: dr again, for the product that gives dstate
    dd_ptr,  # like d
    shares_ptr,  # [N, SHARES, n]: each row's of the gradients of vectors
    start,
    before,
    rows,
    first_row,
    threshold,
    scale: tl.float64,
    eps: tl.float64,
    n: tl.constexpr,
    Q: tl.constexpr,
    R_WIDTH: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    offs_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    in_n, row = offs_n < n, start + offs_b
    mask = (offs_b < rows) & in_n
    of_x, of_c = row * (4 * n) + offs_n, row * n + offs_n
    of_d, of_shares = row * (12 * n) + offs_n, row * (SHARES * n) + offs_n
    at = (of_x, of_x, of_d, offs_n, in_n, mask)
    inputs, norm = (x_ptr, r_ptr, bias_ptr, d_ptr), (gates_weight_ptr, gates_bias_ptr)
    eps = tl.full((1,), eps, COMPUTE)

    dh = _load(dstate_ptr, offs_b * STATE_WIDTH + offs_n, mask, COMPUTE)
    if dh_ptr is not None:
        dh += _load(dh_ptr, of_c, mask, COMPUTE)
    if dz_ptr is not None:
        products = tl.zeros((BLOCK_Q, BLOCK_N), COMPUTE)
        for first in tl.static_range(0, Q, BLOCK_Q):  # one row
            offs_q = first + tl.arange(0, BLOCK_Q)
            in_q = offs_q < Q
            weight = _load(z_weight_ptr, offs_q[:, None] * n + offs_n, in_q[:, None] & in_n, COMPUTE)
            dz = _load(dz_ptr, (start + tl.program_id(0)).to(tl.int64) * Q + offs_q, in_q, COMPUTE)
            products += dz[:, None] * weight
        dh += tl.sum(products, 0)[None, :]
    i, i_hat, i_inverse = _gate(inputs, norm, None, at, eps, 0, n, COMPUTE)
    f, f_hat, f_inverse = _gate(inputs, norm, None, at, eps, 1, n, COMPUTE)
    g, g_hat, g_inverse = _gate(inputs, norm, None, at, eps, 2, n, COMPUTE)
    o, o_hat, o_inverse = _gate(inputs, norm, None, at, eps, 3, n, COMPUTE)
    i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
    read = _load(c_ptr, of_c, mask, COMPUTE)
    if cell_weight_ptr is not None:
        c_hat, c_inverse = _normalised(read, mask, eps, n)
        cell_weight = _load(cell_weight_ptr, offs_n, in_n, COMPUTE)
        read = c_hat * cell_weight + _load(cell_bias_ptr, offs_n, in_n, COMPUTE)
    read = _tanh(read)
    dread = dh * o * (1.0 - read * read)
    if cell_weight_ptr is not None:
        last: tl.constexpr = SHARES - 2
        _store(shares_ptr, of_shares + last * n, dread * c_hat, mask)
        _store(shares_ptr, of_shares + (last + 1) * n, dread, mask)
        dread = _norm_backward(dread * cell_weight, c_hat, c_inverse, n)
    dc = _load(dc_ptr, offs_b * n + offs_n, mask, COMPUTE) + dread
    _store(dc_ptr, offs_b * n + offs_n, dc * f, mask)
    di, dg = dc * g * i * (1.0 - i), dc * i * (1.0 - g * g)
    if key_ptr is not None:
        scales = _drop_scale(key_ptr, first_row + row, offs_n, threshold, scale, STREAM, COMPUTE)
        di *= scales
        dg *= scales
    c_before = _previous(c_ptr, c0_ptr, before, offs_b, offs_n, mask, n, COMPUTE)
    df, do = dc * c_before * f * (1.0 - f), dh * read * o * (1.0 - o)
    outputs, of_dgates = (dx_ptr, dr_ptr, dgates_ptr, dd_ptr, shares_ptr), offs_b * R_WIDTH + offs_n
    _gate_backward(
        di, i_hat, i_inverse, inputs, gates_weight_ptr, outputs, at, of_dgates, of_shares, 0, n, COMPUTE
    )  # fmt: skip
    _gate_backward(
        df, f_hat, f_inverse, inputs, gates_weight_ptr, outputs, at, of_dgates, of_shares, 1, n, COMPUTE
    )  # fmt: skip
    _gate_backward(
        dg, g_hat, g_inverse, inputs, gates_weight_ptr, outputs, at, of_dgates, of_shares, 2, n, COMPUTE
    )  # fmt: skip
    _gate_backward(
        do, o_hat, o_inverse, inputs, gates_weight_ptr, outputs, at, of_dgates, of_shares, 3, n, COMPUTE
    )  # fmt: skip


class Sizes(NamedTuple):
    """Of a call: T steps, N rows in all, B sequences; H and M units of the LSTM and its hyper LSTM, Z numbers
    of an embedding; M = Z = 0 without one."""

    T: int
    N: int
    B: int
    H: int
    M: int
    Z: int


class Weights(NamedTuple):
    """As `hyperfast.reference.lstm` has them; None for what there is not."""

    weight_hh: Tensor
    bias: Tensor
    hyper_weight_xh: Tensor | None
    hyper_weight_hh: Tensor | None
    z_weight: Tensor | None
    z_bias: Tensor | None
    d_weight: Tensor | None
    gates_weight: Tensor | None
    gates_bias: Tensor | None
    cell_weight: Tensor | None
    cell_bias: Tensor | None
    hyper_gates_weight: Tensor | None
    hyper_gates_bias: Tensor | None
    hyper_cell_weight: Tensor | None
    hyper_cell_bias: Tensor | None

    def recurrent(self) -> Tensor:
        """[4H + 4M, H + M]: all that is multiplied with h and hyper_h, in one product."""
        if self.hyper_weight_hh is None:
            return self.weight_hh
        upper = torch.nn.functional.pad(self.weight_hh, (0, self.hyper_weight_hh.shape[1]))
        return torch.cat((upper, torch.cat((self.hyper_weight_xh, self.hyper_weight_hh), 1)))

    def norms(self, hyper: bool) -> dict[str, Tensor | None]:
        names = ("gates_weight", "gates_bias", "cell_weight", "cell_bias")
        return {f"{name}_ptr": getattr(self, "hyper_" * hyper + name) for name in names}


class Step(NamedTuple):
    """`rows` rows from `start` on; those of the step before begin at `before`, -1 if there is none."""

    start: int
    before: int
    rows: int


def steps_of(batch_sizes: Tensor) -> list[Step]:
    """Of batch_sizes [T], on the CPU."""
    steps, start, before = [], 0, -1
    for rows in batch_sizes.tolist():
        if rows:
            steps.append(Step(start, before, rows))
            start, before = start + rows, start
    return steps


def _tile(B: int, n: int, Q: int, whole: bool, each: int) -> tuple[dict[str, int], int, int]:
    """Tile of a kernel over [B, n], its warps and its blocks of columns. whole: a program has whole rows; Q:
    rows of z_weight, if the kernel multiplies with it, one row at a time; each: elements of a thread."""
    power = triton.next_power_of_2
    BLOCK_N = power(n) if whole else min(power(n), COLUMNS)
    columns = triton.cdiv(n, BLOCK_N)
    wanted = triton.cdiv(B * columns, PROGRAMS)
    BLOCK_B = 1 if Q else max(1, min(power(wanted), ELEMENTS // BLOCK_N, power(B)))
    warps = max(1, min(BLOCK_B * BLOCK_N // (32 * each), MOST_WARPS))
    if Q:
        warps = max(warps, 8)
    BLOCK_Q = max(1, min(power(max(Q, 1)), Z_ELEMENTS // (BLOCK_B * BLOCK_N)))
    return {"BLOCK_B": BLOCK_B, "BLOCK_N": BLOCK_N, "BLOCK_Q": BLOCK_Q}, warps, columns


def _launch(kernel, sizes: Sizes, hyper: bool, whole: bool, **arguments) -> Launch:
    """Of the LSTM or its hyper LSTM, for a step of all B rows."""
    n = sizes.M if hyper else sizes.H
    Q = 12 * sizes.Z if arguments["z_weight_ptr"] is not None else 0
    each = 4 if whole and arguments["COMPUTE"] == tl.float32 else 2  # elsewhere Triton 3.6 spills with 4
    tile, warps, columns = _tile(sizes.B, n, Q, whole, each)
    arguments |= tile | {"n": n, "Q": Q, "STREAM": int(hyper)}
    arguments |= {"start": 0, "before": -1, "rows": sizes.B}
    arguments |= {"R_WIDTH": 4 * (sizes.H + sizes.M), "STATE_WIDTH": sizes.H + sizes.M}
    return Launch(kernel, (triton.cdiv(sizes.B, tile["BLOCK_B"]), columns, 1), arguments, num_warps=warps)


class Dropout(NamedTuple):
    """Its key, the share that it drops, and the number of the first row among those of the sequence."""

    key: Tensor | None
    share: float
    first_row: int


def _shared(weights: Weights, hyper: bool, dropout: Dropout, eps: float) -> dict:
    """Arguments that forward and backward have."""
    COMPUTE = compute_type(weights.weight_hh.dtype)
    made = weights.norms(hyper) | {"bias_ptr": None if hyper else weights.bias, "eps": eps}
    made |= {"key_ptr": dropout.key if dropout.share else None, "first_row": dropout.first_row}
    made |= {"threshold": int(dropout.share * 2**32), "scale": 1 / (1 - dropout.share)}
    return made | {"COMPUTE": COMPUTE}


def _per_step(launch: Launch) -> Callable[[Step], None]:
    """A function that makes the launch for a step."""
    call = launch.repeated(*STEP)
    BLOCK_B, columns = launch.arguments["BLOCK_B"], launch.grid[1]

    def run(step: Step) -> None:
        call((triton.cdiv(step.rows, BLOCK_B), columns, 1), *step)

    return run


def _shares(norms: bool, hyper: bool) -> int:
    """Numbers of a unit that a row of the backward adds to the gradients of vectors: of the bias, which the
    hyper LSTM has in its input, and of the norms."""
    return 10 * norms + (0 if hyper else 4)


def most_rows(sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Rows of a sequence to be taken at once, so that what the backward makes for each of them is not more
    than `CHUNK_BYTES`: its gates and their gradients, d and dd, and the shares of sums."""
    _, _, _, H, M, Z = sizes
    wide = max(dtype.itemsize, 4)
    of_row = dtype.itemsize * (8 * H + (28 * H + 4 * M + 24 * Z) * bool(M))
    of_row += wide * (_shares(True, False) * H + _shares(True, True) * M)
    return CHUNK_BYTES // of_row


class Forward:
    """Memory and launches of a call, by the arguments of `run`."""

    def __init__(self, sizes, weights, dropout, eps, tensors):
        self.sizes, self.weights = Sizes(*sizes), Weights(*weights)
        self.tensors, self.options = tensors, (dropout, eps)
        T, N, B, H, M, Z = self.sizes
        h0, hyper_h0 = tensors[2], tensors[4]
        self.state = h0.clone() if hyper_h0 is None else torch.cat((h0, hyper_h0), 1)
        self.gates = h0.new_empty(B, 4 * (H + M))
        self.z, self.d = h0.new_empty(B, 12, Z), h0.new_empty(B, 12, H if M else 0)
        self.makes_z = B <= Z_ROWS

    def launches(self) -> list[Launch]:
        """Those of a step, each by itself: of the LSTM, and of its hyper LSTM where there is one."""
        hypers = (False, True) if self.sizes.M else (False,)
        return [self._launch(hyper) for hyper in hypers]

    def _launch(self, hyper: bool) -> Launch:
        H, weights = self.sizes.H, self.weights
        x, hyper_x, _, c0, _, hyper_c0, h, c, hyper_h, hyper_c, h_gates, hyper_gates = self.tensors
        arguments = _shared(weights, hyper, *self.options)
        if hyper:
            arguments |= {"x_ptr": hyper_x, "c0_ptr": hyper_c0, "c_ptr": hyper_c, "h_ptr": hyper_h}
            arguments |= {"kept_ptr": hyper_gates, "d_ptr": None, "r_ptr": self.gates[:, 4 * H :]}
            arguments |= {"state_ptr": self.state[:, H:]}
        else:
            arguments |= {"x_ptr": x, "c0_ptr": c0, "c_ptr": c, "h_ptr": h, "kept_ptr": h_gates}
            arguments |= {"d_ptr": self.d if self.sizes.M else None, "r_ptr": self.gates}
            arguments |= {"state_ptr": self.state}
        makes_z = hyper and self.makes_z
        arguments |= {"z_weight_ptr": weights.z_weight if makes_z else None}
        arguments |= {"z_bias_ptr": weights.z_bias if makes_z else None, "z_ptr": self.z if makes_z else None}
        whole = makes_z or arguments["gates_weight_ptr"] is not None
        return _launch(lstm_fwd_kernel, self.sizes, hyper, whole, **arguments)

    def run(self, batch_sizes: Tensor) -> None:
        steps = steps_of(batch_sizes)
        if not steps:
            return
        cell, *hyper = map(_per_step, self.launches())
        recurrent = self.weights.recurrent().t()
        d_weight = self.weights.d_weight.transpose(1, 2) if hyper else None
        z_weight = self.weights.z_weight.t() if hyper else None
        seen = None
        for step in steps:
            if step.rows != seen:
                seen = step.rows
                state, gates = self.state[:seen], self.gates[:seen]
                z, d = self.z[:seen].transpose(0, 1), self.d[:seen].transpose(0, 1)
            torch.mm(state, recurrent, out=gates)
            if hyper:
                hyper[0](step)
                if not self.makes_z:
                    torch.addmm(
                        self.weights.z_bias, state[:, self.sizes.H :], z_weight, out=self.z[:seen].flatten(1)
                    )
                torch.bmm(z, d_weight, out=d)
            cell(step)


class Backward:
    """Memory and launches of a call, by the arguments of `run_backward`."""

    def __init__(self, sizes, weights, dropout, eps, inputs, outputs):
        self.sizes, self.weights = Sizes(*sizes), Weights(*weights)
        self.inputs, self.outputs, self.options = inputs, outputs, (dropout, eps)
        T, N, B, H, M, Z = self.sizes
        like = self.weights.weight_hh
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.state = like.new_zeros(B, H + M)
        self.dgates = like.new_empty(B, 4 * (H + M))
        self.dcs = [like.new_zeros(B, n, dtype=wide) for n in (H, M)]
        normed, hyper_normed = (self.weights.norms(h)["gates_weight_ptr"] is not None for h in (False, True))
        self.widths = _shares(normed, False), _shares(hyper_normed, True)
        columns = self.widths[0] * H, self.widths[1] * M
        self.d, self.dd = (like.new_empty(N, 12, H if M else 0) for _ in range(2))
        self.shares = [like.new_empty(N, width, dtype=wide) for width in columns]
        self.takes_z = B <= Z_ROWS

    def launches(self) -> list[Launch]:
        """Those of a step, each by itself: of the LSTM, and of its hyper LSTM where there is one."""
        hypers = (False, True) if self.sizes.M else (False,)
        return [self._launch(hyper) for hyper in hypers]

    def _launch(self, hyper: bool) -> Launch:
        H, weights = self.sizes.H, self.weights
        x, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, _, dh, *_ = self.inputs
        dx, dr, dhyper_gates, dz, *_ = self.outputs
        arguments = _shared(weights, hyper, *self.options)
        arguments |= {"shares_ptr": self.shares[hyper] if self.widths[hyper] else None}
        arguments |= {"SHARES": self.widths[hyper], "dc_ptr": self.dcs[hyper]}
        if hyper:
            arguments |= {"x_ptr": hyper_gates, "r_ptr": None, "c0_ptr": hyper_c0, "c_ptr": hyper_c}
            arguments |= {"d_ptr": None, "dd_ptr": None, "dh_ptr": None}
            arguments |= {"dx_ptr": dhyper_gates, "dr_ptr": None}
            arguments |= {"dstate_ptr": self.state[:, H:], "dgates_ptr": self.dgates[:, 4 * H :]}
        else:
            d, dd = (self.d, self.dd) if self.sizes.M else (None, None)
            arguments |= {"x_ptr": x, "r_ptr": h_gates, "c0_ptr": c0, "c_ptr": c, "dh_ptr": dh}
            arguments |= {"d_ptr": d, "dd_ptr": dd, "dx_ptr": dx, "dr_ptr": dr}
            arguments |= {"dstate_ptr": self.state, "dgates_ptr": self.dgates}
        takes_z = hyper and self.takes_z
        arguments |= {"dz_ptr": dz if takes_z else None}
        arguments |= {"z_weight_ptr": weights.z_weight if takes_z else None}
        whole = arguments["gates_weight_ptr"] is not None
        return _launch(lstm_bwd_kernel, self.sizes, hyper, whole, **arguments)

    def run(self, batch_sizes: Tensor) -> None:
        """The steps, the last first, with all rows' d made at once before and the gradients summed at once
        after."""
        self._take_last()
        steps = steps_of(batch_sizes)
        if not steps:
            return self._write(None)
        cell, *hyper = map(_per_step, self.launches())
        recurrent, dd_weight = self.weights.recurrent(), None
        if hyper:
            d_weight, dz_rows = self.weights.d_weight, self.outputs[3]
            z, dz = (t.view(-1, 12, self.sizes.Z).transpose(0, 1) for t in (self.inputs[7], dz_rows))
            d, dd = self.d.transpose(0, 1), self.dd.transpose(0, 1)
            torch.bmm(z, d_weight.transpose(1, 2), out=d)
        for step in reversed(steps):
            cell(step)
            if hyper:
                rows = slice(step.start, step.start + step.rows)
                torch.bmm(dd[:, rows], d_weight, out=dz[:, rows])
                if not self.takes_z:
                    dhyper_h = self.state[: step.rows, self.sizes.H :]
                    dhyper_h.addmm_(dz_rows[rows], self.weights.z_weight)
                hyper[0](step)
            torch.mm(self.dgates[: step.rows], recurrent, out=self.state[: step.rows])
        if hyper:
            dd_weight = torch.bmm(dd.transpose(1, 2), z, out=torch.empty_like(d_weight))
        self._write(dd_weight)

    def _take_last(self) -> None:
        """What comes from the last states. Rows of sequences that ended keep it until their own last step."""
        H = self.sizes.H
        places = self.state[:, :H], self.dcs[0], self.state[:, H:], self.dcs[1]
        for place, last in zip(places, self.inputs[9:], strict=True):
            if last is not None:
                place.copy_(last)

    def _write(self, dd_weight: Tensor | None) -> None:
        """What was summed, where it is wanted; dd_weight None: zero."""
        H = self.sizes.H
        dh0, dc0, dhyper_h0, dhyper_c0, dbias, dd_weight_out, *dnorms = self.outputs[4:]
        parts = self.state[:, :H], self.dcs[0], self.state[:, H:], self.dcs[1]
        for out, part in zip((dh0, dc0, dhyper_h0, dhyper_c0), parts, strict=True):
            if out is not None:
                out.copy_(part)
        if dd_weight_out is not None:
            dd_weight_out.zero_() if dd_weight is None else dd_weight_out.copy_(dd_weight)
        wanted = [[dbias, *dnorms[:4]], dnorms[4:]]
        for shares, outputs in zip(self.shares, wanted, strict=True):
            outputs = [out for out in outputs if out is not None]
            parts = shares.sum(0).split([len(out) for out in outputs]) if outputs else ()
            for out, part in zip(outputs, parts, strict=True):
                out.copy_(part)


@torch.no_grad()
def run(sizes, batch_sizes, weights, key, dropout, first_row, eps, tensors) -> None:
    """The forward. sizes (T, N, B, H, M, Z); batch_sizes int64 [T] on the CPU; weights as `Weights`; key
    int64 [1], read on the device; first_row: see `Dropout`; tensors x_gates [N, 4H], hyper_x_gates [N, 4M],
    h0, c0 [B, H], hyper_h0, hyper_c0 [B, M], then what is written: h, c [N, H], hyper_h, hyper_c [N, M],
    h_gates [N, 4H], hyper_gates [N, 4M]; these two may be None, and what belongs to the hyper LSTM is where
    there is none. All contiguous."""
    with on_device(tensors[0]):
        Forward(sizes, weights, Dropout(key, dropout, first_row), eps, tensors).run(batch_sizes)


@torch.no_grad()
def run_backward(sizes, batch_sizes, weights, key, dropout, first_row, eps, inputs, outputs) -> None:
    """The backward, as `run`. inputs x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z [N, 12Z], and
    the gradients dh [N, H], dh_last, dc_last [B, H], dhyper_h_last, dhyper_c_last [B, M], each None where it
    is zero; outputs dx_gates, dh_gates (None without hyper LSTM), dhyper_gates, dz, dh0, dc0, dhyper_h0,
    dhyper_c0, which may be those of the last states, dbias, dd_weight and the gradients of the eight vectors
    of normalisation."""
    with on_device(inputs[0]):
        Backward(sizes, weights, Dropout(key, dropout, first_row), eps, inputs, outputs).run(batch_sizes)


def _example(H: int, M: int, Z: int, norms: bool, dtype: torch.dtype, B: int, dropout: float) -> list[Launch]:
    """Of forward and backward, on tensors without memory."""
    wide = torch.float32

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if all(shape) else None

    N = 2 * B
    weights = [empty(4 * H, H), empty(4 * H), empty(4 * M, H), empty(4 * M, M), empty(12 * Z, M)]
    weights += [empty(12 * Z), empty(12, H, Z)]
    for n in (H, M):
        weights += [empty(width * norms, dtype=wide) for width in (4 * n, 4 * n, n, n)]
    key = torch.empty(1, dtype=torch.int64, device="meta")
    of_step = [empty(N, H), empty(N, H, dtype=wide), empty(N, M), empty(N, M, dtype=wide)]
    gates, hyper_gates = empty(N, 4 * H), empty(N, 4 * M)
    state = [empty(B, H), empty(B, H, dtype=wide), empty(B, M), empty(B, M, dtype=wide)]
    tensors = [gates, hyper_gates, *state, *of_step, gates, hyper_gates]
    options = (2, N, B, H, M, Z), weights, Dropout(key, dropout, 0), 1e-5
    z, c0, hyper_c0, c, hyper_c = empty(N, 12 * Z), state[1], state[3], of_step[1], of_step[3]
    inputs = [gates, c0, hyper_c0, c, hyper_c, gates, hyper_gates, z, of_step[0], *state]
    outputs = [gates, gates if M else None, hyper_gates, z, *state, weights[1], *weights[6:]]
    return Forward(*options, tensors).launches() + Backward(*options, inputs, outputs).launches()


def examples() -> list[tuple[str, Launch]]:
    """Plain and layer-norm LSTM, the HyperLSTM of batch 32 and H 512, the paper's, and a larger one."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    cases = {
        "LSTM 512, fp16": (512, 0, 0, False, torch.float16, 32, 0.0),
        "HyperLSTM 512, Z 16, fp32": (512, 128, 16, False, fp32, 32, 0.0),
        "layer-norm HyperLSTM 1000, Z 4, fp32": (1000, 128, 4, True, fp32, 128, 0.1),
        "layer-norm HyperLSTM 512, Z 16, bf16": (512, 128, 16, True, bf16, 32, 0.1),
        "layer-norm HyperLSTM 2048, Z 16, bf16": (2048, 256, 16, True, bf16, 512, 0.1),
        "layer-norm LSTM 1024, fp32": (1024, 0, 0, True, fp32, 128, 0.0),
        "layer-norm HyperLSTM 512, Z 16, fp64": (512, 128, 16, True, fp64, 32, 0.1),
    }
    return [(name, launch) for name, case in cases.items() for launch in _example(*case)]
