"""`generate_fwd_kernel` against the reference in float64."""

import pytest
import torch

from hyperfast import reference
from hyperfast.kernels.generate import run

SIZES = [(1, 1), (5, 3), (63, 16), (257, 16), (64, 64), (7, 100), (3, 512), (0, 16), (300, 17)]


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_reference(dtype, with_bias, device, assert_accurate):
    weights = [torch.randn(N, K, dtype=dtype).to(device) for N, K in SIZES]
    biases = [torch.randn(N, dtype=dtype).to(device) if with_bias else None for N, _ in SIZES]
    zs = [torch.randn(K, dtype=dtype).to(device) for _, K in SIZES]
    outs = [torch.full_like(weight[:, 0], torch.nan) for weight in weights]
    table = [
        (w.data_ptr(), 0 if b is None else b.data_ptr(), z.data_ptr(), out.data_ptr(), *w.shape)
        for w, b, z, out in zip(weights, biases, zs, outs, strict=True)
    ]
    run(table, dtype, device)
    double = [[None if t is None else t.double() for t in ts] for ts in (weights, biases, zs)]
    expected = [w.to(torch.float64) for w in reference.generate(*double)]
    plain = reference.generate(weights, biases, zs)
    for out, wanted, rounded in zip(outs, expected, plain, strict=True):
        if out.numel():
            assert_accurate(out, wanted, dtype, rounded)
