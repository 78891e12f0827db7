"""hyper_linear and hyper_conv2d: values, gradients, transforms, paths, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hyperfast
from hyperfast import ops, reference
from hyperfast.nn import HyperConv2d, HyperLinear
from hyperfast.ops import hyper_layers
from hyperfast.ops._library import _cpu
from hyperfast.ops.merged import Geometry

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# rows, in, out, K around the kernels' vectors, tiles (8 outputs, 512 columns) and strips (32 and 128)
LINEAR = [
    (1, 1, 1, 1),
    (2, 3, 9, 2),
    (3, 16, 8, 4),
    (4, 17, 7, 3),
    (5, 127, 31, 5),
    (7, 129, 33, 8),
    (3, 511, 17, 12),
    (1, 513, 8, 16),
    (8, 130, 65, 17),
    (16, 64, 3, 32),
    (2, 1030, 2, 33),
    (257, 31, 13, 16),
    (3, 40, 9, 64),
    (2, 9, 5, 512),
]
CONVOLUTIONS = {
    "plain": ((2, 3, 6, 5), 5, (3, 3), {}),
    "one place": ((3, 16, 1, 1), 9, (1, 1), {}),
    "1x1": ((2, 5, 4, 3), 9, (1, 1), {}),
    "padded": ((2, 5, 4, 4), 17, (3, 3), {"padding": 1}),
    "pairs": ((2, 3, 6, 7), 5, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same, even": ((2, 3, 5, 6), 4, (4, 2), {"padding": "same"}),
    "same, dilated": ((1, 3, 9, 9), 4, (3, 5), {"padding": "same", "dilation": 2}),
    "valid": ((1, 3, 5, 5), 4, (3, 3), {"padding": "valid"}),
    "more padding than kernel": ((1, 2, 2, 3), 3, (2, 2), {"padding": 3}),
    "groups": ((2, 4, 5, 5), 6, (3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 5, 5), 8, (3, 3), {"groups": 4, "padding": 1, "stride": 2}),
    "everything": ((2, 6, 7, 9), 9, (2, 3), {"stride": (2, 3), "padding": 2, "dilation": 2, "groups": 3}),
}
# The even kernels of the case "same, even" make F.conv2d say that it copies its input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def operands(x_shape, outputs, weights, K, dtype=torch.float64, bias=True, layer_bias=True):
    """x, z, weight, bias, layer_bias for a layer of `weights` weights."""
    shapes = x_shape, (K,), (weights, K), (weights,) if bias else None, (outputs,) if layer_bias else None
    return [None if s is None else torch.randn(s).to(dtype) for s in shapes]


def linear_operands(rows, inputs, outputs, K, dtype=torch.float64, **options):
    return operands((rows, inputs), outputs, outputs * inputs, K, dtype, **options)


def convolution_operands(case, K, dtype=torch.float64, **options):
    shape, outputs, kernel_size, arguments = CONVOLUTIONS[case]
    weights = outputs * shape[1] // arguments.get("groups", 1) * kernel_size[0] * kernel_size[1]
    return operands(shape, outputs, weights, K, dtype, **options), (kernel_size,), arguments


def merged(function):
    """The public function on the merged path."""

    def call(*args, **kwargs):
        return function(*args, **kwargs, path="merged")

    return call


def given(tensors):
    return [t for t in tensors if t is not None]


def with_gradients(function, tensors, dy):
    """The result and the gradients of all tensors but None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, given(leaves), dy.to(y.dtype))]


def check_all(function, expected, tensors, dtype, assert_accurate):
    """Values and gradients against the reference in float64."""
    doubles = [None if t is None else t.double() for t in tensors]
    dy = torch.randn(expected(*doubles).shape).to(dtype)
    wanted = with_gradients(expected, doubles, dy)
    plain = with_gradients(expected, tensors, dy)
    for got, want, simple in zip(with_gradients(function, tensors, dy), wanted, plain, strict=True):
        assert_accurate(got, want, dtype, simple)


@pytest.fixture
def no_native(monkeypatch):
    """Fails a test in which a kernel is reached."""

    def reached(*args):
        pytest.fail("native code was reached")

    for name in ("generate", "hyper_linear", "hyper_linear_backward", "im2col", "col2im"):
        monkeypatch.setattr(_cpu, name, reached)


