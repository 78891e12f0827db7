"""A hyperized network called with embeddings of its own for every sample: one sample at a time as the
specification."""

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.nn import Conv2d, TwoLayerGenerator

B = 4
OPTIONS = {
    "linear": {"z_dim": 3},
    "two_layer": {"z_dim": 3},
    "shared": {"z_dim": 3, "hidden_dim": 5},
    "chunked": {"z_dim": 3, "chunk_size": 50},
}


def network():
    layers = Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2, stride=2, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 5))


def hyper(generator="linear", **options):
    options = OPTIONS[generator] | options
    return hyperfast.hyperize(network(), generator, init="hyperfan", **options).double()


def embeddings(generator, batch=B):
    """Other embeddings than the generator's own, of its shape with a batch dimension."""
    return torch.randn(batch, *generator.z.shape, dtype=torch.float64, requires_grad=True)


def assert_same(y, expected, inputs):
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(t, inputs, dy, allow_unused=True) for t in (y, expected))
    assert any(g is not None for g in theirs)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("generator", OPTIONS)
def test_every_sample_has_weights_of_its_own(generator):
    model, x = hyper(generator), torch.randn(B, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    zs = {name: embeddings(g) for name, g in model.generators.items()}
    expected = torch.cat([model(x[b : b + 1], z={n: z[b] for n, z in zs.items()}) for b in range(B)])
    assert_same(model(x, z=zs), expected, [x, *zs.values(), *model.parameters()])
    assert not torch.allclose(model(x), expected)


def test_one_embedding_for_all_generators():
    model, x = hyper(), torch.randn(B, 3, 4, 4, dtype=torch.float64)
    z = embeddings(model.generators["0/weight"])
    expected = torch.cat([model(x[b : b + 1], z=z[b]) for b in range(B)])
    assert_same(model(x, z=z), expected, [z, *model.parameters()])
    weights = model.generate(z[0])
    generator = model.generators["4/weight"]
    torch.testing.assert_close(weights["4.weight"], generator(z[0])[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["2", "2.weight", "2/weight"])
def test_generators_that_are_not_named_keep_their_own(name):
    model, x = hyper(), torch.randn(B, 3, 4, 4, dtype=torch.float64)
    z = embeddings(model.generators["2/weight"])
    expected = torch.cat([model(x[b : b + 1], z={"2/weight": z[b]}) for b in range(B)])
    assert_same(model(x, z={name: z}), expected, [z, *model.parameters()])
    own = {n: g.z.expand(B, -1) for n, g in model.generators.items()}
    torch.testing.assert_close(model(x, z=own), model(x), rtol=1e-12, atol=1e-12)


def test_refused_embeddings():
    model, x = hyper(), torch.randn(B, 3, 4, 4, dtype=torch.float64)
    z = embeddings(model.generators["0/weight"]).detach()
    with pytest.raises(ValueError, match=r"z of 'conv': there is none; the generators are 0/weight, 2/wei"):
        model(x, z={"conv": z})
    with pytest.raises(ValueError, match=r"z of '0\.weight': names a generator twice"):
        model(x, z={"0": z, "0.weight": z})
    with pytest.raises(ValueError, match=r"z must be \[3\].*got shape \[4, 2\]"):
        model(x, z=z[:, :2])
    with pytest.raises(
        ValueError, match="weights are those of 3 samples, the input has shape|a row for each"
    ):
        model(x, z=z[:3])
    with pytest.raises(ValueError, match="in factored mode generates from its own z only"):
        hyperfast.factored_(model)(x, z=z)


def test_a_generator_of_several_weights_goes_by_its_own_name():
    net = network()
    unit = TwoLayerGenerator([(6, 3, 3, 3), (12, 3, 3, 3)], 3, unit=(6, 3, 3, 3))
    net.append(nn.Conv2d(3, 12, 3))
    model = hyperfast.hyperize(net, unit, targets=["0", "5"], init="hyperfan")
    with pytest.raises(ValueError, match="z of '0': there is none"):
        model.generate({"0": torch.zeros(B, 3, 3)})
    made = model.generate({next(iter(model.generators)): torch.zeros(B, 3, 3)})
    assert made["5.weight"].samples == B and made["5.weight"].shape == (12, 3, 3, 3)


def test_compiled():
    model, x = hyper(), torch.randn(B, 3, 4, 4, dtype=torch.float64)
    z = embeddings(model.generators["0/weight"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, z=z), model(x, z=z), [z, *model.parameters()])
    torch._dynamo.reset()
