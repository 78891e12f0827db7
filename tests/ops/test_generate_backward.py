"""generate_backward: embedding gradients and squared norms."""

import warnings

import pytest
import torch

from hyperfast import ops, reference
from hyperfast.ops._library import _cpu

KS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 511, 512]
NS = [0, 1, 2, 3, 63]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def rows_around_blocks(K: int) -> list[int]:
    """N around what one block and what one thread's share of blocks hold (csrc/cpu/kernels.h)."""
    rows = max(1, min(1024, 16384 // K))
    return [rows - 1, rows, rows + 1, 8 * rows + 1, 9 * rows + 3]


def problem(sizes, dtype):
    return [torch.randn(n, k).to(dtype) for n, k in sizes], [torch.randn(n).to(dtype) for n, _ in sizes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", KS)
def test_values(K, dtype, poison, assert_accurate):
    weights, dws = problem([(n, K) for n in NS + rows_around_blocks(K)], dtype)
    # sums that do not cancel: the bound is relative to them
    weights, dws = [w + 1 for w in weights], [g + 1 for g in dws]
    dzs, norms = ops.generate_backward(weights, dws)
    expected, expected_norms = reference.generate_backward(
        [w.double() for w in weights], [g.double() for g in dws]
    )
    plain = None
    if dtype == torch.bfloat16:
        plain, _ = reference.generate_backward(weights, dws)
    assert_accurate(dzs, expected, dtype, plain)
    # the inputs are exact, and the squares are added in double whatever the dtype
    torch.testing.assert_close(norms, expected_norms, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_one_call_do_not_touch_each_other(dtype, poison):
    sizes = [(n, k) for k, n in zip(KS, [1025, 3, 1, 2049, 0, 17, 1024, 2] * 3, strict=False)]
    weights, dws = problem(sizes, dtype)
    dzs, norms = ops.generate_backward(weights, dws)
    for i in range(len(sizes)):
        (dz,), norm = ops.generate_backward(weights[i : i + 1], dws[i : i + 1])
        assert torch.equal(dzs[i], dz) and torch.equal(norms[i : i + 1], norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 5, 16, 512])
def test_independent_of_the_thread_count(K, dtype):
    weights, dws = problem([(n, K) for n in (20001, 7, 5000)], dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, one_norms = ops.generate_backward(weights, dws)
        torch.set_num_threads(2)
        for _ in range(3):  # blocks go to whichever thread is free
            two, two_norms = ops.generate_backward(weights, dws)
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
            assert torch.equal(one_norms, two_norms)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [1.0, 1e-3])
def test_long_sums_keep_their_digits(value):
    """A million equal terms: a running float32 sum would be off by percents."""
    N = 1_000_003
    (dz,), norm = ops.generate_backward([torch.full((N, 2), 0.1)], [torch.full((N,), value)])
    exact = N * float(torch.tensor(0.1)) * float(torch.tensor(value))
    torch.testing.assert_close(dz.double(), torch.full((2,), exact).double(), rtol=2e-5, atol=0)
    exact_norm = torch.tensor([N * float(torch.tensor(value)) ** 2], dtype=torch.float64)
    torch.testing.assert_close(norm, exact_norm, rtol=1e-10, atol=0)


def test_no_layers():
    dzs, norms = ops.generate_backward([], [])
    assert dzs == [] and norms.shape == (0,) and norms.dtype == torch.float64


def test_tensors_out_of_the_middle_of_others(poison):
    big = torch.randn(40, 33)
    weights = [big[3:20, 2:9], big.t()[:, :6], big[::2, ::3], big[5:6].expand(4, 33)]
    dws = [torch.randn(2 * w.shape[0])[::2] for w in weights[:-1]] + [torch.tensor(2.0).expand(4)]
    got, norms = ops.generate_backward(weights, dws)
    want, want_norms = ops.generate_backward([w.contiguous() for w in weights], [g.contiguous() for g in dws])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and torch.equal(norms, want_norms)


@pytest.mark.parametrize("dtype, K", [(torch.float16, 5), (torch.float32, 513), (torch.float32, 0)])
def test_what_the_kernels_do_not_serve(dtype, K, monkeypatch):
    monkeypatch.setattr(_cpu, "generate_backward", lambda *args: pytest.fail("native code was reached"))
    weights, dws = problem([(6, K)], dtype)
    (dz,), _ = ops.generate_backward(weights, dws)
    assert torch.equal(dz, reference.generate_backward(weights, dws)[0][0])


def test_its_own_gradient_is_never_silently_wrong():
    """Either it can be differentiated, correctly, or the result says that it cannot; DESIGN.md section 4."""
    weight, dw = torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dz,), norm = ops.generate_backward([weight], [dw])
        try:
            got = torch.autograd.grad(dz.sum() + norm.sum(), [weight, dw], allow_unused=True)
        except RuntimeError:
            return
    assert got[0] is not None and got[1] is not None
    torch.testing.assert_close(got[0], dw.detach()[:, None].expand(3, 2))
    torch.testing.assert_close(got[1], weight.detach().sum(1) + 2 * dw.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore")  # the raw op has no formula of its own
def test_opcheck(dtype, requires_grad):
    weights, dws = problem([(5, 3), (2, 4)], dtype)
    inputs = [[t.requires_grad_(requires_grad) for t in column] for column in (weights, dws)]
    torch.library.opcheck(torch.ops.hyperfast.generate_backward.default, tuple(inputs))


BAD = {
    "weight 1-d": (lambda w, g: (w[0], g), ValueError, "weight 0 must be"),
    "dw short": (lambda w, g: (w, g[:2]), ValueError, r"dw 0 must be .*\[3\].*got \[2\]"),
    "dw 2-d": (lambda w, g: (w, g[None]), ValueError, r"dw 0 .*\[1, 3\]"),
    "dw float64": (lambda w, g: (w, g.double()), TypeError, "dw 0 must be torch.float32"),
    "dw None": (lambda w, g: (w, None), (TypeError, ValueError), "dw 0"),
    "weight None": (lambda w, g: (None, g), (TypeError, ValueError), "weight 0"),
    "integers": (lambda w, g: (w.long(), g.long()), TypeError, "weight 0 must be floating point"),
    "another device": (lambda w, g: (w, g.to("meta")), ValueError, "dw 0 must be on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, monkeypatch):
    monkeypatch.setattr(_cpu, "generate_backward", lambda *args: pytest.fail("native code was reached"))
    change, error, message = BAD[case]
    weight, dw = change(torch.randn(3, 2), torch.randn(3))
    with pytest.raises(error, match=message):
        ops.generate_backward([weight], [dw])


def test_lists_of_different_lengths():
    weights, dws = problem([(5, 3), (2, 4)], torch.float32)
    with pytest.raises(ValueError, match="2 weights but 1 of dw"):
        ops.generate_backward(weights, dws[:1])
    with pytest.raises(ValueError, match="0 weights but 2 of dw"):
        ops.generate_backward([], dws)