@pytest.fixture
def native_calls(monkeypatch):
    """Names of the kernels that were called, in order."""
    calls = []
    for name in ("generate", "hyper_linear", "hyper_linear_backward"):
        kernel = getattr(_cpu, name)
        monkeypatch.setattr(
            _cpu, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args)
        )
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LINEAR, ids=str)
def test_linear(sizes, dtype, poison, assert_accurate):
    with_bias = sizes[0] % 2 == 1
    tensors = linear_operands(*sizes, dtype, bias=with_bias, layer_bias=sizes[1] != 64)
    check_all(merged(ops.hyper_linear), reference.hyper_linear, tensors, dtype, assert_accurate)


def check_convolution(tensors, sizes, options, layout, dtype, assert_accurate):
    """`hyper_conv2d` of x in `layout` against the reference, and the layout of y."""
    tensors[0] = tensors[0].contiguous(memory_format=layout)

    def ours(*tensors):
        y = ops.hyper_conv2d(*tensors, *sizes, **options, path="merged")
        last = tensors[0].is_contiguous(memory_format=torch.channels_last) and not tensors[0].is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return y

    def expected(*tensors):
        return reference.hyper_conv2d(*tensors, *sizes, **options)

    check_all(ours, expected, tensors, dtype, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, layout, dtype, poison, assert_accurate):
    tensors, sizes, options = convolution_operands(case, 7, dtype, layer_bias=case != "plain")
    check_convolution(tensors, sizes, options, layout, dtype, assert_accurate)


def test_outputs_cut_into_parts_and_columns_too(poison, assert_accurate):
    """Few outputs of many columns add up parts in the forward, few columns of many outputs in the
    backward."""
    for sizes in ((2, 5000, 3, 2), (2, 20, 700, 2)):
        tensors = linear_operands(*sizes, torch.float32)
        check_all(merged(ops.hyper_linear), reference.hyper_linear, tensors, torch.float32, assert_accurate)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (1, 2, 1, 3, 6)])
@pytest.mark.parametrize("path", ["auto", "merged", "separate"])
def test_leading_dimensions(shape, path):
    _, *rest = linear_operands(1, 6, 4, 3)
    x = torch.randn(shape, dtype=torch.float64)
    y = ops.hyper_linear(x, *rest, path=path)
    torch.testing.assert_close(y, reference.hyper_linear(x, *rest))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_rows(shape):
    tensors = linear_operands(1, 6, 4, 3)
    tensors[0] = torch.randn(shape, dtype=torch.float64)
    dy = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    y, *gradients = with_gradients(merged(ops.hyper_linear), tensors, dy)
    assert y.shape == dy.shape
    assert gradients[0].shape == shape and not any(g.count_nonzero() for g in gradients)


def test_no_images():
    tensors, sizes, options = convolution_operands("padded", 3)
    y = ops.hyper_conv2d(tensors[0][:0], *tensors[1:], *sizes, **options, path="merged")
    assert y.shape == (0, 17, 4, 4)


def test_tensors_out_of_the_middle_of_others(poison):
    big = torch.randn(90, 80, dtype=torch.float64)
    x, weight, bias, z = big[1:8:2, 3:23:4], big.t()[2:22, 5:12], big[:40:2, 7], big[9, :7]
    layer_bias, dy = big[:8:2, 3], big.t()[1:5, 2:6]
    tensors = [x, z, weight, bias, layer_bias]
    got = with_gradients(merged(ops.hyper_linear), tensors, dy)
    wanted = with_gradients(reference.hyper_linear, [t.contiguous() for t in tensors], dy)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_images_out_of_the_middle_of_others(poison):
    tensors, sizes, options = convolution_operands("padded", 7)
    big = torch.randn(6, 20, 9, 7, dtype=torch.float64)
    for x in (big[::3, 2:12:2, 1:8:2, :4], big[::3, :5, 2:6, 3:].transpose(2, 3)):
        got = ops.hyper_conv2d(x, *tensors[1:], *sizes, **options, path="merged")
        torch.testing.assert_close(got, reference.hyper_conv2d(x, *tensors[1:], *sizes, **options))


