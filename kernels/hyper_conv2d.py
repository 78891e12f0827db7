"""hyper_conv2d: generation merged with the convolution, or linear layer, that uses the weights.

y[m, o] = sum_i x_col[m, i] w[o, i] + layer_bias[o], w[o, i] = sum_k weight[o I + i, k] z[k] + bias[o I +
i], for M = B H' W' rows and the I = C / groups R S columns i = (c, r, s) of a group: an implicit matrix
product that gathers its rows from x by index arithmetic and makes each tile of w on chip. A linear layer is
a 1 x 1 convolution of 1 x 1 images.

Floor of the forward: the N K elements of the generator over the bandwidth; beside it 2 N K operations of
generation, in float32, and 2 M N of the product. Generating first adds 2 N elements (w written and read,
mostly in L2) and a launch: merging may cost no more than that, but each further block of rows makes the
tiles again from N K elements in L2. So a block takes all rows up to 128 (64 in float32), programs of one
tile of w are neighbours in the grid, and `merged_wins` (hyperfast.ops.hyper_layers) takes this path for few
rows only.

- Up to 8 rows a product of tiles would leave half of the tensor cores' 16 rows empty and pass w through
  shared memory. There, for float64, and for K over 64 (a tile of 16 x 16 outputs and columns would not fit
  the registers), weights are multiplied where they were made and added up at the end. Blocks are long in I
  and short in O: enough of them that no sum is cut.
- Beyond, tensor cores multiply what is generated in float32 and rounded to x's type: float16, bfloat16, and
  TF32 if torch.backends.cuda.matmul.fp32_precision says so. Float32 otherwise goes through ordinary
  registers. Loads run two tiles ahead. Where there are fewer blocks than a GPU runs at a time, the sum is
  cut into parts, added up in their order by a second kernel: 8 bytes for each output, row and part.

Backward: dx gathers, for each pixel of x, the outputs it meets, and generates again; dw[n] = sum_m dy[m, o]
x_col[m, i] and, in the same program while the rows fit in one block, dz[k] = sum_n dw[n] weight[n, k].
Floor: the generator read twice, once for dx and once for dz. No sum depends on timing. The sizes of blocks
and parts depend on shapes and dtypes alone; they follow from the above and await measurement on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.convolution import (
    Layer,
    gather_columns,
    meeting_rows,
    pixels,
    power,
    split,
    strides,
    sum_parts,
)
from hyperfast.kernels.launch import Launch

FEW_ROWS = 8  # up to here without tensor cores
MOST_ROWS = 64  # of a block in float32; twice that in half precision
DOT_K = 64  # beyond, without tensor cores
TILE_BYTES = 32768  # of the generator, for each step of a block
PROGRAMS = {True: 2 * 132, False: 4 * 132}  # with tensor cores: blocks that 132 multiprocessors run at a time


@triton.jit
def _weights(weight_ptr, bias_ptr, z, rows, offs_k, mask, K: tl.constexpr):
    """weight z + bias of the generator's `rows` [A, B], in z's type."""
    offs = rows[:, :, None] * K + offs_k[None, None, :]
    in_tile = mask[:, :, None] & (offs_k < K)[None, None, :]
    weight = tl.load(weight_ptr + offs, mask=in_tile, other=0.0).to(z.dtype)
    w = tl.sum(weight * z[None, None, :], 2)
    if bias_ptr is not None:
        w += tl.load(bias_ptr + rows, mask=mask, other=0.0).to(z.dtype)
    return w


@triton.jit
def hyper_conv2d_fwd_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    layer_bias_ptr,
    y_ptr,
    M,
    C,
    O,
    H,
    W,
    out_h,
    out_w,
    x_b,
    x_c,
    x_h,
    x_w,
    y_split,
    y_b,
    y_c,
    y_h,
    y_w,
    chunk,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    BY_TAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grid: (row blocks x output blocks x groups, the rows fastest; parts of `chunk` steps). A step is BLOCK_I
    # columns or, BY_TAP, as many channels at one place (r, s) of the kernel: channels_last comes in vectors
    pid = tl.program_id(0)
    row_blocks, output_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    group = pid // row_blocks // output_blocks
    offs_m = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid // row_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    in_m, in_o = offs_m < M, offs_o < O
    I = C * (R * S)
    channels = (group * O + offs_o).to(tl.int64)  # of y
    z = tl.load(z_ptr + offs_k, mask=offs_k < K, other=0.0).to(COMPUTE)

    begin = tl.program_id(1) * chunk
    if DOT is None:
        products = tl.zeros((BLOCK_M, BLOCK_O, BLOCK_I), COMPUTE)
    else:
        y = tl.zeros((BLOCK_M, BLOCK_O), COMPUTE)
    steps = tl.cdiv(C, BLOCK_I) * (R * S) if BY_TAP else tl.cdiv(I, BLOCK_I)
    for step in range(begin, tl.minimum(begin + chunk, steps)):
        if BY_TAP:
            c = step // (R * S) * BLOCK_I + tl.arange(0, BLOCK_I)
            r = tl.full((BLOCK_I,), step // S % R, tl.int32)
            s = tl.full((BLOCK_I,), step % S, tl.int32)
            offs_i = c * (R * S) + step % (R * S)
        else:
            offs_i = step * BLOCK_I + tl.arange(0, BLOCK_I)
            c, r, s = offs_i // (R * S), offs_i // S % R, offs_i % S
        in_i = c < C
        x = gather_columns(
            x_ptr, offs_m, group * C + c, r * DILATION_H, s * DILATION_W, in_m, in_i, H, W, out_h, out_w,
            x_b, x_c, x_h, x_w, STRIDE_H, STRIDE_W, TOP, LEFT, PADDED,
        )  # fmt: skip
        rows = channels[:, None] * I + offs_i[None, :]
        w = _weights(weight_ptr, bias_ptr, z, rows, offs_k, in_o[:, None] & in_i[None, :], K)
        if DOT is None:
            products += x.to(COMPUTE)[:, None, :] * w[None, :, :]
        else:
            w = w.to(x.dtype).to(DOT)
            y = tl.dot(x.to(DOT), tl.trans(w), y, input_precision=PRECISION)
    if DOT is None:
        y = tl.sum(products, 2)
    if layer_bias_ptr is not None:
        y += tl.load(layer_bias_ptr + channels, mask=in_o, other=0.0).to(COMPUTE)[None, :]

    image, row, column = pixels(offs_m, out_h, out_w)
    of_m = tl.program_id(1).to(tl.int64) * y_split + image * y_b + row.to(tl.int64) * y_h + column * y_w
    offs_y = of_m[:, None] + channels[None, :] * y_c
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_o[None, :])


@triton.jit
def hyper_conv2d_bwd_x_kernel(
    dy_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    P,
    C,
    O,
    H,
    W,
    out_h,
    out_w,
    dy_b,
    dy_c,
    dy_h,
    dy_w,
    dx_split,
    dx_b,
    dx_c,
    dx_h,
    dx_w,
    chunk,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dx[p, c] = sum over o, r, s of dy[the pixel that p meets there, o] w[o, c, r, s]
    # grid: (pixel blocks x channel blocks x groups, the pixels fastest; parts of `chunk` steps). A step is
    # BLOCK_O outputs at one place (r, s) of the kernel
    pid = tl.program_id(0)
    pixel_blocks, channel_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(C, BLOCK_C)
    group = pid // pixel_blocks // channel_blocks
    offs_p = pid % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid // pixel_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    in_p, in_c = offs_p < P, offs_c < C
    image, h, w = pixels(offs_p, H, W)
    z = tl.load(z_ptr + offs_k, mask=offs_k < K, other=0.0).to(COMPUTE)

    begin = tl.program_id(1) * chunk
    if DOT is None:
        products = tl.zeros((BLOCK_P, BLOCK_O, BLOCK_C), COMPUTE)
    else:
        dx = tl.zeros((BLOCK_P, BLOCK_C), COMPUTE)
    for step in range(begin, tl.minimum(begin + chunk, tl.cdiv(O, BLOCK_O) * (R * S))):
        r, s = step // S % R, step % S
        offs_o = step // (R * S) * BLOCK_O + tl.arange(0, BLOCK_O)
        in_o = offs_o < O
        outputs = (group * O + offs_o).to(tl.int64)
        down, right = h + TOP - r * DILATION_H, w + LEFT - s * DILATION_W
        row, column, meets = meeting_rows(down, right, out_h, out_w, STRIDE_H, STRIDE_W)
        meets = in_p if POINTWISE else in_p & meets
        of_p = image * dy_b + row.to(tl.int64) * dy_h + column.to(tl.int64) * dy_w
        mask = meets[:, None] & in_o[None, :]
        dy = tl.load(dy_ptr + of_p[:, None] + outputs[None, :] * dy_c, mask=mask, other=0.0)
        rows = (outputs[:, None] * C + offs_c[None, :]) * (R * S) + (r * S + s)
        made = _weights(weight_ptr, bias_ptr, z, rows, offs_k, in_o[:, None] & in_c[None, :], K)
        if DOT is None:
            products += dy.to(COMPUTE)[:, :, None] * made[None, :, :]
        else:
            dx = tl.dot(dy.to(DOT), made.to(dy.dtype).to(DOT), dx, input_precision=PRECISION)
    if DOT is None:
        dx = tl.sum(products, 1)

    of_p = (
        tl.program_id(1).to(tl.int64) * dx_split
        + image * dx_b
        + h.to(tl.int64) * dx_h
        + w.to(tl.int64) * dx_w
    )
    offs_x = of_p[:, None] + (group * C + offs_c).to(tl.int64)[None, :] * dx_c
    tl.store(dx_ptr + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=in_p[:, None] & in_c[None, :])


@triton.jit
def hyper_conv2d_bwd_w_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dw_ptr,
    dz_ptr,
    M,
    C,
    O,
    H,
    W,
    out_h,
    out_w,
    dy_b,
    dy_c,
    dy_h,
    dy_w,
    x_b,
    x_c,
    x_h,
    x_w,
    dw_split,
    chunk,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grid: (column blocks x output blocks x groups; parts of `chunk` rows). dw_ptr or dz_ptr may be None;
    # dz_ptr [grid, K] takes each tile's share of dz and asks for one part only
    pid = tl.program_id(0)
    I = C * (R * S)
    column_blocks, output_blocks = tl.cdiv(I, BLOCK_I), tl.cdiv(O, BLOCK_O)
    group = pid // column_blocks // output_blocks
    offs_i = pid % column_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = pid // column_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_i, in_o = offs_i < I, offs_o < O
    c, r, s = offs_i // (R * S), offs_i // S % R, offs_i % S
    channels = (group * O + offs_o).to(tl.int64)

    begin = tl.program_id(1) * chunk
    dw = tl.zeros((BLOCK_O, BLOCK_I), COMPUTE)
    for m in range(begin, tl.minimum(begin + chunk, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        x = gather_columns(
            x_ptr, offs_m, group * C + c, r * DILATION_H, s * DILATION_W, in_m, in_i, H, W, out_h, out_w,
            x_b, x_c, x_h, x_w, STRIDE_H, STRIDE_W, TOP, LEFT, PADDED,
        )  # fmt: skip
        image, row, column = pixels(offs_m, out_h, out_w)
        of_m = image * dy_b + row.to(tl.int64) * dy_h + column.to(tl.int64) * dy_w
        offs_dy = channels[:, None] * dy_c + of_m[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=in_o[:, None] & in_m[None, :], other=0.0)
        if DOT is None:
            dw += tl.sum(dy.to(COMPUTE)[:, :, None] * x.to(COMPUTE)[None, :, :], 1)
        else:
            dw = tl.dot(dy.to(DOT), x.to(DOT), dw, input_precision=PRECISION)

    rows = channels[:, None] * I + offs_i[None, :]
    mask = in_o[:, None] & in_i[None, :]
    if dw_ptr is not None:
        offs_w = tl.program_id(1).to(tl.int64) * dw_split + rows
        tl.store(dw_ptr + offs_w, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if dz_ptr is not None:
        offs_k = tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        offs = rows[:, :, None] * K + offs_k[None, None, :]
        weight = tl.load(weight_ptr + offs, mask=mask[:, :, None] & in_k[None, None, :], other=0.0).to(
            COMPUTE
        )
        dz = tl.sum(tl.sum(weight * dw[:, :, None], 1), 0)
        tl.store(dz_ptr + pid.to(tl.int64) * K + offs_k, dz, mask=in_k)


@triton.jit
def hyper_conv2d_bwd_z_kernel(
    parts_ptr,
    weight_ptr,
    dw_ptr,
    dz_ptr,
    parts,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw[n] = sum_p parts[p, n], and this block's part of dz; dw_ptr or dz_ptr [grid, K] may be None."""
    block = tl.program_id(0).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n, in_k = offs_n < N, offs_k < K
    dw = tl.zeros((BLOCK_N,), parts_ptr.dtype.element_ty)
    for part in range(0, parts):
        dw += tl.load(parts_ptr + tl.cast(part, tl.int64) * N + offs_n, mask=in_n, other=0.0)
    if dw_ptr is not None:
        tl.store(dw_ptr + offs_n, dw.to(dw_ptr.dtype.element_ty), mask=in_n)
    if dz_ptr is not None:
        mask = in_n[:, None] & in_k[None, :]
        weight = tl.load(weight_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        dz = tl.sum(weight.to(dw.dtype) * dw[:, None], 0)
        tl.store(dz_ptr + block * K + offs_k, dz, mask=in_k)


class Tiles(NamedTuple):
    """What a block works on: rows, and outputs x columns of the generator; on tensor cores or not."""

    rows: int
    outputs: int
    columns: int
    dot: bool


def tiles(rows: int, outputs: int, columns: int, K: int, dtype: torch.dtype, x_dtype: torch.dtype) -> Tiles:
    """By the sizes of a group and the dtypes of the generator and of x; see the head of this file."""
    dot = rows > FEW_ROWS and K <= DOT_K and dtype != torch.float64
    if dot:  # a tile of at least 16 x 16, the least that tensor cores take
        scale = 1 if x_dtype == torch.float32 else 2  # float32 products take twice the registers
        most = 512 * scale if K > 2 else 256 * scale  # larger tiles spill there
        weights = min(max(TILE_BYTES // dtype.itemsize // power(K), 256), most)
        block_o = min(max(power(outputs), 16), 32 if weights > 256 else 16)
        block_i = min(max(power(columns), 16), weights // block_o)
        return Tiles(min(max(power(rows), 16), MOST_ROWS * scale), block_o, block_i, True)
    # as many elements as in float32, so that the sums [rows, weights] fit the registers beside them
    elements = TILE_BYTES // (16 if dtype == torch.float64 else 4) // (2 if rows > FEW_ROWS // 2 else 1)
    weights = min(elements // power(K), 1024)
    block_i = min(power(columns), weights)
    return Tiles(min(power(rows), FEW_ROWS), min(power(outputs), weights // block_i), block_i, False)


def _tiles(layer: Layer, rows: int, columns: int) -> Tiles:
    return tiles(rows, layer.O, columns, layer.K, layer.dtype, layer.x_dtype)


def _launch(layer: Layer, kernel, grid: tuple[int, ...], dot: bool, **arguments) -> Launch:
    return layer.launch(kernel, grid, **arguments if dot else {"DOT": None} | arguments)


def launches(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_bias: Tensor | None,
    y: Tensor,
    geometry: tuple[int, ...],
) -> Iterator[Launch]:
    """Fills y [B, O, H', W'], dense in memory, in x's dtype. x [B, groups C, H, W] has any strides; z [K],
    weight [N, K], bias [N], layer_bias [O] are contiguous and of one dtype. geometry: see `Layer`."""
    layer = Layer(x, z, weight, y, geometry)
    by_tap = layer.taps > 1 and layer.C >= 16 and layer.rows > FEW_ROWS
    columns, repeats = (layer.C, layer.taps) if by_tap else (layer.I, 1)
    block_m, block_o, block_i, dot = _tiles(layer, layer.rows, columns)
    blocks = triton.cdiv(layer.rows, block_m) * layer.groups * triton.cdiv(layer.O, block_o)
    parts, chunk = split(triton.cdiv(columns, block_i) * repeats, blocks, PROGRAMS[dot])
    out = y if parts == 1 else layer.scratch(x.device, parts, y.numel())
    yield _launch(
        layer, hyper_conv2d_fwd_kernel, (blocks, parts), dot, x_ptr=x, bias_ptr=bias, y_ptr=out,
        layer_bias_ptr=layer_bias if parts == 1 else None, **strides("x", x), **strides("y", y),
        y_split=y.numel(), chunk=chunk, BY_TAP=by_tap, BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
    if parts > 1:
        yield sum_parts(out, layer_bias, y, y.stride(1), y.shape[1])


def backward_launches(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dz: Tensor | None,
    dw: Tensor | None,
    geometry: tuple[int, ...],
) -> Iterator[Launch]:
    """Fills those of dx (like x, dense in memory), dz [K] and dw [N] (in weight's dtype) that are given; dy
    [B, O, H', W'] and x in x's dtype with any strides, the rest as in `launches`."""
    layer = Layer(x, z, weight, dy, geometry)
    if dx is not None:
        yield from _dx_launches(layer, dy, bias, dx)
    if dz is not None or dw is not None:
        yield from _dw_launches(layer, dy, x, dz, dw)


def _dx_launches(layer: Layer, dy: Tensor, bias: Tensor | None, dx: Tensor) -> Iterator[Launch]:
    block_p, block_o, block_c, dot = _tiles(layer, layer.pixels, min(layer.C, 64))
    blocks = triton.cdiv(layer.pixels, block_p) * layer.groups * triton.cdiv(layer.C, block_c)
    parts, chunk = split(triton.cdiv(layer.O, block_o) * layer.taps, blocks, PROGRAMS[dot])
    out = dx if parts == 1 else layer.scratch(dx.device, parts, dx.numel())
    yield _launch(
        layer, hyper_conv2d_bwd_x_kernel, (blocks, parts), dot, dy_ptr=dy, bias_ptr=bias, dx_ptr=out,
        **strides("dy", dy), **strides("dx", dx), dx_split=dx.numel(), chunk=chunk,
        BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_C=block_c,
    )  # fmt: skip
    if parts > 1:
        yield sum_parts(out, None, dx)


def _dw_launches(
    layer: Layer, dy: Tensor, x: Tensor, dz: Tensor | None, dw: Tensor | None
) -> Iterator[Launch]:
    """dz in the pass that makes dw, where one block has all rows and its tile of the generator fits the
    registers; else in the pass that adds up the parts of dw."""
    block_m, block_o, block_i, dot = _tiles(layer, layer.rows, layer.I)
    one_pass = layer.rows <= block_m
    if not one_pass:
        dot = layer.dtype != torch.float64
        block_m, block_o, block_i = (32, 64, 64) if dot else (FEW_ROWS, 16, 16)
    blocks = layer.groups * triton.cdiv(layer.O, block_o) * triton.cdiv(layer.I, block_i)
    parts, chunk = split(triton.cdiv(layer.rows, block_m), blocks, PROGRAMS[dot])
    direct = parts == 1 and (one_pass or dz is None)
    dw_parts = dw if direct else layer.scratch(x.device, parts, layer.N)
    dz_parts = layer.scratch(x.device, blocks, layer.K) if direct and dz is not None else None
    yield _launch(
        layer, hyper_conv2d_bwd_w_kernel, (blocks, parts), dot, dy_ptr=dy, x_ptr=x, dw_ptr=dw_parts,
        dz_ptr=dz_parts, **strides("dy", dy), **strides("x", x), dw_split=layer.N, chunk=chunk * block_m,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
    if not direct:
        block_n = max(1, 4096 // power(layer.K))
        blocks = triton.cdiv(layer.N, block_n)
        dz_parts = layer.scratch(x.device, blocks, layer.K) if dz is not None else None
        yield _launch(
            layer, hyper_conv2d_bwd_z_kernel, (blocks,), False, parts_ptr=dw_parts, dw_ptr=dw,
            dz_ptr=dz_parts, parts=parts, N=layer.N, BLOCK_N=block_n,
        )  # fmt: skip
    if dz is not None:
        yield sum_parts(dz_parts, None, dz)


def run(*arguments) -> None:
    """`launches` of the same arguments, run."""
    for launch in launches(*arguments):
        launch.run()


def run_backward(*arguments) -> None:
    """`backward_launches` of the same arguments, run."""
    for launch in backward_launches(*arguments):
        launch.run()


LINEAR = (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
PADDED = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)


def _example(
    B: int, I: int, O: int, side: int, geometry: tuple[int, ...], dtype: torch.dtype, backward: bool
):
    """Those of a layer of `full`, on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N = O * I * geometry[0] * geometry[1]
    x, y = empty(B, I, side, side), empty(B, O, side, side)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    z, weight, bias = empty(16), empty(N, 16), empty(N)
    if backward:
        return backward_launches(y, x, z, weight, bias, torch.empty_like(x), z, bias, geometry)
    return launches(x, z, weight, bias, empty(O), y, geometry)


def examples() -> list[tuple[str, Launch]]:
    """(name, launch) of layers of `full`, K = 16, to see what they compile to; the last of a case's sums."""
    half, single = torch.bfloat16, torch.float32
    cases = {
        "conv5, 64 rows, bf16": (16, 512, 512, 2, PADDED, half),
        "fc1, 1 row, fp32": (1, 512, 1024, 1, LINEAR, single),
        "fc1, 64 rows, bf16": (64, 512, 1024, 1, LINEAR, half),
        "fc1, 64 rows, fp32": (64, 512, 1024, 1, LINEAR, single),
        "conv5, 64 rows, fp32": (16, 512, 512, 2, PADDED, single),
        "conv3, 256 rows, bf16": (4, 128, 256, 8, PADDED, half),
        "fc2, 1 row, bf16": (1, 1024, 512, 1, LINEAR, half),
        "fc2, 256 rows, fp16": (256, 1024, 512, 1, LINEAR, torch.float16),
    }
    named = {
        f"{launch.kernel.__name__}, {name}": launch
        for name, case in cases.items()
        for backward in (False, True)
        for launch in _example(*case, backward)
    }
    return list(named.items())
