"""The kernels of `per_sample_conv2d`, forward and backward, against the expression in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast import ops
from hyperfast.kernels import per_sample_conv2d
from hyperfast.kernels.convolution import sum_parts_kernel
from hyperfast.kernels.launch import INTERPRETED
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
    "65 samples": linear(65, 1, 17, 65, 4),
    "K 17": linear(3, 2, 18, 5, 17),
    "K 100": linear(4, 1, 5, 3, 100),
    "images, groups": Case((3, 6, 2, 3), 9, 5, Geometry(groups=3), LAST),
}
PER_SAMPLE = {
    "19 rows a sample": linear(3, 19, 17, 16, 33),
    "1x1": Case((2, 5, 8, 5), 9, 7, layout=LAST),
    "3x3": Case((3, 3, 4, 5), 5, 16, PADDED),
    "3x3, channels last": Case((2, 17, 9, 8), 5, 4, PADDED, LAST),
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


# the interpreter rounds to bfloat16 by cutting off, which few numbers do not average out
LUCK = pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16")


def with_dtypes() -> list:
    """Every case in every dtype, most of half precision slow."""
    made = []
    for i, name in enumerate(CASES):
        for j, dtype in enumerate(FLOATS):
            is_slow = j > 0 and i % 4 != j  # one half precision for every second case
            is_luck = dtype == torch.bfloat16 and name in ("one of everything", "K 100")
            marks = [mark for mark, wanted in ((pytest.mark.slow, is_slow), (LUCK, is_luck)) if wanted]
            made.append(pytest.param(name, dtype, marks=marks))
    return made


@pytest.mark.parametrize("name, dtype", with_dtypes(), ids=str)
def test_equals_reference(name, dtype, device, assert_accurate):
    assert CASES[name].expands() == (name in EXPANDED)
    check(CASES[name], dtype, device, assert_accurate)


@pytest.mark.parametrize("name", ["3 rows a sample", "K 17", "3x3", "groups, all options"])
def test_float64(name, device, assert_accurate):
    check(CASES[name], torch.float64, device, assert_accurate)


SIZES = [1, 7, 15, 16, 17, 31, 32, 33, 65]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("K", [1, 3, 15, 16, 33])
@pytest.mark.parametrize("rows", [1, 4, 37])
def test_sizes_around_the_tiles(rows, K, dtype, device, assert_accurate):
    for i, samples in enumerate([2, 5, 16, 33]):
        inputs, outputs = SIZES[(2 * i + rows) % len(SIZES)], SIZES[(3 * i + K) % len(SIZES)]
        check(linear(samples, rows, inputs, outputs, K, bias=i % 2 == 0), dtype, device, assert_accurate)


@pytest.mark.parametrize("name", ["images, groups", "3x3, channels last"])
def test_generator_in_float32_beside_half_precision(name, device):
    """As under autocast: the product in x's dtype, the generator's gradients in the generator's."""
    case = CASES[name]
    tensors = case.tensors(torch.float32, device)
    tensors[0] = tensors[0].to(torch.float16)
    y = forward(case, *tensors)
    dy = torch.randn(y.shape).to(device).to(torch.float16)
    got = y, *backward(case, dy, *tensors[:4])
    assert [t.dtype for t in got] == [torch.float16] * 2 + [torch.float32] * 3
    wanted = expected(case, [t.cpu().double() for t in tensors], dy.cpu().double())
    for a, b in zip(got, wanted, strict=True):
        assert (a.cpu() - b).norm() <= 2e-3 * b.norm()


@pytest.mark.parametrize("name", ["K 17", "3x3"])
def test_each_gradient_alone_and_again(name, device):
    """What is not asked for changes nothing, and every run gives the same bits."""
    case = CASES[name]
    tensors = case.tensors(torch.float32, device)[:4]
    dy = torch.randn(case.geometry.shape(tensors[0], tensors[2])).to(device)
    every, again = backward(case, dy, *tensors), backward(case, dy, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(every, again, strict=True))
    for i in range(4):
        alone = backward(case, dy, *tensors, needed=[j == i for j in range(4)])
        assert [t is None for t in alone] == [j != i for j in range(4)]
        torch.testing.assert_close(alone[i], every[i], rtol=1e-5, atol=1e-5)


