"""The CUDA kernel `generate`: register spills, bad input, and on a GPU its results against float64."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from hyperfast.info import why_missing

ROOT = Path(__file__).resolve().parents[1]
KS = [1, 2, 3, 4, 7, 8, 12, 16, 17, 31, 32, 33, 64, 100, 128, 511, 512]
NS = [1, 63, 64, 65, 255, 256, 257, 1009]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def cuda():
    return pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_compiles_without_spills(arch, tmp_path):
    nvcc, reason = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_nvcc"]()
    if nvcc is None:
        pytest.skip(reason)
    target = f"arch=compute_{arch},code=sm_{arch}"
    source = ROOT / "csrc" / "cuda" / "generate.cu"
    command = [nvcc, "-O3", "-std=c++17", "-gencode", target, "-Xptxas", "-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "generate.o")], capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == len(DTYPES)
    assert all(numbers == ("0", "0", "0") for numbers in spills), report
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= 64, report  # four blocks of 256 threads fit


GOOD = (64, 0, 128, 192, 5, 3)


@pytest.mark.parametrize(
    "segment, dtype, error, said",
    [
        (GOOD, "int8", ValueError, "dtype is 'int8'"),
        ((64, 0, 128, 192, 5, 0), "float32", ValueError, r"segments\[1\]: K is 0; wanted 1 to 512"),
        ((64, 0, 128, 192, 5, 513), "float32", ValueError, "K is 513"),
        ((64, 0, 128, 192, -1, 3), "float32", ValueError, "N is -1"),
        ((0, 0, 128, 192, 5, 3), "float32", ValueError, "must not be null"),
        ((66, 0, 128, 192, 5, 3), "float32", ValueError, "not aligned to float32"),
        ((64, 0, 128, 192, 5), "float32", TypeError, "incompatible function arguments"),
        ((-64, 0, 128, 192, 5, 3), "float32", TypeError, "incompatible function arguments"),
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


def random_segments(shapes: list[tuple[int, int]], dtype: torch.dtype, offset: int = 0) -> list[tuple]:
    """(weight, bias or None, z, out) per (N, K); weight begins `offset` elements in, out is NaN."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    segments = []
    for i, (N, K) in enumerate(shapes):
        weight = normal(N * K + offset)[offset:].view(N, K)
        bias = normal(N) if i % 3 else None
        out = torch.full((N + 8,), torch.nan, device="cuda", dtype=dtype)
        segments.append((weight, bias, normal(K), out))
    return segments


def launch(cuda, segments: list[tuple], dtype: torch.dtype) -> None:
    table = []
    for weight, bias, z, out in segments:
        bias_ptr = 0 if bias is None else bias.data_ptr()
        table.append((weight.data_ptr(), bias_ptr, z.data_ptr(), out.data_ptr(), *weight.shape))
    cuda.generate(table, str(dtype).removeprefix("torch."), torch.cuda.current_stream().cuda_stream)


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(cuda, dtype, offset):
    """All sizes in one call: 136 segments, so three launches; with offset 1 no row is aligned to 16 bytes."""
    segments = random_segments([(N, K) for K in KS for N in NS], dtype, offset)
    launch(cuda, segments, dtype)
    got, wanted, plain = [], [], []
    for weight, bias, z, out in segments:
        N = weight.shape[0]
        assert out[N:].isnan().all(), f"wrote past N={N}"
        zero = torch.zeros(N, device="cuda", dtype=dtype)
        got.append(out[:N])
        wanted.append(weight.double() @ z.double() + (zero if bias is None else bias).double())
        plain.append(torch.addmv(zero if bias is None else bias, weight, z))
    error = relative_rms(torch.cat(got), torch.cat(wanted))
    if dtype in (torch.float32, torch.float64):
        assert error < {torch.float32: 5e-7, torch.float64: 1e-15}[dtype]
    else:
        assert error <= 2 * relative_rms(torch.cat(plain), torch.cat(wanted))


@gpu
@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph(cuda):
    [(weight, bias, z, out)] = segments = random_segments([(1009, 16)], torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(cuda, segments, torch.float32)
    assert out.isnan().all(), "capturing must not run the kernel"
    z.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    wanted = weight.double() @ z.double()
    assert relative_rms(out[:1009], wanted) < 5e-7
