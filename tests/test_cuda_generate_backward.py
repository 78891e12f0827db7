"""The CUDA kernels `generate_backward` against the reference in float64, on the emulator and on a GPU."""

import pytest
import torch

from hyperfast import reference
from hyperfast.info import why_missing
from tests.cuda_emulator.kernels import address, dtype_name

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# rows: none, one, fewer than a block holds at a time, one more than a block's; K: odd, lanes of a row, blocks of
# columns of the second kernel
SHAPES = [(0, 16), (1, 1), (7, 3), (63, 16), (257, 16), (2049, 16), (65, 17), (33, 31), (33, 32), (70, 64), (130, 100)]
SHAPES += [(66, 128), (65, 511), (65, 512)]


def run(kernels, weights, dws, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    dzs = [kernels.poison(weight.shape[1], dtype=dtype) for weight in weights]
    norms = kernels.poison(len(weights), dtype=torch.float64)
    doubles = kernels.module.generate_backward_scratch([tuple(weight.shape) for weight in weights])
    scratch = kernels.poison(doubles + 4, dtype=torch.float64)
    table = [
        (address(weight), address(dw), address(dz), norms.data_ptr() + 8 * i, *weight.shape)
        for i, (weight, dw, dz) in enumerate(zip(weights, dws, dzs, strict=True))
    ]
    kernels.module.generate_backward(table, address(scratch), dtype_name(dtype), kernels.stream())
    assert scratch[doubles:].isnan().all(), "wrote past the scratch"
    return dzs, norms


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(cuda_kernels, dtype, offset, assert_accurate):
    """Sums that do not cancel, since the bound is relative to them; 70 layers, so two launches of each kernel."""
    shapes = SHAPES + [(5, 4)] * (70 - len(SHAPES))
    weights = [cuda_kernels.randn(*shape, dtype=dtype, offset=offset).abs_() for shape in shapes]
    dws = [cuda_kernels.randn(N, dtype=dtype).abs_() for N, _ in shapes]
    wanted, wanted_norms = reference.generate_backward([w.double() for w in weights], [d.double() for d in dws])
    plain, _ = reference.generate_backward(weights, dws)
    found = []
    for schedule in cuda_kernels.schedules()[: 3 if dtype == torch.float32 and not offset else 1]:
        cuda_kernels.set_schedule(schedule)
        dzs, norms = run(cuda_kernels, weights, dws, dtype)
        assert_accurate(dzs, wanted, dtype, plain)
        torch.testing.assert_close(norms, wanted_norms, rtol=1e-12, atol=0)
        found.append(torch.cat(dzs))
    assert all(torch.equal(found[0], other) for other in found), "the order of a sum depends on timing"


GOOD = (64, 128, 192, 256, 5, 3)


@pytest.mark.parametrize(
    "segment, scratch, said",
    [
        ((64, 128, 192, 256, 5, 513), 512, r"segments\[1\]: K is 513"),
        ((64, 128, 192, 256, -5, 3), 512, "N is -5"),
        ((64, 0, 192, 256, 5, 3), 512, "weight, dw and scratch must not be null"),
        (GOOD, 0, "weight, dw and scratch must not be null"),
        ((64, 128, 0, 256, 5, 3), 512, "dz and squared_norm must not be null"),
        ((64, 130, 192, 256, 5, 3), 512, "not aligned to elements of 4 bytes"),
        ((64, 128, 192, 260, 5, 3), 512, "not aligned to elements of 8 bytes"),
    ],
)
def test_bad_input_never_reaches_the_gpu(segment, scratch, said):
    cuda = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
    with pytest.raises(ValueError, match=said):
        cuda.generate_backward([GOOD, segment], scratch, "float32", 0)


def test_nothing_to_do_is_no_launch():
    cuda = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
    cuda.generate_backward([], 0, "float32", 0)
    assert cuda.generate_backward_scratch([]) == 0
