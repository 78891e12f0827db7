"""What the kernels of `per_sample_conv2d` compile to, with or without a GPU: little spilled, tensor cores
where they are meant to be, the generator read 16 bytes at a time."""

import pytest
import torch

pytest.importorskip("triton")
from hyperfast.kernels import per_sample_conv2d  # noqa: E402
from hyperfast.kernels.launch import INTERPRETED, SHARED_LIMITS, Launch  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

CAPABILITIES = [80, 90]
OPERANDS = {torch.bfloat16: "bf16.bf16", torch.float16: "f16.f16", torch.float64: "f64.f64"}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def every_launch(B, I, O, side, geometry, K, dtype, x_dtype=None, groups=1) -> dict[str, Launch]:
    """Forward and backward of a layer, by kernel, without the sums of parts."""
    x_dtype, geometry = x_dtype or dtype, (*geometry[:10], groups)
    N = O * (I // groups) * geometry[0] * geometry[1]
    x, y = empty(B, I, side, side, dtype=x_dtype), empty(B, O, side, side, dtype=x_dtype)
    z, weight, bias = empty(B, K, dtype=dtype), empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    made = [*per_sample_conv2d.launches(x, z, weight, bias, empty(O, dtype=dtype), y, geometry)]
    gradients = (torch.empty_like(t) for t in (x, z, weight, bias))
    made += per_sample_conv2d.backward_launches(y, x, z, weight, bias, *gradients, geometry)
    named = {launch.kernel.__name__.removesuffix("_kernel"): launch for launch in made}
    return {name: launch for name, launch in named.items() if name != "sum_parts"}


def compiled(launch: Launch, capability: int, most_stack: int = 0) -> str:
    """The assembly, once spills (bytes of stack a thread) and shared memory are checked."""
    made = launch.compile(capability)
    assert made.stack <= most_stack, f"{launch.kernel.__name__} spills {made.stack} bytes"
    assert made.shared <= SHARED_LIMITS[capability]
    return made.ptx


def on_tensor_cores(ptx: str, operands: str) -> bool:
    lines = [line for line in ptx.splitlines() if "mma.sync" in line or "wgmma.mma_async" in line]
    assert all(operands in line for line in lines)
    return bool(lines)


LINEAR, PADDED = per_sample_conv2d.LINEAR, per_sample_conv2d.PADDED
SHAPES = {
    "linear": (64, 512, 512, 1, LINEAR),
    "few": (3, 40, 24, 2, LINEAR),
    "convolution": (128, 64, 64, 16, PADDED),
    "first convolution": (64, 3, 64, 32, PADDED),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_with_the_generator(dtype):
    """The form for few rows: the generator comes 16 bytes at a time, ahead of its use."""
    launch = every_launch(*SHAPES["linear"], 16, dtype)["per_sample_conv2d_expand_fwd"]
    ptx = compiled(launch, 90)
    assert on_tensor_cores(ptx, OPERANDS.get(dtype, "")) == (dtype == torch.bfloat16)
    assert any("cp.async.c" in line and ", 0x10, " in line for line in ptx.splitlines())


SPILLED = 32  # bytes of stack a thread, at most, that some kernels keep elsewhere than in the sizes below


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, K", [(dtype, K) for dtype in DTYPES for K in (1, 3, 16, 64, 512)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_little_is_spilled(shape, dtype, K, capability):
    usual = K == 16 and dtype != torch.float64
    for launch in every_launch(*SHAPES[shape], K, dtype).values():
        ptx = compiled(launch, capability, most_stack=0 if usual else SPILLED)
        assert on_tensor_cores(ptx, OPERANDS.get(dtype, "")) == (dtype in OPERANDS)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [LINEAR, PADDED], ids=["linear", "convolution"])
def test_sizes_of_one_and_nothing_but_one_gradient(geometry):
    """Triton makes constants of sizes of 1, and leaves out what is None."""
    for B, I, O, K in ((1, 1, 1, 1), (2, 3, 5, 20)):
        unit = I * geometry[0] * geometry[1]
        shapes = (B, I, 1, 1), (B, K), (O * unit, K), (O * unit,)
        x, z, weight, dbias = (empty(*shape, dtype=torch.float32) for shape in shapes)
        y = empty(B, O, 1, 1, dtype=torch.float32)
        made = [*per_sample_conv2d.launches(x, z, weight, None, None, y, geometry)]
        for i in range(4):
            gradients = [t if i == j else None for j, t in enumerate((x, z, weight, dbias))]
            made += per_sample_conv2d.backward_launches(y, x, z, weight, None, *gradients, geometry)
        for launch in made:
            compiled(launch, 90)


@pytest.mark.slow
def test_groups_and_half_precision():
    for launch in every_launch(16, 32, 32, 4, PADDED, 16, torch.float16, groups=32).values():
        assert on_tensor_cores(compiled(launch, 90), OPERANDS[torch.float16])


@pytest.mark.slow
@pytest.mark.parametrize("capability, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_tf32_and_autocast(shape, capability, instruction):
    """Under autocast x is in half precision: only products of the generator with z and dw stay in float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        launches = every_launch(*SHAPES[shape], 16, torch.float32)
    finally:
        matmul.fp32_precision = before
    for name, launch in launches.items():
        ptx = compiled(launch, capability, SPILLED)
        assert on_tensor_cores(ptx, "tf32.tf32"), name
    for name, launch in every_launch(*SHAPES[shape], 16, torch.float32, torch.bfloat16).items():
        ptx = compiled(launch, capability, SPILLED)
        of_generator = name.endswith(("generate", "bwd_z"))
        assert on_tensor_cores(ptx, OPERANDS[torch.bfloat16]) != of_generator, name
        assert of_generator or instruction in ptx or capability == 90, name