@pytest.mark.parametrize("dtype, K", [(torch.float16, 5), (torch.float32, 513)])
def test_what_the_kernels_do_not_serve(dtype, K, no_native):
    tensors = linear_operands(3, 4, 5, K, dtype)
    assert not hyper_layers.merged_wins(3, tensors[2], False)
    dy = torch.randn(3, 5)
    got = with_gradients(merged(ops.hyper_linear), tensors, dy)
    for a, b in zip(got, with_gradients(reference.hyper_linear, tensors, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-2)


def test_nan_and_inf_stay_where_they_belong():
    x, z, weight, bias, layer_bias = linear_operands(7, 21, 11, 16, torch.float32)
    x[2, 20], x[4, 0] = float("nan"), float("inf")
    y = ops.hyper_linear(x, z, weight, bias, layer_bias, path="merged")
    assert y[2].isnan().all() and not y[4].isfinite().any()
    assert y[[0, 1, 3, 5, 6]].isfinite().all()
    x = torch.randn(7, 21)
    weight[5 * 21 + 20, 3] = float("nan")  # one weight of output 5
    y = ops.hyper_linear(x, z, weight, bias, layer_bias, path="merged")
    assert y[:, 5].isnan().all() and y[:, :5].isfinite().all() and y[:, 6:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 700, 41, 16), (3, 40, 300, 5), (2, 5000, 3, 4)], ids=str)
