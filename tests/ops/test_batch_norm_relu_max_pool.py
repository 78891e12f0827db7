"""batch_norm_relu_max_pool: values, gradients, ties and NaN as torch has them, transforms, bad input."""

import pytest
import torch
import torch.nn.functional as F

from hyperfast import ops, reference
from hyperfast.ops._library import _cpu

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# B, C, H, W: channels around the widths of vectors, windows that leave a row or column, several tiles, rows
# of several panels
SHAPES = [
    (2, 1, 2, 2),
    (3, 2, 5, 4),
    (1, 3, 4, 7),
    (2, 15, 3, 3),
    (5, 16, 6, 2),
    (2, 17, 9, 19),
    (1, 33, 2, 31),
    (3, 64, 17, 16),
    (2, 100, 12, 11),
    (9, 513, 5, 3),
    (2, 24, 3, 150),
]


def channels_last(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


def problem(shape, dtype, pool=2, mean=0.3):
    """x, running_mean, running_var, weight, bias and dy; the [C] ones float32 where x is bfloat16."""
    B, C, H, W = shape
    x = (channels_last(*shape, dtype=torch.float32) + mean).to(dtype)
    small = dtype if dtype == torch.float64 else torch.float32
    parameters = [torch.randn(C).to(small) for _ in range(4)]
    parameters[1] = parameters[1].abs() + 0.5  # running_var
    return x, *parameters, channels_last(B, C, H // pool, W // pool, dtype=torch.float32).to(dtype)


def in_double(tensors):
    return [t.double() for t in tensors]


def results(function, x, running_mean, running_var, weight, bias, dy, training, pool):
    """y, running statistics, dx, dweight, dbias."""
    running_mean, running_var = running_mean.clone(), running_var.clone()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], running_mean, running_var, *leaves[1:], training, 0.3, 1e-3, pool)
    return [y.detach(), running_mean, running_var, *torch.autograd.grad(y, leaves, dy)]


def every_result(dtype):
    """Of all shapes and options, from seeded inputs: for `tests/test_isa.py`."""
    torch.manual_seed(5)
    made = []
    for shape in SHAPES:
        for pool in (1, 2):
            for training in (True, False):
                inputs = problem(shape, dtype, pool)
                made.append(results(ops.batch_norm_relu_max_pool, *inputs, training, pool))
    return made


@pytest.fixture
def no_native(monkeypatch):
    """Fails a test in which a kernel is reached."""

    def reached(*args):
        pytest.fail("native code was reached")

    for name in ("batch_norm", "batch_norm_backward"):
        monkeypatch.setattr(_cpu, name, reached)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, pool, training, poison, assert_accurate):
    made, expected, plain = [], [], []
    for shape in SHAPES:
        inputs = problem(shape, dtype, pool)
        made.append(results(ops.batch_norm_relu_max_pool, *inputs, training, pool))
        expected.append(results(reference.batch_norm_relu_max_pool, *in_double(inputs), training, pool))
        plain.append(results(reference.batch_norm_relu_max_pool, *inputs, training, pool))
        y, *_, dx, _, _ = made[-1]
        assert y.is_contiguous(memory_format=torch.channels_last) and dx.stride() == inputs[0].stride()
    for got, wanted, simple in zip(
        *(zip(*columns, strict=True) for columns in (made, expected, plain)), strict=True
    ):
        # of bfloat16 images, statistics and parameter gradients are float32
        assert_accurate(got, wanted, got[0].dtype, simple)


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_and_count(dtype, momentum):
    """They move as torch's do, in the dtype they are kept in; what was saved of them is seen to change."""
    x = (channels_last(4, 19, 6, 5) + 0.3).to(dtype)
    for kept in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
        before = torch.randn(19).to(kept), torch.rand(19).to(kept)
        (mean, var), count = [t.clone() for t in before], torch.tensor(6)
        options = {"training": True, "momentum": momentum, "pool": 1, "num_batches_tracked": count}
        ops.batch_norm_relu_max_pool(x, mean, var, **options)
        batch = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
        bounds = {"rtol": 1e-2, "atol": 1e-2} if kept == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        for got, old, new in zip((mean, var), before, batch, strict=True):
            torch.testing.assert_close(got.double(), torch.lerp(old.double(), new, momentum), **bounds)
            assert got._version == 1
        assert count.item() == 7 and count._version == 1


