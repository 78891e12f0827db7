"""`ops.conv2d`: one matrix product for each tap (kn2row) against torch's convolution, in channels_last.

The rule in hyperfast/ops/conv2d.py is read off this table.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.machine import interleaved, median, paired_ratio
from hyperfast import ops
from hyperfast.ops.conv2d import useful_share

# B, I, O, image size, kernel size; the first two are conv5 and conv4 of `full`
SHAPES = [
    (64, 512, 512, 2, 3), (64, 256, 512, 4, 3), (64, 128, 256, 8, 3), (64, 256, 256, 1, 3),
    (64, 256, 256, 3, 3), (64, 256, 256, 5, 3), (64, 256, 256, 4, 5), (64, 64, 64, 2, 3),
    (64, 128, 128, 2, 3), (256, 256, 256, 4, 3), (16, 256, 512, 4, 3), (4, 512, 512, 2, 3),
    (1, 512, 512, 2, 3), (1, 512, 512, 4, 3),
]  # fmt: skip


def bench_conv2d(benchmark, report):
    rows = []
    benchmark.pedantic(lambda: rows.extend(row(*shape) for shape in SHAPES), rounds=1)
    header = ["batch, channels, image, kernel", "useful products", "forward, torch / kn2row",
              "forward + backward, torch / kn2row", "kn2row", "taken"]  # fmt: skip
    report("conv2d, padding k // 2, float32, channels_last", header, rows)


def row(B: int, I: int, O: int, size: int, taps: int) -> list[str]:
    torch.manual_seed(0)
    padding = taps // 2
    x, weight, dy = (
        torch.randn(B, I, size, size),
        torch.randn(O, I, taps, taps),
        torch.randn(B, O, size, size),
    )
    x, weight, dy = (t.to(memory_format=torch.channels_last) for t in (x, weight, dy))
    tensors = x.requires_grad_(), weight.requires_grad_()

    def forward(path: str) -> torch.Tensor:
        return ops.conv2d(*tensors, None, padding=padding, path=path)

    def both(path: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(path), tensors, dy)

    for a, b in zip(both("torch"), both("kn2row"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-2)
    times = [
        interleaved({path: functools.partial(function, path) for path in ("torch", "kn2row")}, 7)
        for function in (torch.no_grad()(forward), both)
    ]
    ratios = [f"{paired_ratio(t['torch'], t['kn2row']):.2f}" for t in times]
    y = ops.conv2d(*tensors, None, padding=padding)
    taken = "kn2row" if type(y.grad_fn).__name__ == "Conv2dBackward" else "torch"
    name = f"{B}, {I} -> {O}, {size} x {size}, {taps} x {taps}"
    share = f"{100 * useful_share(size, taps, padding) ** 2:.0f} %"
    return [name, share, *ratios, f"{1e3 * median(times[1]['kn2row']):.2f} ms", taken]