def test_independent_of_the_thread_count(sizes, dtype):
    tensors = linear_operands(*sizes, dtype)
    dy = torch.randn(sizes[0], sizes[2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(merged(ops.hyper_linear), tensors, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class TestGradients:
    def small(self, kind):
        """(function of the tensors, tensors) in float64."""
        if kind == "linear":
            return merged(ops.hyper_linear), linear_operands(3, 5, 4, 3)
        tensors, sizes, options = convolution_operands(kind, 2)
        return lambda *t: ops.hyper_conv2d(*t, *sizes, **options, path="merged"), tensors

    @pytest.mark.parametrize("kind", ["linear", "pairs", "groups", "same, even"])
    def test_gradcheck(self, kind):
        function, tensors = self.small(kind)
        tensors = [t.requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)

    def test_full_gradcheck(self):
        function, tensors = self.small("linear")
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])

    @pytest.mark.parametrize("needed", range(5))
    def test_only_one_is_needed(self, needed):
        function, tensors = self.small("linear")
        dy = torch.randn(3, 4, dtype=torch.float64)
        every = with_gradients(function, tensors, dy)[1:]
        tensors[needed].requires_grad_()
        (got,) = torch.autograd.grad(function(*tensors), tensors[needed], dy)
        torch.testing.assert_close(got, every[needed])

    def test_no_bias(self):
        function, tensors = self.small("linear")
        tensors[3] = tensors[4] = None
        assert torch.autograd.gradcheck(
            function, [None if t is None else t.requires_grad_() for t in tensors]
        )

    @pytest.mark.parametrize("path", ["merged", "separate"])
    def test_factored_forms_no_weight_gradient(self, path):
        _, tensors = self.small("linear")
        x, z, weight, bias, layer_bias = (t.requires_grad_() for t in tensors)
        dy = torch.randn(3, 4, dtype=torch.float64)
        ops.hyper_linear(x, z, weight, bias, layer_bias, factored=True, path=path).backward(dy)
        assert weight.grad is None
        dw = (dy.t() @ x.detach()).view(-1)
        torch.testing.assert_close(bias.grad, dw)
        torch.testing.assert_close(z.grad, weight.detach().t() @ dw)

    def test_create_graph_in_factored_mode_is_dense(self):
        _, tensors = self.small("linear")
        leaves = [t.requires_grad_() for t in tensors]
        function = merged(ops.hyper_linear)
        grads = torch.autograd.grad(function(*leaves, factored=True).pow(3).sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)
        wanted = torch.autograd.grad(reference.hyper_linear(*leaves).pow(3).sum(), leaves, create_graph=True)
        wanted_again = torch.autograd.grad(sum((g**2).sum() for g in wanted), leaves)
        for got, want in zip((*grads, *again), (*wanted, *wanted_again), strict=True):
            torch.testing.assert_close(got, want)

    def test_gradient_that_is_not_contiguous(self):
        function, tensors = self.small("padded")
        leaves = [t.requires_grad_() for t in tensors]
        got = torch.autograd.grad(function(*leaves).sum(), leaves)  # an expanded scalar
        _, sizes, options = convolution_operands("padded", 2)
        wanted = torch.autograd.grad(reference.hyper_conv2d(*leaves, *sizes, **options).sum(), leaves)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_tensor_given_twice(self):
        weight, z = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2), (2,)))
        bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

        def f(z, weight, bias):
            return ops.hyper_linear(z, z, weight, bias, z, path="merged")

        assert torch.autograd.gradcheck(f, (z, weight, bias))
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        leaves = z, weight, bias
        got = torch.autograd.grad(compiled(*leaves).pow(2).sum(), leaves)
        for a, b in zip(got, torch.autograd.grad(f(*leaves).pow(2).sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)

    def test_backward_after_an_update_is_refused(self):
        function, tensors = self.small("linear")
        y = function(*(t.requires_grad_() for t in tensors))
        with torch.no_grad():
            tensors[2].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestTransforms:
    def test_grad(self):
        tensors = linear_operands(3, 5, 4, 3)
        every = tuple(range(5))
        ours = torch.func.grad(lambda *t: merged(ops.hyper_linear)(*t).pow(2).sum(), every)(*tensors)
        theirs = torch.func.grad(lambda *t: reference.hyper_linear(*t).pow(2).sum(), every)(*tensors)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want)

    @pytest.mark.parametrize(
        "in_dims", [(None, 0, None, None, None), (0, None, None, None, None), (1, 0, 2, 1, 0)]
    )
    def test_vmap(self, in_dims):
        tensors = [
            t if d is None else torch.stack([t, t.flip(0), t * 2]).movedim(0, d)
            for t, d in zip(linear_operands(3, 5, 4, 3), in_dims, strict=True)
        ]
        function = merged(ops.hyper_linear)
        got = torch.func.vmap(function, in_dims)(*tensors)
        rows = [
            [t if d is None else t.select(d, b) for t, d in zip(tensors, in_dims, strict=True)]
            for b in range(3)
        ]
        torch.testing.assert_close(got, torch.stack([function(*row) for row in rows]))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, requires_grad):
        tensors, _, _ = convolution_operands("groups", 3)
        geometry = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2).flat()
        op = torch.ops.hyperfast
        # no autograd formula of its own: the Function has it
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 2 if requires_grad else 3]
        tensors = [t.requires_grad_(requires_grad) for t in tensors]
        torch.library.opcheck(op.hyper_conv2d, (*tensors, geometry), test_utils=tests)
        for x in (tensors[0], tensors[0].contiguous(memory_format=torch.channels_last)):
            dy = torch.randn(2, 6, 5, 5, dtype=torch.float64)
            for needed in ((True, True, True), (True, False, False), (False, True, False)):
                args = dy, x, *tensors[1:4], geometry, *needed
                torch.library.opcheck(op.hyper_conv2d_backward, args, test_utils=tests)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compile(self, requires_grad):
        torch._dynamo.reset()
        tensors, sizes, options = convolution_operands("padded", 3)
        tensors = [t.requires_grad_(requires_grad) for t in tensors]
        flat = linear_operands(3, 5, 4, 3)

        def f(*tensors):
            y = ops.hyper_conv2d(*tensors, *sizes, **options, path="merged")
            return y.pow(2).sum() + merged(ops.hyper_linear)(tensors[0].mean((2, 3)), *flat[1:]).sum()

        got, wanted = torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), f(*tensors)
        torch.testing.assert_close(got, wanted)
        if requires_grad:
            for a, b in zip(*(torch.autograd.grad(y, tensors) for y in (got, wanted)), strict=True):
                torch.testing.assert_close(a, b)

    def test_compile_for_any_number_of_rows(self):
        torch._dynamo.reset()
        _, *rest = linear_operands(1, 5, 4, 3)
        compiled = torch.compile(merged(ops.hyper_linear), fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (2, 3, 7):
            x = torch.randn(rows, 5, dtype=torch.float64)
            torch.testing.assert_close(compiled(x, *rest), reference.hyper_linear(x, *rest))

    @pytest.mark.parametrize("path", ["merged", "separate"])
    def test_autocast(self, path):
        tensors = linear_operands(3, 5, 4, 3, torch.float32)
        leaves = [t.requires_grad_() for t in tensors]
        for x in (leaves[0], leaves[0].bfloat16()):
            with torch.autocast("cpu", torch.bfloat16):
                y = ops.hyper_linear(x, *leaves[1:], path=path)
            assert y.dtype == torch.bfloat16
            wanted = reference.hyper_linear(*leaves)
            assert (y - wanted).norm() <= 0.02 * wanted.norm()
            dy = torch.randn(3, 4)
            got = torch.autograd.grad(y, leaves, dy.bfloat16())
            for a, b in zip(got, torch.autograd.grad(wanted, leaves, dy), strict=True):
                assert a.dtype == torch.float32 and (a - b).norm() <= 0.02 * b.norm()


class TestPaths:
    @pytest.mark.parametrize("path, kernels", [("merged", ["hyper_linear"]), ("separate", ["generate"])])
    def test_what_runs(self, path, kernels, native_calls):
        ops.hyper_linear(*linear_operands(3, 5, 4, 3), path=path)
        assert native_calls == kernels

    @pytest.mark.parametrize("needs_grad", [False, True])
    @pytest.mark.parametrize("rows", [1, 16, 5000])
    def test_auto_follows_the_rule(self, rows, needs_grad, native_calls):
        tensors = linear_operands(rows, 5, 4, 3, torch.float32)
        tensors[1].requires_grad_(needs_grad)
        ops.hyper_linear(*tensors)
        merges = hyper_layers.merged_wins(rows, tensors[2], needs_grad)
        assert native_calls == ["hyper_linear" if merges else "generate"]
        assert merges == (rows < 5000 and not needs_grad)

    @pytest.mark.parametrize("factored", [False, True])
    def test_layers(self, factored, native_calls):
        model = torch.nn.Sequential(
            HyperConv2d(2, 3, 3, stride=2, padding=1, z_dim=3),
            torch.nn.Flatten(),
            HyperLinear(12, 5, z_dim=3),
        )
        model = hyperfast.factored_(model, factored)
        x = torch.randn(2, 2, 4, 4)
        trained = model(x)
        assert native_calls == ["generate", "generate"]
        native_calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(x), trained.detach())
        assert native_calls == ["hyper_linear", "hyper_linear"]

    def test_next_weights_come_first(self, native_calls):
        layer = hyperfast.factored_(HyperLinear(4, 3, z_dim=5))
        optimizer = hyperfast.optim.AdamW(layer, lr=0.1)
        layer(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        native_calls.clear()
        with torch.no_grad():
            layer(torch.randn(2, 4))
            assert native_calls == []
            hyperfast.invalidate(layer)
            layer(torch.randn(2, 4))
        assert native_calls == ["hyper_linear"]

    def test_generators_that_are_watched_or_plain_generate(self, native_calls):
        watched, plain = HyperLinear(4, 3, z_dim=5), HyperLinear(4, 3, z_dim=5, backend="reference")
        seen = []
        watched.generator.register_forward_hook(lambda module, args, made: seen.append(made))
        with torch.no_grad():
            watched(torch.randn(2, 4)), plain(torch.randn(2, 4))
        assert len(seen) == 1 and native_calls == ["generate"]


def broken(name=None):
    x, z, weight, bias, layer_bias = linear_operands(3, 5, 4, 2, torch.float32)
    good = dict(x=x, z=z, weight=weight, bias=bias, layer_bias=layer_bias)
    cases = {
        "x scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., I\], got shape \[\]"),
        "x a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        "x of other width": (
            {"x": x[:, :3]},
            ValueError,
            r"weight must be .* multiple of I = 3, got \[20, 2\]",
        ),
        "x without columns": ({"x": x[:, :0]}, ValueError, r"multiple of I = 0"),
        "x float64": ({"x": x.double()}, TypeError, "x must be torch.float32 like weight, got torch.float64"),
        "x int": ({"x": x.int()}, TypeError, "x must be torch.float32"),
        "x elsewhere": ({"x": x.to("meta")}, ValueError, "x must be on cpu"),
        "z short": ({"z": z[:1]}, ValueError, r"z 0 must be \[2\].*got \[1\]"),
        "z None": ({"z": None}, TypeError, "z 0 must be a tensor"),
        "weight 1-d": ({"weight": weight[0]}, ValueError, r"weight 0 must be \[N, K\]"),
        "weight None": ({"weight": None}, TypeError, "weight must be a tensor"),
        "weight empty": ({"weight": weight[:0], "bias": None}, ValueError, "weight must be"),
        "bias long": ({"bias": torch.randn(21)}, ValueError, r"bias 0 must be \[20\].*got \[21\]"),
        "layer_bias long": ({"layer_bias": bias}, ValueError, r"layer_bias must be \[4\].*got \[20\]"),
        "layer_bias float64": (
            {"layer_bias": layer_bias.double()},
            TypeError,
            "layer_bias must be torch.float32",
        ),
        "layer_bias a number": ({"layer_bias": 1.0}, TypeError, "layer_bias must be a tensor"),
        "path": ({"path": "fused"}, ValueError, "path must be one of auto, merged, separate, got 'fused'"),
    }
    if name is None:
        return list(cases)
    changes, error, message = cases[name]
    return good | changes, error, message


