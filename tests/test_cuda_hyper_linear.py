"""The CUDA kernel `hyper_linear` against the reference in float64, on the emulator and on a GPU."""

import pytest
import torch

from hyperfast import reference
from hyperfast.info import why_missing
from tests.cuda_emulator import build
from tests.cuda_emulator.kernels import Kernels, address, dtype_name

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# M: rows of a thread and one more, all; O: outputs of a block and one more; I: part of a tile, one, several of a
# chunk; K: one access, one lane's more, a ring of two stages (512)
SIZES = [(1, 1, 1, 1), (3, 5, 7, 3), (1, 33, 40, 16), (8, 32, 64, 16), (9, 31, 17, 4), (17, 20, 33, 17)]
SIZES += [(64, 40, 50, 16), (63, 65, 9, 100), (5, 3, 70, 512), (33, 4, 3, 64)]


def run(kernels, tensors: list, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    M, O, I, K = sizes
    floats = kernels.module.hyper_linear_scratch(sizes, dtype_name(dtype))
    scratch = kernels.poison(floats + 8, dtype=torch.float32)
    y = kernels.poison(M * O + 8, dtype=dtype)
    addresses = [address(t) for t in (*tensors, y, scratch)]
    kernels.module.hyper_linear(addresses, sizes, dtype_name(dtype), kernels.stream())
    assert y[M * O :].isnan().all() and scratch[floats:].isnan().all(), "wrote past an end"
    return y[: M * O].view(M, O)


def problem(kernels, sizes: tuple[int, ...], dtype: torch.dtype, bias: bool, offset: int) -> list:
    """weight, bias, z, x, layer_bias, as the kernel takes them"""
    M, O, I, K = sizes
    return [
        kernels.randn(O * I, K, dtype=dtype, offset=offset),
        kernels.randn(O * I, dtype=dtype) if bias else None,
        kernels.randn(K, dtype=dtype),
        kernels.randn(M, I, dtype=dtype),
        kernels.randn(O, dtype=dtype) if bias else None,
    ]


def check(kernels, dtype: torch.dtype, offset: int, schedules, assert_accurate) -> None:
    for i, sizes in enumerate(SIZES):
        weight, bias, z, x, layer_bias = tensors = problem(kernels, sizes, dtype, i % 3 != 0, offset)
        arguments = x, z, weight, bias, layer_bias
        expected = reference.hyper_linear(*[None if t is None else t.double() for t in arguments])
        plain = reference.hyper_linear(*arguments)
        for schedule in schedules:
            kernels.set_schedule(schedule)
            assert_accurate(run(kernels, tensors, sizes, dtype), expected, dtype, plain)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(cuda_kernels, dtype, offset, assert_accurate):
    """With offset 1 no row is aligned to 16 bytes, and threads copy by themselves."""
    schedules = cuda_kernels.schedules()[: 3 if dtype == torch.float32 and not offset else 1]
    check(cuda_kernels, dtype, offset, schedules, assert_accurate)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_bulk_copies(dtype, assert_accurate):
    """As sm_80 runs it: cp.async."""
    kernels = Kernels(build.module(bulk=False), torch.device("cpu"))
    check(kernels, dtype, 0, kernels.schedules(), assert_accurate)


def test_a_result_does_not_depend_on_other_rows(cuda_kernels):
    """The sums of a row are the same ones in any batch whose rows the warps share alike."""
    sizes = (8, 40, 100, 16)
    weight, bias, z, x, layer_bias = problem(cuda_kernels, sizes, torch.float32, True, 0)
    all_rows = run(cuda_kernels, [weight, bias, z, x, layer_bias], sizes, torch.float32)
    one = run(cuda_kernels, [weight, bias, z, x[3:4].clone(), layer_bias], (1, *sizes[1:]), torch.float32)
    assert torch.equal(one[0], all_rows[3])


@pytest.mark.parametrize(
    "tensors, sizes, dtype, said",
    [
        ((64,) * 7, (65, 4, 4, 4), "float32", "M is 65; wanted 1 to 64"),
        ((64,) * 7, (1, 0, 4, 4), "float32", "O and I must be 1"),
        ((64,) * 7, (1, 4, 4, 513), "float32", "K is 513"),
        ((64,) * 7, (1, 4, 4, 4), "float64", "dtype is 'float64'; wanted float32"),
        ((64, 0, 64, 0, 0, 64, 64), (1, 4, 4, 4), "float32", "weight, z, x and y must not be null"),
        ((64, 0, 64, 64, 0, 64, 0), (1, 4, 400, 4), "float32", "scratch must not be null"),
        ((66, 0, 64, 64, 0, 64, 64), (1, 4, 4, 4), "float32", "not aligned to elements of 4 bytes"),
    ],
)
def test_bad_input_never_reaches_the_gpu(tensors, sizes, dtype, said):
    cuda = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
    with pytest.raises(ValueError, match=said):
        cuda.hyper_linear(tensors, sizes, dtype, 0)
