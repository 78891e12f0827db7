"""The batch norm kernels against the reference in float64: all dtypes, sizes around the blocks, ties, NaN."""

import itertools

import pytest
import torch

from hyperfast import reference
from hyperfast.kernels import batch_norm_relu_max_pool as kernels

# B, C, H, W: one image or channel, primes, edges that fill no window, channels around a block of 16 or 32
SHAPES = [(1, 1, 3, 2), (2, 17, 5, 7), (3, 33, 4, 4), (5, 3, 2, 3)]
MORE_SHAPES = [(2, 1, 13, 11), (3, 7, 5, 4), (1, 64, 9, 6), (2, 100, 3, 3), (7, 2, 2, 2)]


@pytest.fixture(autouse=True)
def few_programs(device, monkeypatch):
    """The interpreter takes a tenth of a second for a program: fewer and smaller ones, yet several tiles of
    several blocks."""
    if device.type == "cpu":
        small = {"SUM_PROGRAMS": 3, "PROGRAMS": 2, "SUM_BYTES": 4096, "BYTES": 4096, "LEAST_BYTES": 1024}
        for name, value in small.items():
            monkeypatch.setattr(kernels, name, value)


def channels_last(*shape, dtype, device):
    return torch.randn(shape).to(device).to(dtype).to(memory_format=torch.channels_last)


def poisoned(shape, dtype, device):
    made = torch.full(shape, torch.nan if dtype.is_floating_point else 99, dtype=dtype, device=device)
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def problem(shape, dtype, device, pool, mean=0.3):
    """x, weight, bias, running mean, running variance, dy; the [C] ones in what the kernels compute in."""
    B, C, H, W = shape
    x = (torch.randn(shape, dtype=torch.float64).to(device) + mean).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, running_mean = (torch.randn(C).to(device).to(compute) for _ in range(3))
    running_var = torch.rand(C).to(device).to(compute) + 0.5
    dy = channels_last(B, C, H // pool, W // pool, dtype=dtype, device=device)
    return x, weight, bias, running_mean, running_var, dy


def results(x, weight, bias, running_mean, running_var, dy, pool, training):
    """y, index, dx, dweight, dbias, running mean and variance of the kernels, over poisoned memory."""
    dtype, device, C = x.dtype, x.device, x.shape[1]
    running = [running_mean.clone(), running_var.clone()]
    statistics = poisoned((2, C), torch.float64, device)
    y, index = poisoned(dy.shape, dtype, device), poisoned(dy.shape, torch.uint8, device)
    count = torch.tensor(5, device=device)
    given = (None, None, *running, count) if training else (*running, None, None, None)
    kernels.run(x, weight, bias, *given, 0.3, 1e-3, pool, statistics, y, index)
    assert count == 6 if training else count == 5
    dweight = poisoned((C,), weight.dtype if weight is not None else running_mean.dtype, device)
    dx, dbias = poisoned(x.shape, dtype, device), dweight.clone()
    kernels.run_backward(dy, x, index, weight, statistics, not training, 1e-3, pool, dx, dweight, dbias)
    return [y, index, dx, dweight, dbias, *running]


def expected_of(x, weight, bias, running_mean, running_var, dy, pool, training):
    """y, dx, dweight, dbias, running mean, running variance of the reference."""
    running = [running_mean.clone(), running_var.clone()]
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = reference.batch_norm_relu_max_pool(leaves[0], *running, *leaves[1:], training, 0.3, 1e-3, pool)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), *running]


def double(tensors):
    return [t.double() for t in tensors]


def check(shapes, dtype, pool, training, device, assert_accurate):
    made, expected, plain = [], [], []
    for shape in shapes:
        inputs = problem(shape, dtype, device, pool)
        found = results(*inputs, pool, training)
        made.append([*found[:1], *found[2:]])
        expected.append(expected_of(*double(inputs), pool, training))
        plain.append(expected_of(*inputs, pool, training))
    for got, wanted, simple in zip(
        *(zip(*columns, strict=True) for columns in (made, expected, plain)), strict=True
    ):
        assert_accurate(got, wanted, got[0].dtype, simple)


@pytest.mark.parametrize("pool", [1, 2])
def test_equals_reference(dtype, pool, device, assert_accurate):
    check(SHAPES, dtype, pool, True, device, assert_accurate)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_statistics(dtype, pool, device, assert_accurate):
    check(SHAPES[:2], dtype, pool, False, device, assert_accurate)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_more_shapes(dtype, pool, training, device, assert_accurate):
    check(MORE_SHAPES, dtype, pool, training, device, assert_accurate)


@pytest.mark.parametrize("shape, pool", [((2, 20, 17, 19), 2), ((1, 5, 40, 30), 1)])
def test_a_mean_much_larger_than_the_deviation(shape, pool, device, assert_accurate):
    """Several tiles of several blocks; 1e4 of deviation 1 has 10 bits left in float32, all of them used."""
    inputs = problem(shape, torch.float32, device, pool, mean=1e4)
    got = results(*inputs, pool, True)
    for actual, wanted in zip([got[0], *got[2:]], expected_of(*double(inputs), pool, True), strict=True):
        assert_accurate(actual, wanted, torch.float32)