@pytest.mark.parametrize("path", ["merged", "separate"])
@pytest.mark.parametrize("case", broken())
def test_bad_input(case, path, no_native):
    arguments, error, message = broken(case)
    with pytest.raises(error, match=message):
        ops.hyper_linear(**{"path": path} | arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel_size": 0}, "kernel_size must be an int or a pair of at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"stride": 0}, "stride must be"),
        ({"dilation": (1, 0)}, "dilation must be"),
        ({"padding": -1}, "padding must be an int or a pair of at least 0, got -1"),
        ({"padding": "full"}, 'padding must be a size, "same" or "valid", got \'full\''),
        ({"padding": "same", "stride": 2}, 'padding="same" needs stride 1'),
        ({"groups": 3}, "groups must divide the 4 channels of x, got 3"),
        ({"groups": 4}, r"weight must be \[N, K\] with N a multiple of I / groups R S = 9 and of groups 4"),
        ({"kernel_size": 6}, r"x of shape \[2, 4, 5, 5\] is smaller than kernel_size \(6, 6\)"),
        ({"x": torch.randn(4, 5, 5)}, r"x must be \[B, I, H, W\], got shape \[4, 5, 5\]"),
    ],
)
def test_bad_convolution(change, message, no_native):
    x, z, weight, bias, _ = operands((2, 4, 5, 5), 2, 2 * 4 * 9, 3, torch.float32)
    arguments = dict(x=x, z=z, weight=weight, bias=bias, layer_bias=None, kernel_size=3) | change
    if change == {"groups": 4}:
        arguments |= {"weight": weight[: 9 * 6], "bias": bias[: 9 * 6]}
    with pytest.raises(ValueError, match=message):
        ops.hyper_conv2d(**arguments, path="merged")