@pytest.mark.parametrize("pool", [1, 2])
def test_a_mean_much_larger_than_the_deviation(pool, assert_accurate):
    inputs = problem((8, 20, 33, 32), torch.float32, pool, mean=1e3)
    got = results(ops.batch_norm_relu_max_pool, *inputs, True, pool)
    expected = results(reference.batch_norm_relu_max_pool, *in_double(inputs), True, pool)
    for actual, wanted in zip(got, expected, strict=True):
        assert_accurate(actual, wanted, torch.float32)


def test_a_first_pixel_far_from_the_others(assert_accurate):
    """It is what the sums of its tile are shifted by."""
    inputs = problem((4, 16, 32, 32), torch.float32)
    inputs[0][0, :, 0, 0] = 300.0
    got = results(ops.batch_norm_relu_max_pool, *inputs, True, 2)
    expected = results(reference.batch_norm_relu_max_pool, *in_double(inputs), True, 2)
    for actual, wanted in zip(got, expected, strict=True):
        assert_accurate(actual, wanted, torch.float32)


def as_written(x, running_mean, running_var, weight, bias, training, momentum, eps, pool):
    """ReLU before the pool, as most write it."""
    y = F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))
    return F.max_pool2d(y, pool)


@pytest.mark.parametrize("function", [as_written, reference.batch_norm_relu_max_pool])
@pytest.mark.parametrize("training", [True, False])
def test_ties_go_to_the_first(training, function):
    x, running_mean, running_var, weight, bias, dy = problem((6, 19, 11, 8), torch.float64)
    x = torch.randint(3, x.shape).double().to(memory_format=torch.channels_last)
    weight[:4] = torch.tensor([0.0, -0.0, -1.0, 0.0])
    bias[:4] = torch.tensor([1.0, 0.0, 0.5, -1.0])
    inputs = (x, running_mean, running_var, weight, bias, dy)
    got = results(ops.batch_norm_relu_max_pool, *inputs, training, 2)
    for actual, wanted in zip(got, results(function, *inputs, training, 2), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_and_infinity(dtype, pool):
    """Given statistics keep them where they are: the same pixels win, NaN outputs pass their gradient on."""
    inputs = problem((4, 21, 8, 6), dtype, pool)
    for value in (float("nan"), float("inf"), -float("inf")):
        inputs[0][torch.rand(inputs[0].shape) < 0.15] = value
    got = results(ops.batch_norm_relu_max_pool, *inputs, False, pool)
    wanted = results(as_written, *inputs, False, pool)
    assert got[0].isnan().any() and got[0].isinf().any()
    for a, b in zip(got[:4], wanted[:4], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_nan_in_training_stays_in_its_channel():
    x, _, _, weight, bias, _ = problem((2, 18, 5, 5), torch.float32)
    x[1, 3, 2, 2] = float("nan")
    y = ops.batch_norm_relu_max_pool(x, None, None, weight, bias, True)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_independent_of_the_thread_count(dtype):
    inputs = problem((7, 70, 33, 31), dtype)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(results(ops.batch_norm_relu_max_pool, *inputs, True, 2))
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2)])
def test_only_the_gradients_that_are_needed(needed):
    inputs = problem((2, 9, 6, 5), torch.float64)
    expected = results(reference.batch_norm_relu_max_pool, *inputs, True, 2)[3:]
    leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate((inputs[0], inputs[3], inputs[4]))]
    y = ops.batch_norm_relu_max_pool(leaves[0], None, None, *leaves[1:], True, 0.3, 1e-3)
    y.backward(inputs[5])
    for i, leaf in enumerate(leaves):
        if i in needed:
            torch.testing.assert_close(leaf.grad, expected[i])
        else:
            assert leaf.grad is None


def test_without_parameters_and_statistics():
    x = channels_last(2, 5, 6, 6).requires_grad_()
    y = ops.batch_norm_relu_max_pool(x, None, None, training=True)
    wanted = reference.batch_norm_relu_max_pool(x, None, None, training=True)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy))


def test_gradients_that_are_not_contiguous():
    x = channels_last(3, 5, 8, 6).requires_grad_()
    for dy in (torch.randn(3, 5, 4, 3).double(), torch.randn(5, 1, 1).double().expand(3, 5, 4, 3)):
        got = torch.autograd.grad(ops.batch_norm_relu_max_pool(x, None, None, training=True), x, dy)
        wanted = torch.autograd.grad(reference.batch_norm_relu_max_pool(x, None, None, training=True), x, dy)
        torch.testing.assert_close(got, wanted)


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 5, 6, 4).double(),
    "part of channels_last": lambda: channels_last(2, 9, 7, 8)[:, 2:7, 1:],
    "transposed": lambda: torch.randn(4, 6, 5, 2).double().permute(3, 2, 1, 0),
    "expanded": lambda: torch.randn(1, 5, 6, 4).double().expand(2, 5, 6, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout]().requires_grad_()
    got = ops.batch_norm_relu_max_pool(x, None, None, training=True)
    wanted = reference.batch_norm_relu_max_pool(x, None, None, training=True)
    torch.testing.assert_close(got, wanted)
    last = layout == "part of channels_last"
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    dy = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, dy), torch.autograd.grad(wanted, x, dy))


