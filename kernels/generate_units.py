"""generate_units: u = a weight + bias [P, C], written straight into the kernels of all layers, and its
gradients, du [P, C] read straight out of theirs.

A row of u lies in one unit (C divides O I T), so it belongs to one layer: programs take tiles of u whatever
the layers, and look up for each row where its unit begins by binary search among the layers' first units.
Within a unit places are arithmetic on compile-time sizes, runs of I T elements that leave in 16 bytes a
thread where they are aligned. In channels_last a tile takes its columns in memory's order, runs of I: it is
the weight, small and in L2, that is gathered.

Forward, floor: P C elements written and 2 P C D operations; a and weight are small. Of Hyper WRN-40-2, [966,
64] x [64, 2304] in float32, 8.9 MB are 2.7 us of an H100's memory, and 285 MFLOP 4.3 us of its float32
units: only TF32 and half precision, on tensor cores, are bound by bytes.

Backward, floor: the P C elements of dw (and of w for l2) read and 4 P C D operations. One launch has the
programs of da = du weight^T, tiles [BLOCK_P, BLOCK_D] that go through columns, beside those of dweight = a^T
du and dbias, tiles [BLOCK_D, BLOCK_C] that go through rows. Each reads du once, the second time mostly from
L2. Programs that make both sums would read it once, but leave D (1 / BLOCK_P + 1 / BLOCK_C) partial sums for
each element of du, more than they save with tiles that fit the registers. Where there are fewer tiles than
multiprocessors the sums are cut into parts, and none is longer than MOST_TERMS; a second launch adds the
parts up in their order. Those are PROGRAMS tiles, 2 MB, or D / MOST_TERMS of du. No sum depends on timing.

Sizes of tiles and parts follow from registers (float32 products hold both factors of a step in them) and
from counting programs. They await a GPU, as does whether other programs of a multiprocessor hide that
dweight looks up rows in its loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.launch import TRITON_TYPES, Launch, compute_type, dot_precision, dot_type
from hyperfast.kernels.segments import check_aligned, find_segment, pointer, segments

PROGRAMS = 132  # multiprocessors of an H100: forward twice as many tiles, backward as many for each product
MOST_TERMS = 1024  # of a sum in one part
STAGES = 3
BLOCK_S, BLOCK_J = 8, 512  # parts and elements that a program of the sum takes at a time


@triton.jit
def _columns(places, I: tl.constexpr, T: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr):
    """The columns of u whose numbers lie at these places of a row. They differ only in channels_last where a
    row is WHOLE output channels: there places count in memory's order."""
    if LAST and WHOLE:
        rest = places % (I * T)
        return places - rest + rest % I * T + rest // I
    return places


@triton.jit
def _find_rows(
    rows_ptr,
    starts_ptr,
    L,
    offs_p,
    FIELDS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
):
    """Of each row of u: pointer to its layer's row of the table, units side by side there, and where its unit
    begins in the layer."""
    unit = offs_p // (O * I * T // C)
    layer = tl.zeros_like(unit)
    for halving in tl.static_range(1, 31):
        if BLOCK_L >> halving > 0:
            later = layer + (BLOCK_L >> halving)
            first = tl.load(starts_ptr + later, mask=later < L, other=2147483647)
            layer = tl.where(first <= unit, later, layer)
    unit -= tl.load(starts_ptr + layer)
    row_ptr = rows_ptr + layer * FIELDS
    across = tl.load(row_ptr + FIELDS - 1).to(tl.int32)
    down, right = unit // across, unit % across
    begin = down.to(tl.int64) * across * (O * I * T) + right.to(tl.int64) * (I if LAST else I * T)
    return row_ptr, across, begin


