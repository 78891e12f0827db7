"""Generators of several layers: the mathematics of each, initialisation, factored gradients, copies."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.nn import ChunkedGenerator, SharedCoreGenerator, TwoLayerGenerator
from hyperfast.optim import SGD, AdamW

SHAPES = [(4, 2, 3, 3), (6, 4, 3, 3), (5, 6), (7,)]
TILED = [(4, 2, 3, 3), (2, 2, 3, 3), (4, 6, 3, 3)]  # of units (2, 2, 3, 3): 2, 1 and 6
UNIT = (2, 2, 3, 3)


def two_layer(**options) -> TwoLayerGenerator:
    g = TwoLayerGenerator(TILED, 5, 3, UNIT, init="hyperfan", **options)
    for bias in (g.b1, g.b2):
        nn.init.normal_(bias)
    return g


def shared(**options) -> SharedCoreGenerator:
    g = SharedCoreGenerator(SHAPES, 3, 5, **options)
    nn.init.normal_(g.core_bias)
    return g


def chunked(**options) -> ChunkedGenerator:
    g = ChunkedGenerator(SHAPES, 3, chunk_size=10, init="hyperfan", **options)
    nn.init.normal_(g.bias)
    return g


def two_layer_by_units(g: TwoLayerGenerator) -> list[torch.Tensor]:
    """As the public code: unit after unit, concatenated."""
    units = iter(g.z)

    def unit():
        a = (next(units) @ g.w2 + g.b2).view(UNIT[1], g.hidden_dim)
        return (a @ g.w1 + g.b1).view(UNIT)

    return [
        torch.cat([torch.cat([unit() for _ in range(shape[1] // 2)], 1) for _ in range(shape[0] // 2)])
        for shape in TILED
    ]


def shared_by_layers(g: SharedCoreGenerator) -> list[torch.Tensor]:
    hidden = [g.core_weight @ z + g.core_bias for z in g.z]
    return [
        (head.weight @ h + head.bias).view(shape)
        for head, h, shape in zip(g.heads, hidden, SHAPES, strict=True)
    ]


def chunked_by_layers(g: ChunkedGenerator) -> list[torch.Tensor]:
    chunks, made = iter(g.z), []
    for shape in SHAPES:
        n = math.prod(shape)
        flat = torch.cat([g.weight @ next(chunks) + g.bias for _ in range(math.ceil(n / 10))])
        made.append(flat[:n].view(shape))
    return made


KINDS = {
    "two_layer": (two_layer, two_layer_by_units),
    "shared": (shared, shared_by_layers),
    "chunked": (chunked, chunked_by_layers),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_weights_and_gradients(kind):
    make, plainly = kind
    g = make(dtype=torch.float64)
    made, wanted = g(), plainly(g)
    assert [w.shape for w in made] == list(g.shapes)
    seeds, parameters = [torch.randn_like(w) for w in made], list(g.parameters())
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b)
    got = torch.autograd.grad(made, parameters, seeds)
    for a, b in zip(got, torch.autograd.grad(wanted, parameters, seeds), strict=True):
        torch.testing.assert_close(a, b)


def test_other_embeddings(kind):
    g = kind[0](dtype=torch.float64)
    z = torch.randn_like(g.z, requires_grad=True)
    made = g(z)
    torch.cat([w.flatten() for w in made]).sum().backward()
    assert g.z.grad is None and z.grad.count_nonzero() == z.numel()
    twin = copy.deepcopy(g)
    with torch.no_grad():
        twin.z.copy_(z)
    for a, b in zip(made, twin(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"z must be \[\d+, \d\], got shape \[2\]"):
        g(torch.randn(2))


def test_embeddings_by_layer(kind):
    g = kind[0]()
    own = g.embeddings()
    assert len(own) == len(g.shapes) and torch.equal(torch.cat(own), g.z)
    assert all(z.data_ptr() in range(g.z.data_ptr(), g.z.data_ptr() + g.z.nbytes) for z in own)


def test_l2(kind):
    g = kind[0](dtype=torch.float64)
    made = g()
    loss = 0.15 * sum(w.square().sum() for w in made)
    wanted = torch.autograd.grad(loss + sum(w.sum() for w in made), list(g.parameters()))
    hyperfast.nn.generated_l2_(g, 0.3)
    got = torch.autograd.grad(sum(w.sum() for w in g()), list(g.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled(kind):
    g = kind[0](dtype=torch.float64)
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(), g(), strict=True):
        torch.testing.assert_close(a, b)


def test_copied_pickled_moved_and_loaded(kind):
    g = kind[0]()
    g()  # leaves what it made last
    twin = copy.deepcopy(hyperfast.factored_(g)).double()
    for a, b in zip(twin(), g(), strict=True):
        torch.testing.assert_close(a.float(), b)
    other = kind[0]()
    other.load_state_dict(g.state_dict())
    for a, b in zip(other(), g(), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_the_generation_in_float32(kind):
    g = kind[0]()
    with torch.autocast("cpu", torch.bfloat16):
        made = g()
    for a, b in zip(made, g(), strict=True):
        assert torch.equal(a, b.bfloat16())


def test_autocast_leaves_the_weights_of_samples_and_l2_in_float32(kind):
    g = hyperfast.nn.generated_l2_(kind[0](), 0.3)
    z = torch.randn(3, *g.z.shape)
    for given in (None, z):
        wanted = [w if given is None else w.dense() for w in g(given)]
        expected = torch.autograd.grad(sum(0 * w.sum() for w in wanted), g.parameters(), allow_unused=True)
        with torch.autocast("cpu", torch.bfloat16):
            made = [w if given is None else w.dense() for w in g(given)]
            loss = sum(0 * w.float().sum() for w in made)
        for a, b in zip(made, wanted, strict=True):
            assert torch.equal(a, b.bfloat16())
        got = torch.autograd.grad(loss, g.parameters(), allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)  # TwoLayerGenerator: l2 of w as it was rounded
            assert a is None or (a - b).norm() <= 3e-3 * b.norm()


@pytest.mark.parametrize("name", ["hyperfan", "hyperfan_out"])
@pytest.mark.parametrize("make", [TwoLayerGenerator, SharedCoreGenerator, ChunkedGenerator])
def test_hyperfan_makes_hes_scale_in_every_layer(make, name):
    shapes = [(16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3)]
    options = {"unit": (16, 16, 3, 3)} if make is TwoLayerGenerator else {}
    for seed in range(5):
        torch.manual_seed(seed)
        g = make(shapes, init=name, **options)
        for w, shape in zip(g(), shapes, strict=True):
            fan = 9 * (shape[0] if name == "hyperfan_out" else shape[1])
            assert 0.7 < w.std().item() / math.sqrt(2 / fan) < 1.3


def test_shared_core_keeps_trained_weights():
    g, weights = shared(), [torch.randn(shape) for shape in SHAPES]
    g.keep_(*weights)
    for a, b in zip(g(), weights, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="makes 4 weights, got 1"):
        g.keep_(weights[0])


class Net(nn.Module):
    """Two layers and a bias from one shared core."""

    def __init__(self):
        super().__init__()
        self.generator = SharedCoreGenerator([(6, 4), (3, 6), (3,)], 2, 5)

    def forward(self, x):
        w1, w2, b2 = self.generator()
        return F.linear(torch.tanh(F.linear(x, w1)), w2, b2)


@pytest.mark.parametrize("ours, theirs", [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_factored_heads_train_as_dense_ones(ours, theirs):
    model = hyperfast.factored_(Net().double())
    twin = hyperfast.factored_(copy.deepcopy(model), False)
    x = torch.randn(8, 4, dtype=torch.float64)
    ours, theirs = ours(model, lr=0.02, max_grad_norm=0.3), theirs(twin.parameters(), lr=0.02)
    for _ in range(20):
        for m in (model, twin):
            m.zero_grad()
            for part in x.split(4):  # two forwards and backwards for each step
                m(part).square().sum().backward()
        assert all(head.weight.grad is None for head in model.generator.heads)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        ours.step()
        theirs.step()
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-9


def evaluate_with_copies(model, x):
    others = {name: nn.Parameter(p + 0.1) for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, x)


def evaluate_with_another_core(model, x):
    torch.func.functional_call(model, {"generator.core_weight": torch.zeros(5, 2).double()}, x)


def evaluate_after_an_edit(model, x):
    with torch.no_grad():
        model.generator.core_bias.add_(1)
        model(x)
        model.generator.core_bias.sub_(1)


def per_sample_gradients(model, x):
    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, x).square().sum()

    parameters = {name: 2 * p.detach() for name, p in model.named_parameters()}
    torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    copy.deepcopy(model)


def fail_to_generate(model, x):
    bias, model.generator.heads[1].bias = model.generator.heads[1].bias, nn.Parameter(torch.zeros(2))
    with pytest.raises((ValueError, TypeError)):
        model(x)
    model.generator.heads[1].bias = bias
    copy.deepcopy(model)


BETWEEN = (
    evaluate_with_copies,
    evaluate_with_another_core,
    evaluate_after_an_edit,
    per_sample_gradients,
    fail_to_generate,
)


@pytest.mark.parametrize("between", BETWEEN)
def test_the_step_takes_the_z_of_the_forward_that_was_trained(between):
    model = hyperfast.factored_(Net().double())
    twin, x = copy.deepcopy(model), torch.randn(8, 4, dtype=torch.float64)
    for m in (model, twin):
        m(x).square().sum().backward()
        if m is model:
            between(m, x)
        SGD(m, lr=0.1).step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_factored_heads_refuse_other_embeddings():
    g = hyperfast.factored_(shared())
    with pytest.raises(ValueError, match="SharedCoreGenerator in factored mode generates from its own z"):
        g(torch.randn(4, 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(4, 4, 3, 3), (2, 4, 3, 3)], 3, 3), "not made of whole units"),
        (([(4, 4, 3, 3)], 3, 3, (2, 2, 3)), r"unit must be \(out, in, \*kernel\) like shape"),
        (([(4, 4, 3, 3)], 3, 3, (2, 2, 1, 1)), r"unit must be \(out, in, \*kernel\) like shape"),
        (([(5, 4)], 3, 3, (2, 2)), "not made of whole units"),
        (([(4,)], 3), r"unit must be \(out, in, \*kernel\)"),
        (([], 3), "at least 1"),
        (([(4, 2)], 3, 0), "at least 1"),
    ],
)
def test_bad_units(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoLayerGenerator(*arguments)


def test_bad_sizes():
    for make in (SharedCoreGenerator, ChunkedGenerator):
        for shapes, K, size in (([(4, 0)], 2, 3), ([(4, 2)], 0, 3), ([(4, 2)], 2, 0), ([], 2, 3)):
            with pytest.raises(ValueError, match="at least 1"):
                make(shapes, K, size)
        with pytest.raises(ValueError, match="fan_in must have 1 numbers like shapes, got 2"):
            make([(4, 2)], fan_in=[3, 4])
