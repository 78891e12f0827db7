"""generate_units: against the reference in float64, every tiling and layout, and the two-layer generator on
it."""

import contextlib
import math

import pytest
import torch

from hyperfast import ops, reference
from hyperfast.ops import generate_units
from hyperfast.ops.generate_units import product_first, two_layer

HA = [(16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]
# shapes, unit, D, rows of u in a unit. The CPU kernels' tiles have 64 rows and at most 64 columns; their runs
# are whole vectors where I times the kernel is a multiple of 16 (contiguous), or I is (channels_last).
CASES = {
    "has_units": (HA, (16, 16, 3, 3), 64, 1),
    "has_rows": (HA, (16, 16, 3, 3), 64, 16),
    "one_number": ([(1, 1)], (1, 1), 1, 1),
    "odd": ([(3, 10, 3, 2), (9, 5, 3, 2), (3, 5, 3, 2)], (3, 5, 3, 2), 17, 1),
    "odd_rows": ([(3, 10, 3, 2), (9, 5, 3, 2), (3, 5, 3, 2)], (3, 5, 3, 2), 4, 2),
    "rows_across_outputs": ([(6, 5, 3, 2), (3, 5, 3, 2)], (3, 5, 3, 2), 5, 5),
    "rows_inside_a_kernel": ([(6, 5, 3, 2), (3, 5, 3, 2)], (3, 5, 3, 2), 5, 45),
    "numbers": ([(6, 5, 3, 2)], (3, 5, 3, 2), 3, 90),
    "more_outputs_than_inputs": ([(16, 16, 2, 2), (8, 8, 2, 2)], (8, 4, 2, 2), 9, 4),
    "linear": ([(8, 12), (4, 6), (20, 6)], (4, 6), 7, 1),
    "conv1d": ([(4, 9, 5), (2, 3, 5)], (2, 3, 5), 16, 3),
    "conv3d": ([(4, 3, 2, 1, 3), (2, 6, 2, 1, 3)], (2, 3, 2, 1, 3), 2, 1),
    "block_less_one": ([(63, 1, 3, 3)], (1, 1, 3, 3), 15, 1),
    "block": ([(64, 1, 8, 8)], (1, 1, 8, 8), 16, 1),
    "block_and_one": ([(5, 13, 5, 13)], (1, 1, 5, 13), 65, 1),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def make(name: str, dtype: torch.dtype = torch.float64, with_bias: bool = True) -> tuple:
    """a, weight, bias, shapes, unit."""
    shapes, unit, D, rows = CASES[name]
    C = math.prod(unit) // rows
    P = sum(math.prod(shape) for shape in shapes) // C
    bias = torch.randn(C, dtype=torch.float64).to(dtype) if with_bias else None
    a, weight = (torch.randn(size, dtype=torch.float64).to(dtype) for size in ((P, D), (D, C)))
    return a, weight / D**0.5, bias, shapes, unit


def kernels(a, weight, bias, shapes, unit) -> list[torch.Tensor]:
    """Unit by unit, as the tiling is defined."""
    u = a @ weight if bias is None else a @ weight + bias
    units, made = iter(u.reshape(-1, *unit)), []
    for shape in shapes:
        rows = [
            torch.cat([next(units) for _ in range(shape[1] // unit[1])], 1)
            for _ in range(shape[0] // unit[0])
        ]
        made.append(torch.cat(rows))
    return made


def double(*tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def gradients(function, tensors, dws):
    """What `function` makes of the tensors, and its gradients of those that are not None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    made = function(*leaves)
    used = [(w, dw) for w, dw in zip(made, dws, strict=True) if dw is not None]
    wanted = [t for t in leaves if t is not None]
    with torch.autocast("cpu", enabled=False):  # as a backward after the autocast region
        return made, torch.autograd.grad([w for w, _ in used], wanted, [dw for _, dw in used])


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_tiling(name):
    case = make(name)
    for a, b in zip(reference.generate_units(*case), kernels(*case), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    dws = [torch.randn(shape, dtype=torch.float64) for shape in case[3]]
    _, expected = gradients(lambda *t: kernels(*t, *case[3:]), case[:3], dws)
    got = reference.generate_units_backward(dws, [], 0.0, *case[:2], *case[3:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "channels_last"),
    [(name, last) for name, case in CASES.items() for last in (False, True) if not last or len(case[1]) == 4],
)
def test_accurate(assert_accurate, poison, name, channels_last, dtype):
    *tensors, shapes, unit = make(name, dtype, with_bias=name != "odd_rows")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dws = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for shape in shapes]
    l2 = 0.25 if name in ("has_units", "odd") else 0.0

    def run(backend):
        def function(a, weight, bias):
            options = {"l2": l2, "channels_last": channels_last, "backend": backend}
            return generate_units(a, weight, bias, shapes, unit, **options)

        return function

    made, grads = gradients(run("auto"), tensors, dws)
    expected, expected_grads = gradients(run("reference"), double(*tensors), double(*dws))
    plain, plain_grads = gradients(run("reference"), tensors, dws)
    assert all(w.is_contiguous(memory_format=layout) for w in made)
    assert_accurate(made, expected, dtype, plain)
    for got, wanted, simple in zip(grads, expected_grads, plain_grads, strict=True):
        assert_accurate(got, wanted, dtype, simple)


@pytest.mark.parametrize(("D", "unit"), [(64, (16, 9)), (5, (3, 11))])
def test_many_rows(assert_accurate, D, unit):
    """More rows than a block of a sum has."""
    shapes = [(unit[0] * 1200, unit[1]), (unit[0], unit[1] * 37)]
    C = math.prod(unit)
    tensors = torch.randn(1237, D), torch.randn(D, C), torch.randn(C)
    dws = [torch.randn(shape) for shape in shapes]
    made, grads = gradients(lambda *t: generate_units(*t, shapes, unit), tensors, dws)
    expected, wanted = gradients(lambda *t: kernels(*t, shapes, unit), double(*tensors), double(*dws))
    assert_accurate(made, expected, torch.float32)
    for got, exact in zip(grads, wanted, strict=True):
        assert_accurate(got, exact, torch.float32)


LAYOUTS = {
    "contiguous": lambda i, dw: dw,
    "channels_last": lambda i, dw: dw.contiguous(memory_format=torch.channels_last),
    "mixed": lambda i, dw: dw.contiguous(memory_format=torch.channels_last) if i else dw,
    "slices": lambda i, dw: torch.stack([dw, dw], -1)[..., 0],
    "expanded": lambda i, dw: torch.randn((), dtype=dw.dtype).expand(dw.shape),
    "negated": lambda i, dw: torch.complex(dw, dw).conj().imag,
    "missing": lambda i, dw: None if i == 1 else dw,
}


@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_in_any_layout(layout, channels_last, l2):
    *tensors, shapes, unit = make("has_units")
    dws = [LAYOUTS[layout](i, torch.randn(shape, dtype=torch.float64)) for i, shape in enumerate(shapes)]
    if l2 and layout == "missing":  # autograd adds nothing for a layer that nobody used
        ws = ops.generate_units(*tensors, shapes, unit, channels_last=channels_last)
        flat = [n for shape in shapes for n in shape]
        got = torch.ops.hyperfast.generate_units_backward(
            dws, ws, l2, *tensors[:2], flat, list(unit), True, True, True
        )
        zero = [torch.zeros_like(w) if dw is None else dw for w, dw in zip(ws, dws, strict=True)]
        wanted = reference.generate_units_backward(zero, ws, l2, *tensors[:2], shapes, unit)
    else:
        options = {"l2": l2, "channels_last": channels_last}
        _, got = gradients(lambda *t: generate_units(*t, shapes, unit, **options), tensors, dws)
        options["backend"] = "reference"
        _, wanted = gradients(lambda *t: generate_units(*t, shapes, unit, **options), tensors, dws)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["has_units", "odd_rows"])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_what_needs_a_gradient(name, needed):
    *tensors, shapes, unit = make(name)
    tensors = [t.requires_grad_(i in needed) for i, t in enumerate(tensors)]
    loss = sum(w.square().sum() for w in generate_units(*tensors, shapes, unit))
    wanted = sum(w.square().sum() for w in kernels(*tensors, shapes, unit))
    leaves = [tensors[i] for i in needed]
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_with_any_number_of_threads():
    *tensors, shapes, unit = make("has_units", torch.float32)
    dws = [torch.randn(shape) for shape in shapes]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made, grads = gradients(lambda *t: generate_units(*t, shapes, unit, l2=0.1), tensors, dws)
            results.append([*made, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs():
    a, weight, bias, shapes, unit = make("odd")
    strided = a.t().contiguous().t(), *(torch.stack([t, t], -1)[..., 1] for t in (weight, bias))
    for w, expected in zip(
        generate_units(*strided, shapes, unit), kernels(a, weight, bias, shapes, unit), strict=True
    ):
        torch.testing.assert_close(w, expected)


def test_no_layers_and_nothing_to_sum():
    assert generate_units(torch.ones(0, 3), torch.ones(3, 4), None, [], (2, 2)) == ()
    a, weight = torch.ones(2, 0, requires_grad=True), torch.ones(0, 4)
    (w,) = generate_units(a, weight, torch.arange(4.0), [(2, 4)], (2, 2))
    assert w.tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]]
    assert torch.autograd.grad(w.sum(), a)[0].shape == (2, 0)


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("name", ["odd", "odd_rows", "conv1d"])
def test_gradcheck(name, l2):
    *tensors, shapes, unit = make(name)
    tensors = [t.requires_grad_() for t in tensors]

    def function(*t):
        return generate_units(*t, shapes, unit, channels_last=name == "odd")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    got = torch.autograd.grad(generate_units(*tensors, shapes, unit, l2=l2)[0].sum(), tensors)
    (used, *_) = kernels(*tensors, shapes, unit)
    penalty = sum(w.square().sum() for w in kernels(*tensors, shapes, unit)) * l2 / 2
    for a, b in zip(got, torch.autograd.grad(used.sum() + penalty, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("channels_last", "l2", "dtype"), [(False, 0.0, torch.bfloat16), (True, 0.3, None)])
def test_opcheck(channels_last, l2, dtype):
    a, weight, bias, shapes, unit = make("odd", torch.float32)
    forward, backward = torch.ops.hyperfast.generate_units, torch.ops.hyperfast.generate_units_backward
    flat = [n for shape in shapes for n in shape]
    given = a, weight, bias, flat, list(unit), channels_last, dtype
    torch.library.opcheck(forward.default, given)
    ws = forward(*given)
    dws = [None, *(torch.randn_like(w) for w in ws[1:])]
    needed = not l2, True, not l2
    given = dws, ws if l2 else [], l2, a, weight, flat, list(unit), *needed
    torch.library.opcheck(backward.default, given)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast):
    *tensors, shapes, unit = make("odd", torch.float32)

    def function(*t):
        return generate_units(*t, shapes, unit, l2=0.1, channels_last=True)

    dws = [torch.randn(shape).to(torch.bfloat16 if autocast else torch.float32) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        made, grads = gradients(compiled, tensors, dws)
        expected, wanted = gradients(function, tensors, dws)
    for a, b in zip([*made, *grads], [*expected, *wanted], strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b)


def test_the_same_tensor_twice_compiled():
    a = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(
        lambda a: generate_units(a, a, None, [(8, 2)], (2, 2)), fullgraph=True, backend="aot_eager"
    )
    (got,) = torch.autograd.grad(compiled(a)[0].square().sum(), a)
    (wanted,) = torch.autograd.grad((a @ a).square().sum(), a)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["has_units", "odd"])
def test_autocast(assert_accurate, name, channels_last):
    """Products in float32, layers in bfloat16, and gradients from layers' gradients in bfloat16."""
    *tensors, shapes, unit = make(name, torch.float32)
    dws = [torch.randn(shape).bfloat16() for shape in shapes]
    options = {"l2": 0.5, "channels_last": channels_last}
    with torch.autocast("cpu", torch.bfloat16):
        made, grads = gradients(lambda *t: generate_units(*t, shapes, unit, **options), tensors, dws)
    exact = kernels(*double(*tensors), shapes, unit)
    assert_accurate(made, exact, torch.bfloat16, [w.bfloat16() for w in exact])
    given = double(*dws), double(*made), 0.5, *double(*tensors[:2]), shapes, unit
    for got, wanted in zip(grads, reference.generate_units_backward(*given), strict=True):
        assert_accurate(got, wanted, torch.float32)


def test_half_precision_runs_the_reference():
    *tensors, shapes, unit = make("odd", torch.float16)
    dws = [torch.randn(shape).half() for shape in shapes]
    made, grads = gradients(lambda *t: generate_units(*t, shapes, unit), tensors, dws)
    expected, wanted = gradients(lambda *t: reference.generate_units(*t, shapes, unit), tensors, dws)
    for a, b in zip([*made, *grads], [*expected, *wanted], strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_functorch():
    a, weight, bias, shapes, unit = make("odd_rows")
    batch = torch.stack([a, 2 * a, -a])

    def function(a, weight, bias):
        return sum(w.square().sum() for w in generate_units(a, weight, bias, shapes, unit, l2=0.2))

    wanted = [torch.func.grad(function, (0, 1, 2))(one, weight, bias) for one in batch]
    for in_dims, inputs in (((0, None, None), (batch, weight, bias)), ((0, 0, 0), (batch, *(
        t.expand(3, *t.shape) for t in (weight, bias)))) ):  # fmt: skip
        made = torch.vmap(lambda *t: generate_units(*t, shapes, unit), in_dims)(*inputs)
        for i, one in enumerate(batch):
            for w, expected in zip(made, kernels(one, weight, bias, shapes, unit), strict=True):
                torch.testing.assert_close(w[i], expected)
        got = torch.vmap(torch.func.grad(function, (0, 1, 2)), in_dims)(*inputs)
        for j in range(3):
            torch.testing.assert_close(got[j], torch.stack([g[j] for g in wanted]))


def test_outputs_alias_nothing():
    *tensors, shapes, unit = make("linear")
    for backend in ("auto", "reference"):
        made = generate_units(*tensors, shapes, unit, backend=backend)
        assert len({w.untyped_storage().data_ptr() for w in made}) == len(made)


def bad(**changes) -> dict:
    given = {"a": torch.ones(8, 3), "weight": torch.ones(3, 4), "bias": torch.ones(4), "shapes": [(4, 8)]}
    return given | {"unit": (2, 2)} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.ones(8)}, ValueError, r"a must be \[P, D\], got \[8\]"),
        ({"a": 3}, TypeError, "a must be a tensor, got int"),
        ({"a": torch.ones(8, 3).to_sparse()}, TypeError, "a must be a dense tensor"),
        (
            {"a": torch.ones(8, 3, dtype=torch.int64)},
            TypeError,
            "a must be floating point .*, got torch.int64",
        ),
        ({"weight": torch.ones(4, 4)}, ValueError, r"weight must be \[3, C\] for a .* got \[4, 4\]"),
        ({"weight": torch.ones(3, 4).double()}, TypeError, "weight must be torch.float32 like a"),
        ({"weight": torch.ones(3, 4, device="meta")}, ValueError, "weight must be on cpu like a, got meta"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[4\]"),
        ({"bias": torch.ones(4).double()}, TypeError, "bias must be torch.float32"),
        ({"unit": (4,)}, ValueError, r"unit must be \(O, I, \*kernel\)"),
        ({"unit": (2, 0)}, ValueError, r"unit must be \(O, I, \*kernel\), each at least 1"),
        ({"shapes": [(4, 7)]}, ValueError, r"shape 0 must be \(m 2, n 2.* got \(4, 7\)"),
        ({"shapes": [(4, 8), (2, 2, 1)]}, ValueError, r"shape 1 must be .* got \(2, 2, 1\)"),
        ({"shapes": [(4, 8), (2, 2)]}, ValueError, r"P C = 36 for 9 units .* got \[8, 4\]"),
        ({"shapes": []}, ValueError, "for 0 units"),
        ({"weight": torch.ones(3, 3), "bias": None}, ValueError, "C a divisor of 4"),
        ({"channels_last": True}, ValueError, "channels_last is for units of four dimensions"),
        ({"l2": -1.0}, ValueError, "l2 must be at least 0 and finite, got -1.0"),
        ({"l2": math.nan}, ValueError, "l2 must be at least 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(changes, error, message):
    assert len(generate_units(**bad())) == 1
    with pytest.raises(error, match=message):
        generate_units(**bad(**changes))


# ---- the two-layer generator


@pytest.mark.parametrize("E", [2, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_two_layer_in_either_order(E, autocast):
    K, D, unit = 2, 7, (4, 2, 3)
    R, C = 2, 12
    dtype = torch.float32 if autocast else torch.float64
    sizes = (E, K), (K, R * D), (R * D,), (D, C), (C,)
    tensors = [torch.randn(size, dtype=dtype) for size in sizes]
    shapes = [(4 * (E - 1), 2, 3), (4, 2, 3)]
    assert product_first(E, K, D, C) == (E == 40)

    def unit_by_unit(z, w2, b2, w1, b1):
        a = (z @ w2 + b2).view(-1, D)
        return kernels(a, w1, b1, shapes, unit)

    dws = [torch.randn(shape, dtype=dtype) for shape in shapes]
    low = [dw.bfloat16() for dw in dws] if autocast else dws
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        made, grads = gradients(lambda *t: two_layer(*t, shapes, unit), tensors, low)
    expected, wanted = gradients(unit_by_unit, tensors, [dw.to(dtype) for dw in low])
    assert all(w.dtype == (torch.bfloat16 if autocast else dtype) for w in made)
    for a, b in zip([*made, *grads], [*expected, *wanted], strict=True):
        torch.testing.assert_close(a.to(dtype), b, **({"rtol": 1e-2, "atol": 1e-2} if autocast else {}))


def test_product_first_has_fewer_multiplications():
    for E in (1, 10, 100, 1000):
        for K, D, C in ((4, 4, 784), (64, 64, 144), (64, 8, 9)):
            one_by_one, first = E * K * D + E * D * C, K * D * C + E * K * C  # times R
            assert product_first(E, K, D, C) == (first < one_by_one)
