"""Weights for each sample, made by every generator, inside any module: one at a time as the specification."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.nn import (
    ChunkedGenerator,
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    PerSampleWeight,
    SharedCoreGenerator,
    TwoLayerGenerator,
)
from hyperfast.nn.generator import generated_l2_

B = 3
GENERATORS = {
    "linear": lambda: LinearGenerator((4, 6), 3),
    "linear without bias": lambda: LinearGenerator((4, 6), 3, bias=False),
    "linear, reference": lambda: LinearGenerator((4, 6), 3, backend="reference"),
    "two layers": lambda: TwoLayerGenerator((4, 6), 3, 5),
    "two layers, units": lambda: TwoLayerGenerator([(4, 6), (2, 6)], 3, 5, unit=(2, 3)),
    "shared": lambda: SharedCoreGenerator([(4, 6), (2, 3, 2, 2)], 3, 5),
    "chunked": lambda: ChunkedGenerator([(4, 6), (7,)], 3, 5),
}
# layer, shape of the input of one sample
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear, rows": (lambda: nn.Linear(6, 5), (2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv1d, same": (lambda: nn.Conv1d(4, 3, 5, padding="same", dilation=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), (2, 1), groups=2), (4, 7, 6)),
    "conv2d, reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, dilation=2), (4, 3, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 3, 2)),
}  # fmt: skip


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module.double()


def assert_same_gradients(got, wanted, tensors):
    dy = torch.randn_like(wanted)
    ours, theirs = (
        torch.autograd.grad(y, tensors, dy, retain_graph=True, allow_unused=True) for y in (got, wanted)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def batched(generator):
    return torch.randn(B, *generator.z.shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name):
    """Weights, and gradients of the generator and of z, are those of one sample after the other."""
    generator = randomised(GENERATORS[name]())
    z = batched(generator)
    made = generator(z)
    alone = [generator(row) for row in z]
    assert all(isinstance(w, PerSampleWeight) and w.dtype == z.dtype for w in made)
    assert [w.shape for w in made] == list(generator.shapes)
    got = torch.cat([w.dense().flatten(1) for w in made], 1)
    wanted = torch.stack([torch.cat([w.flatten() for w in weights]) for weights in alone])
    torch.testing.assert_close(got, wanted)
    assert_same_gradients(got, wanted, [z, *generator.parameters()])


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("name", GENERATORS)
def test_no_samples(name, l2):
    """Empty weights and zero gradients, whatever L2 adds for each sample."""
    generator = generated_l2_(randomised(GENERATORS[name]()), l2)
    z = batched(generator)[:0].detach().requires_grad_()
    made = generator(z)
    assert [w.dense().shape for w in made] == [(0, *shape) for shape in generator.shapes]
    sum(w.dense().sum() for w in made).backward()
    assert z.grad.shape == z.shape
    assert not any(p.grad.any() for n, p in generator.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["two layers, units", "shared", "chunked"])
def test_compiled_generators(name):
    torch._dynamo.reset()
    generator = randomised(GENERATORS[name]())
    z, x = batched(generator), torch.randn(B, 6, dtype=torch.float64)

    def call(z):
        return F.linear(x, generator(z)[0])

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(got, call(z))
    assert_same_gradients(got, call(z), [z])


@pytest.mark.parametrize("kind", ["generated", "ready"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, kind):
    """A module with a generated weight and bias for each sample, against one module for each."""
    make, shape = LAYERS[name]
    layer = randomised(make())
    x = torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)
    generators = {n: randomised(LinearGenerator(p.shape, 2)) for n, p in layer.named_parameters()}
    z = torch.randn(B, 2, dtype=torch.float64, requires_grad=True)
    tensors = [x, z, *(p for g in generators.values() for n, p in g.named_parameters() if n != "z")]
    for names in ({"weight"}, set(generators)):
        made = {n: generators[n](z)[0] for n in names}
        if kind == "ready":
            made = {n: PerSampleWeight.ready(w.dense()) for n, w in made.items()}
        got = torch.func.functional_call(layer, made, x)
        rows = []
        for b in range(B):
            own = {n: w.dense()[b] for n, w in made.items()}
            rows.append(torch.func.functional_call(layer, own, x[b : b + 1]))
        wanted = torch.cat(rows)
        torch.testing.assert_close(got, wanted)
        assert_same_gradients(got, wanted, tensors)


def test_a_bias_for_each_sample_beside_one_weight():
    layer, x = randomised(nn.Conv2d(2, 3, 3)), torch.randn(B, 2, 5, 5, dtype=torch.float64)
    biases = torch.randn(B, 3, dtype=torch.float64)
    got = torch.func.functional_call(layer, {"bias": PerSampleWeight.ready(biases)}, x)
    torch.testing.assert_close(got, F.conv2d(x, layer.weight) + biases.view(B, 3, 1, 1))


@pytest.mark.parametrize("shape", [(4,), (2, 5, 5), (2, 3, 3, 3)])
def test_a_bias_under_autocast(shape):
    """Its sum stays in autocast's dtype, as in the layers of torch: one bias, and one for each sample."""
    x = torch.randn(B, *shape)
    weights = torch.randn(B, 6, shape[0], *[3] * (len(shape) - 1))
    layer = [F.linear, None, F.conv2d, F.conv3d][len(shape) - 1]
    bias = torch.randn(6)
    for own in (bias, PerSampleWeight.ready(bias.expand(B, 6))):
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x, PerSampleWeight.ready(weights), own)
            wanted = torch.cat([layer(x[b : b + 1], weights[b], bias) for b in range(B)])
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert (got - wanted).norm() <= 0.01 * wanted.norm()


