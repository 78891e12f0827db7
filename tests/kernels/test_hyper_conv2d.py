"""The kernels of `hyper_conv2d`, forward and backward, against the reference in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyperfast.kernels import hyper_conv2d
from hyperfast.kernels.convolution import sum_parts_kernel
from hyperfast.kernels.hyper_conv2d import FEW_ROWS, MOST_ROWS, launches, run, run_backward
from hyperfast.nn import HyperConv2d, HyperLinear
from hyperfast.ops.hyper_layers import merged_wins
from hyperfast.ops.merged import Geometry, expression

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LAST, FIRST = torch.channels_last, torch.contiguous_format


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
        shapes = self.x, (self.K,), (N, self.K), (N,), (self.outputs,)
        made = [torch.randn(shape).to(device).to(dtype) for shape in shapes]
        made[0] = made[0].contiguous(memory_format=self.layout)
        return made if self.bias else [*made[:3], None, None]


def linear(rows: int, inputs: int, outputs: int, K: int, **options) -> Case:
    return Case((rows, inputs, 1, 1), outputs, K, **options)


CASES = {
    "one of everything": linear(1, 1, 1, 1),
    "1 row": linear(1, 67, 9, 16),
    "few rows": linear(3, 13, 7, 3, bias=False),
    "8 rows": linear(FEW_ROWS, 31, 9, 64),
    "9 rows, tiles": linear(FEW_ROWS + 1, 33, 17, 16),
    "64 rows, K 64": linear(64, 17, 15, 64, bias=False),
    "65 rows": linear(65, 16, 33, 16),
    "a block and a row": linear(2 * MOST_ROWS + 1, 5, 3, 4),
    "K 100, no tensor cores": linear(9, 5, 3, 100),
    "1x1": Case((2, 5, 4, 3), 9, 5, layout=LAST),
    "3x3": Case((1, 3, 4, 5), 5, 16, Geometry((3, 3), padding=(1, 1, 1, 1))),
    "3x3, channels last": Case((2, 17, 2, 3), 5, 16, Geometry((3, 3), padding=(1, 1, 1, 1)), LAST),
    "3x3 of 2x2 pixels, few rows": Case((1, 18, 2, 2), 3, 2, Geometry((3, 3), padding=(1, 1, 1, 1))),
    "5x5": Case((1, 2, 5, 5), 3, 3, Geometry((5, 5), padding=(2, 2, 2, 2)), bias=False),
    "pairs": Case((2, 3, 6, 7), 5, 7, Geometry((3, 2), (2, 1), (1, 1, 0, 0), (1, 2)), LAST),
    "same, even": Case((2, 3, 5, 4), 4, 8, Geometry((4, 2), padding=(1, 2, 0, 1))),
    "more padding than kernel": Case((1, 2, 2, 3), 3, 1, Geometry((2, 2), padding=(3, 3, 3, 3))),
    "depthwise": Case((2, 4, 5, 5), 8, 4, Geometry((3, 3), (2, 2), (1, 1, 1, 1), groups=4), LAST),
    "groups, all options": Case((2, 6, 7, 9), 9, 16, Geometry((2, 3), (2, 3), (2, 2, 2, 2), (2, 2), 3)),
    "groups, channels last": Case((1, 36, 3, 3), 6, 4, Geometry((2, 2), (1, 2), groups=2), LAST),
}


def poisoned(shape, dtype, device, layout=FIRST) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device).contiguous(memory_format=layout)


def forward(case: Case, x: Tensor, *tensors: Tensor | None) -> Tensor:
    shape = case.geometry.shape(x, tensors[1])
    y = poisoned(shape, x.dtype, x.device, case.layout)
    run(x, *tensors, y, case.geometry.numbers())
    return y


def backward(case: Case, dy: Tensor, x, z, weight, bias, needed=(True, True, True)) -> list[Tensor | None]:
    """dx, dz, dw"""
    likes = (x, case.layout), (z, FIRST), (weight[:, 0], FIRST)
    out = [
        poisoned(t.shape, t.dtype, t.device, layout) if n else None
        for n, (t, layout) in zip(needed, likes, strict=True)
    ]
    run_backward(dy, x, z, weight, bias, *out, case.geometry.numbers())
    return out


def expected(case: Case, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """y, dx, dz and dw in plain PyTorch."""
    x, z, weight, bias, layer_bias = tensors
    x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    bias.requires_grad_()  # its gradient is dw
    y = expression(x, z, weight, bias, layer_bias, case.geometry)
    return [y.detach(), *torch.autograd.grad(y, (x, z, bias), dy)]


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
    check(CASES[name], dtype, device, assert_accurate)


@pytest.mark.parametrize("name", ["few rows", "K 100, no tensor cores", "3x3"])
def test_float64(name, device, assert_accurate):
    check(CASES[name], torch.float64, device, assert_accurate)


SIZES = [1, 7, 15, 16, 17, 31, 32, 33, 65]
# half precision is held against the error of plain PyTorch, by luck next to nothing where dz has few elements
SWEEPS = [(dtype, K) for dtype in FLOATS for K in (1, 3, 16, 64) if dtype == torch.float32 or K > 3]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, K", SWEEPS, ids=str)
def test_sizes_around_the_tiles(dtype, K, device, assert_accurate):
    for i, rows in enumerate([1, 2, 5, 8, 9, 16, 63, 64, 127, 128, 129]):
        inputs, outputs = SIZES[i % len(SIZES)], SIZES[(3 * i + K) % len(SIZES)]
        check(linear(rows, inputs, outputs, K, bias=i % 2 == 0), dtype, device, assert_accurate)


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=str)
def test_generator_in_float32_beside_half_precision(layout, device):
    """As under autocast: the product in x's dtype, generated in the generator's."""
    case = CASES["3x3, channels last"]._replace(layout=layout)
    tensors = case.tensors(torch.float32, device)
    half = tensors[0].to(torch.float16)
    y = forward(case, half, *tensors[1:])
    dy = torch.randn(y.shape).to(device).to(torch.float16)
    dx, dz, dw = backward(case, dy, half, *tensors[1:4])
    assert [t.dtype for t in (y, dx, dz, dw)] == [torch.float16] * 2 + [torch.float32] * 2
    tensors[0] = half
    wanted = expected(case, [t.cpu().double() for t in tensors], dy.cpu().double())
    for got, want in zip((y, dx, dz, dw), wanted, strict=True):
        assert (got.cpu() - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("name", ["9 rows, tiles", "3x3"])
def test_each_gradient_alone_and_again(name, device):
    """What is not asked for changes nothing but rounding, and every run gives the same bits."""
    case = CASES[name]
    tensors = case.tensors(torch.float32, device)[:4]
    dy = torch.randn(case.geometry.shape(tensors[0], tensors[2])).to(device)
    every, again = backward(case, dy, *tensors), backward(case, dy, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(every, again, strict=True))
    for i in range(3):
        alone = backward(case, dy, *tensors, needed=[j == i for j in range(3)])
        assert [t is None for t in alone] == [j != i for j in range(3)]
        torch.testing.assert_close(alone[i], every[i], rtol=1e-5, atol=1e-5)


def test_tensors_with_gaps(device):
    """x and dy are read where they lie."""
    case = CASES["pairs"]
    tensors = case.tensors(torch.float32, device)
    wide = torch.randn(4, 6, 13, 15).to(device)
    x = wide[1:3, ::2, 1::2, 8:].transpose(0, 1)[:, :2].transpose(0, 1)
    assert x.shape == case.x and not x.is_contiguous()
    y = forward(case, x, *tensors[1:])
    dy = torch.randn(1).to(device).expand(y.shape)
    got = [y, *backward(case, dy, x, *tensors[1:4])]
    wanted = expected(case, [x.double(), *(t.double() for t in tensors[1:])], dy.double())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_in_its_row_and_output(device):
    for rows in (3, 20):
        case = linear(rows, 21, 11, 4)
        x, z, weight, bias, layer_bias = case.tensors(torch.float32, device)
        x[2, 20] = torch.nan
        weight[5 * 21 + 20, 3] = torch.inf
        good = forward(case, x, z, weight, bias, layer_bias).isfinite().view(rows, 11)
        expected = torch.ones_like(good)
        expected[2], expected[:, 5] = False, False
        assert torch.equal(good, expected)


@pytest.mark.parametrize("rows, inputs, K", [(2, 200, 100), (12, 150, 4)])
def test_few_blocks_are_cut_into_parts(rows, inputs, K, device, assert_accurate):
    """Few blocks of outputs: several parts of the columns, added in their order."""
    case, dtype = linear(rows, inputs, 3, K), torch.float32
    tensors = case.tensors(dtype, device)
    y = poisoned(case.geometry.shape(tensors[0], tensors[2]), dtype, device)
    parts = list(launches(*tensors, y, case.geometry.numbers()))
    assert parts[0].grid[1] > 2 and parts[1].kernel is sum_parts_kernel
    for launch in parts:
        launch.run()
    wanted = expression(*(t.cpu().double() for t in tensors), case.geometry)
    assert_accurate(y.cpu(), wanted, dtype)


def test_rule(device):
    """Where `auto` merges: few rows, and never with gradients."""

    def most(K: int, dtype: torch.dtype) -> int:
        weight = torch.empty(64, K, dtype=dtype, device=device)
        assert not merged_wins(1, weight, needs_grad=True)
        return max(rows for rows in range(1, 200) if merged_wins(rows, weight, needs_grad=False))

    assert [most(16, dtype) for dtype in (*FLOATS, torch.float64)] == [32, 32, 32, 8]
    assert [most(64, torch.float32), most(65, torch.float32)] == [32, 8]


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_layers_in_evaluation(precision, device, monkeypatch):
    """They merge, under autocast too, where x reaches the kernels in its dtype."""
    given = []
    monkeypatch.setattr(hyper_conv2d, "run", lambda x, *rest: given.append(x.dtype) or run(x, *rest))
    torch.manual_seed(1)
    convolution, linear = HyperConv2d(2, 3, 3, padding=1, z_dim=4), HyperLinear(12, 5, z_dim=4)
    model = torch.nn.Sequential(convolution, torch.nn.Flatten(), linear).to(device)
    x = torch.randn(2, 2, 2, 2).to(device)
    trained = model(x).detach()
    with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision is not None):
        y = model(x)
    assert given == [precision or torch.float32] * 2
    assert y.dtype == (precision or torch.float32)
    assert (y - trained).norm() <= (1e-6 if precision is None else 0.02) * trained.norm()


def test_float32_follows_torch():
    tensors = linear(64, 16, 16, 16).tensors(torch.float32, torch.device("cpu"))
    y = torch.empty(64, 16, 1, 1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            launch = next(launches(*tensors, y, Geometry().numbers()))
            assert launch.arguments["PRECISION"] == precision
    finally:
        matmul.fp32_precision = before