# Values and gradients of both layers against the reference in float64, under the instruction set of the
# process.
SCRIPT = """
import sys, torch
from hyperfast import ops, reference
from hyperfast.ops._library import _cpu
assert _cpu.isa() == sys.argv[1], _cpu.isa()
torch.manual_seed(0)
bounds = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
for dtype, bound in bounds.items():
    for K in (1, 2, 3, 4, 8, 9, 16, 17, 32, 64, 100):
        for shape, outputs, size, options, samples in (
            ((5, 33), 19, None, {}, False),
            ((2, 530), 9, None, {}, False),
            ((2, 6, 5, 4), 10, (3, 2), dict(padding=1, groups=2), False),
            ((5, 267), 9, None, {}, True),
            ((2, 3, 33), 9, None, {}, True),
        ):
            inputs = shape[1] // options["groups"] * size[0] * size[1] if size else shape[-1]
            z_shape = (shape[0], K) if samples else (K,)
            shapes = shape, z_shape, (outputs * inputs, K), (outputs * inputs,), (outputs,)
            tensors = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
            doubles = [t.detach().double().requires_grad_() for t in tensors]
            name = "hyper_conv2d" if size else "hyper_linear"
            sizes = (size,) if size else ()
            y = getattr(ops, name)(*tensors, *sizes, **options, path="merged")
            wanted = getattr(reference, name)(*doubles, *sizes, **options)
            dy = torch.randn(y.shape).to(dtype)
            got = [y, *torch.autograd.grad(y, tensors, dy)]
            expected = [wanted, *torch.autograd.grad(wanted, doubles, dy.double())]
            for i, (a, b) in enumerate(zip(got, expected)):
                error = ((a.double() - b).norm() / b.norm()).item()
                assert error <= bound, (dtype, K, shape, i, error)
"""


@pytest.mark.parametrize(
    "isa", [isa for isa in _cpu.isas() if isa != _cpu.isa()]
)  # this one's is tested above
def test_instruction_sets(isa):
    environment = os.environ | {"HYPERFAST_ISA": isa, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, isa]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
