"""The batch norm kernels compiled for GPUs that are not here: what `full` relies on."""

import pytest

pytest.importorskip("triton")

from hyperfast.kernels import launch
from hyperfast.kernels.batch_norm_relu_max_pool import examples

if launch.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("example", examples(), ids=lambda e: f"{e[1].kernel.__name__} {e[0]}")
def test_nothing_spills_and_loads_are_wide(example, capability):
    _, made = example
    found = made.compile(capability)
    assert found.stack == 0
    assert found.shared <= launch.SHARED_LIMITS[capability]
    assert found.registers * found.threads <= 65536
    assert "ld.global.v4.b32" in found.ptx  # x, 16 bytes a thread
    assert ".f64" in found.ptx  # statistics
