"""How `per_sample_conv2d` is contracted on the CPU: products by torch, what lies around them by our kernels.

With T rows a sample, and weight read as it is stored, [O, I, K]:
y[b, t, o] = sum_ik x[b, t, i] z[b, k] weight[o, i, k] + sum_i x[b, t, i] bias[o, i]

Two orders of it, neither of which holds the B N weights of all samples:

expand    the outer products of x and z, [B T, I K], times the generator [O, I K]: one product of 2 B T N K
          operations. The backward makes their gradient, dy times the generator, and contracts it to dx and dz
          in one pass.
generate  the weights of some outputs of some samples, z weight^T + bias in one product, used while they are
          in cache: 2 B N (K + T) operations. The rows of a convolution are many, so it always goes this way,
          samples as groups of one convolution.

Chunks of CHUNK_BYTES (CONVOLUTION_BYTES), in a fixed order, whose sizes depend on shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.ops._library import _cpu, address, dtype_name
from hyperfast.ops.merged import LINEAR, Geometry, layout_of, pad_uneven

CHUNK_BYTES = 8 << 20
CONVOLUTION_BYTES = 32 << 20  # of the weights of one convolution: smaller ones cost oneDNN more
LEAST_OUTPUTS = 32  # of a chunk of generated weights: narrower products are slow
PASSES, PRODUCT = 35, 1.4  # of "generate": what its weights cost in memory, and an operation, measured


def expands(rows: int, K: int, geometry: Geometry) -> bool:
    """Whether a layer of `rows` rows a sample is contracted by "expand". That costs T K multiplications for
    each weight and sample, "generate" T + K and passes over the weights in cache; measured they are equal at
    K 4, T 15; K 16, T 4; K 64, T 2 (benchmarks/bench_per_sample.py)."""
    return geometry == LINEAR and rows * K <= PASSES + PRODUCT * (rows + K)


def separate_wins(x: Tensor, weight: Tensor, K: int, geometry: Geometry) -> bool:
    """Whether plain PyTorch, which makes the weights of all samples at once and keeps them for the backward,
    is faster: where they fit one chunk and "expand" does not serve, by 10 to 30 %."""
    most = CHUNK_BYTES if geometry == LINEAR else CONVOLUTION_BYTES
    rows = x.shape[2] * x.shape[3]
    return x.shape[0] * len(weight) * weight.itemsize <= most and not expands(rows, K, geometry)


def _cut(length: int, most: int) -> Iterator[slice]:
    """`length` in equal parts of at most `most`."""
    size = math.ceil(length / math.ceil(length / max(1, most)))
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a b; a `first` product overwrites."""
    if total.dtype != a.dtype:  # `_total` of bfloat16
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif first:
        (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out=total)
    else:
        (total.addmm_ if a.dim() == 2 else total.baddbmm_)(a, b)


