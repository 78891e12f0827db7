"""`generate_bwd_kernel` and the sums of its partial sums against the reference in float64."""

import pytest
import torch

from hyperfast import reference
from hyperfast.kernels.generate_backward import launches, run

SIZES = [(1, 1), (1025, 1), (5, 3), (63, 16), (257, 16), (65, 64), (7, 100), (3, 512), (0, 16), (300, 17)]


def made(sizes, dtype, device, shift: int = 0):
    """Weights and dws, `shift` elements behind the beginning of memory, with sums that do not cancel."""
    weights = [torch.empty(N * K + shift, dtype=dtype, device=device)[shift:].view(N, K) for N, K in sizes]
    for weight in weights:
        weight.copy_(torch.randn(weight.shape).to(device) + 1)
    return weights, [(torch.randn(N).to(device) + 1).to(dtype) for N, _ in sizes]


def table_of(weights, dws):
    dzs = [torch.full((w.shape[1],), torch.nan, dtype=w.dtype, device=w.device) for w in weights]
    norms = torch.full((len(weights),), torch.nan, dtype=torch.float64, device=weights[0].device)
    table = [
        (w.data_ptr(), dw.data_ptr(), dz.data_ptr(), norms.data_ptr() + 8 * i, *w.shape)
        for i, (w, dw, dz) in enumerate(zip(weights, dws, dzs, strict=True))
    ]
    return table, dzs, norms


@pytest.mark.parametrize("shift", [0, 1])
def test_equals_reference(dtype, shift, device, assert_accurate):
    weights, dws = made(SIZES, dtype, device, shift)
    table, dzs, norms = table_of(weights, dws)
    run(table, dtype, device)
    double = [[t.double() for t in ts] for ts in (weights, dws)]
    expected, expected_norms = reference.generate_backward(*double)
    plain, _ = reference.generate_backward(weights, dws)
    assert_accurate(dzs, expected, dtype, plain)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-13, atol=0)


def test_chunks_and_bits(device):
    """More than one chunk, and than one step of the second launch; the same bits again and beside others."""
    N = 2 * 16 * 1024 + 77
    weights, dws = made([(N, 1), (40, 16)], torch.float32, device)
    table, dzs, norms = table_of(weights, dws)
    run(table, torch.float32, device)
    first, again = [dz.clone() for dz in dzs], []
    for row in table:
        run([row], torch.float32, device)
    again = [dz.clone() for dz in dzs]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = weights[0].double().t() @ dws[0].double()
    torch.testing.assert_close(dzs[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms[0], dws[0].double().square().sum(), rtol=1e-13, atol=0)


def test_partial_sums_are_shared_by_all_layers():
    """The second launch is one for all K."""
    kernels = [launch.kernel for launch in launches([(16, 16, 16, 16, 9, K) for K in (3, 16, 512)],
               torch.float32, torch.device("cpu"))]  # fmt: skip
    assert len(kernels) == 4 and len(set(map(id, kernels))) == 2


def test_an_address_between_elements_is_refused(device):
    with pytest.raises(ValueError, match="no multiple of its elements' 4 bytes"):
        run([(16, 18, 16, 16, 4, 4)], torch.float32, device)
    with pytest.raises(ValueError, match="no multiple of its elements' 8 bytes"):
        run([(16, 16, 16, 20, 4, 4)], torch.float32, device)
