"""per_sample_conv2d: a layer in which every sample has generated weights of its own.

y_b = conv(x_b, w_b) + layer_bias, w_b = weight z_b + bias, for T = H' W' rows and N weights a sample, M = B T
rows in all, weight [N, K], N = O I, I = C / groups R S. Two forms; `expands` takes the one that costs less.

Expand, for few rows a sample: y[m, o] = sum_ik (x[m, i] z[b, k]) weight[o, i, k] + sum_i x[m, i] bias[o, i]
is one matrix product with the generator as it lies, [O, I K]. Its operand x outer z is made in registers from
tiles of x and z, never in memory, and no w exists. Backward: a block makes a tile of d(x outer z) = dy weight
and sums it at once, over k with z to dx and over i with x to its share of dz; dweight = dy^T (x outer z),
dbias = dy^T x. Floor: the generator read once forward, read once and its gradient written backward, N K
elements each time; 2 M N K operations forward, 4 M N K backward. On an H100 the bytes decide up to about M =
40 in float32 on ordinary registers, 300 in half precision on tensor cores.

Per sample, for many: w_b of a chunk of samples is made by one product z weight^T, channels last, and each
sample's layer is an implicit matrix product with its own w. Of w exist B N elements, at most CHUNK_BYTES at a
time. To make a tile of w beside the product that uses it, as hyper_conv2d does, needs no memory but moves
more through L2: K times the tile for each block of rows of each sample. A layer 64 -> 64, 3 x 3, of 16 x
16 pixels, 128 samples, K = 16, in bfloat16, would read 302 MB that way in blocks of 128 rows; w is 9 MB
written and 19 MB read. Floor there: x and y, 8 MB, the generator, 1 MB, and 2 M N = 2.4e9 operations.
Backward: dx from w made again; dw_b of a chunk of samples, then dweight = dw^T z, dz = dw weight and dbias in
one pass over dw.

Products are on tensor cores: half precision, float64, and TF32 where
torch.backends.cuda.matmul.fp32_precision says so; float32 otherwise goes through ordinary registers. Few
blocks of an expanded product are cut into parts, added up in their order: no result depends on timing.
`expands`, CHUNK_BYTES, tiles and parts follow from the above and from what compiles without spills (at K =
16 in float32 and bfloat16; elsewhere and in TF32 some keep up to 32 bytes of a thread on its stack); they
await measurement on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    sum_parts_kernel,
)
from hyperfast.kernels.launch import Launch, dot_precision, dot_type

GENERATION = 16  # a generated weight costs as much as so many multiplications on tensor cores, for each k
EXPANDED_ROWS = 64  # of a sample
PROGRAMS = 2 * 132  # blocks that 132 multiprocessors run at a time
CHUNK_BYTES = 1 << 26  # of the weights of a chunk of samples
MOST_SAMPLES = 65_535  # of a chunk: the second dimension of a grid


@triton.jit
def _rows_of(offs_m, H, W, t_b, t_h, t_w):
    """(sample, offset) of rows m of a tensor [B, channels, H, W] with these strides."""
    image, row, column = pixels(offs_m, H, W)
    return image, image * t_b + row.to(tl.int64) * t_h + column.to(tl.int64) * t_w


@triton.jit
def _outer(x, z, COMPUTE: tl.constexpr, DOT: tl.constexpr):
    """x outer z, [M, I K], for x [M, I] and z [M, K], rounded to x's type."""
    made = x.to(COMPUTE)[:, :, None] * z.to(COMPUTE)[:, None, :]
    return tl.reshape(made, (x.shape[0], x.shape[1] * z.shape[1])).to(x.dtype).to(DOT)


