"""The CUDA kernel `generate` against the reference in float64, on the emulator and on a GPU."""

import pytest
import torch

from hyperfast import reference
from hyperfast.info import why_missing
from tests.cuda_emulator.kernels import address, dtype_name

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
KS = [1, 3, 4, 8, 12, 16, 17, 33, 64, 100, 128, 511, 512]
NS = [1, 63, 64, 65, 257]


@pytest.fixture
def cuda():
    return pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))


GOOD = (64, 0, 128, 192, 5, 3)


@pytest.mark.parametrize(
    "segment, dtype, error, said",
    [
        (GOOD, "int8", ValueError, "dtype is 'int8'; wanted one of bfloat16, float16"),
        ((64, 0, 128, 192, 5, 0), "float32", ValueError, r"segments\[1\]: K is 0; wanted 1 to 512"),
        ((64, 0, 128, 192, 5, 513), "float32", ValueError, "K is 513"),
        ((64, 0, 128, 192, -1, 3), "float32", ValueError, "N is -1"),
        ((0, 0, 128, 192, 5, 3), "float32", ValueError, "must not be null"),
        ((66, 0, 128, 192, 5, 3), "float32", ValueError, "no multiple of its elements' 4 bytes"),
        ((64, 0, 128, 192, 5), "float32", TypeError, "incompatible function arguments"),
    ],
)
def test_bad_input_never_reaches_the_gpu(cuda, segment, dtype, error, said):
    with pytest.raises(error, match=said):
        cuda.generate([GOOD, segment], dtype, 0)


def test_nothing_to_do_is_no_launch(cuda):
    cuda.generate([], "float32", 0)
    cuda.generate([(0, 0, 0, 0, 0, 3)], "float32", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_gpu_the_error_is_cudas(cuda):
    with pytest.raises(RuntimeError, match="hyperfast._cuda.generate: .*CUDA"):
        cuda.generate([GOOD], "float32", 0)


def segments(kernels, shapes, dtype: torch.dtype, offset: int = 0) -> list[tuple]:
    """(weight, bias or None, z, out) per (N, K); weight begins `offset` elements in, out is NaN."""
    return [
        (
            kernels.randn(N, K, dtype=dtype, offset=offset),
            kernels.randn(N, dtype=dtype) if i % 3 else None,
            kernels.randn(K, dtype=dtype),
            kernels.poison(N + 8, dtype=dtype),
        )
        for i, (N, K) in enumerate(shapes)
    ]


def launch(kernels, made: list[tuple], dtype: torch.dtype) -> None:
    table = [(*map(address, row), *row[0].shape) for row in made]
    kernels.module.generate(table, dtype_name(dtype), kernels.stream())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(cuda_kernels, dtype, offset, assert_accurate):
    """All sizes in one call: 65 segments, so two launches; with offset 1 no row is aligned to 16 bytes."""
    made = segments(cuda_kernels, [(N, K) for K in KS for N in NS], dtype, offset)
    expected = reference.generate(
        *zip(*[[None if t is None else t.double() for t in row[:3]] for row in made], strict=True)
    )
    plain = reference.generate(*zip(*[row[:3] for row in made], strict=True))
    for schedule in cuda_kernels.schedules()[: 4 if dtype == torch.float32 else 1]:
        cuda_kernels.set_schedule(schedule)
        for *_, out in made:
            out.fill_(torch.nan)
        launch(cuda_kernels, made, dtype)
        outs = [out[: len(weight)] for weight, *_, out in made]
        assert all(out[len(weight) :].isnan().all() for weight, *_, out in made), "wrote past N"
        assert_accurate(outs, expected, dtype, plain)


def test_layers_without_rows(cuda_kernels, assert_accurate):
    """Of a rank that owns none: alone, they launch nothing; between others."""
    launch(cuda_kernels, segments(cuda_kernels, [(0, 3), (0, 16)], torch.float32), torch.float32)
    made = segments(cuda_kernels, [(0, 3), (65, 3), (0, 16), (65, 16), (0, 8)], torch.float32)
    launch(cuda_kernels, made, torch.float32)
    rows = [[None if t is None else t.double() for t in row[:3]] for row in made]
    expected = reference.generate(*zip(*rows, strict=True))
    assert all(out[len(weight) :].isnan().all() for weight, *_, out in made), "wrote past N"
    assert_accurate([out[: len(row[0])] for *row, out in made][1::2], expected[1::2], torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_runs_on_the_current_stream_and_in_a_graph(cuda_kernels):
    if cuda_kernels.emulated:
        pytest.skip("the emulator has no graphs")
    [(weight, bias, z, out)] = made = segments(cuda_kernels, [(1009, 16)], torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(cuda_kernels, made, torch.float32)
    assert out.isnan().all(), "capturing must not run the kernel"
    z.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    wanted = weight.double() @ z.double()
    assert (out[:1009].double() - wanted).norm() < 1e-6 * wanted.norm()