def _total(
    shape: torch.Size, like: Tensor, chunks: int, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Memory for a sum over chunks, of bfloat16 in float32."""
    is_wide = like.dtype == torch.bfloat16 and chunks > 1
    return torch.empty(shape, dtype=torch.float32 if is_wide else like.dtype, memory_format=layout)


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H W, C], contiguous."""
    return x.flatten(2).mT.contiguous()


def _image(rows: Tensor, x: Tensor, shape: list[int]) -> Tensor:
    """[B, H W, C] as [B, C, H, W] in the layout of x."""
    return rows.mT.unflatten(2, shape[2:]).contiguous(memory_format=layout_of(x))


class _Expand:
    """Outer products of x's rows with z, chunk by chunk of whole samples, in one buffer."""

    def __init__(self, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None):
        self.rows, self.z = _rows(x), z.contiguous()
        B, self.T, self.I = self.rows.shape
        self.K = z.shape[1]
        self.weight = weight.reshape(-1, self.I * self.K)
        self.bias = None if bias is None else bias.reshape(-1, self.I)
        samples = CHUNK_BYTES // (self.T * self.weight[0].nbytes)
        self.chunks = list(_cut(B, samples))
        self.buffer = x.new_empty(self.chunks[0].stop * self.T, self.I * self.K)

    def _call(self, kernel, addresses: tuple[int, ...], samples: slice, *options) -> None:
        sizes = samples.stop - samples.start, self.T, self.I, self.K
        kernel(addresses, *options, sizes, dtype_name(self.rows), torch.get_num_threads())

    def products(self, samples: slice) -> Tensor:
        """[rows of the chunk, I K]"""
        made = self.buffer[: (samples.stop - samples.start) * self.T]
        addresses = self.rows[samples].data_ptr(), self.z[samples].data_ptr(), made.data_ptr()
        self._call(_cpu.outer_product, addresses, samples)
        return made

    def products_backward(self, dy: Tensor, samples: slice, dx: Tensor | None, dz: Tensor | None) -> None:
        """Fills the chunk of dx [B, T, I] and dz [B, K] from that of dy [rows of the chunk, O]."""
        made = torch.mm(dy, self.weight, out=self.buffer[: len(dy)])
        wanted = [None if t is None else t[samples] for t in (dx, dz)]
        if dx is not None and self.bias is not None:
            torch.mm(dy, self.bias, out=wanted[0].flatten(0, 1))
        tensors = made, self.rows[samples], self.z[samples], *wanted
        addresses = tuple(map(address, tensors))
        self._call(_cpu.outer_product_backward, addresses, samples, self.bias is not None)


def _forward_expand(x, z, weight, bias, layer_bias, geometry: Geometry) -> Tensor:
    e = _Expand(x, z, weight, bias)
    y = x.new_empty(*e.rows.shape[:2], len(e.weight))
    for samples in e.chunks:
        out, products = y[samples].flatten(0, 1), e.products(samples)
        if layer_bias is None:
            torch.mm(products, e.weight.t(), out=out)
        else:
            torch.addmm(layer_bias, products, e.weight.t(), out=out)
        if bias is not None:
            out.addmm_(e.rows[samples].flatten(0, 1), e.bias.t())
    return _image(y, x, geometry.shape(x, weight))


def _backward_expand(dy, x, z, weight, bias, geometry, need_x, need_z, need_weight, need_bias):
    e = _Expand(x, z, weight, bias)
    dy = _rows(dy)
    dx, dz = torch.empty_like(e.rows) if need_x else None, torch.empty_like(e.z) if need_z else None
    dweight = _total(e.weight.shape, weight, len(e.chunks)) if need_weight else None
    for samples in e.chunks:
        rows = dy[samples].flatten(0, 1)
        if need_weight:
            _accumulate(dweight, rows.t(), e.products(samples), first=samples.start == 0)
        if need_x or need_z:
            e.products_backward(rows, samples, dx, dz)
    dbias = dy.flatten(0, 1).t() @ e.rows.flatten(0, 1) if need_bias else None
    return (
        _image(dx, x, x.shape) if need_x else None,
        dz,
        dweight.to(weight.dtype).view(weight.shape) if need_weight else None,
        dbias.view(-1) if need_bias else None,
    )


class _Generate:
    """The weights of some outputs of some samples, in one buffer."""

    def __init__(self, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry):
        self.x, self.z, self.weight, self.bias, self.geometry = x, z, weight, bias, geometry
        B, self.O = len(x), geometry.outputs(x, weight)
        self.I = len(weight) // self.O
        output_bytes, is_linear = self.I * weight.itemsize, geometry == LINEAR
        outputs = max(CHUNK_BYTES // (B * output_bytes), LEAST_OUTPUTS) if is_linear else self.O
        self.outputs = list(_cut(self.O, outputs))
        most = CHUNK_BYTES if is_linear else CONVOLUTION_BYTES
        self.samples = list(_cut(B, most // (self.outputs[0].stop * output_bytes)))
        self.buffer = x.new_empty(self.samples[0].stop * self.outputs[0].stop * self.I)

    def chunks(self) -> Iterator[tuple[slice, slice, slice]]:
        """(samples, outputs, rows of the generator)"""
        for outputs in self.outputs:
            for samples in self.samples:
                yield samples, outputs, slice(outputs.start * self.I, outputs.stop * self.I)

    def room(self, samples: slice, outputs: slice) -> Tensor:
        """The buffer for a chunk of weights, or of their gradients: [samples, outputs, I]"""
        shape = samples.stop - samples.start, outputs.stop - outputs.start, self.I
        return self.buffer[: math.prod(shape)].view(shape)

    def weights(self, samples: slice, outputs: slice, n: slice) -> Tensor:
        w = self.room(samples, outputs)
        torch.mm(self.z[samples], self.weight[n].t(), out=w.flatten(1))
        return w if self.bias is None else w.add_(self.bias[n].view(-1, self.I))

    def _as_groups(self, samples: slice, w: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """The samples as one image [1, B C, H, W], their kernels, and the padding left to the convolution."""
        x, padding = pad_uneven(self.x[samples], self.geometry)
        kernels = w.view(-1, x.shape[1] // self.geometry.groups, *self.geometry.kernel_size)
        return x.reshape(1, -1, *x.shape[2:]), kernels, padding

    def convolve(self, samples: slice, w: Tensor, y: Tensor) -> None:
        images, kernels, padding = self._as_groups(samples, w)
        groups = len(w) * self.geometry.groups
        made = F.conv2d(images, kernels, None, self.geometry.stride, padding, self.geometry.dilation, groups)
        y.copy_(made.view(y.shape))

    def convolve_backward(self, samples, w, dy, dx: Tensor | None, need_w: bool) -> Tensor | None:
        """Fills dx and returns the gradient of w."""
        images, kernels, padding = self._as_groups(samples, w)
        made, dw, _ = torch.ops.aten.convolution_backward(
            dy.reshape(1, -1, *dy.shape[2:]), images, kernels, None, self.geometry.stride, padding,
            self.geometry.dilation, False, [0, 0], len(w) * self.geometry.groups,
            [dx is not None, need_w, False],
        )  # fmt: skip
        if dx is not None:
            top, left = (at - cut for at, cut in zip(self.geometry.padding[::2], padding, strict=True))
            made = made.view(*dx.shape[:2], *made.shape[2:])
            dx.copy_(made[..., top : top + dx.shape[2], left : left + dx.shape[3]])
        return dw


def _forward_generate(x, z, weight, bias, layer_bias, geometry: Geometry) -> Tensor:
    g = _Generate(x, z, weight, bias, geometry)
    shape = geometry.shape(x, weight)
    if geometry == LINEAR:
        x = _rows(x)
        y = x.new_empty(*x.shape[:2], shape[1])
    else:
        y = torch.empty(shape, dtype=x.dtype, memory_format=layout_of(x))
    for samples, outputs, n in g.chunks():
        w = g.weights(samples, outputs, n)
        if geometry == LINEAR:
            y[samples, :, outputs] = x[samples] @ w.mT
        else:
            g.convolve(samples, w, y[samples])
    if geometry == LINEAR:
        return _image(y if layer_bias is None else y.add_(layer_bias), g.x, shape)
    return y if layer_bias is None else y.add_(layer_bias.view(-1, 1, 1))


def _backward_generate(dy, x, z, weight, bias, geometry, need_x, need_z, need_weight, need_bias):
    g = _Generate(x, z, weight, bias, geometry)
    need_w = need_z or need_weight or need_bias
    if geometry == LINEAR:
        x, dy = _rows(x), _rows(dy)
    layout = torch.contiguous_format if geometry == LINEAR else layout_of(x)
    dx = _total(x.shape, x, len(g.outputs), layout) if need_x else None
    dz = _total(z.shape, z, len(g.outputs)) if need_z else None
    dweight = _total(weight.shape, weight, len(g.samples)) if need_weight else None
    dbias = _total((len(weight), 1), weight, len(g.samples)) if need_bias else None
    ones = z.new_ones(len(z), 1)
    for samples, outputs, n in g.chunks():
        w = g.weights(samples, outputs, n) if need_x or geometry != LINEAR else None
        if geometry == LINEAR:
            d = dy[samples, :, outputs]
            if need_x:
                _accumulate(dx[samples], d, w, outputs.start == 0)
            if need_w:
                dw = torch.bmm(d.mT, x[samples], out=g.room(samples, outputs))
        else:
            dw = g.convolve_backward(samples, w, dy[samples], dx[samples] if need_x else None, need_w)
        if need_w:
            dw = dw.reshape(samples.stop - samples.start, -1)
        if need_z:
            _accumulate(dz[samples], dw, weight[n], outputs.start == 0)
        if need_weight:
            _accumulate(dweight[n], dw.t(), z[samples], samples.start == 0)
        if need_bias:
            _accumulate(dbias[n], dw.t(), ones[samples], samples.start == 0)
    if need_x:
        dx = _image(dx.to(g.x.dtype), g.x, g.x.shape) if geometry == LINEAR else dx.to(x.dtype)
    return (
        dx,
        dz.to(z.dtype) if need_z else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(weight.dtype).view(-1) if need_bias else None,
    )


def forward(x, z, weight, bias, layer_bias, geometry):
    geometry = Geometry.of(tuple(geometry))
    way = _forward_expand if expands(x[0, 0].numel(), z.shape[1], geometry) else _forward_generate
    return way(x, z, weight, bias, layer_bias, geometry)


def backward(dy, x, z, weight, bias, geometry, *needed):
    geometry = Geometry.of(tuple(geometry))
    way = _backward_expand if expands(x[0, 0].numel(), z.shape[1], geometry) else _backward_generate
    made = way(dy, x, z, weight, bias, geometry, *needed)
    return tuple(x.new_empty(0) if g is None else g for g in made)