@triton.jit
def _generator_tile(
    channels, in_o, first_i, first_k, I,
    K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) [O, BLOCK_I BLOCK_K] of weight [O, I, K]."""
    offs = tl.arange(0, BLOCK_I * BLOCK_K)
    i, k = first_i + offs // BLOCK_K, first_k + offs % BLOCK_K
    inside = i < I
    if K % BLOCK_K:
        inside = inside & (k < K)
    return (channels[:, None] * I + i[None, :]) * K + k[None, :], in_o[:, None] & inside[None, :]


@triton.jit
def per_sample_conv2d_expand_fwd_kernel(
    x_ptr, z_ptr, weight_ptr, bias_ptr, layer_bias_ptr, y_ptr, M, C, O, H, W, x_b, x_c, x_h, x_w,
    y_split, y_b, y_c, y_h, y_w, chunk,
    K: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # grid: (row blocks x output blocks x groups, the rows fastest; parts of `chunk` columns)
    pid = tl.program_id(0)
    row_blocks, output_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    group = pid // row_blocks // output_blocks
    offs_m = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid // row_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_m, in_o = offs_m < M, offs_o < O
    channels = (group * O + offs_o).to(tl.int64)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, C)
    sample, of_m = _rows_of(offs_m, H, W, x_b, x_h, x_w)

    y = tl.zeros((BLOCK_M, BLOCK_O), COMPUTE)
    k_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for step in range(0, tl.cdiv(end - begin, BLOCK_I) * k_blocks):
        first, first_k = begin + step // k_blocks * BLOCK_I, step % k_blocks * BLOCK_K
        offs_i, offs_k = first + tl.arange(0, BLOCK_I), first_k + tl.arange(0, BLOCK_K)
        of_i = (group * C + offs_i).to(tl.int64) * x_c
        in_x, in_z = in_m[:, None] & (offs_i < end)[None, :], in_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + of_m[:, None] + of_i[None, :], mask=in_x, other=0.0)
        z = tl.load(z_ptr + sample[:, None] * K + offs_k[None, :], mask=in_z, other=0.0)
        offs, mask = _generator_tile(channels, in_o, first, first_k, C, K, BLOCK_I, BLOCK_K)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(COMPUTE).to(x.dtype).to(DOT)
        made = _outer(x, z, COMPUTE, DOT)
        y = tl.dot(made, tl.trans(weight), y, input_precision=PRECISION, out_dtype=COMPUTE)
    if bias_ptr is not None:
        for first in range(begin, end, BLOCK_I * BLOCK_K):
            offs_i = first + tl.arange(0, BLOCK_I * BLOCK_K)
            in_i = offs_i < end
            of_i = (group * C + offs_i).to(tl.int64) * x_c
            x = tl.load(x_ptr + of_m[:, None] + of_i[None, :], mask=in_m[:, None] & in_i[None, :], other=0.0)
            of_bias = channels[:, None] * C + offs_i[None, :]
            bias = tl.load(bias_ptr + of_bias, mask=in_o[:, None] & in_i[None, :], other=0.0)
            bias = bias.to(COMPUTE).to(x.dtype).to(DOT)
            y = tl.dot(x.to(DOT), tl.trans(bias), y, input_precision=PRECISION, out_dtype=COMPUTE)
    if layer_bias_ptr is not None:
        y += tl.load(layer_bias_ptr + channels, mask=in_o, other=0.0).to(COMPUTE)[None, :]

    _, of_y = _rows_of(offs_m, H, W, y_b, y_h, y_w)
    offs_y = tl.program_id(1).to(tl.int64) * y_split + of_y[:, None] + channels[None, :] * y_c
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_o[None, :])


@triton.jit
def per_sample_conv2d_expand_bwd_x_kernel(
    dy_ptr, x_ptr, z_ptr, weight_ptr, bias_ptr, dx_ptr, dz_ptr, M, C, O, H, W, dy_b, dy_c, dy_h, dy_w,
    x_b, x_c, x_h, x_w, dx_split, dx_b, dx_c, dx_h, dx_w, chunk,
    K: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # grid: (row blocks x column blocks x groups, the rows fastest; parts of `chunk` outputs). dx_ptr or
    # dz_ptr may be None; dz_ptr [parts, groups, column blocks, T, B, K] takes each block's share
    pid = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_I)
    group = pid // row_blocks // column_blocks
    offs_m = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_i = pid // row_blocks % column_blocks * BLOCK_I
    offs_i = first_i + tl.arange(0, BLOCK_I)
    in_m, in_i = offs_m < M, offs_i < C
    in_x = in_m[:, None] & in_i[None, :]
    of_i = (group * C + offs_i).to(tl.int64)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, O)
    sample, of_dy = _rows_of(offs_m, H, W, dy_b, dy_h, dy_w)
    if dz_ptr is not None:
        _, of_x = _rows_of(offs_m, H, W, x_b, x_h, x_w)
        T = H * W
        part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // row_blocks) + pid // row_blocks
        of_dz = (part * T + offs_m % T) * (M // T) + sample

    dx = tl.zeros((BLOCK_M, BLOCK_I), COMPUTE)
    if dx_ptr is not None:
        if bias_ptr is not None:
            for first in range(begin, end, BLOCK_O):
                offs_o = first + tl.arange(0, BLOCK_O)
                in_o = offs_o < end
                channels = (group * O + offs_o).to(tl.int64)
                in_dy = in_m[:, None] & in_o[None, :]
                dy = tl.load(dy_ptr + of_dy[:, None] + channels[None, :] * dy_c, mask=in_dy, other=0.0)
                of_bias = channels[:, None] * C + offs_i[None, :]
                bias = tl.load(bias_ptr + of_bias, mask=in_o[:, None] & in_i[None, :], other=0.0)
                bias = bias.to(COMPUTE).to(dy.dtype).to(DOT)
                dx = tl.dot(dy.to(DOT), bias, dx, input_precision=PRECISION, out_dtype=COMPUTE)
    for first_k in range(0, K, BLOCK_K):
        products = tl.zeros((BLOCK_M, BLOCK_I * BLOCK_K), COMPUTE)
        for first in range(begin, end, BLOCK_O):
            offs_o = first + tl.arange(0, BLOCK_O)
            in_o = offs_o < end
            channels = (group * O + offs_o).to(tl.int64)
            in_dy = in_m[:, None] & in_o[None, :]
            dy = tl.load(dy_ptr + of_dy[:, None] + channels[None, :] * dy_c, mask=in_dy, other=0.0)
            offs, mask = _generator_tile(channels, in_o, first_i, first_k, C, K, BLOCK_I, BLOCK_K)
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(COMPUTE).to(dy.dtype).to(DOT)
            products = tl.dot(dy.to(DOT), weight, products, input_precision=PRECISION, out_dtype=COMPUTE)
        outer = tl.reshape(products, (BLOCK_M, BLOCK_I, BLOCK_K))
        offs_k = first_k + tl.arange(0, BLOCK_K)
        in_z = in_m[:, None] & (offs_k < K)[None, :]
        if dx_ptr is not None:
            z = tl.load(z_ptr + sample[:, None] * K + offs_k[None, :], mask=in_z, other=0.0).to(COMPUTE)
            dx += tl.sum(outer * z[:, None, :], 2)
        if dz_ptr is not None:
            x = tl.load(x_ptr + of_x[:, None] + of_i[None, :] * x_c, mask=in_x, other=0.0).to(COMPUTE)
            dz = tl.sum(outer * x[:, :, None], 1)
            tl.store(dz_ptr + of_dz[:, None] * K + offs_k[None, :], dz, mask=in_z)
    if dx_ptr is not None:
        _, of_dx = _rows_of(offs_m, H, W, dx_b, dx_h, dx_w)
        offs_x = tl.program_id(1).to(tl.int64) * dx_split + of_dx[:, None] + of_i[None, :] * dx_c
        tl.store(dx_ptr + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=in_x)


@triton.jit
def per_sample_conv2d_expand_bwd_w_kernel(
    dy_ptr, x_ptr, z_ptr, dweight_ptr, dbias_ptr, M, C, O, H, W, dy_b, dy_c, dy_h, dy_w,
    x_b, x_c, x_h, x_w, N, chunk,
    K: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # grid: (k blocks x column blocks x output blocks x groups, those of k fastest; parts of `chunk` rows).
    # dweight_ptr or dbias_ptr may be None; without dweight_ptr there is one block of k
    pid = tl.program_id(0)
    k_blocks = 1 if dweight_ptr is None else tl.cdiv(K, BLOCK_K)
    column_blocks, output_blocks = tl.cdiv(C, BLOCK_I), tl.cdiv(O, BLOCK_O)
    first_k = pid % k_blocks * BLOCK_K
    block = pid // k_blocks
    first_i = block % column_blocks * BLOCK_I
    group = block // column_blocks // output_blocks
    offs_o = block // column_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i, offs_k = first_i + tl.arange(0, BLOCK_I), first_k + tl.arange(0, BLOCK_K)
    in_o, in_i = offs_o < O, offs_i < C
    channels = (group * O + offs_o).to(tl.int64)
    of_i = (group * C + offs_i).to(tl.int64) * x_c
    part = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, M)

    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_O, BLOCK_I * BLOCK_K), COMPUTE)
        for first in range(begin, end, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            in_m = offs_m < end
            sample, of_x = _rows_of(offs_m, H, W, x_b, x_h, x_w)
            _, of_dy = _rows_of(offs_m, H, W, dy_b, dy_h, dy_w)
            offs_y = channels[:, None] * dy_c + of_dy[None, :]
            dy = tl.load(dy_ptr + offs_y, mask=in_o[:, None] & in_m[None, :], other=0.0).to(DOT)
            in_x = in_m[:, None] & in_i[None, :]
            x = tl.load(x_ptr + of_x[:, None] + of_i[None, :], mask=in_x, other=0.0)
            in_z = in_m[:, None] & (offs_k < K)[None, :]
            z = tl.load(z_ptr + sample[:, None] * K + offs_k[None, :], mask=in_z, other=0.0)
            made = _outer(x, z, COMPUTE, DOT)
            dweight = tl.dot(dy, made, dweight, input_precision=PRECISION, out_dtype=COMPUTE)
        offs, mask = _generator_tile(channels, in_o, first_i, first_k, C, K, BLOCK_I, BLOCK_K)
        offs += part * N * K
        tl.store(dweight_ptr + offs, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        if first_k == 0:
            dbias = tl.zeros((BLOCK_O, BLOCK_I), COMPUTE)
            for first in range(begin, end, BLOCK_M):
                offs_m = first + tl.arange(0, BLOCK_M)
                in_m = offs_m < end
                _, of_x = _rows_of(offs_m, H, W, x_b, x_h, x_w)
                _, of_dy = _rows_of(offs_m, H, W, dy_b, dy_h, dy_w)
                offs_y = channels[:, None] * dy_c + of_dy[None, :]
                dy = tl.load(dy_ptr + offs_y, mask=in_o[:, None] & in_m[None, :], other=0.0).to(DOT)
                in_x = in_m[:, None] & in_i[None, :]
                x = tl.load(x_ptr + of_x[:, None] + of_i[None, :], mask=in_x, other=0.0).to(DOT)
                dbias = tl.dot(dy, x, dbias, input_precision=PRECISION, out_dtype=COMPUTE)
            of_bias = part * N + channels[:, None] * C + offs_i[None, :]
            in_bias = in_o[:, None] & in_i[None, :]
            tl.store(dbias_ptr + of_bias, dbias.to(dbias_ptr.dtype.element_ty), mask=in_bias)


@triton.jit
def _generator_rows(offs_n, C, TAPS: tl.constexpr):
    """Rows (o, c, r, s) of the generator for weights counted with the channels last, (o, r, s, c)."""
    o, tap, c = offs_n // C // TAPS, offs_n // C % TAPS, offs_n % C
    return ((o * C + c) * TAPS + tap).to(tl.int64)


@triton.jit
def per_sample_conv2d_generate_kernel(
    z_ptr, weight_ptr, bias_ptr, w_ptr, samples, N, C,
    K: tl.constexpr, TAPS: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # w[b, o, r, s, c] = sum_k weight[(o, c, r, s), k] z[b, k] + bias[o, c, r, s]; grid: (sample blocks x
    # weight blocks, the samples fastest)
    pid = tl.program_id(0)
    sample_blocks = tl.cdiv(samples, BLOCK_B)
    offs_b = pid % sample_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = pid // sample_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_b, in_n = offs_b < samples, offs_n < N
    rows = _generator_rows(offs_n, C, TAPS)
    w = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        in_k = (offs_k < K)[None, :]
        z = tl.load(z_ptr + offs_b[:, None] * K + offs_k[None, :], mask=in_b[:, None] & in_k, other=0.0)
        offs = rows[:, None] * K + offs_k[None, :]
        weight = tl.load(weight_ptr + offs, mask=in_n[:, None] & in_k, other=0.0)
        w = tl.dot(z.to(DOT), tl.trans(weight.to(DOT)), w, input_precision=PRECISION, out_dtype=COMPUTE)
    if bias_ptr is not None:
        w += tl.load(bias_ptr + rows, mask=in_n, other=0.0).to(COMPUTE)[None, :]
    offs = offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(w_ptr + offs, w.to(w_ptr.dtype.element_ty), mask=in_b[:, None] & in_n[None, :])


@triton.jit
def per_sample_conv2d_fwd_kernel(
    x_ptr, w_ptr, layer_bias_ptr, y_ptr, M, N, C, O, H, W, out_h, out_w, x_b, x_c, x_h, x_w,
    y_b, y_c, y_h, y_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr,
    LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # grid: (row blocks x output blocks x groups, the rows fastest; samples). M rows a sample
    pid = tl.program_id(0)
    row_blocks, output_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    group = pid // row_blocks // output_blocks
    offs_m = pid % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = pid // row_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_m, in_o = offs_m < M, offs_o < O
    I = C * (R * S)
    channels = (group * O + offs_o).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample * x_b
    w_ptr += sample * N
    y = tl.zeros((BLOCK_M, BLOCK_O), COMPUTE)
    for first in range(0, I, BLOCK_I):
        offs_i = first + tl.arange(0, BLOCK_I)
        in_i = offs_i < I
        c, r, s = offs_i % C, offs_i // C // S, offs_i // C % S
        x = gather_columns(
            x_ptr, offs_m, group * C + c, r * DILATION_H, s * DILATION_W, in_m, in_i, H, W, out_h, out_w,
            x_b, x_c, x_h, x_w, STRIDE_H, STRIDE_W, TOP, LEFT, PADDED,
        )  # fmt: skip
        offs = channels[:, None] * I + offs_i[None, :]
        w = tl.load(w_ptr + offs, mask=in_o[:, None] & in_i[None, :], other=0.0)
        y = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), y, input_precision=PRECISION, out_dtype=COMPUTE)
    if layer_bias_ptr is not None:
        y += tl.load(layer_bias_ptr + channels, mask=in_o, other=0.0).to(COMPUTE)[None, :]
    _, of_m = _rows_of(offs_m, out_h, out_w, y_b, y_h, y_w)
    offs_y = sample * y_b + of_m[:, None] + channels[None, :] * y_c
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_o[None, :])


@triton.jit
def per_sample_conv2d_bwd_x_kernel(
    dy_ptr, w_ptr, dx_ptr, P, N, C, O, H, W, out_h, out_w, dy_b, dy_c, dy_h, dy_w, dx_b, dx_c, dx_h, dx_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr,
    LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, POINTWISE: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dx[p, c] = sum over r, s, o of dy[the row that p meets there, o] w[o, r, s, c]
    # grid: (pixel blocks x channel blocks x groups, the pixels fastest; samples). P pixels a sample. A step
    # is BLOCK_O outputs at one place (r, s) of the kernel
    pid = tl.program_id(0)
    pixel_blocks, channel_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(C, BLOCK_C)
    group = pid // pixel_blocks // channel_blocks
    offs_p = pid % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid // pixel_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_p, in_c = offs_p < P, offs_c < C
    _, h, w = pixels(offs_p, H, W)
    sample = tl.program_id(1).to(tl.int64)
    dy_ptr += sample * dy_b
    w_ptr += sample * N
    dx = tl.zeros((BLOCK_P, BLOCK_C), COMPUTE)
    output_blocks = tl.cdiv(O, BLOCK_O)
    for step in range(0, output_blocks * (R * S)):
        tap = step // output_blocks
        offs_o = step % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        in_o = offs_o < O
        outputs = (group * O + offs_o).to(tl.int64)
        mask = in_p[:, None] & in_o[None, :]
        down, right = h + TOP - tap // S * DILATION_H, w + LEFT - tap % S * DILATION_W
        row, column, meets = meeting_rows(down, right, out_h, out_w, STRIDE_H, STRIDE_W)
        if not POINTWISE:
            mask = mask & meets[:, None]
        of_dy = row.to(tl.int64) * dy_h + column.to(tl.int64) * dy_w
        dy = tl.load(dy_ptr + of_dy[:, None] + outputs[None, :] * dy_c, mask=mask, other=0.0)
        offs = (outputs[:, None] * (R * S) + tap) * C + offs_c[None, :]
        made = tl.load(w_ptr + offs, mask=in_o[:, None] & in_c[None, :], other=0.0)
        dx = tl.dot(dy.to(DOT), made.to(DOT), dx, input_precision=PRECISION, out_dtype=COMPUTE)
    _, of_p = _rows_of(offs_p, H, W, dx_b, dx_h, dx_w)
    offs_x = sample * dx_b + of_p[:, None] + (group * C + offs_c).to(tl.int64)[None, :] * dx_c
    tl.store(dx_ptr + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=in_p[:, None] & in_c[None, :])


@triton.jit
def per_sample_conv2d_bwd_w_kernel(
    dy_ptr, x_ptr, dw_ptr, M, N, C, O, H, W, out_h, out_w, dy_b, dy_c, dy_h, dy_w, x_b, x_c, x_h, x_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr,
    LEFT: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # dw[b, o, r, s, c]; grid: (column blocks x output blocks x groups; samples). M rows a sample
    pid = tl.program_id(0)
    I = C * (R * S)
    column_blocks, output_blocks = tl.cdiv(I, BLOCK_I), tl.cdiv(O, BLOCK_O)
    group = pid // column_blocks // output_blocks
    offs_i = pid % column_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = pid // column_blocks % output_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    in_i, in_o = offs_i < I, offs_o < O
    c, r, s = offs_i % C, offs_i // C // S, offs_i // C % S
    channels = (group * O + offs_o).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    x_ptr += sample * x_b
    dy_ptr += sample * dy_b
    dw = tl.zeros((BLOCK_O, BLOCK_I), COMPUTE)
    for first in range(0, M, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        x = gather_columns(
            x_ptr, offs_m, group * C + c, r * DILATION_H, s * DILATION_W, in_m, in_i, H, W, out_h, out_w,
            x_b, x_c, x_h, x_w, STRIDE_H, STRIDE_W, TOP, LEFT, PADDED,
        )  # fmt: skip
        _, of_dy = _rows_of(offs_m, out_h, out_w, dy_b, dy_h, dy_w)
        offs = channels[:, None] * dy_c + of_dy[None, :]
        dy = tl.load(dy_ptr + offs, mask=in_o[:, None] & in_m[None, :], other=0.0)
        dw = tl.dot(dy.to(DOT), x.to(DOT), dw, input_precision=PRECISION, out_dtype=COMPUTE)
    offs = sample * N + channels[:, None] * I + offs_i[None, :]
    tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=in_o[:, None] & in_i[None, :])


@triton.jit
def per_sample_conv2d_bwd_z_kernel(
    dw_ptr, z_ptr, weight_ptr, dweight_before_ptr, dbias_before_ptr, dweight_ptr, dbias_ptr, dz_ptr,
    samples, N, C,
    K: tl.constexpr, TAPS: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # dweight = before + dw^T z, dbias = before + the sum of dw, and dz_ptr [weight blocks, samples, K] takes
    # each block's share of dw weight. grid: weight blocks x k blocks, these fastest. Every pointer after
    # weight_ptr may be None; dw [samples, N] has the channels last
    k_blocks = tl.cdiv(K, BLOCK_K)
    first_k = tl.program_id(0) % k_blocks * BLOCK_K
    block = tl.program_id(0) // k_blocks
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    in_n, in_k = offs_n < N, (offs_k < K)[None, :]
    rows = _generator_rows(offs_n, C, TAPS)
    of_weight, in_weight = rows[:, None] * K + offs_k[None, :], in_n[:, None] & in_k
    dweight = tl.zeros((BLOCK_N, BLOCK_K), COMPUTE)
    dbias = tl.zeros((BLOCK_N,), COMPUTE)
    if dz_ptr is not None:
        weight = tl.load(weight_ptr + of_weight, mask=in_weight, other=0.0).to(DOT)
    for first in range(0, samples, BLOCK_B):
        offs_b = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        in_b = (offs_b < samples)[:, None]
        offs = offs_b[:, None] * N + offs_n[None, :]
        dw = tl.load(dw_ptr + offs, mask=in_b & in_n[None, :], other=0.0)
        if dbias_ptr is not None:
            dbias += tl.sum(dw.to(COMPUTE), 0)
        if dweight_ptr is not None:
            z = tl.load(z_ptr + offs_b[:, None] * K + offs_k[None, :], mask=in_b & in_k, other=0.0)
            dweight = tl.dot(
                tl.trans(dw.to(DOT)), z.to(DOT), dweight, input_precision=PRECISION, out_dtype=COMPUTE
            )
        if dz_ptr is not None:
            dz = tl.dot(dw.to(DOT), weight, input_precision=PRECISION, out_dtype=COMPUTE)
            offs = (block.to(tl.int64) * samples + offs_b)[:, None] * K + offs_k[None, :]
            tl.store(dz_ptr + offs, dz, mask=in_b & in_k)
    if dweight_ptr is not None:
        if dweight_before_ptr is not None:
            dweight += tl.load(dweight_before_ptr + of_weight, mask=in_weight, other=0.0).to(COMPUTE)
            tl.debug_barrier()  # it may be dweight itself: no thread stores what another has yet to load
        tl.store(dweight_ptr + of_weight, dweight.to(dweight_ptr.dtype.element_ty), mask=in_weight)
    if dbias_ptr is not None:
        if first_k == 0:
            if dbias_before_ptr is not None:
                dbias += tl.load(dbias_before_ptr + rows, mask=in_n, other=0.0).to(COMPUTE)
                tl.debug_barrier()
            tl.store(dbias_ptr + rows, dbias.to(dbias_ptr.dtype.element_ty), mask=in_n)


def expands(rows: int, K: int, pointwise: bool) -> bool:
    """Whether a layer of `rows` rows a sample multiplies by the generator itself, K times the product by w,
    rather than make w; only where columns are pixels, so that dx needs no scattering. With K = 1
    that always costs less, but dz is the sum of a share of each row, by few programs: up to EXPANDED_ROWS."""
    return pointwise and rows <= EXPANDED_ROWS and rows * K <= rows + GENERATION * K


def _block(size: int, most: int) -> int:
    """At least 16, the least that tensor cores take."""
    return min(max(power(size), 16), most)


def _expand_tiles(layer: Layer, columns: int, most_k: int) -> dict[str, int]:
    """BLOCK_I x BLOCK_K = `columns` of the generator's columns, and rows and outputs to go with them."""
    block_k = min(power(layer.K), most_k)
    blocks = {"BLOCK_M": _block(layer.rows, 64), "BLOCK_O": _block(layer.O, 64)}
    return blocks | {"BLOCK_I": columns // block_k, "BLOCK_K": block_k}


def _backward_tiles(layer: Layer, **reduced: int) -> dict[str, int]:
    """At least 16 inputs, for the products with the bias. reduced: what is summed over, by the name of its
    block, goes in steps of 32, or of 16 on ordinary registers."""
    steps = {name: _block(size, 16 if layer.wide else 32) for name, size in reduced.items()}
    return _expand_tiles(layer, 512 // layer.x_dtype.itemsize, 32 // layer.x_dtype.itemsize) | steps


def _tiles(layer: Layer, rows: int) -> dict[str, int]:
    return {
        "BLOCK_M": _block(rows, 64 if layer.wide else 128),
        "BLOCK_O": _block(layer.O, 64),
        "BLOCK_I": _block(layer.I, 32),
    }


def _generator_tiles(layer: Layer) -> dict[str, object]:
    """For products of the generator with z and dw: in the generator's type."""
    return {
        "TAPS": layer.taps, "DOT": dot_type(layer.dtype), "PRECISION": dot_precision(layer.dtype),
        "BLOCK_K": _block(layer.K, 32),
    }  # fmt: skip


def launches(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_bias: Tensor | None,
    y: Tensor,
    geometry: tuple[int, ...],
) -> Iterator[Launch]:
    """Fills y [B, O, H', W'], dense in memory, in x's dtype. x [B, groups C, H, W] has any strides; z [B, K],
    weight [N, K], bias [N], layer_bias [O] are contiguous and of one dtype. geometry: see `Layer`."""
    layer = Layer(x, z, weight, y, geometry)
    T = y.shape[2] * y.shape[3]
    if expands(T, layer.K, layer.pointwise):
        yield from _expand_launches(layer, x, bias, layer_bias, y)
        return
    w, tiles = None, _tiles(layer, T)
    grid = triton.cdiv(T, tiles["BLOCK_M"]) * triton.cdiv(layer.O, tiles["BLOCK_O"]) * layer.groups
    for chosen in _chunks(layer, len(x)):
        w = _weights_of(layer, x, chosen) if w is None else w
        yield _generate(layer, z[chosen], bias, w)
        part, out = x[chosen], y[chosen]
        yield layer.launch(
            per_sample_conv2d_fwd_kernel, (grid, len(part)), x_ptr=part, w_ptr=w, y_ptr=out,
            layer_bias_ptr=layer_bias, M=T, N=layer.N, **strides("x", x), **strides("y", y), **tiles,
        )  # fmt: skip


def backward_launches(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    dz: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    geometry: tuple[int, ...],
) -> Iterator[Launch]:
    """Fills those of dx (like x, dense in memory), dz [B, K], dweight [N, K] and dbias [N] (contiguous, in
    weight's dtype) that are given; dy [B, O, H', W'] and x in x's dtype with any strides, the rest as in
    `launches`."""
    layer = Layer(x, z, weight, dy, geometry)
    if expands(dy.shape[2] * dy.shape[3], layer.K, layer.pointwise):
        if dx is not None or dz is not None:
            yield from _expand_x_launches(layer, dy, x, bias, dx, dz)
        if dweight is not None or dbias is not None:
            yield from _expand_w_launches(layer, dy, x, dweight, dbias)
        return
    if dx is not None:
        yield from _dx_launches(layer, dy, z, bias, dx)
    if dz is not None or dweight is not None or dbias is not None:
        yield from _dw_launches(layer, dy, x, z, dz, dweight, dbias)


def _expand_launches(
    layer: Layer, x: Tensor, bias: Tensor | None, layer_bias: Tensor | None, y: Tensor
) -> Iterator[Launch]:
    tiles = _expand_tiles(layer, (16 if layer.K == 1 else 32) if layer.wide else 128, 16)
    blocks = triton.cdiv(layer.rows, tiles["BLOCK_M"]) * triton.cdiv(layer.O, tiles["BLOCK_O"]) * layer.groups
    parts, chunk = split(triton.cdiv(layer.C, tiles["BLOCK_I"]), blocks, PROGRAMS)
    out = y if parts == 1 else layer.scratch(x.device, parts, y.numel())
    yield layer.launch(
        per_sample_conv2d_expand_fwd_kernel, (blocks, parts), x_ptr=x, bias_ptr=bias, y_ptr=out,
        layer_bias_ptr=layer_bias if parts == 1 else None, **strides("x", x), **strides("y", y),
        y_split=y.numel(), chunk=chunk * tiles["BLOCK_I"], **tiles,
    )  # fmt: skip
    if parts > 1:
        yield sum_parts(out, layer_bias, y, y.stride(1), y.shape[1])


def _expand_x_launches(
    layer: Layer, dy: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor | None, dz: Tensor | None
) -> Iterator[Launch]:
    tiles = _backward_tiles(layer, BLOCK_O=layer.O)
    row_blocks = triton.cdiv(layer.rows, tiles["BLOCK_M"])
    tile_blocks = triton.cdiv(layer.C, tiles["BLOCK_I"]) * layer.groups
    parts, chunk = split(triton.cdiv(layer.O, tiles["BLOCK_O"]), row_blocks * tile_blocks, PROGRAMS)
    out, shares = dx, None
    if dx is not None and parts > 1:
        out = layer.scratch(dx.device, parts, dx.numel())
    if dz is not None:
        shares = layer.scratch(dz.device, parts * tile_blocks * (layer.rows // len(x)), dz.numel())
    yield layer.launch(
        per_sample_conv2d_expand_bwd_x_kernel, (row_blocks * tile_blocks, parts), dy_ptr=dy, x_ptr=x,
        bias_ptr=bias, dx_ptr=out, dz_ptr=shares, **strides("dy", dy), **strides("x", x),
        **strides("dx", x if dx is None else dx), dx_split=x.numel(), chunk=chunk * tiles["BLOCK_O"], **tiles,
    )  # fmt: skip
    if dx is not None and parts > 1:
        yield sum_parts(out, None, dx)
    if dz is not None:
        yield sum_parts(shares, None, dz)


def _expand_w_launches(
    layer: Layer, dy: Tensor, x: Tensor, dweight: Tensor | None, dbias: Tensor | None
) -> Iterator[Launch]:
    tiles = _backward_tiles(layer, BLOCK_M=layer.rows)
    blocks = layer.groups * triton.cdiv(layer.O, tiles["BLOCK_O"]) * triton.cdiv(layer.C, tiles["BLOCK_I"])
    blocks *= 1 if dweight is None else triton.cdiv(layer.K, tiles["BLOCK_K"])
    parts, chunk = split(triton.cdiv(layer.rows, tiles["BLOCK_M"]), blocks, PROGRAMS)
    wanted = dweight, dbias
    made = wanted
    if parts > 1:
        made = [None if t is None else layer.scratch(t.device, parts, t.numel()) for t in wanted]
    yield layer.launch(
        per_sample_conv2d_expand_bwd_w_kernel, (blocks, parts), dy_ptr=dy, x_ptr=x, dweight_ptr=made[0],
        dbias_ptr=made[1], **strides("dy", dy), **strides("x", x), N=layer.N,
        chunk=chunk * tiles["BLOCK_M"], **tiles,
    )  # fmt: skip
    for sums, out in zip(made, wanted, strict=True):
        if parts > 1 and out is not None:
            yield sum_parts(sums, None, out)


def _chunks(layer: Layer, samples: int) -> list[slice]:
    """Chunks of equal size whose weights, in x's dtype, take at most CHUNK_BYTES, or one sample each."""
    most = min(max(CHUNK_BYTES // (layer.N * layer.x_dtype.itemsize), 1), MOST_SAMPLES)
    size = triton.cdiv(samples, triton.cdiv(samples, most))
    return [slice(first, min(first + size, samples)) for first in range(0, samples, size)]


def _weights_of(layer: Layer, x: Tensor, chosen: slice) -> Tensor:
    """Memory for the weights of these samples [samples, N], each (o, r, s, c)."""
    return x.new_empty(chosen.stop - chosen.start, layer.N)


def _generate(layer: Layer, z: Tensor, bias: Tensor | None, w: Tensor) -> Launch:
    """w [samples, N] of z [samples, K]."""
    tiles = _generator_tiles(layer) | {"BLOCK_B": _block(len(z), 64), "BLOCK_N": 64}
    grid = triton.cdiv(len(z), tiles["BLOCK_B"]) * triton.cdiv(layer.N, 64)
    return layer.launch(
        per_sample_conv2d_generate_kernel, (grid,), z_ptr=z, bias_ptr=bias, w_ptr=w, samples=len(z),
        N=layer.N, **tiles,
    )  # fmt: skip


def _dx_launches(layer: Layer, dy: Tensor, z: Tensor, bias: Tensor | None, dx: Tensor) -> Iterator[Launch]:
    w, P = None, dx.shape[2] * dx.shape[3]
    block_p, block_c = _block(P, 64 if layer.wide else 128), _block(layer.C, 32 if layer.wide else 64)
    block_o = _block(layer.O, 16 if layer.wide else 32)
    grid = triton.cdiv(P, block_p) * triton.cdiv(layer.C, block_c) * layer.groups
    for chosen in _chunks(layer, len(dx)):
        w = _weights_of(layer, dx, chosen) if w is None else w
        yield _generate(layer, z[chosen], bias, w)
        part, out = dy[chosen], dx[chosen]
        yield layer.launch(
            per_sample_conv2d_bwd_x_kernel, (grid, len(part)), dy_ptr=part, w_ptr=w, dx_ptr=out, P=P,
            N=layer.N, **strides("dy", dy), **strides("dx", dx), BLOCK_P=block_p, BLOCK_O=block_o,
            BLOCK_C=block_c,
        )  # fmt: skip


def _dw_launches(
    layer: Layer, dy: Tensor, x: Tensor, z: Tensor,
    dz: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
) -> Iterator[Launch]:  # fmt: skip
    """The weights of a chunk of samples, then what the generator gets of them; dweight and dbias add up over
    chunks, in float32 where their own type is narrower."""
    T = dy.shape[2] * dy.shape[3]
    tiles = {"BLOCK_M": _block(T, 32), "BLOCK_O": _block(layer.O, 64), "BLOCK_I": _block(layer.I, 64)}
    grid = layer.groups * triton.cdiv(layer.O, tiles["BLOCK_O"]) * triton.cdiv(layer.I, tiles["BLOCK_I"])
    generator = _generator_tiles(layer) | {"BLOCK_N": 64}
    blocks, k_blocks = triton.cdiv(layer.N, 64), triton.cdiv(layer.K, generator["BLOCK_K"])
    chunks = _chunks(layer, len(x))
    wanted, sums = (dweight, dbias), (dweight, dbias)
    if len(chunks) > 1 and layer.dtype.itemsize < 4:
        sums = [None if t is None else layer.scratch(t.device, *t.shape) for t in wanted]
    dw = _weights_of(layer, x, chunks[0])
    for chosen in chunks:
        part, samples = x[chosen], chosen.stop - chosen.start
        yield layer.launch(
            per_sample_conv2d_bwd_w_kernel, (grid, samples), dy_ptr=dy[chosen], x_ptr=part, dw_ptr=dw, M=T,
            N=layer.N, **strides("dy", dy), **strides("x", x), **tiles,
        )  # fmt: skip
        before = (None, None) if chosen.start == 0 else sums
        after = wanted if chosen.stop == len(x) else sums
        shares = None if dz is None else layer.scratch(dz.device, blocks, samples * layer.K)
        yield layer.launch(
            per_sample_conv2d_bwd_z_kernel, (blocks * k_blocks,), dw_ptr=dw, z_ptr=z[chosen], samples=samples,
            N=layer.N, dweight_before_ptr=before[0], dbias_before_ptr=before[1], dweight_ptr=after[0],
            dbias_ptr=after[1], dz_ptr=shares, BLOCK_B=_block(samples, 32), **generator,
        )  # fmt: skip
        if dz is not None:
            yield sum_parts(shares, None, dz[chosen])


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


def _example(B: int, I: int, O: int, side: int, geometry: tuple[int, ...], K: int, dtype: torch.dtype):
    """Launches of a layer, forward and backward, on tensors without memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N = O * I * geometry[0] * geometry[1]
    x, y = empty(B, I, side, side), empty(B, O, side, side)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    generator = empty(B, K), empty(N, K), empty(N)
    yield from launches(x, *generator, empty(O), y, geometry)
    yield from backward_launches(y, x, *generator, torch.empty_like(x), *generator, geometry)


def examples() -> list[tuple[str, Launch]]:
    """(name, launch) of a linear layer 512 -> 512 of 64 samples and a convolution 64 -> 64 of 128, to see
    what they compile to."""
    linear, convolution = (64, 512, 512, 1, LINEAR), (128, 64, 64, 16, PADDED)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
    named = {}
    for K, kind in ((16, "fp32"), (16, "bf16"), (64, "bf16"), (16, "fp64")):
        for name, case in (("linear", linear), ("conv", convolution)):
            for launch in _example(*case, K, types[kind]):
                if launch.kernel is sum_parts_kernel:
                    continue
                named[f"{launch.kernel.__name__}, {name}, K {K}, {kind}"] = launch
    return list(named.items())