@pytest.mark.parametrize("case", ["float16", "pool 3", "empty", "backend"])
def test_what_the_kernels_do_not_serve(case, no_native):
    x = channels_last(0 if case == "empty" else 2, 3, 7, 7, dtype=torch.float32)
    pool, backend = 3 if case == "pool 3" else 2, "reference" if case == "backend" else "auto"
    x = x.half() if case == "float16" else x
    running = [torch.zeros(3), torch.ones(3)]
    y = ops.batch_norm_relu_max_pool(x, *running, pool=pool, backend=backend)
    assert torch.equal(y, reference.batch_norm_relu_max_pool(x, *running, pool=pool))
    assert y.dtype == x.dtype


def with_residual(function, x, running_mean, running_var, weight, bias, dy, training, pool, residual):
    """As `results`, and the gradient of the residual."""
    running = running_mean.clone(), running_var.clone()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    options = training, 0.3, 1e-3, pool
    y = function(leaves[0], *running, *leaves[1:3], *options, residual=leaves[3])
    return [y.detach(), *running, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype, training, poison, assert_accurate):
    made, expected, plain = [], [], []
    for shape in [*SHAPES, (8, 16, 96, 97)]:  # the last one's dx is streamed
        inputs = *problem(shape, dtype, 1), training, 1
        residual = channels_last(*shape, dtype=torch.float32).to(dtype)
        doubles = *in_double(inputs[:6]), training, 1, residual.double()
        made.append(with_residual(ops.batch_norm_relu_max_pool, *inputs, residual))
        expected.append(with_residual(reference.batch_norm_relu_max_pool, *doubles))
        plain.append(with_residual(reference.batch_norm_relu_max_pool, *inputs, residual))
    for got, wanted, simple in zip(
        *(zip(*columns, strict=True) for columns in (made, expected, plain)), strict=True
    ):
        assert_accurate(got, wanted, got[0].dtype, simple)


def test_residual_before_a_pool_has_no_kernel(no_native):
    inputs = *problem((3, 5, 6, 8), torch.float32), True, 2, channels_last(3, 5, 6, 8, dtype=torch.float32)
    got, wanted = (
        with_residual(f, *inputs) for f in (ops.batch_norm_relu_max_pool, reference.batch_norm_relu_max_pool)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_residual_in_other_layouts_and_alone():
    """A residual that is not channels_last; its gradient without that of x; without any gradient."""
    x, mean, var, weight, bias, dy = problem((3, 5, 4, 7), torch.float64, 1)
    residual = torch.randn(5, 3, 4, 7).double().transpose(0, 1)
    wanted = reference.batch_norm_relu_max_pool(x, mean, var, weight, bias, pool=1, residual=residual)
    got = ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, pool=1, residual=residual)
    torch.testing.assert_close(got, wanted)
    leaf = residual.clone().requires_grad_()
    y = ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, pool=1, residual=leaf)
    (dresidual,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(dresidual, torch.where(wanted > 0, dy, 0))
    x.requires_grad_()
    y = ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, pool=1, residual=x)  # the same tensor twice
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(F.relu(F.batch_norm(x, mean, var, weight, bias) + x), x, dy),
    )


