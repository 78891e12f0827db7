"""The kernels of `per_sample_conv2d`, forward and backward, against the expression in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast import ops
from hyperfast.kernels import per_sample_conv2d
from hyperfast.kernels.convolution import sum_parts_kernel
from hyperfast.kernels.per_sample_conv2d import backward_launches, expands, launches, run, run_backward
from hyperfast.ops.merged import Geometry
from hyperfast.ops.per_sample import expression

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAST, FIRST = torch.channels_last, torch.contiguous_format
PADDED = Geometry((3, 3), padding=(1, 1, 1, 1))


class Case(NamedTuple):
    x: tuple[int, int, int, int]
    outputs: int
    K: int
    geometry: Geometry = Geometry()
    layout: torch.memory_format = FIRST
    bias: bool = True

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        """x, z, weight, bias, layer_bias"""
        I = self.x[1] // self.geometry.groups * self.geometry.kernel_size[0] * self.geometry.kernel_size[1]
        N = self.outputs * I
        shapes = self.x, (self.x[0], self.K), (N, self.K), (N,), (self.outputs,)
        made = [torch.randn(shape).to(device).to(dtype) for shape in shapes]
        made[0] = made[0].contiguous(memory_format=self.layout)
        return made if self.bias else [*made[:3], None, None]

    def expands(self) -> bool:
        rows = self.geometry.rows(torch.empty(self.x, device="meta")) // self.x[0]
        return expands(rows, self.K, self.geometry._replace(groups=1) == Geometry())


def linear(samples: int, rows: int, inputs: int, outputs: int, K: int, **options) -> Case:
    return Case((samples, inputs, rows, 1), outputs, K, **options)


EXPANDED = {
    "one of everything": linear(1, 1, 1, 1, 1),
    "1 row a sample": linear(5, 1, 67, 9, 16),
    "3 rows a sample": linear(7, 3, 13, 17, 3, bias=False),
    "65 samples": linear(65, 1, 33, 65, 4),
    "K 17": linear(3, 2, 18, 5, 17),
    "K 100": linear(4, 1, 5, 3, 100),
    "images, groups": Case((3, 6, 2, 3), 9, 5, Geometry(groups=3), LAST),
}
PER_SAMPLE = {
    "19 rows a sample": linear(3, 19, 17, 16, 33),
    "1x1": Case((2, 5, 8, 5), 9, 7, layout=LAST),
    "3x3": Case((3, 3, 4, 5), 5, 16, PADDED),
    "3x3, channels last": Case((2, 17, 9, 8), 18, 4, PADDED, LAST),
    "3x3 of 1x1 pixels": Case((4, 3, 1, 1), 2, 2, PADDED, bias=False),
    "K 100, 3x3": Case((2, 2, 3, 3), 3, 100, PADDED),
    "pairs": Case((2, 3, 6, 7), 5, 7, Geometry((3, 2), (2, 1), (1, 1, 0, 0), (1, 2)), LAST),
    "same, even": Case((2, 3, 5, 4), 4, 8, Geometry((4, 2), padding=(1, 2, 0, 1)), bias=False),
    "more padding than kernel": Case((2, 2, 2, 3), 3, 1, Geometry((2, 2), padding=(3, 3, 3, 3))),
    "depthwise": Case((2, 4, 5, 5), 8, 4, Geometry((3, 3), (2, 2), (1, 1, 1, 1), groups=4), LAST),
    "groups, all options": Case((2, 6, 7, 9), 9, 16, Geometry((2, 3), (2, 3), (2, 2, 2, 2), (2, 2), 3)),
}
CASES = EXPANDED | PER_SAMPLE


def poisoned(shape, dtype, device, layout=FIRST) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device).contiguous(memory_format=layout)


def forward(case: Case, x: Tensor, *tensors: Tensor | None) -> Tensor:
    y = poisoned(case.geometry.shape(x, tensors[1]), x.dtype, x.device, case.layout)
    run(x, *tensors, y, case.geometry.numbers())
    return y


def backward(case: Case, dy: Tensor, x, z, weight, bias, needed=(True,) * 4) -> list[Tensor | None]:
    """dx, dz, dweight, dbias"""
    likes = (x, case.layout), (z, FIRST), (weight, FIRST), (weight[:, 0], FIRST)
    out = [
        poisoned(t.shape, t.dtype, t.device, layout) if n else None
        for n, (t, layout) in zip(needed, likes, strict=True)
    ]
    run_backward(dy, x, z, weight, bias, *out, case.geometry.numbers())
    return out


def expected(case: Case, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """y, dx, dz, dweight and dbias in plain PyTorch."""
    x, z, weight, bias, layer_bias = tensors
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    inputs = [t.detach().requires_grad_() for t in (x, z, weight, bias)]
    y = expression(*inputs, layer_bias, case.geometry)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def check(case: Case, dtype: torch.dtype, device: torch.device, assert_accurate) -> None:
    tensors = case.tensors(dtype, device)
    y = forward(case, *tensors)
    dy = torch.randn(y.shape).to(device).to(dtype)
    got = [y, *backward(case, dy, *tensors[:4])]
    doubles = [None if t is None else t.cpu().double() for t in tensors]
    wanted = expected(case, doubles, dy.cpu().double())
    plain = expected(case, [None if t is None else t.cpu() for t in tensors], dy.cpu())
    for a, b, rounded in zip(got, wanted, plain, strict=True):
        assert_accurate(a.cpu(), b, dtype, rounded)


def with_dtypes() -> list:
    """Every case in every dtype, most of half precision slow."""
    made = []
    for i, name in enumerate(CASES):
        for j, dtype in enumerate(FLOATS):
            is_slow = j > 0 and i % 4 != j  # one half precision for every second case
            made.append(pytest.param(name, dtype, marks=pytest.mark.slow if is_slow else ()))
    return made


@pytest.mark.parametrize("name, dtype", with_dtypes(), ids=str)
def test_equals_reference(name, dtype, device, assert_accurate):
    assert CASES[name].expands() == (name in EXPANDED)
    check(CASES[name], dtype, device, assert_accurate)
