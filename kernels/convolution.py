"""What the kernels of layers on generated weights share: places of images and the columns of a convolution by
index arithmetic, sums cut into parts, and how a call's sizes and dtypes reach a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.launch import Launch, compute_type, dot_precision, dot_type

WARPS, STAGES = 8, 3
power = triton.next_power_of_2


@triton.jit
def pixels(offs, height, width):
    """(image, row, column) of pixels counted through images of height x width."""
    return (offs // (height * width)).to(tl.int64), offs // width % height, offs % width


@triton.jit
def gather_columns(
    x_ptr,
    offs_m,
    c,
    down,
    right,
    in_m,
    in_i,
    H,
    W,
    out_h,
    out_w,
    x_b,
    x_c,
    x_h,
    x_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    PADDED: tl.constexpr,
):
    """x_col[m, i] of rows m and columns i: channel c of x, `down` and `right` from the window's corner."""
    image, row, column = pixels(offs_m, out_h, out_w)
    h = row * STRIDE_H - TOP
    w = column * STRIDE_W - LEFT
    mask = in_m[:, None] & in_i[None, :]
    if PADDED:
        hs = h[:, None] + down[None, :]
        ws = w[:, None] + right[None, :]
        mask = mask & (hs >= 0) & (hs < H) & (ws >= 0) & (ws < W)
    of_m = image * x_b + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w
    of_i = c.to(tl.int64) * x_c + down.to(tl.int64) * x_h + right.to(tl.int64) * x_w
    return tl.load(x_ptr + of_m[:, None] + of_i[None, :], mask=mask, other=0.0)


@triton.jit
def meeting_rows(down, right, out_h, out_w, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr):
    """(row, column, whether there is one) of the output whose window begins `down` and `right` of the padded
    image's corner."""
    row, column = down // STRIDE_H, right // STRIDE_W
    meets = (down >= 0) & (down % STRIDE_H == 0) & (row < out_h)
    return row, column, meets & (right >= 0) & (right % STRIDE_W == 0) & (column < out_w)


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    layer_bias_ptr,
    out_ptr,
    parts,
    size,
    inner,
    channels,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j] = sum_p parts[p, j] + layer_bias[j // inner % channels], in memory's order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    total = tl.zeros((BLOCK_P, BLOCK), parts_ptr.dtype.element_ty)
    for first in range(0, parts, BLOCK_P):
        offs_p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (offs_p < parts)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + offs_p[:, None] * size + offs[None, :], mask=mask, other=0.0)
    out = tl.sum(total, 0)
    if layer_bias_ptr is not None:
        layer_bias = tl.load(layer_bias_ptr + offs // inner % channels, mask=inside, other=0.0)
        out += layer_bias.to(out.dtype)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{letter}": stride for letter, stride in zip("bchw", tensor.stride(), strict=True)}


def split(steps: int, blocks: int, programs: int) -> tuple[int, int]:
    """(parts, steps of each) into which the `steps` of each of `blocks` blocks are cut, about `programs` in
    all."""
    chunk = triton.cdiv(steps, max(1, min(steps, programs // blocks)))
    return triton.cdiv(steps, chunk), chunk


def sum_parts(
    parts: Tensor, layer_bias: Tensor | None, out: Tensor, inner: int = 1, channels: int = 1
) -> Launch:
    """out = the sum of parts [P, elements of out, in out's order in memory] + layer_bias [channels], of which
    each serves `inner` elements in turn."""
    P, size = parts.shape
    BLOCK_P = min(power(P), 256)
    BLOCK = min(power(size), 4096 // BLOCK_P)
    arguments = {"parts_ptr": parts, "layer_bias_ptr": layer_bias, "out_ptr": out, "parts": P, "size": size}
    arguments |= {"inner": inner, "channels": channels, "BLOCK_P": BLOCK_P, "BLOCK": BLOCK}
    return Launch(sum_parts_kernel, (triton.cdiv(size, BLOCK),), arguments, num_warps=WARPS)


class Layer:
    """Sizes of one call and the arguments its kernels share. x [B, C groups, H, W], y [B, O groups, H', W'],
    weight [N, K]; geometry: R, S, stride (2), padding (top, bottom, left, right), dilation (2), groups."""

    def __init__(self, x: Tensor, z: Tensor, weight: Tensor, y: Tensor, geometry: tuple[int, ...]):
        R, S, stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w, self.groups = geometry
        B, channels, H, W = x.shape
        self.N, self.K = weight.shape
        self.C, self.O, self.taps = channels // self.groups, y.shape[1] // self.groups, R * S
        self.I, self.pixels, self.rows = self.C * R * S, B * H * W, y.shape[0] * y.shape[2] * y.shape[3]
        self.dtype, self.x_dtype = weight.dtype, x.dtype
        self.wide = x.dtype.itemsize >= 4  # tiles take twice the registers
        self.pointwise = geometry[:10] == (1, 1, 1, 1, 0, 0, 0, 0, 1, 1)
        self.shared = {
            "z_ptr": z, "weight_ptr": weight, "C": self.C, "O": self.O, "M": self.rows, "P": self.pixels,
            "H": H, "W": W, "out_h": y.shape[2], "out_w": y.shape[3], "K": self.K, "R": R, "S": S,
            "STRIDE_H": stride_h, "STRIDE_W": stride_w, "TOP": top, "LEFT": left,
            "DILATION_H": dilation_h, "DILATION_W": dilation_w, "PADDED": any((top, bottom, left, right)),
            "POINTWISE": self.pointwise, "BLOCK_K": power(self.K), "COMPUTE": compute_type(weight.dtype),
            "DOT": dot_type(x.dtype), "PRECISION": dot_precision(x.dtype),
        }  # fmt: skip

    def scratch(self, device: torch.device, *shape: int) -> Tensor:
        """Memory for sums, in the type the kernels compute in."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.empty(shape, dtype=dtype, device=device)

    def launch(self, kernel, grid: tuple[int, ...], **arguments) -> Launch:
        """With those of the shared arguments that the kernel has."""
        arguments = self.shared | arguments
        arguments = {name: arguments[name] for name in kernel.arg_names}
        return Launch(kernel, grid, arguments, num_warps=WARPS, num_stages=STAGES)