@pytest.mark.parametrize(
    "residual, error, message",
    [
        ([1.0], TypeError, "residual must be a tensor, got list"),
        (
            torch.zeros(2, 3, 4, 1),
            ValueError,
            r"residual must be \[2, 3, 4, 4\] like x, got shape \[2, 3, 4, 1\]",
        ),
        (
            torch.zeros(2, 3, 4, 4).double(),
            TypeError,
            "residual must be torch.float32 like x, got torch.float64",
        ),
        (torch.zeros(2, 3, 4, 4, device="meta"), ValueError, "residual must be on cpu like x, got meta"),
    ],
    ids=["list", "shape", "dtype", "device"],
)
def test_bad_residuals(residual, error, message, no_native):
    x, mean, var, *_ = problem((2, 3, 4, 4), torch.float32)
    with pytest.raises(error, match=message):
        ops.batch_norm_relu_max_pool(x, mean, var, pool=1, residual=residual)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_residual_of_another_dtype_under_autocast(dtypes, backend):
    x, mean, var, weight, bias, *_ = problem((2, 3, 4, 4), torch.float32)
    x, residual = x.to(dtypes[0]), torch.randn(2, 3, 4, 4).to(dtypes[1]).requires_grad_()
    options = {"pool": 1, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, residual=residual, **options)
        with pytest.raises(TypeError, match="residual must be torch.* like x, got torch.float64"):
            ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, residual=residual.double(), **options)
    alike = residual.detach().to(x.dtype)
    wanted = ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, residual=alike, **options)
    assert y.dtype == x.dtype and torch.equal(y, wanted)
    (dresidual,) = torch.autograd.grad(y.float().sum(), residual)
    assert torch.equal(dresidual, (wanted > 0).to(residual.dtype))
    with pytest.raises(TypeError, match="residual must be torch.* like x"):
        ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, residual=residual, **options)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_a_residual(training):
    running = [torch.randn(3).double(), torch.rand(3).double() + 0.5]

    def f(x, weight, bias, residual):
        copies = [t.clone() for t in running]
        return ops.batch_norm_relu_max_pool(x, *copies, weight, bias, training, pool=1, residual=residual)

    images = [channels_last(2, 3, 5, 4) for _ in range(2)]
    inputs = [images[0], torch.randn(3).double(), torch.randn(3).double(), images[1]]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_gradcheck(pool, training):
    running = [torch.randn(3).double(), torch.rand(3).double() + 0.5]

    def f(x, weight, bias):
        copies = [t.clone() for t in running]
        return ops.batch_norm_relu_max_pool(x, *copies, weight, bias, training, pool=pool)

    inputs = [channels_last(2, 3, 5, 4), torch.randn(3).double(), torch.randn(3).double()]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def run_op(x, weight, bias, given=(None, None), pool=2, eps=1e-5, updated=(None, None, None)):
    """y, index and statistics."""
    op = torch.ops.hyperfast.batch_norm_relu_max_pool
    return op(x, weight, bias, *given, *updated, 0.3, eps, pool, True)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, pool, given):
    x, mean, var, weight, bias, dy = problem((2, 6, 5, 4), dtype, pool)
    statistics = (mean, var, *[None] * 3) if given else (None, None, mean, var, torch.tensor(3))
    forward = torch.ops.hyperfast.batch_norm_relu_max_pool
    for with_index in (True, False):
        torch.library.opcheck(forward, (x, weight, bias, *statistics, 0.3, 1e-5, pool, with_index))
    _, index, made = run_op(x, weight, None, statistics[:2], pool)
    backward = torch.ops.hyperfast.batch_norm_relu_max_pool_backward
    for with_dx in (True, False):
        torch.library.opcheck(backward, (dy, x, index, weight, made, given, 1e-5, pool, with_dx))
    if pool == 1:
        residual = torch.randn_like(x)
        torch.library.opcheck(forward, (x, weight, bias, *statistics, 0.3, 1e-5, pool, True, residual))
        torch.library.opcheck(backward, (dy, x, index, weight, made, given, 1e-5, pool, True, True))


def test_autograd_sees_that_running_statistics_change():
    x, mean, var, weight, bias, _ = problem((2, 6, 5, 4), torch.float32)
    leaf, count = torch.ones(6, requires_grad=True), torch.tensor(2)
    product = (leaf * mean).sum()
    ops.batch_norm_relu_max_pool(x, mean, var, weight, bias, True, num_batches_tracked=count)
    assert count == 3 and count._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_reference_backward_is_the_gradient_of_the_reference():
    x, mean, var, weight, bias, dy = problem((3, 4, 5, 7), torch.float64)
    for statistics in (None, torch.stack((mean, var))):
        given = (None, None) if statistics is None else statistics
        _, index, _ = run_op(x, weight, bias, given, eps=1e-3)
        got = reference.batch_norm_relu_max_pool_backward(dy, x, index, weight, statistics, 1e-3, 2)
        training = statistics is None
        expected = results(reference.batch_norm_relu_max_pool, x, mean, var, weight, bias, dy, training, 2)[
            3:
        ]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_transforms_run_the_reference():
    x, weight = torch.randn(3, 2, 4, 6, 6).double(), torch.randn(4).double()

    def loss(x, weight):
        return ops.batch_norm_relu_max_pool(x, None, None, weight, training=True).pow(3).sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, weight)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_(), weight.clone().requires_grad_()]
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(t[i] for t in got), wanted)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, fresh_compiler):
    inputs = problem((3, 6, 7, 8), torch.float64)
    compiled = torch.compile(ops.batch_norm_relu_max_pool, fullgraph=True, backend=backend, dynamic=False)
    for training in (True, False):
        alone = *inputs[:5], channels_last(3, 6, 7, 8), training, 1, channels_last(3, 6, 7, 8)
        got = results(compiled, *inputs, training, 2) + with_residual(compiled, *alone)
        wanted = results(ops.batch_norm_relu_max_pool, *inputs, training, 2)
        wanted += with_residual(ops.batch_norm_relu_max_pool, *alone)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(*inputs[:5], False), ops.batch_norm_relu_max_pool(*inputs[:5])
            )