@triton.jit
def _offsets(
    offs_p,
    places,
    across,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Where these places of these rows of u lie in their layers, from the beginning of their units."""
    row = offs_p % (O * I * T // C)
    RUN: tl.constexpr = I if LAST else I * T
    if WHOLE:
        run, rest = (row * (C // RUN))[:, None] + (places // RUN)[None, :], (places % RUN)[None, :]
    else:
        place = (row * C)[:, None] + places[None, :]
        run, rest = place // RUN, place % RUN
        if LAST:
            run, rest = place // (I * T) * T + place % T, place % (I * T) // T
    return run * (across.to(INDEX) * RUN)[:, None] + rest


@triton.jit
def generate_units_fwd_kernel(
    rows_ptr,
    starts_ptr,
    L,
    a_ptr,
    weight_ptr,
    bias_ptr,
    P,
    BLOCK_L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK_C)
    offs_p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    places = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_p, in_c = offs_p < P, places < C
    columns = _columns(places, I, T, LAST, WHOLE)

    u = tl.zeros((BLOCK_P, BLOCK_C), COMPUTE)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < D
        offs_a = offs_p.to(tl.int64)[:, None] * D + offs_d[None, :]
        a = tl.load(a_ptr + offs_a, mask=in_p[:, None] & in_d[None, :], other=0.0)
        offs_w = offs_d.to(tl.int64)[:, None] * C + columns[None, :]
        weight = tl.load(weight_ptr + offs_w, mask=in_d[:, None] & in_c[None, :], other=0.0)
        u = tl.dot(a.to(DOT), weight.to(DOT), u, input_precision=PRECISION, out_dtype=COMPUTE)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + columns, mask=in_c, other=0.0).to(COMPUTE)[None, :]

    row_ptr, across, begin = _find_rows(rows_ptr, starts_ptr, L, offs_p, 2, BLOCK_L, C, O, I, T, LAST)
    w_ptr = pointer(row_ptr, 0, DTYPE, MULTIPLE) + begin
    offs = _offsets(offs_p, places, across, C, O, I, T, LAST, WHOLE, INDEX)
    tl.store(w_ptr[:, None] + offs, u.to(DTYPE), mask=in_p[:, None] & in_c[None, :])


@triton.jit
def _find_du(
    rows_ptr,
    starts_ptr,
    L,
    offs_p,
    BLOCK_L: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """Of each row of u: pointers to its unit in dw and w, whether there is a dw, and units side by side."""
    row_ptr, across, begin = _find_rows(rows_ptr, starts_ptr, L, offs_p, 3, BLOCK_L, C, O, I, T, LAST)
    given = tl.load(row_ptr) != 0
    dw_ptr = pointer(row_ptr, 0, DTYPE, MULTIPLE) + begin
    return dw_ptr, pointer(row_ptr, 1, DTYPE, MULTIPLE) + begin, given, across


@triton.jit
def _load_du(
    dw_ptr,
    w_ptr,
    given,
    across,
    offs_p,
    places,
    mask,
    l2,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    L2: tl.constexpr,
):
    """dw + l2 w of these rows and places of u; a layer without dw has zeros for it."""
    offs = _offsets(offs_p, places, across, C, O, I, T, LAST, WHOLE, INDEX)
    du = tl.load(dw_ptr[:, None] + offs, mask=mask & given[:, None], other=0.0)
    if L2:
        w = tl.load(w_ptr[:, None] + offs, mask=mask, other=0.0).to(COMPUTE)
        du = du.to(COMPUTE) + tl.full((1, 1), l2, COMPUTE) * w
    return du


@triton.jit
def _da(
    rows_ptr,
    starts_ptr,
    L,
    weight_ptr,
    da_ptr,
    P,
    l2,
    tile,
    chunk,
    split,
    BLOCK_L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """da[p, d] = sum of `chunk` columns of du[p, c] weight[d, c]; tiles by (part, block of P, block of D)."""
    across_d, down_p = tl.cdiv(D, BLOCK_D), tl.cdiv(P, BLOCK_P)
    offs_d = tile % across_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tile // across_d % down_p * BLOCK_P + tl.arange(0, BLOCK_P)
    part = tile // across_d // down_p
    in_p, in_d = offs_p < P, offs_d < D
    dw_ptr, w_ptr, given, across = _find_du(
        rows_ptr, starts_ptr, L, offs_p, BLOCK_L, C, O, I, T, LAST, DTYPE, MULTIPLE
    )
    da = tl.zeros((BLOCK_P, BLOCK_D), COMPUTE)
    for c in range(part * chunk, tl.minimum(part * chunk + chunk, C), STEP):
        places = c + tl.arange(0, STEP)
        in_c = places < C
        du = _load_du(
            dw_ptr, w_ptr, given, across, offs_p, places, in_p[:, None] & in_c[None, :], l2,
            C, O, I, T, LAST, WHOLE, INDEX, COMPUTE, L2,
        )  # fmt: skip
        columns = _columns(places, I, T, LAST, WHOLE)
        offs = offs_d.to(tl.int64)[None, :] * C + columns[:, None]
        weight = tl.load(weight_ptr + offs, mask=in_c[:, None] & in_d[None, :], other=0.0)
        da = tl.dot(du.to(DOT), weight.to(DOT), da, input_precision=PRECISION, out_dtype=COMPUTE)
    offs = part.to(tl.int64) * split + offs_p.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=in_p[:, None] & in_d[None, :])


@triton.jit
def _dweight(
    rows_ptr,
    starts_ptr,
    L,
    a_ptr,
    dweight_ptr,
    dbias_ptr,
    P,
    l2,
    tile,
    chunk,
    split,
    BLOCK_L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """dweight[d, c] = sum of `chunk` rows of a[p, d] du[p, c], and dbias[c], that of du[p, c]; tiles by
    (part, block of D, block of C). Either pointer may be None."""
    across_c, down_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    places = tile % across_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tile // across_c % down_d * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tile // across_c // down_d
    in_c, in_d = places < C, offs_d < D
    dweight = tl.zeros((BLOCK_D, BLOCK_C), COMPUTE)
    sums = tl.zeros((STEP, BLOCK_C), COMPUTE)
    for p in range(part * chunk, tl.minimum(part * chunk + chunk, P), STEP):
        offs_p = p + tl.arange(0, STEP)
        in_p = offs_p < P
        dw_ptr, w_ptr, given, across = _find_du(
            rows_ptr, starts_ptr, L, offs_p, BLOCK_L, C, O, I, T, LAST, DTYPE, MULTIPLE
        )
        du = _load_du(
            dw_ptr, w_ptr, given, across, offs_p, places, in_p[:, None] & in_c[None, :], l2,
            C, O, I, T, LAST, WHOLE, INDEX, COMPUTE, L2,
        )  # fmt: skip
        if dweight_ptr is not None:
            offs = offs_p.to(tl.int64)[None, :] * D + offs_d[:, None]
            a = tl.load(a_ptr + offs, mask=in_d[:, None] & in_p[None, :], other=0.0)
            dweight = tl.dot(a.to(DOT), du.to(DOT), dweight, input_precision=PRECISION, out_dtype=COMPUTE)
        if dbias_ptr is not None:
            sums += du.to(COMPUTE)
    columns = _columns(places, I, T, LAST, WHOLE)
    first = part.to(tl.int64) * split
    if dweight_ptr is not None:
        offs = first + offs_d.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(
            dweight_ptr + offs, dweight.to(dweight_ptr.dtype.element_ty), mask=in_d[:, None] & in_c[None, :]
        )
    if dbias_ptr is not None:
        if tile // across_c % down_d == 0:
            dbias = tl.sum(sums, 0).to(dbias_ptr.dtype.element_ty)
            tl.store(dbias_ptr + first + columns, dbias, mask=in_c)


@triton.jit
def generate_units_bwd_kernel(
    rows_ptr,
    starts_ptr,
    L,
    a_ptr,
    weight_ptr,
    da_ptr,
    dweight_ptr,
    dbias_ptr,
    P,
    l2: tl.float64,
    da_tiles,
    da_chunk,
    da_split,
    dweight_chunk,
    dweight_split,
    BLOCK_L: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,
    I: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
    DTYPE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    L2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    # grid: the tiles of da, then those of dweight and dbias; what is not wanted has no tiles and no pointer
    pid = tl.program_id(0)
    if pid < da_tiles:
        if da_ptr is not None:
            _da(
                rows_ptr, starts_ptr, L, weight_ptr, da_ptr, P, l2, pid, da_chunk, da_split,
                BLOCK_L, D, C, O, I, T, LAST, WHOLE, INDEX, DTYPE, MULTIPLE, COMPUTE, DOT, PRECISION, L2,
                BLOCK_P, BLOCK_D, STEP,
            )  # fmt: skip
    else:
        if dweight_ptr is not None or dbias_ptr is not None:
            _dweight(
                rows_ptr, starts_ptr, L, a_ptr, dweight_ptr, dbias_ptr, P, l2, pid - da_tiles,
                dweight_chunk, dweight_split, BLOCK_L, D, C, O, I, T, LAST, WHOLE, INDEX, DTYPE, MULTIPLE,
                COMPUTE, DOT, PRECISION, L2, BLOCK_C, BLOCK_D, STEP,
            )  # fmt: skip


@triton.jit
def generate_units_sum_kernel(
    rows_ptr,
    starts_ptr,
    L,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """out[j] = sum_s parts[s, j] for each of up to three results, in their parts' order."""
    row_ptr, block = find_segment(rows_ptr, starts_ptr, L, 5, BLOCK_L)
    out_ptr, parts_ptr = pointer(row_ptr, 0, DTYPE), pointer(row_ptr, 1, COMPUTE)
    parts, split, size = tl.load(row_ptr + 2), tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    offs_j = block.to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_S, BLOCK_J), COMPUTE)
    for first in range(0, parts, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < parts)[:, None] & (offs_j < size)[None, :]
        total += tl.load(parts_ptr + offs_s[:, None] * split + offs_j[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_j, tl.sum(total, 0).to(DTYPE), mask=offs_j < size)


_power = triton.next_power_of_2


def _block(size: int, most: int) -> int:
    """The largest power of two from 16 to `most` whose whole blocks exceed `size` by at most an eighth, or
    16."""
    found = most
    while found > 16 and triton.cdiv(size, found) * found * 8 > size * 9:
        found //= 2
    return found


def _side(dtype: torch.dtype) -> int:
    """Of the largest tiles."""
    return 32 if dtype == torch.float64 else 64


def _step(dtype: torch.dtype) -> int:
    """Terms of a sum that one product of tiles adds: float32 and float64 hold them in registers."""
    return 16 if dtype in (torch.float32, torch.float64) else 64


def _warps(*tile: int) -> int:
    """16 elements of a tile for each thread."""
    return 8 if tile[0] * tile[1] >= 4096 else 4


def _shared(
    rows: Sequence[tuple[int, ...]],
    a: Tensor,
    weight: Tensor,
    unit: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
) -> dict[str, object]:
    """The arguments of forward and backward alike. ValueError for an address between elements."""
    addresses = [address for row in rows for address in row[:-2]]
    check_aligned(addresses, dtype.itemsize)
    made = segments([(*row[:-2], row[-1]) for row in rows], [row[-2] for row in rows], a.device)
    (O, I, T), (D, C) = unit, weight.shape
    span = max(row[-1] for row in rows) * O * I * T  # of a unit in memory
    return made.arguments() | {
        "P": len(a), "D": D, "C": C, "O": O, "I": I, "T": T, "LAST": channels_last and T > 1,
        "WHOLE": C % (I * T) == 0, "INDEX": tl.int32 if span < 2**31 else tl.int64,
        "DTYPE": TRITON_TYPES[dtype], "MULTIPLE": 16 if all(x % 16 == 0 for x in addresses) else 1,
        "COMPUTE": compute_type(a.dtype), "DOT": dot_type(a.dtype), "PRECISION": dot_precision(a.dtype),
    }  # fmt: skip


def launches(
    rows: Sequence[tuple[int, int, int]],
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unit: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
) -> Iterator[Launch]:
    """Fills the layers: rows (address of w, units, units side by side), all in `dtype`, contiguous or in
    channels_last, [m O, T, n I]. a [P, D], weight [D, C] and bias [C] are contiguous and of one dtype; unit:
    O, I, T."""
    (P, D), C, block_p = a.shape, weight.shape[1], _side(a.dtype)
    block_c, block_d = _block(C, block_p), min(max(_power(D), 16), _step(a.dtype))
    columns = triton.cdiv(C, block_c)
    while block_p > 16 and triton.cdiv(P, block_p) * columns < 2 * PROGRAMS:
        block_p //= 2
    arguments = _shared(rows, a, weight, unit, channels_last, dtype)
    arguments |= {"a_ptr": a, "weight_ptr": weight, "bias_ptr": bias}
    arguments |= {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_D": block_d}
    grid = (triton.cdiv(P, block_p) * columns,)
    yield Launch(generate_units_fwd_kernel, grid, arguments, _warps(block_p, block_c), STAGES)


def _parts(terms: int, step: int, tiles: int) -> tuple[int, int]:
    """(parts, terms of each) into which the sums of so many tiles are cut."""
    parts = max(1, PROGRAMS // tiles, triton.cdiv(terms, MOST_TERMS))
    chunk = triton.cdiv(triton.cdiv(terms, parts), step) * step
    return triton.cdiv(terms, chunk), chunk


def backward_launches(
    rows: Sequence[tuple[int, int, int, int]],
    l2: float,
    a: Tensor,
    weight: Tensor,
    da: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    unit: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
) -> Iterator[Launch]:
    """Fills those of da, dweight and dbias that are given, like a, weight and bias. rows: (address of dw or 0
    for zeros, address of w, for l2 alone, units, units side by side); the rest as in `launches`."""
    (P, D), C, side, step = a.shape, weight.shape[1], _side(a.dtype), _step(a.dtype)
    block_c, block_d = _block(C, side), min(max(_power(D), 16), side)
    of_rows, of_columns = (triton.cdiv(n, block) for n, block in ((P, side), (C, block_c)))
    down_d = triton.cdiv(D, block_d)
    da_tiles, dweight_tiles = of_rows * down_d, of_columns * down_d
    da_parts, da_chunk = _parts(C, step, da_tiles)
    dweight_parts, dweight_chunk = _parts(P, step, dweight_tiles)

    (da_to,), da_split, of_da = _in_parts(da_parts, da)
    (dweight_to, dbias_to), dweight_split, of_dweight = _in_parts(dweight_parts, dweight, dbias)
    da_tiles = 0 if da is None else da_tiles * da_parts
    dweight_tiles = 0 if dweight is None and dbias is None else dweight_tiles * dweight_parts
    arguments = _shared(rows, a, weight, unit, channels_last, dtype) | {
        "a_ptr": a, "weight_ptr": weight, "da_ptr": da_to, "dweight_ptr": dweight_to, "dbias_ptr": dbias_to,
        "da_tiles": da_tiles, "da_chunk": da_chunk, "da_split": da_split, "dweight_chunk": dweight_chunk,
        "dweight_split": dweight_split, "l2": float(l2), "L2": l2 != 0, "BLOCK_P": side, "BLOCK_C": block_c,
        "BLOCK_D": block_d, "STEP": step,
    }  # fmt: skip
    grid = (da_tiles + dweight_tiles,)
    yield Launch(generate_units_bwd_kernel, grid, arguments, _warps(side, block_d), STAGES)
    if sums := of_da + of_dweight:
        made = segments(sums, [triton.cdiv(row[-1], BLOCK_J) for row in sums], a.device)
        constants = {"BLOCK_S": BLOCK_S, "BLOCK_J": BLOCK_J}
        constants |= {"DTYPE": TRITON_TYPES[a.dtype], "COMPUTE": compute_type(a.dtype)}
        yield Launch(generate_units_sum_kernel, (made.blocks,), made.arguments() | constants, num_warps=8)


def _in_parts(parts: int, *results: Tensor | None) -> tuple[list[Tensor | None], int, list[tuple[int, ...]]]:
    """Where `parts` parts of the results go, how far apart those of one result lie, and rows for the kernel
    that adds them up: the results themselves and no rows where there is one part."""
    given = [result for result in results if result is not None]
    if parts == 1 or not given:
        return list(results), 0, []
    split = sum(result.numel() for result in given)
    dtype = torch.float64 if given[0].dtype == torch.float64 else torch.float32
    memory = torch.empty(parts * split, dtype=dtype, device=given[0].device)
    places, rows = [], []
    for result in results:
        places.append(None if result is None else memory)
        if result is not None:
            rows.append((result.data_ptr(), memory.data_ptr(), parts, split, result.numel()))
            memory = memory[result.numel() :]
    return places, split, rows


def run(*arguments) -> None:
    """`launches` of the same arguments, run."""
    for launch in launches(*arguments):
        launch.run()


def run_backward(*arguments) -> None:
    """`backward_launches` of the same arguments, run."""
    for launch in backward_launches(*arguments):
        launch.run()


WRN = [(1, 2, 1), (11, 4, 2), (1, 8, 2), (11, 16, 4), (1, 32, 4), (11, 64, 8)]  # layers, units, side by side


def _example(P: int, D: int, C: int, last: bool, dtype: torch.dtype, l2: float = 0.0) -> Iterator[Launch]:
    """Forward and backward of Hyper WRN-40-2, on tensors without memory."""
    unit, address = (16, 16, 9), 4096
    a, weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((P, D), (D, C), (C,)))
    rows = [(address, *sizes) for layers, *sizes in WRN for _ in range(layers)]
    yield from launches(rows, a, weight, bias, unit, last, dtype)
    rows = [(address, *row) for row in rows]
    yield from backward_launches(rows, l2, a, weight, a, weight, bias, unit, last, dtype)


def examples() -> list[tuple[str, Launch]]:
    """(name, launch) to compile without a GPU: Hyper WRN-40-2, from its 966 embeddings or from what the first
    layer of their generator makes; the sums of the first."""
    cases = {
        "embeddings, float32": (966, 64, 2304, False, torch.float32, 5e-6),
        "embeddings, bfloat16, channels_last": (966, 64, 2304, True, torch.bfloat16),
        "second layer, float32": (15456, 64, 144, False, torch.float32),
        "second layer, bfloat16": (15456, 64, 144, False, torch.bfloat16, 5e-6),
        "K 4, float32, channels_last": (966, 4, 2304, True, torch.float32, 5e-6),
        "rows of 36, float16, channels_last": (61824, 16, 36, True, torch.float16),
        "embeddings, float64, channels_last": (966, 64, 2304, True, torch.float64, 5e-6),
    }
    return [
        (name, launch)
        for name, case in cases.items()
        for launch in _example(*case)
        if launch.kernel is not generate_units_sum_kernel or name.startswith("embeddings")
    ]
