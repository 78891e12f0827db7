"""conv2d: kn2row against torch's convolution."""

import sys

import pytest
import torch
import torch.nn.functional as F

from hyperfast import ops
from hyperfast.ops.conv2d import _lacks_fast_bf16, useful_share

conv2d_module = sys.modules["hyperfast.ops.conv2d"]

# (B, I, H, W), (O, R, S), padding, dilation
SHAPES = [
    ((3, 5, 2, 2), (7, 3, 3), 1, 1),
    ((2, 4, 4, 4), (3, 3, 3), (1, 1), 1),
    ((1, 1, 1, 1), (1, 3, 3), 1, 1),  # only the middle tap meets the image
    ((2, 3, 5, 4), (6, 3, 2), (0, 1), 1),
    ((2, 3, 3, 7), (2, 5, 3), (4, 1), 1),  # padding beyond the kernel's half: whole rows of bias
    ((2, 3, 6, 5), (2, 3, 3), 2, 2),
    ((2, 3, 2, 2), (2, 3, 3), 3, 3),  # dilation jumps over the image
    ((2, 3, 4, 4), (5, 1, 1), 0, 1),
    ((2, 3, 4, 4), (5, 4, 4), 0, 1),
    ((2, 3, 3, 3), (4, 3, 3), 0, 1),
]


def problem(shape, kernel, dtype=torch.float32, channels_last=True):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight = torch.randn(kernel[0], shape[1], *kernel[1:], dtype=torch.float64).to(dtype)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return [t.requires_grad_() for t in (x, weight, torch.randn(kernel[0]).to(dtype))]


def run(function, tensors, dy):
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype))]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape,kernel,padding,dilation", SHAPES)
def test_values_and_gradients(
    shape, kernel, padding, dilation, dtype, channels_last, with_bias, poison, assert_accurate
):
    tensors = problem(shape, kernel, dtype, channels_last)
    tensors[2] = tensors[2] if with_bias else None
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    options = (1, padding, dilation)
    dy = torch.randn_like(F.conv2d(*exact, *options))
    actual = run(lambda *t: ops.conv2d(*t, *options, path="kn2row"), tensors, dy)
    expected = run(lambda *t: F.conv2d(*t, *options), exact, dy)
    for a, e in zip(actual, expected, strict=True):
        assert_accurate(a, e, dtype)
    assert actual[0].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.preserve_format
    )


def test_non_contiguous_arguments(assert_accurate):
    x = torch.randn(2, 6, 4, 5)[:, ::2].transpose(2, 3)
    weight = torch.randn(3, 3, 3, 4).permute(3, 0, 1, 2)[..., ::2]
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert_accurate(ops.conv2d(x, weight, padding=1, path="kn2row"), expected, torch.float32)


def test_frozen_arguments_get_no_gradient():
    x, weight, bias = problem((2, 3, 2, 2), (4, 3, 3))
    for wanted in (x, weight, bias):
        tensors = [t if t is wanted else t.detach() for t in (x, weight, bias)]
        (gradient,) = torch.autograd.grad(
            ops.conv2d(*tensors, padding=1, path="kn2row").square().sum(), [wanted]
        )
        (expected,) = torch.autograd.grad(F.conv2d(*tensors, padding=1).square().sum(), [wanted])
        torch.testing.assert_close(gradient, expected)


def test_gradcheck_and_double_backward():
    tensors = problem((2, 2, 3, 2), (3, 3, 3), torch.float64)

    def function(*t):
        return ops.conv2d(*t, padding=1, path="kn2row")

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("kn2row", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, channels_last, kn2row):
    x, weight, bias = (t.detach() for t in problem((2, 3, 3, 2), (4, 3, 3), dtype, channels_last))
    options = ([1, 1], [1, 1], [1, 1], 1, kn2row)
    torch.library.opcheck(torch.ops.hyperfast.conv2d, (x, weight, bias, *options))
    dy = torch.randn(2, 4, 3, 2).to(dtype)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.hyperfast.conv2d_backward, (dy, x, weight, *options, *need))


def test_opcheck_with_stride_and_groups():
    x, weight = torch.randn(2, 4, 7, 5).bfloat16(), torch.randn(6, 2, 3, 2).bfloat16()
    options = ([2, 3], [1, 2], [2, 1], 2, False)
    y = torch.ops.hyperfast.conv2d(x, weight, None, *options)
    assert y.shape == F.conv2d(x, weight, None, *options[:4]).shape
    torch.library.opcheck(torch.ops.hyperfast.conv2d, (x, weight, None, *options))
    torch.library.opcheck(
        torch.ops.hyperfast.conv2d_backward, (torch.randn_like(y), x, weight, *options, True, True)
    )


def test_compiled_equals_eager():
    tensors = problem((2, 3, 4, 4), (5, 3, 3))

    def function(*t):
        return ops.conv2d(*t, padding=1, path="kn2row").relu()

    dy = torch.randn(2, 5, 4, 4)
    eager = run(function, tensors, dy)
    compiled = run(torch.compile(function, fullgraph=True), tensors, dy)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