@pytest.mark.parametrize("pixel", [0, 300])
def test_one_pixel_far_from_the_others(pixel, device, assert_accurate):
    inputs = problem((1, 8, 20, 20), torch.float32, device, 2)
    inputs[0][0, :, pixel // 20, pixel % 20] = 300.0
    got = results(*inputs, 2, True)
    for actual, wanted in zip([got[0], *got[2:]], expected_of(*double(inputs), 2, True), strict=True):
        assert_accurate(actual, wanted, torch.float32)


@pytest.mark.parametrize("pool", [1, 2])
def test_the_first_of_equal_maxima_wins(pool, device):
    x, weight, bias, *rest = problem((2, 19, 7, 8), torch.float64, device, pool)
    x = torch.randint(3, x.shape).to(device).double().to(memory_format=torch.channels_last)
    weight[:4], bias[:4] = torch.tensor([0.0, -0.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, 0.5, -1.0])
    inputs = (x, weight, bias, *rest)
    got = results(*inputs, pool, True)
    for actual, wanted in zip([got[0], *got[2:]], expected_of(*inputs, pool, True), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    y, index = got[:2]
    windows = x[:, :, : 7 // pool * pool].unfold(2, pool, pool).unfold(3, pool, pool).flatten(4)
    sign = torch.where(weight < 0, -1, 1).view(1, -1, 1, 1, 1) * (weight != 0).view(1, -1, 1, 1, 1)
    first = (windows * sign).argmax(4)  # torch's too takes the first
    assert torch.equal(index.long(), torch.where(y > 0, first, pool * pool))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity(dtype, pool, device):
    inputs = problem((2, 21, 6, 5), dtype, device, pool)
    for value in (torch.nan, torch.inf, -torch.inf):
        inputs[0][torch.rand(inputs[0].shape).to(device) < 0.1] = value
    found = results(*inputs, pool, False)
    wanted = expected_of(*inputs, pool, False)
    assert found[0].isnan().any() and found[0].isinf().any()
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found[0], wanted[0], equal_nan=True, **tolerances)
    if dtype == torch.float32:  # half precision: other winners, for plain PyTorch compares rounded numbers
        torch.testing.assert_close(found[2], wanted[1], equal_nan=True)


def test_nan_in_training_stays_in_its_channel(device):
    inputs = problem((2, 18, 5, 5), torch.float32, device, 2)
    inputs[0][1, 3, 2, 2] = torch.nan
    y, _, _, _, _, mean, var = results(*inputs, 2, True)
    others = [c for c in range(18) if c != 3]
    assert y[:, 3].isnan().all() and mean[3].isnan() and var[3].isnan()
    assert all(t.isfinite().all() for t in (y[:, others], mean[others], var[others]))


@pytest.mark.parametrize("parameters", list(itertools.product((True, False), repeat=2)))
def test_without_weight_or_bias_index_and_dx(parameters, device, assert_accurate):
    x, weight, bias, *rest, dy = problem((2, 5, 5, 6), torch.float32, device, 2)
    weight, bias = (p if there else None for p, there in zip((weight, bias), parameters, strict=True))
    full = results(x, weight, bias, *rest, dy, 2, True)
    ones, zeros = torch.ones(5, device=device), torch.zeros(5, device=device)
    weight_or_ones, bias_or_zeros = ones if weight is None else weight, zeros if bias is None else bias
    wanted = expected_of(*double((x, weight_or_ones, bias_or_zeros, *rest, dy)), 2, True)
    for actual, exact in zip([full[0], *full[2:]], wanted, strict=True):
        assert_accurate(actual, exact, torch.float32)
    y, statistics = poisoned(full[0].shape, x.dtype, device), poisoned((2, 5), torch.float64, device)
    kernels.run(x, weight, bias, *[None] * 5, 0.3, 1e-3, 2, statistics, y, None)
    assert torch.equal(y, full[0])
    dweight, dbias = (poisoned((5,), x.dtype, device) for _ in range(2))
    kernels.run_backward(dy, x, full[1], weight, statistics, False, 1e-3, 2, None, dweight, dbias)
    assert torch.equal(dweight, full[3]) and torch.equal(dbias, full[4])


def test_parameters_in_half_precision(device):
    """Of modules that are bfloat16 altogether; every vector is read and written as it is."""
    x, weight, bias, mean, var, dy = (t.bfloat16() for t in problem((2, 5, 4, 4), torch.float32, device, 2))
    running = [mean.clone(), var.clone()]
    statistics = poisoned((2, 5), torch.float64, device)
    y, index = poisoned(dy.shape, x.dtype, device), poisoned(dy.shape, torch.uint8, device)
    kernels.run(x, weight, bias, None, None, *running, None, 0.3, 1e-3, 2, statistics, y, index)
    wanted = expected_of(*double((x, weight, bias, mean, var, dy)), 2, True)
    for got, exact in zip((y, *running), (wanted[0], *wanted[4:]), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)


def test_equal_bit_for_bit_every_time(device):
    inputs = problem((1, 5, 11, 13), torch.float32, device, 2)
    first, second = (results(*inputs, 2, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
