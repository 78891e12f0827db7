"""What the kernels of `hyper_conv2d` compile to, with or without a GPU: nothing spilled, tensor cores where
they are meant to be, the generator read 16 bytes at a time."""

import pytest
import torch

pytest.importorskip("triton")
from hyperfast.kernels import hyper_conv2d  # noqa: E402
from hyperfast.kernels.convolution import sum_parts_kernel  # noqa: E402
from hyperfast.kernels.launch import INTERPRETED, SHARED_LIMITS, Launch  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

EXAMPLES = {} if INTERPRETED else dict(hyper_conv2d.examples())
FIRST = "conv5, 64 rows, bf16", "fc1, 1 row, fp32"  # in the default run
OPERANDS = {"bf16": "bf16.bf16", "fp16": "f16.f16"}


def compiled(launch: Launch, capability: int) -> str:
    """The assembly, once spills and shared memory are checked."""
    made = launch.compile(capability)
    assert made.stack == 0
    assert made.shared <= SHARED_LIMITS[capability]
    return made.ptx


def on_tensor_cores(ptx: str, operands: str) -> bool:
    lines = [line for line in ptx.splitlines() if "mma.sync" in line or "wgmma.mma_async" in line]
    assert all(operands in line for line in lines)
    return bool(lines)


def reads_16_bytes_ahead(ptx: str) -> bool:
    return any("cp.async.c" in line and ", 0x10, " in line for line in ptx.splitlines())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n.endswith(FIRST) else pytest.mark.slow) for n in EXAMPLES]
)
def test_examples(name, capability):
    launch = EXAMPLES[name]
    ptx = compiled(launch, capability)
    kernel, _, _, dtype = name.split(", ")
    uses_cores = launch.arguments.get("DOT") is not None
    assert on_tensor_cores(ptx, OPERANDS.get(dtype, "")) == (uses_cores and dtype in OPERANDS)
    if kernel.endswith(("fwd_kernel", "bwd_x_kernel")):
        assert reads_16_bytes_ahead(ptx) if uses_cores else "ld.global.v4.b32" in ptx
        if capability == 90 and uses_cores and dtype in OPERANDS:
            assert "wgmma.mma_async" in ptx


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def every_launch(B, I, O, side, geometry, K, dtype, x_dtype=None, groups=1) -> list[Launch]:
    """Forward and backward of a layer, without the sums of parts."""
    x_dtype, geometry = x_dtype or dtype, (*geometry[:10], groups)
    N = O * (I // groups) * geometry[0] * geometry[1]
    x, y = empty(B, I, side, side, dtype=x_dtype), empty(B, O, side, side, dtype=x_dtype)
    z, weight, bias = empty(K, dtype=dtype), empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    made = [*hyper_conv2d.launches(x, z, weight, bias, empty(O, dtype=dtype), y, geometry)]
    dx, dz, dw = torch.empty_like(x), torch.empty_like(z), torch.empty_like(bias)
    made += hyper_conv2d.backward_launches(y, x, z, weight, bias, dx, dz, dw, geometry)
    return [launch for launch in made if launch.kernel is not sum_parts_kernel]


SHAPES = {
    "8 rows": (8, 512, 1024, 1, hyper_conv2d.LINEAR),
    "64 rows": (64, 512, 1024, 1, hyper_conv2d.LINEAR),
    "convolution": (16, 64, 128, 4, hyper_conv2d.PADDED),
    "first convolution": (64, 3, 64, 32, hyper_conv2d.PADDED),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("K", [1, 3, 8, 16, 64, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_spilled(shape, dtype, K, capability):
    for launch in every_launch(*SHAPES[shape], K, dtype):
        compiled(launch, capability)


@pytest.mark.slow
def test_groups():
    for groups in (2, 32):
        for launch in every_launch(16, 32, 32, 4, hyper_conv2d.PADDED, 16, torch.float32, groups=groups):
            compiled(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_tf32_and_autocast(capability, instruction):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        forward, *_ = every_launch(*SHAPES["64 rows"], 16, torch.float32)
    finally:
        matmul.fp32_precision = before
    ptx = compiled(forward, capability)
    assert instruction in ptx and on_tensor_cores(ptx, "tf32.tf32")
    forward, *_ = every_launch(*SHAPES["64 rows"], 16, torch.float32, torch.bfloat16)
    ptx = compiled(forward, capability)
    assert instruction in ptx and on_tensor_cores(ptx, "bf16.bf16") and reads_16_bytes_ahead(ptx)