def test_a_network():
    """Every weight of a network, its batch norm left alone."""
    network = randomised(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)))
    network.eval()
    generator = randomised(SharedCoreGenerator([(4, 2, 3, 3), (3, 16)], 3, 5))
    z, x = batched(generator), torch.randn(B, 2, 4, 4, dtype=torch.float64)

    def call(z, x):
        return torch.func.functional_call(
            network, dict(zip(("0.weight", "3.weight"), generator(z), strict=True)), x
        )

    wanted = torch.cat([call(z[b], x[b : b + 1]) for b in range(B)])
    torch.testing.assert_close(call(z, x), wanted)
    assert_same_gradients(call(z, x), wanted, [z, *generator.parameters()])


@pytest.mark.parametrize("kind", ["linear", "shared"])
def test_a_hyperized_network(kind):
    """Embeddings of each sample for all of its generators, and for one beside the others' own."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    model = hyperfast.hyperize(network, kind, 3, init="hyperfan")
    x = torch.randn(B, 2, 4, 4, dtype=torch.float64)
    every = {name: batched(generator) for name, generator in model.generators.items()}
    for zs in (every, dict(list(every.items())[:1])):
        rows = []
        for b in range(B):
            with model.generated({name: z[b] for name, z in zs.items()}) as plain:
                rows.append(plain(x[b : b + 1]))
        with model.generated(zs) as conditional:
            got = conditional(x)
        torch.testing.assert_close(got, torch.cat(rows))
        assert_same_gradients(got, torch.cat(rows), [*zs.values(), *model.parameters()])
    with pytest.raises(ValueError, match="z of 'other': there is none; the generators are"):
        model.generate({"other": x})


def test_l2_of_the_weights_of_all_samples():
    generator = generated_l2_(randomised(LinearGenerator((4, 6), 3)), 0.1)
    z, x = batched(generator), torch.randn(B, 6, dtype=torch.float64)
    F.linear(x, generator(z)[0]).sum().backward()
    got = [p.grad for p in (z, generator.weight, generator.bias)]
    z.grad = generator.weight.grad = generator.bias.grad = None
    w = generated_l2_(generator, 0.0)(z)[0].dense()
    (torch.einsum("bi,boi->bo", x, w).sum() + 0.05 * w.square().sum()).backward()
    for a, p in zip(got, (z, generator.weight, generator.bias), strict=True):
        torch.testing.assert_close(a, p.grad)


class TestHyperLayers:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda **o: HyperLinear(6, 4, z_dim=3, **o), (6,)),
            (lambda **o: HyperLinear(6, 4, bias=False, z_dim=3, **o), (5, 6)),
            (lambda **o: HyperConv2d(4, 6, 3, stride=2, padding=1, groups=2, z_dim=3, **o), (4, 5, 6)),
            (lambda **o: HyperConv2d(4, 6, 2, padding="same", z_dim=3, **o), (4, 5, 6)),
        ],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    def test_z(self, make, shape, backend):
        layer = randomised(make(backend=backend))
        x = torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)
        z = batched(layer.generator)
        parameters = [p for n, p in layer.named_parameters() if not n.endswith(".z")]
        wanted = torch.cat([layer(x[b : b + 1], z=z[b]) for b in range(B)])
        for got in (layer(x, z=z), layer(x, layer.generator(z)[0])):
            torch.testing.assert_close(got, wanted)
            assert_same_gradients(got, wanted, [x, z, *parameters])
        with torch.no_grad():
            torch.testing.assert_close(layer(x, z=layer.generator.z.detach()), layer(x))

    def test_another_generator(self):
        layer = randomised(HyperConv2d(2, 4, 3, generator=TwoLayerGenerator((4, 2, 3, 3), 3, 5)))
        z, x = batched(layer.generator), torch.randn(B, 2, 5, 5, dtype=torch.float64)
        wanted = torch.cat([layer(x[b : b + 1], z=z[b]) for b in range(B)])
        torch.testing.assert_close(layer(x, z=z), wanted)
        assert_same_gradients(layer(x, z=z), wanted, [z, *layer.generator.parameters()])

    def test_hooks_are_called(self):
        layer, seen = HyperLinear(6, 4, z_dim=3), []
        layer.generator.register_forward_hook(lambda module, args, made: seen.append(made))
        layer(torch.randn(B, 6), z=torch.randn(B, 3))
        assert len(seen) == 1 and isinstance(seen[0][0], PerSampleWeight)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compile(self, backend):
        class Conditional(nn.Module):
            """z from the input itself."""

            def __init__(self):
                super().__init__()
                self.condition = nn.Linear(4, 3)
                self.conv, self.fc = HyperConv2d(4, 2, 3, padding=1, z_dim=3), HyperLinear(2, 5, z_dim=3)

            def forward(self, x):
                z = self.condition(x.mean((2, 3)))
                return self.fc(F.relu(self.conv(x, z=z)).mean((2, 3)), z=z)

        torch._dynamo.reset()
        model = Conditional().double()
        twin = copy.deepcopy(model)
        x = torch.randn(B, 4, 5, 5, dtype=torch.float64)
        got, wanted = torch.compile(model, fullgraph=True, backend=backend)(x), twin(x)
        torch.testing.assert_close(got, wanted)
        got.square().sum().backward(), wanted.square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)  # the own z of a generator has none
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)

    def test_autocast(self):
        layer, x, z = HyperLinear(6, 4, z_dim=3), torch.randn(B, 6), torch.randn(B, 3)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, z=z)
        wanted = layer(x, z=z)
        assert y.dtype == torch.bfloat16 and (y - wanted).norm() < 0.02 * wanted.norm()


class TestRefused:
    def test_functions_that_do_not_know_it(self):
        w = PerSampleWeight.ready(torch.randn(B, 4, 6))
        for call, name in (
            (lambda: torch.add(w, 1), "add"),
            (lambda: w.sum(), "sum"),
            (lambda: torch.relu(w), "relu"),
            (lambda: w.T, "T"),
            (lambda: w.data, "data"),
            (lambda: setattr(w, "grad", None), "grad"),
        ):
            with pytest.raises(TypeError, match=f"^{name} is not computed with weights for each sample"):
                call()

    def test_attention(self):
        module = nn.MultiheadAttention(4, 2)
        w = PerSampleWeight.ready(torch.randn(B, 12, 4))
        x = torch.randn(2, B, 4)
        with pytest.raises(TypeError, match="multi_head_attention_forward is not computed"):
            torch.func.functional_call(module, {"in_proj_weight": w}, (x, x, x))

    @pytest.mark.parametrize("kind", ["generated", "ready"])
    def test_another_number_of_samples(self, kind):
        w = LinearGenerator((4, 6), 2)(torch.randn(B, 2))[0]
        w = w if kind == "generated" else PerSampleWeight.ready(w.dense())
        with pytest.raises(ValueError, match=r"weights are those of 3 samples, the input has shape \[2, 6\]"):
            F.linear(torch.randn(2, 6), w)
        w = PerSampleWeight.ready(torch.randn(B, 4, 2, 3, 3, 3))
        with pytest.raises(ValueError, match=r"must have 5 dimensions, got shape \[3, 2, 5, 5\]"):
            F.conv3d(torch.randn(B, 2, 5, 5), w)

    def test_layers(self):
        layer = HyperLinear(6, 4, z_dim=3)
        x, z = torch.randn(B, 6), torch.randn(B, 3)
        with pytest.raises(ValueError, match="give weight or z, not both"):
            layer(x, torch.randn(4, 6), z=z)
        with pytest.raises(
            ValueError, match=r"z must be \[3\], got shape \[3, 2\], which is not \[B, 3\] for B"
        ):
            layer(x, z=z[:, :2])
        with pytest.raises(ValueError, match=r"z \[2, 3\], x \[3, 6\]"):
            layer(x, z=z[:2])
        with pytest.raises(ValueError, match="in factored mode generates from its own z only"):
            hyperfast.factored_(layer)(x, z=z)


def test_what_it_says_of_itself():
    w = LinearGenerator((4, 6), 2)(torch.randn(B, 2))[0]
    assert repr(w) == "PerSampleWeight((4, 6), 3 samples, generated)"
    assert w.shape == (4, 6) and w.dim() == w.ndim == 2 and w.size(1) == 6 and w.numel() == 24
    assert w.device.type == "cpu" and w.is_floating_point() and len({w, w}) == 1
    assert w.requires_grad and w.is_leaf and w.grad is None and w.element_size() == 4
    assert w.is_contiguous() and w.stride() == (6, 1) and w.stride(0) == 6
    assert not PerSampleWeight.ready(torch.randn(B, 4, 6)).requires_grad
