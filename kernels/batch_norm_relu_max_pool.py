"""batch_norm_relu_max_pool: batch norm -> ReLU -> P x P max pool of channels_last images, in two launches.

Floor, in passes over x: the forward reads it for the statistics and again to normalise, and writes P^-2 of it
(y, and a byte for each output that says which pixel of the window won, or that ReLU is off); the backward
reads x, dy and the bytes for the sums and again for dx, and writes dx. At batch 64 the five layers of `full`
have 8.4 MB to 0.26 MB of x in bfloat16: microseconds on a GPU, and in its second level cache, so that
launches count as much as bytes. Hence no third launch to add up the sums over the batch: every program of the
second one does it for its own channels. For that to be little, a program takes few channels (64 bytes of a
pixel, whole sectors of memory) and the first launch makes few tiles: conv1 in bfloat16 has 64 of them, and a
program reads 32 KiB of sums. All of it awaits a measurement on a GPU: the numbers below are to be set by one.

Means and squared deviations of a tile are shifted by the mean of its first block, which is off by at most
sqrt(blocks) deviations of the tile whatever the data: nothing cancels where |mean| is much larger than the
deviation. Tiles are merged in float64 (Chan, Golub and LeVeque, 1983) in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.launch import Launch, compute_type

# about one for each multiprocessor in the launches that sum, two in the others
SUM_PROGRAMS, PROGRAMS = 128, 256
SUM_BYTES, BYTES, LEAST_BYTES = 32768, 16384, 2048  # of x for a block
THREAD_BYTES = 64  # of x for a thread: four loads of 16 bytes in flight
CHANNEL_BYTES = 64  # of a pixel for a program


class Tiling(NamedTuple):
    """Blocks of BLOCK pixels or windows by BLOCK_C channels; a program takes one of `tiles` runs of `length`
    pixels or windows."""

    tiles: int
    length: int
    BLOCK: int
    BLOCK_C: int
    num_warps: int


def _tiling(count: int, C: int, each: int, itemsize: int, sums: bool = False) -> Tiling:
    """Of `count` windows, for each of which a thread holds `each` elements of x (or of dy, y and index)."""
    BLOCK_C = min(triton.next_power_of_2(C), CHANNEL_BYTES // itemsize)
    programs = SUM_PROGRAMS if sums else PROGRAMS
    is_wide = C * itemsize % 16 == 0  # else every element has an address of its own, in registers
    most = SUM_BYTES if sums and is_wide else BYTES
    row = BLOCK_C * itemsize * each
    length = max(triton.cdiv(count, max(1, programs // triton.cdiv(C, BLOCK_C))), LEAST_BYTES // row)
    BLOCK = min(triton.next_power_of_2(length), most // row)
    # at least four warps, unless that would cut the loads to less than 16 bytes
    threads = max(BLOCK * row // THREAD_BYTES, min(128, BLOCK * row // each // 16))
    return Tiling(triton.cdiv(count, length), length, BLOCK, BLOCK_C, threads // 32)


@triton.jit
def _place(C, BLOCK_C: tl.constexpr):
    """(tile, channels) of this program; neighbours take the channels of the same pixels."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    return pid // channel_blocks, pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _window(offs, rows, columns):
    """(image, row, column) of windows counted row by row."""
    row = offs // columns
    b = row // rows
    return b, row - b * rows, offs - row * columns


@triton.jit
def _load(ptr, offs, C, offs_c, mask):
    """[offs, channels] of a tensor [..., C]; 0 outside."""
    offsets = offs.to(tl.int64)[:, None] * C + offs_c[None, :]
    return tl.load(ptr + offsets, mask=mask[:, None] & (offs_c < C)[None, :], other=0)


@triton.jit
def _store(ptr, offs, C, offs_c, mask, value):
    offsets = offs.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_c < C)[None, :])


@triton.jit
def _channels(ptr, offs_c, C, default: tl.constexpr):
    """A vector [C] in float64, `default` where there is none."""
    if ptr is None:
        return tl.full(offs_c.shape, default, tl.float64)
    else:
        vector = tl.load(ptr + offs_c, mask=offs_c < C, other=default)
        if ptr.dtype.element_ty.primitive_bitwidth == 16:
            vector = vector.to(tl.float32)
        return vector.to(tl.float64)