def test_vmap():
    x, weights = torch.randn(2, 3, 4, 4), torch.randn(5, 6, 3, 3, 3)
    made = torch.vmap(lambda w: ops.conv2d(x, w, padding=1, path="kn2row"))(weights)
    expected = torch.stack([F.conv2d(x, w, padding=1) for w in weights])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "size,taps,padding,dilation,share",
    [(2, 3, 1, 1, 4 / 6), (4, 3, 1, 1, 10 / 12), (5, 3, 0, 1, 1), (1, 3, 1, 1, 1 / 3)],
)
def test_useful_share(size, taps, padding, dilation, share):
    assert useful_share(size, taps, padding, dilation) == pytest.approx(share)


@pytest.mark.parametrize(
    "shape,kernel,options,fused",
    [
        ((4, 256, 2, 2), (256, 3, 3), dict(padding=1), True),
        ((4, 256, 4, 4), (256, 3, 3), dict(padding=1), True),
        ((4, 256, 8, 8), (256, 3, 3), dict(padding=1), False),  # few zeros
        ((3, 256, 2, 2), (256, 3, 3), dict(padding=1), False),  # small batch
        ((4, 255, 2, 2), (256, 3, 3), dict(padding=1), False),  # few channels
        ((4, 256, 2, 2), (256, 3, 3), dict(padding=1, stride=2), False),
        ((4, 256, 2, 2), (256, 3, 3), dict(padding="same"), False),
        ((4, 256, 2, 2), (256, 3, 3), dict(padding=1, path="torch"), False),
    ],
)
def test_the_rule_that_chooses(shape, kernel, options, fused):
    x, weight, bias = problem(shape, kernel)
    y = ops.conv2d(x, weight, bias, **options)
    assert (type(y.grad_fn).__name__ == "Conv2dBackward") == fused


@pytest.mark.parametrize("path", ["kn2row", "float32"])
def test_bfloat16_is_multiplied_in_float32(path, assert_accurate):
    tensors = problem((3, 64, 4, 4), (32, 3, 3), torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn(3, 32, 4, 4, dtype=torch.float64).bfloat16().double()
    expected = run(lambda *t: F.conv2d(*t, padding=1), exact, dy)
    plain = run(lambda *t: F.conv2d(*t, padding=1), tensors, dy)
    actual = run(lambda *t: ops.conv2d(*t, padding=1, path=path), tensors, dy)
    for a, e, p in zip(actual, expected, plain, strict=True):
        assert_accurate(a, e, torch.bfloat16, p)
        assert a.stride() == p.stride()


@pytest.mark.parametrize("slow", [True, False])
def test_autocast(slow, monkeypatch):
    monkeypatch.setattr(conv2d_module, "bf16_products_are_slow", lambda: slow)
    tensors = problem((4, 256, 2, 2), (256, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conv2d(*tensors, padding=1)
        expected = F.conv2d(*tensors, padding=1)
    assert y.dtype == torch.bfloat16 and (type(y.grad_fn).__name__ == "Conv2dBackward") == slow
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1.0)
    gradients = torch.autograd.grad(y.float().square().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("slow", [True, False])
def test_autocast_compiled(slow, monkeypatch):
    monkeypatch.setattr(conv2d_module, "_lacks_fast_bf16", lambda: slow)
    torch._dynamo.reset()
    tensors = problem((2, 3, 4, 4), (5, 3, 3))

    def function(*t):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.conv2d(*t, padding=1)

    dy = torch.randn(2, 5, 4, 4)
    eager = run(function, tensors, dy)
    compiled = run(torch.compile(function, fullgraph=True), tensors, dy)
    for e, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize(
    "cpuinfo,slow",
    [
        ("vendor_id : GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("vendor_id : GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", False),
        ("vendor_id : AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n", False),
        ("vendor_id : AuthenticAMD\nflags\t\t: fpu avx2\n", True),
        ("Features : asimd bf16\n", False),
    ],
)
def test_which_processors_multiply_bfloat16_slowly(cpuinfo, slow, monkeypatch):
    monkeypatch.setattr(conv2d_module.Path, "read_text", lambda self: cpuinfo)
    assert _lacks_fast_bf16.__wrapped__() == slow


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(path="winograd"), "path must be one of auto, torch, kn2row, float32"),
        (dict(path="kn2row", stride=2), r"stride \(2, 2\)"),
        (dict(path="kn2row", groups=3), "groups 3"),
        (dict(path="kn2row", padding="same"), "padding same"),
        (dict(path="kn2row", dilation=9), r"dilation \(9, 9\)"),
        (dict(path="kn2row", weight=torch.randn(4, 2, 3, 3)), r"weight \[4, 2, 3, 3\]"),
        (dict(path="kn2row", weight=torch.randn(4, 3, 3, 3).bfloat16()), "bfloat16"),
        (dict(path="kn2row", x=torch.randn(3, 4, 4)), r"x \[3, 4, 4\]"),
        (dict(path="kn2row", x=None), "x NoneType"),
        (dict(path="float32", groups=3), "groups 3"),
        (dict(path="float32", stride=0), r"stride \(0, 0\)"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.randn(2, 3, 4, 4), weight=torch.randn(4, 3, 3, 3), padding=1) | change
    with pytest.raises(ValueError, match=message):
        ops.conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments)
