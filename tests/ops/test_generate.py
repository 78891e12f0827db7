"""generate: values, gradients, transforms, bad input."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperfast
from hyperfast import ops, reference
from hyperfast.ops._library import _cpu
from hyperfast.ops.next_weights import is_current, record

KS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 511, 512]
NS = [0, 1, 2, 3, 63]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
L = 3  # layers in the small problems


def rows_around_blocks(K: int) -> list[int]:
    """N around what one block and what one thread's share of blocks hold (csrc/cpu/kernels.h)."""
    rows = max(1, min(1024, 16384 // K))
    return [rows - 1, rows, rows + 1, 8 * rows + 1]


def generators(sizes, dtype, bias=lambda i: True):
    weights = [torch.randn(n, k).to(dtype) for n, k in sizes]
    biases = [torch.randn(n).to(dtype) if bias(i) else None for i, (n, _) in enumerate(sizes)]
    return weights, biases, [torch.randn(k).to(dtype) for _, k in sizes]


def in_double(tensors):
    return [None if t is None else t.double() for t in tensors]


def small(dtype=torch.float64, requires_grad=True):
    """Three layers of different N and K, one without bias."""
    columns = generators([(5, 3), (2, 4), (7, 1)], dtype, bias=lambda i: i != 1)
    for t in (t for column in columns for t in column if t is not None):
        t.requires_grad_(requires_grad)
    return columns


def flat(columns):
    return [t for column in columns for t in column if t is not None]


def unflat(tensors):
    w0, w1, w2, b0, b2, *zs = tensors
    return [w0, w1, w2], [b0, None, b2], zs


@pytest.fixture
def no_native(monkeypatch):
    """Fails a test in which a kernel is reached."""

    def reached(*args):
        pytest.fail("native code was reached")

    for name in ("generate", "generate_backward", "update_generate"):
        monkeypatch.setattr(_cpu, name, reached)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", KS)
def test_values(K, dtype, poison, assert_accurate):
    sizes = [(n, K) for n in NS + rows_around_blocks(K)]
    columns = generators(sizes, dtype, bias=lambda i: i % 3 != 2)
    made = ops.generate(*columns)
    expected = reference.generate(*map(in_double, columns))
    assert_accurate(made, expected, dtype, reference.generate(*columns))
    assert all(w.is_contiguous() for w in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_one_call_do_not_touch_each_other(dtype, poison):
    sizes = [(n, k) for k, n in zip(KS, [1025, 3, 1, 2049, 0, 17, 1024, 2] * 3, strict=False)]
    columns = generators(sizes, dtype)
    together = ops.generate(*columns)
    for made, weight, bias, z in zip(together, *columns, strict=True):
        assert torch.equal(made, ops.generate([weight], [bias], [z])[0])


def test_no_layers():
    assert ops.generate([], [], []) == ()


def test_tensors_out_of_the_middle_of_others(poison):
    big = torch.randn(40, 33)
    weights = [big[3:20, 2:9], big.t()[:, :6], big[::2, ::3], big[5:6].expand(4, 33)]
    zs = [torch.randn(2 * w.shape[1])[::2] for w in weights]
    biases = [torch.randn(3, w.shape[0]).t()[:, 1] for w in weights]
    assert not any(w.is_contiguous() for w in weights)
    contiguous = [[t.contiguous() for t in column] for column in (weights, biases, zs)]
    for made, expected in zip(ops.generate(weights, biases, zs), ops.generate(*contiguous), strict=True):
        assert torch.equal(made, expected)


def test_lazily_negated_tensors():
    weight, bias, z = (torch.randn(s, dtype=torch.complex64).conj().imag for s in ((3, 2), (3,), (2,)))
    assert weight.is_neg()
    (made,) = ops.generate([weight], [bias], [z])
    torch.testing.assert_close(made, weight.clone() @ z.clone() + bias.clone())


@pytest.mark.parametrize("negated", [0, 1, 2])
def test_one_lazily_negated_contiguous_tensor(negated):
    """torch negates tensors and lists of them before an op sees them, but not lists of optional tensors."""
    tensors = [torch.randn(3, 2), torch.randn(3), torch.randn(2)]
    expected = [t.neg() if i == negated else t for i, t in enumerate(tensors)]
    tensors[negated] = torch._neg_view(tensors[negated])
    assert tensors[negated].is_contiguous()
    (made,) = ops.generate(*([t] for t in tensors))
    assert torch.equal(made, ops.generate(*([t] for t in expected))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_address_between_elements_is_refused(dtype):
    """torch takes such memory from others; the compiler counts on there being none."""
    size = torch.empty(0, dtype=dtype).itemsize
    memory = torch.zeros(4 * size + size // 2, dtype=torch.uint8).numpy()[size // 2 :]
    weight = torch.frombuffer(memory, dtype=dtype).view(2, 2)
    assert weight.data_ptr() % size
    rest = [torch.zeros(2, dtype=dtype)], [torch.zeros(2, dtype=dtype)]
    with pytest.raises(ValueError, match="no multiple of its elements"):
        ops.generate([weight], *rest)
    with pytest.raises(ValueError, match="no multiple of its elements"):
        ops.generate_backward([weight], rest[0])
    ops.generate([weight.clone()], *rest)


def test_inference_tensors():
    weights, biases, zs = small(torch.float32, requires_grad=False)
    with torch.inference_mode():
        made_there = [t.clone() for t in zs]
    for a, b in zip(
        ops.generate(weights, biases, made_there), ops.generate(weights, biases, zs), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="made under inference_mode"):
        ops.generate([w.requires_grad_() for w in weights], biases, made_there)


@pytest.mark.parametrize("dtype, K", [(torch.float16, 5), (torch.float32, 513), (torch.float32, 0)])
def test_what_the_kernels_do_not_serve(dtype, K, no_native):
    columns = generators([(6, K)], dtype)
    (made,) = ops.generate(*columns)
    assert torch.equal(made, reference.generate(*columns)[0])


def test_result_aliases_nothing():
    weights, biases, zs = small()
    made = ops.generate(weights, biases, zs, next_weights=[None] * L)
    addresses = {t.data_ptr() for t in flat((weights, biases, zs))}
    assert not addresses & {w.data_ptr() for w in made}


def test_nan_and_inf_stay_in_their_rows():
    weights, biases, zs = generators([(9, 16)], torch.float32)
    weights[0][3, 15], weights[0][5, 0] = float("nan"), float("inf")
    (made,) = ops.generate(weights, biases, zs)
    assert made[3].isnan() and made[5].isinf()
    assert made[[0, 1, 2, 4, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("K", [1, 3, 16, 37, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_independent_of_the_thread_count(K, dtype):
    columns = generators([(n, K) for n in (5000, 7, 20001)], dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.generate(*columns)
        torch.set_num_threads(2)
        two = ops.generate(*columns)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients(backend):
    def f(*tensors):
        return ops.generate(*unflat(tensors), backend=backend)

    inputs = flat(small())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_gradients_of_float32_and_their_dtype(assert_accurate):
    columns = generators([(2049, 17), (1, 4), (100, 512)], torch.float32)
    leaves = [t.requires_grad_() for t in flat(columns)]
    seeds = [torch.randn(n) for n in (2049, 1, 100)]
    grads = torch.autograd.grad(ops.generate(*columns), leaves, seeds)
    exact = [[t.detach().double().requires_grad_() for t in column] for column in columns]
    expected = torch.autograd.grad(reference.generate(*exact), flat(exact), [s.double() for s in seeds])
    for got, want in zip(grads, expected, strict=True):
        assert_accurate(got, want, torch.float32)


def test_create_graph_in_factored_mode_is_dense():
    columns = small()
    made = ops.generate(*columns, factored=True)
    loss = sum((w**3).sum() for w in made)
    grads = torch.autograd.grad(loss, flat(columns), create_graph=True)
    again = torch.autograd.grad(sum((g**2).sum() for g in grads), flat(columns))
    exact = [[None if t is None else t.detach().requires_grad_() for t in column] for column in columns]
    loss = sum((w**3).sum() for w in reference.generate(*exact))
    wanted = torch.autograd.grad(loss, flat(exact), create_graph=True)
    wanted_again = torch.autograd.grad(sum((g**2).sum() for g in wanted), flat(exact))
    for got, want in zip((*grads, *again), (*wanted, *wanted_again), strict=True):
        torch.testing.assert_close(got, want)


def test_factored_forms_no_weight_gradient():
    weights, biases, zs = small()
    biases[1] = torch.randn(2, dtype=torch.float64, requires_grad=True)
    seeds = [torch.randn(5).double(), torch.randn(2).double(), None]
    made = ops.generate(weights, biases, zs, factored=True)
    torch.autograd.backward(made[:2], seeds[:2])
    assert all(w.grad is None for w in weights)
    for i in (0, 1):
        assert torch.equal(biases[i].grad, seeds[i])
        torch.testing.assert_close(zs[i].grad, weights[i].detach().t() @ seeds[i])
    assert biases[2].grad is None and zs[2].grad is None  # its weights were not used


@pytest.mark.parametrize("frozen", ["weights", "biases", "zs"])
def test_gradients_of_what_needs_none_are_none(frozen):
    columns = dict(zip(("weights", "biases", "zs"), small(), strict=True))
    for t in columns[frozen]:
        if t is not None:
            t.requires_grad_(False)
    sum(w.sum() for w in ops.generate(**columns)).backward()
    for name, column in columns.items():
        for t in (t for t in column if t is not None):
            assert (t.grad is None) == (name == frozen)


def test_gradient_that_is_not_contiguous():
    weights, biases, zs = small()
    made = ops.generate(weights, biases, zs)
    made[0].sum().backward()  # an expanded scalar
    torch.testing.assert_close(zs[0].grad, weights[0].detach().sum(0))


def test_a_tensor_given_twice():
    weight, bias, z = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 4), (4,), (4,)))

    def f(weight, bias, z):
        return ops.generate([weight, weight], [bias, z], [z, z])

    assert torch.autograd.gradcheck(f, (weight, bias, z))


def test_backward_after_an_update_is_refused():
    weights, biases, zs = small()
    made = ops.generate(weights, biases, zs)
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made[0].sum().backward()


def test_func_transforms():
    columns = small(requires_grad=False)
    tensors = flat(columns)

    def loss(generate, *tensors):
        return sum((w**2).sum() for w in generate(*unflat(tensors)))

    every = tuple(range(len(tensors)))
    ours = torch.func.grad(lambda *t: loss(ops.generate, *t), every)(*tensors)
    theirs = torch.func.grad(lambda *t: loss(reference.generate, *t), every)(*tensors)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)
    ours = torch.func.jacrev(torch.func.jacrev(lambda z: loss(ops.generate, *tensors[:-1], z)))(tensors[-1])
    torch.testing.assert_close(ours, 2 * tensors[2].t() @ tensors[2])


@pytest.mark.parametrize(
    "in_dims", [(None, None, 0), (0, None, None), (None, 0, None), (0, 0, 0), (2, 1, 1), (None, 1, 0)]
)
def test_vmap(in_dims):
    shapes = ((5, 3), (5,), (3,))
    tensors = [
        torch.randn(s, dtype=torch.float64)
        if d is None
        else torch.randn(4, *s, dtype=torch.float64).movedim(0, d)
        for s, d in zip(shapes, in_dims, strict=True)
    ]

    def one(weight, bias, z):
        return ops.generate([weight], [bias], [z])[0]

    made = torch.func.vmap(one, in_dims)(*tensors)
    rows = [
        [t if d is None else t.select(d, b) for t, d in zip(tensors, in_dims, strict=True)] for b in range(4)
    ]
    torch.testing.assert_close(made, torch.stack([one(*row) for row in rows]))
    every = torch.func.grad(lambda *t: (one(*t) ** 2).sum(), (0, 1, 2))
    per_sample = torch.func.vmap(every, in_dims)(*tensors)
    for i in range(3):
        torch.testing.assert_close(per_sample[i], torch.stack([every(*row)[i] for row in rows]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore")  # the raw op has no formula of its own: Generate has
def test_opcheck(dtype, requires_grad):
    weights, biases, zs = small(dtype, requires_grad)
    next_weights = [None, torch.zeros(2).to(dtype), None]
    for wanted in (None, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.hyperfast.generate.default, (weights, biases, zs, next_weights, wanted)
        )


class TestAutocast:
    @pytest.mark.parametrize("K", [16, 600])
    @pytest.mark.parametrize("factored", [False, True])
    def test_rounds_once_at_the_end(self, K, factored):
        weights, biases, zs = (
            [t.requires_grad_() for t in column] for column in generators([(6, K)], torch.float32)
        )
        with torch.autocast("cpu", torch.bfloat16):
            (made,) = ops.generate(weights, biases, zs, factored=factored)
        assert made.dtype == torch.bfloat16
        exact = (weights[0] @ zs[0] + biases[0]).detach()
        torch.testing.assert_close(made.detach(), exact.bfloat16(), rtol=2**-7, atol=0)
        seed = torch.randn(6).bfloat16()
        made.backward(seed)
        assert torch.equal(biases[0].grad, seed.float())
        torch.testing.assert_close(zs[0].grad, weights[0].detach().t() @ seed.float())
        assert (weights[0].grad is None) == factored

    @pytest.mark.parametrize("factored", [False, True])
    def test_reference_backend(self, factored):
        weights, biases, zs = (
            [t.requires_grad_() for t in column] for column in generators([(6, 16)], torch.float32)
        )
        with torch.autocast("cpu", torch.bfloat16):
            (made,) = ops.generate(weights, biases, zs, backend="reference", factored=factored)
        assert made.dtype == torch.bfloat16
        seed = torch.randn(6).bfloat16()
        made.backward(seed)
        error = zs[0].grad - weights[0].detach().t() @ seed.float()
        assert error.norm() < 0.02 * zs[0].grad.norm()

    def test_backward_inside_the_region(self):
        weights, biases, zs = (
            [t.requires_grad_() for t in column] for column in generators([(6, 4)], torch.float32)
        )
        with torch.autocast("cpu", torch.bfloat16):
            ops.generate(weights, biases, zs, backend="reference")[0].float().sum().backward()
        assert zs[0].grad.dtype == torch.float32

    def test_float64_stays(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.generate(*small())[0].dtype == torch.float64


class TestNextWeights:
    def given(self):
        weight, bias, z = torch.randn(5, 3), torch.randn(5), torch.randn(3)
        buffer = torch.full((5,), 7.0)  # not what they make: its use shows
        record(buffer, weight, bias, z)
        return buffer, weight, bias, z

    def make(self, buffer, weight, bias, z):
        return ops.generate([weight], [bias], [z], next_weights=[buffer])[0]

    def test_used_while_nothing_changed(self):
        buffer, *parameters = self.given()
        made = self.make(buffer, *parameters)
        assert torch.equal(made, buffer) and made.data_ptr() != buffer.data_ptr()

    @pytest.mark.parametrize("changed", [0, 1, 2])
    @pytest.mark.parametrize("how", ["in place", "under inference_mode", "through a view", "another tensor"])
    def test_not_used_after_a_change(self, changed, how):
        buffer, *parameters = self.given()
        if how == "in place":
            parameters[changed].mul_(2)
        elif how == "under inference_mode":
            with torch.inference_mode():
                parameters[changed].mul_(2)
        elif how == "through a view":
            parameters[changed].detach()[:1].mul_(2)
        else:
            parameters[changed] = parameters[changed].clone()
        assert torch.equal(self.make(buffer, *parameters), ops.generate(*([p] for p in parameters))[0])

    @pytest.mark.parametrize("replaced", [0, 1, 2])
    def test_not_used_for_another_tensor_at_the_same_address(self, replaced):
        buffer, *parameters = self.given()
        values = parameters[replaced].clone()
        memory = parameters[replaced].numpy()  # keeps the address taken
        parameters[replaced] = None
        parameters[replaced] = torch.from_numpy(memory)
        parameters[replaced].data.copy_(values + 1)
        assert not torch.equal(self.make(buffer, *parameters), buffer)

    def test_an_unknown_buffer_is_not_used(self):
        _, *parameters = self.given()
        assert not is_current(torch.zeros(5), *parameters)
        assert not is_current(None, *parameters)

    def test_only_some_layers_have_them(self):
        buffer, weight, bias, z = self.given()
        made = ops.generate([weight, weight], [bias, None], [z, z], next_weights=[buffer, None])
        assert torch.equal(made[0], buffer)
        torch.testing.assert_close(made[1], weight @ z)


def broken(name):
    weights, biases, zs = small(torch.float32, requires_grad=False)
    cases = {
        "weight 1-d": (
            ([weights[0][0], *weights[1:]], biases, zs),
            ValueError,
            r"weight 0 must be \[N, K\].*\[3\]",
        ),
        "z short": ((weights, biases, [zs[0][:2], *zs[1:]]), ValueError, r"z 0 must be .*\[3\].*got \[2\]"),
        "z 2-d": ((weights, biases, [zs[0][None], *zs[1:]]), ValueError, r"z 0 .*\[1, 3\]"),
        "z scalar": ((weights, biases, [torch.tensor(1.0), *zs[1:]]), ValueError, "z 0"),
        "bias long": (
            (weights, [torch.randn(6), *biases[1:]], zs),
            ValueError,
            r"bias 0 must be .*\[5\].*got \[6\]",
        ),
        "z float64": (
            (weights, biases, [*zs[:2], zs[2].double()]),
            TypeError,
            "z 2 must be torch.float32.*float64",
        ),
        "bias bf16": (
            (weights, [biases[0].bfloat16(), *biases[1:]], zs),
            TypeError,
            "bias 0 must be torch.float32",
        ),
        "weight int": (
            ([weights[0].int(), *weights[1:]], biases, zs),
            TypeError,
            "weight 0 must be floating point",
        ),
        "weight complex": (
            ([weights[0].cfloat(), *weights[1:]], biases, zs),
            TypeError,
            "weight 0 must be floating",
        ),
        "mixed": (
            (
                [weights[0].double(), *weights[1:]],
                [biases[0].double(), *biases[1:]],
                [zs[0].double(), *zs[1:]],
            ),
            TypeError,
            "all weights must have one dtype",
        ),
        "fewer zs": ((weights, biases, zs[:2]), ValueError, "3 weights but 2 of z"),
        "fewer biases": ((weights, biases[:2], zs), ValueError, "3 weights but 2 of bias"),
        "no weights, one z": (([], [], zs[:1]), ValueError, "0 weights but 1 of z"),
        "z None": ((weights, biases, [None, *zs[1:]]), (TypeError, ValueError), "z 0"),
        "weight None": (([None, *weights[1:]], biases, zs), (TypeError, ValueError), "weight 0"),
        "float8": (
            ([weights[0].to(torch.float8_e4m3fn), *weights[1:]], biases, zs),
            TypeError,
            "weight 0 must",
        ),
        "sparse": (
            ([weights[0].to_sparse(), *weights[1:]], biases, zs),
            TypeError,
            "weight 0 must be a dense",
        ),
        "mkldnn": ((weights, [biases[0].to_mkldnn(), *biases[1:]], zs), TypeError, "bias 0 must be a dense"),
        "nested": (
            (weights, biases, [torch.nested.nested_tensor([zs[0]], layout=torch.jagged), *zs[1:]]),
            TypeError,
            "z 0 must be a dense tensor, got nested",
        ),
        "z a list": ((weights, biases, [[1.0, 2.0, 3.0], *zs[1:]]), TypeError, "z 0"),
        "another device": ((weights, biases, [zs[0].to("meta"), *zs[1:]]), ValueError, "z 0 must be on cpu"),
    }
    return cases[name] if name else list(cases)


@pytest.mark.parametrize("case", broken(None))
def test_bad_input(case, no_native):
    arguments, error, message = broken(case)
    with pytest.raises(error, match=message):
        ops.generate(*arguments)


def test_bad_next_weights_and_backend(no_native):
    weights, biases, zs = small(torch.float32, requires_grad=False)
    with pytest.raises(ValueError, match=r"next_weight 0 must be .*\[5\].*got \[4\]"):
        ops.generate(weights, biases, zs, next_weights=[torch.zeros(4), None, None])
    with pytest.raises(ValueError, match="3 weights but 1 of next_weight"):
        ops.generate(weights, biases, zs, next_weights=[None])
    with pytest.raises(ValueError, match="backend must be one of auto, reference, got 'cuda'"):
        ops.generate(weights, biases, zs, backend="cuda")
    with pytest.raises(ValueError, match="early hands dw to the biases: every layer needs one"):
        ops.generate(weights, [None, *biases[1:]], zs, factored=True, early=True)


class Calls(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_autocast_casts_all_layers_at_once():
    """One launch for the weights of all layers, one for their gradients, on next weights as on made ones."""
    generators = torch.nn.ModuleList(hyperfast.nn.LinearGenerator((size,), 5) for size in (7, 1, 30))
    model = hyperfast.factored_(generators)
    optimizer = hyperfast.optim.AdamW(model)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), Calls() as forward:
            made = [w for (w,) in hyperfast.nn.generator.generate_together(model)]
        with Calls() as backward:
            torch.autograd.backward(made, [torch.ones_like(w) for w in made])
        assert "aten::_to_copy" not in forward.names + backward.names
        assert backward.names.count("aten::_foreach_copy_") == 1
        assert all(w.dtype == torch.bfloat16 for w in made)
        for g, w in zip(model, made, strict=True):
            torch.testing.assert_close(w, (g.weight @ g.z + g.bias).bfloat16())
            assert torch.equal(g.bias.grad, torch.ones_like(g.bias))
        optimizer.step()
        buffers = [g.next_weight.data_ptr() for g in model]
        with torch.autocast("cpu", torch.bfloat16):
            made = [w for (w,) in hyperfast.nn.generator.generate_together(model)]
        assert not {w.data_ptr() for w in made} & set(buffers)