@triton.jit
def _move(ptr, offs_c, C, target, momentum, COMPUTE: tl.constexpr):
    """Moves a vector [C] by the share `momentum` towards `target`."""
    before = _channels(ptr, offs_c, C, 0.0)
    after = (before + momentum * (target - before)).to(COMPUTE)
    tl.store(ptr + offs_c, after.to(ptr.dtype.element_ty), mask=offs_c < C)


@triton.jit
def _partials(partial_ptr, field: tl.constexpr, tiles, C, offs_c, BLOCK_T: tl.constexpr):
    """[tiles, channels] of one of the two sums of every tile."""
    offs_t = tl.arange(0, BLOCK_T)
    return _load(partial_ptr, offs_t * 2 + field, C, offs_c, offs_t < tiles)


@triton.jit
def batch_norm_statistics_fwd_kernel(
    x_ptr,  # [pixels, C]
    partial_ptr,  # float64 [tiles, 2, C]: mean and squared deviations of each tile
    pixels,
    C,
    length,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, offs_c = _place(C, BLOCK_C)
    begin = tile * length
    end = tl.minimum(begin + length, pixels)
    offs_p = begin + tl.arange(0, BLOCK_P)
    x = _load(x_ptr, offs_p, C, offs_c, offs_p < end).to(COMPUTE)
    shift = tl.sum(x, 0) / tl.minimum(end - begin, BLOCK_P)
    d = tl.where((offs_p < end)[:, None], x - shift[None, :], 0.0)
    total, squares = d, d * d
    for first in range(begin + BLOCK_P, end, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        x = _load(x_ptr, offs_p, C, offs_c, offs_p < end).to(COMPUTE)
        d = tl.where((offs_p < end)[:, None], x - shift[None, :], 0.0)
        total += d
        squares += d * d
    rest = tl.sum(total, 0).to(tl.float64) / (end - begin)
    deviations = tl.sum(squares, 0).to(tl.float64) - rest * rest * (end - begin)
    out_ptr = partial_ptr + tile.to(tl.int64) * 2 * C + offs_c
    tl.store(out_ptr, shift.to(tl.float64) + rest, mask=offs_c < C)
    tl.store(out_ptr + C, tl.maximum(deviations, 0.0, tl.PropagateNan.ALL), mask=offs_c < C)


@triton.jit
def batch_norm_relu_max_pool_fwd_kernel(
    x_ptr,  # [B, H, W, C]
    partial_ptr,  # or None: mean and var are given
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_ptr,
    statistics_ptr,  # float64 [2, C]
    y_ptr,  # [B, H // P, W // P, C]
    index_ptr,
    pixels,
    windows,
    H,
    W,
    C,
    partial_length,
    partial_tiles,
    length,
    eps: tl.float64,
    momentum: tl.float64,
    per_pixel: tl.float64,  # 1 / pixels
    unbiasing: tl.float64,  # pixels / (pixels - 1)
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, offs_c = _place(C, BLOCK_C)
    if partial_ptr is None:
        mean, var = _channels(mean_ptr, offs_c, C, 0.0), _channels(var_ptr, offs_c, C, 1.0)
    else:
        offs_t = tl.arange(0, BLOCK_T)
        count = tl.minimum(tl.maximum(pixels - offs_t * partial_length, 0), partial_length).to(tl.float64)
        means = _partials(partial_ptr, 0, partial_tiles, C, offs_c, BLOCK_T)
        deviations = _partials(partial_ptr, 1, partial_tiles, C, offs_c, BLOCK_T)
        mean = tl.sum(means * count[:, None], 0) * per_pixel
        d = means - mean[None, :]
        var = tl.sum(deviations + d * d * count[:, None], 0) * per_pixel
    if tile == 0:
        tl.store(statistics_ptr + offs_c, mean, mask=offs_c < C)
        tl.store(statistics_ptr + C + offs_c, var, mask=offs_c < C)
        if running_mean_ptr is not None:
            _move(running_mean_ptr, offs_c, C, mean, momentum, COMPUTE)
            _move(running_var_ptr, offs_c, C, var * unbiasing, momentum, COMPUTE)
        if num_batches_ptr is not None:
            if tl.program_id(0) == 0:
                tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)

    factor = _channels(weight_ptr, offs_c, C, 1.0) / tl.sqrt(var + eps)  # rsqrt is approximate in float64
    center, scale = mean.to(COMPUTE), factor.to(COMPUTE)
    rest = mean - center.to(tl.float64)
    offset = (_channels(bias_ptr, offs_c, C, 0.0) - rest * factor).to(COMPUTE)
    begin = tile * length
    end = tl.minimum(begin + length, windows)
    for first in range(begin, end, BLOCK_W):
        offs_w = first + tl.arange(0, BLOCK_W)
        inside = offs_w < end
        b, i, j = _window(offs_w, H // P, W // P)
        pixel = (b * H + i * P) * W + j * P
        x = _load(x_ptr, pixel, C, offs_c, inside).to(COMPUTE)
        best = (x - center[None, :]) * scale[None, :] + offset[None, :]
        winner = tl.zeros([BLOCK_W, BLOCK_C], tl.int32)
        for k in tl.static_range(1, P * P):
            x = _load(x_ptr, pixel + (k // P * W + k % P), C, offs_c, inside).to(COMPUTE)
            v = (x - center[None, :]) * scale[None, :] + offset[None, :]
            wins = (v > best) | (v != v)  # as torch: the last NaN wins
            winner = tl.where(wins, k, winner)
            best = tl.where(wins, v, best)
        _store(y_ptr, offs_w, C, offs_c, inside, tl.where(best <= 0, 0.0, best))
        if index_ptr is not None:
            _store(index_ptr, offs_w, C, offs_c, inside, tl.where(best <= 0, P * P, winner))


@triton.jit
def batch_norm_sums_bwd_kernel(
    dy_ptr,  # [B, H // P, W // P, C]
    x_ptr,  # [B, H, W, C]
    index_ptr,  # like dy
    statistics_ptr,
    partial_ptr,  # float64 [tiles, 2, C]: sums of g and of g (x - center); g is dy where ReLU is on
    windows,
    H,
    W,
    C,
    length,
    P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, offs_c = _place(C, BLOCK_C)
    center = _channels(statistics_ptr, offs_c, C, 0.0).to(COMPUTE)
    total = tl.zeros([BLOCK_W, BLOCK_C], COMPUTE)
    products = tl.zeros([BLOCK_W, BLOCK_C], COMPUTE)
    begin = tile * length
    end = tl.minimum(begin + length, windows)
    for first in range(begin, end, BLOCK_W):
        offs_w = first + tl.arange(0, BLOCK_W)
        inside = offs_w < end
        b, i, j = _window(offs_w, H // P, W // P)
        pixel = (b * H + i * P) * W + j * P
        winner = _load(index_ptr, offs_w, C, offs_c, inside).to(tl.int32)
        dy = _load(dy_ptr, offs_w, C, offs_c, inside).to(COMPUTE)
        x = _load(x_ptr, pixel, C, offs_c, inside).to(COMPUTE)
        for k in tl.static_range(1, P * P):
            other = _load(x_ptr, pixel + (k // P * W + k % P), C, offs_c, inside).to(COMPUTE)
            x = tl.where(winner == k, other, x)
        is_on = inside[:, None] & (winner < P * P)
        g = tl.where(is_on, dy, 0.0)
        total += g
        products += g * tl.where(is_on, x - center[None, :], 0.0)
    out_ptr = partial_ptr + tile.to(tl.int64) * 2 * C + offs_c
    tl.store(out_ptr, tl.sum(total, 0).to(tl.float64), mask=offs_c < C)
    tl.store(out_ptr + C, tl.sum(products, 0).to(tl.float64), mask=offs_c < C)


@triton.jit
def batch_norm_relu_max_pool_bwd_kernel(
    dy_ptr,
    x_ptr,
    index_ptr,
    weight_ptr,
    statistics_ptr,
    partial_ptr,
    dx_ptr,  # [B, H, W, C] or None
    dweight_ptr,
    dbias_ptr,
    windows,  # those that the edges cut count too
    H,
    W,
    C,
    partial_tiles,
    length,
    eps: tl.float64,
    per_pixel: tl.float64,
    P: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    tile, offs_c = _place(C, BLOCK_C)
    mean = _channels(statistics_ptr, offs_c, C, 0.0)
    inverse = 1.0 / tl.sqrt(_channels(statistics_ptr + C, offs_c, C, 1.0) + eps)
    center = mean.to(COMPUTE)
    rest = mean - center.to(tl.float64)
    dbias = tl.sum(_partials(partial_ptr, 0, partial_tiles, C, offs_c, BLOCK_T), 0)
    products = tl.sum(_partials(partial_ptr, 1, partial_tiles, C, offs_c, BLOCK_T), 0)
    dweight = (products - rest * dbias) * inverse
    if tile == 0:
        tl.store(dbias_ptr + offs_c, dbias.to(COMPUTE), mask=offs_c < C)
        tl.store(dweight_ptr + offs_c, dweight.to(COMPUTE), mask=offs_c < C)
    if dx_ptr is not None:
        # dx = factor g + (x - center) slope + offset
        a = _channels(weight_ptr, offs_c, C, 1.0) * inverse
        s = -a * inverse * dweight * per_pixel
        factor, slope = a.to(COMPUTE), s.to(COMPUTE)
        offset = (-a * dbias * per_pixel - s * rest).to(COMPUTE)
        begin = tile * length
        end = tl.minimum(begin + length, windows)
        for first in range(begin, end, BLOCK_W):
            offs_w = first + tl.arange(0, BLOCK_W)
            b, i, j = _window(offs_w, tl.cdiv(H, P), tl.cdiv(W, P))
            pixel = (b * H + i * P) * W + j * P
            is_whole = (offs_w < end) & (i < H // P) & (j < W // P)
            window = (b * (H // P) + i) * (W // P) + j
            winner = _load(index_ptr, window, C, offs_c, is_whole).to(tl.int32)
            g = _load(dy_ptr, window, C, offs_c, is_whole).to(COMPUTE) * factor[None, :]
            for k in tl.static_range(P * P):
                inside = (offs_w < end) & (i * P + k // P < H) & (j * P + k % P < W)
                d = tl.where(is_whole[:, None] & (winner == k), g, 0.0)
                if not GIVEN:
                    x = _load(x_ptr, pixel + (k // P * W + k % P), C, offs_c, inside).to(COMPUTE)
                    d += (x - center[None, :]) * slope[None, :] + offset[None, :]
                _store(dx_ptr, pixel + (k // P * W + k % P), C, offs_c, inside, d)


def _launch(kernel, tiling: Tiling, block: str, x: Tensor, **arguments) -> Launch:
    C = x.shape[1]
    arguments |= {"x_ptr": x, "C": C, "length": tiling.length, block: tiling.BLOCK}
    arguments |= {"BLOCK_C": tiling.BLOCK_C, "COMPUTE": compute_type(x.dtype)}
    grid = (tiling.tiles * triton.cdiv(C, tiling.BLOCK_C),)
    return Launch(kernel, grid, arguments, num_warps=tiling.num_warps)


def launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
    eps: float,
    pool: int,
    statistics: Tensor,
    y: Tensor,
    index: Tensor | None,
) -> list[Launch]:
    """Of the forward: x [B, C, H, W], y and index in channels_last; weight, bias, given mean and var, running
    statistics contiguous [C] in any dtype or None, num_batches int64 of one element; fills statistics [2, C],
    y and index and updates the running statistics."""
    B, C, H, W = x.shape
    pixels, windows = B * H * W, B * (H // pool) * (W // pool)
    made, partial, tiles, length = [], None, 1, 1
    if mean is None:
        tiling = _tiling(pixels, C, 1, x.itemsize, sums=True)
        tiles, length = tiling.tiles, tiling.length
        partial = x.new_empty((tiles, 2, C), dtype=torch.float64)
        arguments = {"partial_ptr": partial, "pixels": pixels}
        made.append(_launch(batch_norm_statistics_fwd_kernel, tiling, "BLOCK_P", x, **arguments))
    made.append(
        _launch(
            batch_norm_relu_max_pool_fwd_kernel,
            _tiling(windows, C, max(2, pool * pool), x.itemsize),
            "BLOCK_W",
            x,
            partial_ptr=partial,
            mean_ptr=mean,
            var_ptr=var,
            weight_ptr=weight,
            bias_ptr=bias,
            running_mean_ptr=running_mean,
            running_var_ptr=running_var,
            num_batches_ptr=num_batches,
            statistics_ptr=statistics,
            y_ptr=y,
            index_ptr=index,
            pixels=pixels,
            windows=windows,
            H=H,
            W=W,
            partial_length=length,
            partial_tiles=tiles,
            eps=eps,
            momentum=momentum,
            per_pixel=1 / pixels,
            unbiasing=pixels / max(1, pixels - 1),
            P=pool,
            BLOCK_T=triton.next_power_of_2(tiles),
        )
    )
    return made


def backward_launches(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    given: bool,
    eps: float,
    pool: int,
    dx: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
) -> list[Launch]:
    """Of the backward: dy, x, index and dx in channels_last; fills dx, dweight and dbias."""
    B, C, H, W = x.shape
    windows = B * (H // pool) * (W // pool)
    tiling = _tiling(windows, C, max(2, pool * pool), x.itemsize, sums=True)
    partial = x.new_empty((tiling.tiles, 2, C), dtype=torch.float64)
    shared = {"dy_ptr": dy, "index_ptr": index, "statistics_ptr": statistics, "partial_ptr": partial}
    shared |= {"H": H, "W": W, "P": pool}
    sums = _launch(batch_norm_sums_bwd_kernel, tiling, "BLOCK_W", x, windows=windows, **shared)
    windows = B * triton.cdiv(H, pool) * triton.cdiv(W, pool)
    all_of_x = _tiling(windows, C, max(2, pool * pool), x.itemsize)
    second = _launch(
        batch_norm_relu_max_pool_bwd_kernel,
        all_of_x._replace(tiles=1) if dx is None else all_of_x,
        "BLOCK_W",
        x,
        weight_ptr=weight,
        dx_ptr=dx,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        per_pixel=1 / (B * H * W),
        windows=windows,
        partial_tiles=tiling.tiles,
        eps=eps,
        GIVEN=given,
        BLOCK_T=triton.next_power_of_2(tiling.tiles),
        **shared,
    )
    return [sums, second]


def run(*arguments) -> None:
    """The forward, arguments as of `launches`."""
    for launch in launches(*arguments):
        launch.run()


def run_backward(*arguments) -> None:
    """The backward, arguments as of `backward_launches`."""
    for launch in backward_launches(*arguments):
        launch.run()


def examples() -> list[tuple[str, Launch]]:
    """The five layers of `full` at batch 64."""
    layers = {"conv1": (64, 32, 2), "conv5": (512, 2, 1), "conv2": (128, 16, 2), "conv3": (256, 8, 2)}
    layers |= {"conv4": (512, 4, 2)}
    made = []
    for dtype, names in ((torch.bfloat16, layers), (torch.float32, ("conv1", "conv4", "conv5"))):
        for name in names:
            C, size, pool = layers[name]
            x = torch.empty(64, C, size, size, dtype=dtype, device="meta")
            y = torch.empty(64, C, size // pool, size // pool, dtype=dtype, device="meta")
            vector = x.new_empty(C, dtype=torch.float32)
            statistics = x.new_empty((2, C), dtype=torch.float64)
            index, count = y.to(torch.uint8), x.new_empty(1, dtype=torch.int64)
            running = (vector, vector, count, 0.1, 1e-5, pool)
            found = launches(x, vector, vector, None, None, *running, statistics, y, index)
            options = (False, 1e-5, pool, x, vector, vector)
            found += backward_launches(y, x, index, vector, statistics, *options)
            made += [(f"{name} {dtype}", launch) for launch in found]
    return made