def test_compile_with_a_dynamic_batch(fresh_compiler):
    compiled = torch.compile(
        lambda x: ops.batch_norm_relu_max_pool(x, None, None, training=True),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for rows in (2, 3, 5):
        x = channels_last(rows, 3, 6, 6)
        torch.testing.assert_close(compiled(x), ops.batch_norm_relu_max_pool(x, None, None, training=True))


def broken(name):
    """Arguments of one bad call, the error and its message; None: the names of all cases."""
    x, mean, var, weight, bias, _ = problem((2, 3, 4, 5), torch.float32)
    cases = {
        "x 3-D": ((x[0], mean, var), ValueError, r"x must be \[B, C, H, W\], got shape \[3, 4, 5\]"),
        "x int": ((x.int(), mean, var), TypeError, "x must be floating point .* got torch.int32"),
        "x list": (([1.0], mean, var), TypeError, "x must be a tensor, got list"),
        "x small": ((x[:, :, :1], mean, var), ValueError, r"at least 2 x 2 .* got shape \[2, 3, 1, 5\]"),
        "weight": ((x, mean, var, weight[:2]), ValueError, r"weight must be \[3\] for x of .*, got \[2\]"),
        "bias": ((x, mean, var, weight, bias.double()), TypeError, "bias must be torch.float32 .*float64"),
        "bias list": ((x, mean, var, weight, [0.0] * 3), TypeError, "bias must be a tensor, got list"),
        "mean": ((x, mean[None], var), ValueError, r"running_mean must be \[3\].*got \[1, 3\]"),
        "device": ((x, mean.to("meta"), var), ValueError, "running_mean must be on cpu like x, got meta"),
        "one of two": ((x, mean, None), ValueError, "must both be tensors or both None"),
        "none": ((x, None, None), ValueError, "must be tensors unless training"),
        "one value": ((x[:1, :, :1, :1], *[None] * 4, True, 0.1, 1e-5, 1), ValueError, "more than one value"),
        "pool": ((x, mean, var, *[None] * 2, False, 0.1, 1e-5, 0), ValueError, "pool must be .* got 0"),
        "pool 2.0": ((x, mean, var, *[None] * 2, False, 0.1, 1e-5, 2.0), ValueError, "pool must be .* 2.0"),
    }  # fmt: skip
    return cases[name] if name else list(cases)


@pytest.mark.parametrize("case", broken(None))
def test_bad_input(case, no_native):
    arguments, error, message = broken(case)
    with pytest.raises(error, match=message):
        ops.batch_norm_relu_max_pool(*arguments)
    with pytest.raises(error, match=message):
        ops.batch_norm_relu_max_pool(*arguments, num_batches_tracked=torch.tensor(0))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, got 'gpu'"):
        ops.batch_norm_relu_max_pool(*arguments, backend="gpu")


@pytest.mark.parametrize(
    "count, error, message",
    [
        (3, TypeError, "num_batches_tracked must be a tensor, got int"),
        (torch.tensor(0.0), TypeError, "num_batches_tracked must be torch.int64, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"num_batches_tracked must be \[\], got \[3\]"),
        (torch.tensor(0, device="meta"), ValueError, "num_batches_tracked must be on cpu like x, got meta"),
    ],
    ids=["int", "dtype", "shape", "device"],
)
def test_bad_counts(count, error, message, no_native):
    x, mean, var, *_ = problem((2, 3, 4, 4), torch.float32)
    with pytest.raises(error, match=message):
        ops.batch_norm_relu_max_pool(x, mean, var, training=True, num_batches_tracked=count)