def test_tensors_with_gaps(device):
    """x and dy are read where they lie, in both forms."""
    wide = torch.randn(4, 12, 13, 15).to(device)
    images = Case((2, 3, 6, 7), 5, 7, Geometry((3, 2), (2, 1), (1, 1, 0, 0), (1, 2)))
    rows = Case((2, 3, 2, 1), 5, 7)
    for case, x in ((images, wide[1:3, ::4, 1::2, 8:]), (rows, wide[::2, 2:5, 4:11:5, 3:4])):
        assert x.shape == case.x and not x.is_contiguous() and case.expands() == (case is rows)
        tensors = case.tensors(torch.float32, device)
        y = forward(case, x, *tensors[1:])
        dy = torch.randn(1).to(device).expand(y.shape)
        got = [y, *backward(case, dy, x, *tensors[1:4])]
        wanted = expected(case, [x.double(), *(t.double() for t in tensors[1:])], dy.double())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stays_in_its_sample_and_output(device):
    for rows in (1, 40):
        case = linear(4, rows, 21, 11, 4)
        assert case.expands() == (rows == 1)
        x, z, weight, bias, layer_bias = case.tensors(torch.float32, device)
        x[2, 20, 0], z[1, 3], weight[5 * 21 + 20, 3] = torch.nan, torch.inf, torch.inf
        good = forward(case, x, z, weight, bias, layer_bias).isfinite().squeeze(3)
        wanted = torch.ones_like(good)
        wanted[1], wanted[2, :, 0], wanted[:, 5] = False, False, False
        assert torch.equal(good, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_of_samples(dtype, device, monkeypatch, assert_accurate):
    """Memory for the weights of two samples: the generator's gradients add up over chunks, in float32."""
    case = Case((5, 3, 4, 5), 5, 16, PADDED)
    monkeypatch.setattr(per_sample_conv2d, "CHUNK_BYTES", 2 * 135 * dtype.itemsize)
    x, *tensors, y = [*case.tensors(dtype, device), torch.empty(5, 5, 4, 5, dtype=dtype, device=device)]
    kernels = [launch.kernel.__name__ for launch in launches(x, *tensors, y, case.geometry.numbers())]
    assert kernels == ["per_sample_conv2d_generate_kernel", "per_sample_conv2d_fwd_kernel"] * 3
    check(case, dtype, device, assert_accurate)


def test_few_blocks_are_cut_into_parts(device, assert_accurate):
    """Parts of the inputs, of the outputs and of the rows, added in their order."""
    case, dtype = linear(35, 1, 40, 20, 3), torch.float32
    tensors = case.tensors(dtype, device)
    y = torch.empty(case.geometry.shape(tensors[0], tensors[2]), dtype=dtype, device=device)
    made = [*launches(*tensors, y, case.geometry.numbers())]
    made += backward_launches(y, *tensors[:4], *tensors[:4], case.geometry.numbers())
    products = [launch for launch in made if launch.kernel is not sum_parts_kernel]
    assert len(products) == 3 and all(launch.grid[1] > 1 for launch in products)
    assert len(made) - len(products) == 5  # y, dx, dz, dweight, dbias
    check(case, dtype, device, assert_accurate)


def test_rule():
    """The generator itself is multiplied by where that costs less than making w: few rows, more with K =
    1, but not so many that dz is the sum of thousands of parts."""

    def most(K: int, pointwise: bool = True) -> int:
        return max((rows for rows in range(1, 1000) if expands(rows, K, pointwise)), default=0)

    assert [most(K) for K in (1, 2, 3, 16, 64, 512)] == [64, 32, 24, 17, 16, 16]
    assert most(16, pointwise=False) == 0


def test_op_takes_them(device, monkeypatch):
    """hyper_linear and hyper_conv2d with z [B, K] reach the kernels, forward and backward."""
    called = []
    for name, function in (("run", run), ("run_backward", run_backward)):
        monkeypatch.setattr(per_sample_conv2d, name, lambda *a, n=name, f=function: called.append(n) or f(*a))
    z, weight = torch.randn(3, 4).to(device).requires_grad_(), torch.randn(18, 4).to(device)
    ops.hyper_linear(torch.randn(3, 2, 6).to(device), z, weight).sum().backward()
    ops.hyper_conv2d(torch.randn(3, 2, 5, 5).to(device), z, weight, None, None, 3).sum().backward()
    assert called == ["run", "run_backward"] * 2


def test_float32_follows_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            for case in (CASES["K 17"], CASES["3x3"]):
                x, *tensors = case.tensors(torch.float32, torch.device("cpu"))
                y = torch.empty(case.geometry.shape(x, tensors[1]))
                made = list(launches(x, *tensors, y, case.geometry.numbers()))
                of_products = [launch for launch in made if launch.kernel is not sum_parts_kernel]
                assert all(launch.arguments["PRECISION"] == precision for launch in of_products)
    finally:
        matmul.fp32_precision = before
