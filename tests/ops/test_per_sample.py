"""hyper_linear and hyper_conv2d with an embedding for each sample: values, gradients, transforms, errors."""

import pytest
import torch

from hyperfast import ops, reference
from hyperfast.ops import per_sample, per_sample_cpu
from hyperfast.ops.merged import LINEAR, Geometry
from tests.ops.test_hyper_layers import (
    CONVOLUTIONS,
    DTYPES,
    check_all,
    check_convolution,
    convolution_operands,
    linear_operands,
    merged,
    with_gradients,
)

# samples, rows of each, in, out, K: both orders, around the kernels' vectors and runs (256)
LINEAR_SIZES = [
    (1, (), 1, 1, 1),
    (2, (), 3, 9, 2),
    (3, (), 17, 7, 3),
    (5, (1,), 16, 8, 4),
    (4, (), 255, 5, 8),
    (3, (2,), 257, 33, 16),
    (2, (3, 2), 31, 17, 5),
    (7, (), 20, 6, 17),
    (2, (), 9, 5, 512),
    (3, (13,), 12, 70, 16),
    (2, (3,), 33, 40, 33),
    (2, (2, 41), 8, 5, 3),
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def per_sample_linear(samples, rows, inputs, outputs, K, dtype=torch.float64, **options):
    x, z, *rest = linear_operands(samples, inputs, outputs, K, dtype, **options)
    return [torch.randn(samples, *rows, inputs).to(dtype), torch.randn(samples, K).to(dtype), *rest]


def per_sample_convolution(case, K, dtype=torch.float64, **options):
    tensors, sizes, arguments = convolution_operands(case, K, dtype, **options)
    tensors[1] = torch.randn(len(tensors[0]), K).to(dtype)
    return tensors, sizes, arguments


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of samples and of outputs where there would be one."""
    monkeypatch.setattr(per_sample_cpu, "CHUNK_BYTES", 600)
    monkeypatch.setattr(per_sample_cpu, "CONVOLUTION_BYTES", 600)
    monkeypatch.setattr(per_sample_cpu, "LEAST_OUTPUTS", 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LINEAR_SIZES, ids=str)
def test_linear(sizes, dtype, poison, assert_accurate):
    tensors = per_sample_linear(*sizes, dtype, bias=sizes[0] % 2 == 1, layer_bias=sizes[2] != 17)
    check_all(merged(ops.hyper_linear), reference.hyper_linear, tensors, dtype, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, (2,), 20, 7, 4), (7, (9,), 12, 10, 5)], ids=str)
def test_linear_in_chunks(sizes, dtype, small_chunks, poison, assert_accurate):
    tensors = per_sample_linear(*sizes, dtype)
    check_all(merged(ops.hyper_linear), reference.hyper_linear, tensors, dtype, assert_accurate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, layout, dtype, poison, assert_accurate):
    tensors, sizes, options = per_sample_convolution(case, 7, dtype, layer_bias=case != "plain")
    check_convolution(tensors, sizes, options, layout, dtype, assert_accurate)


@pytest.mark.parametrize("case", ["pairs", "same, even", "groups", "1x1"])
def test_convolution_in_chunks(case, small_chunks, poison, assert_accurate):
    tensors, sizes, options = per_sample_convolution(case, 7, torch.float32)

    def ours(*tensors):
        return ops.hyper_conv2d(*tensors, *sizes, **options, path="merged")

    def expected(*tensors):
        return reference.hyper_conv2d(*tensors, *sizes, **options)

    check_all(ours, expected, tensors, torch.float32, assert_accurate)


def test_the_order_follows_the_operations():
    """One row a sample is never worth generating for; many rows with a large embedding always are."""
    for K in (1, 4, 16, 64, 512):
        assert per_sample_cpu.expands(1, K, LINEAR)
        assert not per_sample_cpu.expands(1, K, Geometry((3, 3)))
    assert not per_sample_cpu.expands(64, 16, LINEAR) and per_sample_cpu.expands(4096, 1, LINEAR)


@pytest.mark.parametrize(
    "sizes, kernel, path",
    [
        ((64, (), 64, 64, 16), None, "merged"),  # one row: outer products
        ((64, (16,), 64, 64, 16), None, "separate"),  # 1 MiB of weights
        ((64, (16,), 256, 256, 16), None, "merged"),  # 16 MiB
        ((8, (4, 4), 16, 16, 16), 3, "separate"),
        ((512, (3, 3), 64, 64, 4), 3, "merged"),  # 72 MiB
    ],
)
def test_auto_follows_the_rule(sizes, kernel, path, monkeypatch):
    samples, rows, inputs, outputs, K = sizes
    taken = []
    for name, way in (("forward_op", "merged"), ("expression", "separate")):
        monkeypatch.setattr(per_sample, name, lambda *t, way=way: taken.append(way) or t[0])
    weight, z = torch.empty(outputs * inputs * (kernel or 1) ** 2, K), torch.empty(samples, K)
    if kernel:
        ops.hyper_conv2d(torch.empty(samples, inputs, *rows), z, weight, None, None, kernel)
    else:
        ops.hyper_linear(torch.empty(samples, *rows, inputs), z, weight)
    assert taken == [path]


@pytest.mark.parametrize("sizes", [(6, (2,), 20, 7, 4), (7, (30,), 12, 10, 16)], ids=str)
def test_what_is_not_needed_is_not_made(sizes):
    """Every gradient alone is what it is among all."""
    tensors = per_sample_linear(*sizes)
    dy = torch.randn(*tensors[0].shape[:-1], sizes[3], dtype=torch.float64)
    _, *together = with_gradients(merged(ops.hyper_linear), tensors, dy)
    for i, wanted in enumerate(together):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(merged(ops.hyper_linear)(*leaves), leaves[i], dy)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(0, 6), (0, 4, 6), (3, 0, 6)])
def test_no_samples_or_rows(shape):
    tensors = per_sample_linear(shape[0], shape[1:-1], 6, 4, 3)
    dy = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    y, *gradients = with_gradients(merged(ops.hyper_linear), tensors, dy)
    assert y.shape == dy.shape
    assert gradients[0].shape == shape and not any(g.count_nonzero() for g in gradients)


def test_no_images():
    tensors, sizes, options = per_sample_convolution("groups", 3)
    tensors[:2] = tensors[0][:0], tensors[1][:0]
    dy = torch.randn(0, 6, 5, 5, dtype=torch.float64)
    y, *gradients = with_gradients(
        lambda *t: ops.hyper_conv2d(*t, *sizes, **options, path="merged"), tensors, dy
    )
    assert y.shape == dy.shape and [g.shape for g in gradients] == [t.shape for t in tensors]
    assert not any(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("rows", [1, 12])
def test_tensors_out_of_the_middle_of_others(rows, poison):
    big = torch.randn(90, 90, dtype=torch.float64)
    x = big[1 : 4 * rows + 1, 3:13:2].unflatten(0, (4, rows)).transpose(0, 1).contiguous().transpose(0, 1)
    weight, bias, z = big.t()[2:22, 5:12], big[:40:2, 7], big[9:21:3, 1:8]
    tensors = [x, z, weight, bias, big[:8:2, 3]]
    dy = big[: 4 * rows, 20:28:2].unflatten(0, (4, rows))
    got = with_gradients(merged(ops.hyper_linear), tensors, dy)
    wanted = with_gradients(reference.hyper_linear, [t.contiguous() for t in tensors], dy)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_images_out_of_the_middle_of_others(poison):
    tensors, sizes, options = per_sample_convolution("padded", 7)
    big = torch.randn(6, 20, 9, 7, dtype=torch.float64)
    for x in (big[::3, 2:12:2, 1:8:2, :4], big[::3, :5, 2:6, 3:].transpose(2, 3)):
        got = ops.hyper_conv2d(x, *tensors[1:], *sizes, **options, path="merged")
        torch.testing.assert_close(got, reference.hyper_conv2d(x, *tensors[1:], *sizes, **options))


@pytest.mark.parametrize("dtype, K", [(torch.float16, 5), (torch.float32, 513)])
def test_what_the_kernels_do_not_serve(dtype, K):
    tensors = per_sample_linear(3, (2,), 4, 5, K, dtype)
    dy = torch.randn(3, 2, 5)
    got = with_gradients(merged(ops.hyper_linear), tensors, dy)
    for a, b in zip(got, with_gradients(reference.hyper_linear, tensors, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-2)


def test_samples_do_not_touch_each_other():
    x, z, *rest = per_sample_linear(5, (), 21, 11, 16, torch.float32)
    x[2, 20], z[4, 3] = float("nan"), float("inf")
    y = ops.hyper_linear(x, z, *rest, path="merged")
    assert y[2].isnan().all() and not y[4].isfinite().any() and y[[0, 1, 3]].isfinite().all()


class TestTransforms:
    def small(self, kind):
        """(function of the tensors, tensors) in float64."""
        if kind == "linear":
            return merged(ops.hyper_linear), per_sample_linear(3, (), 5, 4, 3)
        if kind == "rows":
            return merged(ops.hyper_linear), per_sample_linear(2, (9,), 3, 2, 16)
        tensors, sizes, options = per_sample_convolution(kind, 2)
        return lambda *t: ops.hyper_conv2d(*t, *sizes, **options, path="merged"), tensors

    @pytest.mark.parametrize("kind", ["linear", "rows", "pairs", "groups", "same, even"])
    def test_gradcheck(self, kind):
        function, tensors = self.small(kind)
        tensors = [t.requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(function, tensors, fast_mode=kind != "linear")
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)

    @pytest.mark.parametrize("kind", ["linear", "pairs"])
    def test_func_grad(self, kind):
        function, tensors = self.small(kind)
        got = torch.func.grad(lambda *t: function(*t).pow(2).sum(), tuple(range(5)))(*tensors)
        leaves = [t.requires_grad_() for t in tensors]
        wanted = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("kind", ["linear", "pairs"])
    @pytest.mark.parametrize("in_dims", [(None, 0, None, None, None), (1, 0, 2, 1, 0)])
    def test_vmap(self, kind, in_dims):
        function, tensors = self.small(kind)
        tensors = [
            t if d is None else torch.stack([t, t.flip(0), t * 2]).movedim(0, d)
            for t, d in zip(tensors, in_dims, strict=True)
        ]
        rows = [
            [t if d is None else t.select(d, b) for t, d in zip(tensors, in_dims, strict=True)]
            for b in range(3)
        ]
        got = torch.func.vmap(function, in_dims)(*tensors)
        torch.testing.assert_close(got, torch.stack([function(*row) for row in rows]))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, requires_grad):
        tensors, _, _ = per_sample_convolution("groups", 3)
        geometry = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2).flat()
        op = torch.ops.hyperfast
        # no autograd formula of its own: the Function has it
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 2 if requires_grad else 3]
        tensors = [t.requires_grad_(requires_grad) for t in tensors]
        torch.library.opcheck(op.per_sample_conv2d, (*tensors, geometry), test_utils=tests)
        for x in (tensors[0], tensors[0].contiguous(memory_format=torch.channels_last)):
            dy = torch.randn(2, 6, 5, 5, dtype=torch.float64)
            for needed in ((True,) * 4, (True, False, False, False), (False, True, False, True)):
                args = dy, x, *tensors[1:4], geometry, *needed
                torch.library.opcheck(op.per_sample_conv2d_backward, args, test_utils=tests)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compile(self, requires_grad):
        torch._dynamo.reset()
        function, tensors = self.small("padded")
        tensors = [t.requires_grad_(requires_grad) for t in tensors]
        flat = per_sample_linear(2, (), 5, 4, 2)

        def f(*tensors):
            y = function(*tensors)
            return y.pow(2).sum() + ops.hyper_linear(tensors[0].mean((2, 3)), tensors[1], *flat[2:]).sum()

        got, wanted = torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors), f(*tensors)
        torch.testing.assert_close(got, wanted)
        if requires_grad:
            for a, b in zip(*(torch.autograd.grad(y, tensors) for y in (got, wanted)), strict=True):
                torch.testing.assert_close(a, b)

    def test_compile_for_any_number_of_samples(self):
        torch._dynamo.reset()
        _, _, *rest = per_sample_linear(1, (), 5, 4, 3)
        compiled = torch.compile(ops.hyper_linear, fullgraph=True, dynamic=True, backend="aot_eager")
        for samples in (2, 3, 7):
            x, z = (torch.randn(samples, n, dtype=torch.float64) for n in (5, 3))
            torch.testing.assert_close(compiled(x, z, *rest), reference.hyper_linear(x, z, *rest))

    @pytest.mark.parametrize("path", ["merged", "separate"])
    @pytest.mark.parametrize("rows", [(), (12,)])
    def test_autocast(self, rows, path):
        leaves = [t.requires_grad_() for t in per_sample_linear(3, rows, 5, 4, 16, torch.float32)]
        for x in (leaves[0], leaves[0].bfloat16()):
            with torch.autocast("cpu", torch.bfloat16):
                y = ops.hyper_linear(x, *leaves[1:], path=path)
            assert y.dtype == torch.bfloat16
            wanted = reference.hyper_linear(*leaves)
            assert (y - wanted).norm() <= 0.02 * wanted.norm()
            dy = torch.randn(wanted.shape)
            got = torch.autograd.grad(y, leaves, dy.bfloat16())
            for a, b in zip(got, torch.autograd.grad(wanted, leaves, dy), strict=True):
                assert a.dtype == torch.float32 and (a - b).norm() <= 0.02 * b.norm()

    def test_autocast_leaves_the_generation_in_float32(self):
        """Separately: what comes out is the layer of autocast with weights made in float32, bit for bit."""
        x, z, weight = torch.randn(3, 4, 5), torch.randn(3, 16), torch.randn(30, 16)
        w = (z @ weight.t()).view(3, 6, 5)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.hyper_linear(x, z, weight, path="separate")
            assert torch.equal(y, (w @ x.mT).mT)
        images, weight = torch.randn(3, 2, 6, 6), torch.randn(36, 16)
        w = (z @ weight.t()).view(6, 2, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.hyper_conv2d(images, z, weight, None, None, 3, path="separate")
            wanted = torch.nn.functional.conv2d(images.view(1, 6, 6, 6), w, groups=3)
        assert torch.equal(y, wanted.view(3, 2, 4, 4))


def broken(name=None):
    x, z, weight, bias, layer_bias = per_sample_linear(3, (), 5, 4, 2, dtype=torch.float32)
    good = dict(x=x, z=z, weight=weight, bias=bias, layer_bias=layer_bias)
    cases = {
        "x of other samples": ({"x": x[:2]}, ValueError, r"row for each.*got z \[3, 2\], x \[2, 5\]"),
        "x without samples": ({"x": x[0]}, ValueError, r"row for each.*got z \[3, 2\], x \[5\]"),
        "z wide": ({"z": torch.randn(3, 3)}, ValueError, r"z must be \[3, 2\].*got \[3, 3\]"),
        "z float64": ({"z": z.double()}, TypeError, "z must be torch.float32"),
        "z sparse": ({"z": z.to_sparse()}, TypeError, "z must be a dense tensor"),
        "z with three dimensions": ({"z": z[None]}, ValueError, r"z 0 must be \[2\].*got \[1, 3, 2\]"),
        "bias long": ({"bias": torch.randn(21)}, ValueError, r"bias 0 must be \[20\].*got \[21\]"),
        "factored": ({"factored": True}, ValueError, r"factored must be False for z \[3, 2\].*rank 3"),
        "path": ({"path": "fused"}, ValueError, "path must be one of auto, merged, separate, got 'fused'"),
    }
    if name is None:
        return list(cases)
    changes, error, message = cases[name]
    return good | changes, error, message


@pytest.mark.parametrize("path", ["merged", "separate"])
@pytest.mark.parametrize("case", broken())
def test_bad_input(case, path, monkeypatch):
    reached = lambda *args: pytest.fail("the op was reached")  # noqa: E731
    monkeypatch.setattr(per_sample, "forward_op", reached)
    monkeypatch.setattr(per_sample, "expression", reached)
    arguments, error, message = broken(case)
    with pytest.raises(error, match=message):
        ops.hyper_linear(**{"path": path} | arguments)
