"""The generated weights of a model by name, and what rests on them."""

import math

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.nn import (
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    named_generators,
    named_weights,
    parameter_counts,
    plain_state_dict,
)


class Language(nn.Module):
    """A tied embedding, a convolution, and an attention whose weights have names of their own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv1 = nn.Conv1d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        x = self.norm(self.conv1(self.embedding(x).mT)).mT
        return self.out(self.attention(x, x, x, need_weights=False)[0])


X = torch.arange(10).view(2, 5) % 7
NAMES = ["conv1", "attention.in_proj_weight", "attention.out_proj", "embedding"]


def names(model):
    return [name for name, *_ in named_weights(model)]


@pytest.mark.parametrize("generator", ["linear", "shared"])
def test_a_hyper_module_has_the_names_of_its_network(generator):
    model, twin = Language(), Language()
    keys = set(model.state_dict())
    hyper = hyperfast.hyperize(model, generator, z_dim=3)
    assert sorted(names(hyper)) == sorted(NAMES)
    assert sorted(names(nn.Sequential(hyper))) == sorted(f"0.{name}" for name in NAMES)
    for name, g, index in named_weights(hyper):
        assert g.embeddings()[index].shape[1] == 3
        parameter = name if name.endswith("_weight") else f"{name}.weight"
        assert g.shapes[index] == twin.get_parameter(parameter).shape
    hyper.eval(), model.eval(), twin.eval()
    expected = hyper(X)
    state = plain_state_dict(hyper)
    assert set(state) == keys
    twin.load_state_dict(state)
    assert torch.equal(twin(X), expected)
    assert len({t.data_ptr() for t in state.values()}) == len(state)  # shared with nothing
    assert set(plain_state_dict(nn.ModuleDict({"a": hyper}))) == {f"a.{key}" for key in keys}


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("generator", ["linear", "two_layer", "shared", "chunked"])
def test_counts_of_a_hyper_module(generator, factored):
    options = {} if generator != "two_layer" else {"hidden_dim": 5}
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    hyper = hyperfast.hyperize(model, generator, 3, init="hyperfan", **options)
    hyperfast.factored_(hyper, factored)
    generators = list(named_generators(hyper))
    assert len(generators) == (2 if generator in ("linear", "two_layer") else 1) and generators[0][0] == "0"
    counts = parameter_counts(hyper)
    assert counts["generated"] == 4 * 6 * 9 + 6 * 3 and counts["other"] == 6 + 3
    assert counts["embedding"] == sum(g.z.numel() for _, g in generators)
    assert counts["total"] == sum(p.numel() for p in hyper.parameters())
    assert counts["generator"] == counts["total"] - counts["embedding"] - 9
    embeddings = [g.embeddings()[index] for _, g, index in named_weights(hyper)]
    assert sum(z.numel() for z in embeddings) == counts["embedding"]


def test_layers_that_share_and_layers_under_two_names():
    shared = LinearGenerator((4, 4), 3)
    layer = HyperLinear(4, 4, generator=shared)
    model = nn.Sequential(layer, nn.Tanh(), layer, HyperLinear(4, 4, bias=False, generator=shared))
    assert names(model) == ["0"] and [name for name, _ in named_generators(model)] == ["0"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    plain.load_state_dict(plain_state_dict(model))
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain(x), model(x))
    model.shared = shared  # under a name of its own as well: no part of the plain network
    assert set(plain_state_dict(model)) == set(plain.state_dict())


def test_a_layer_alone_and_a_network_without():
    assert names(HyperConv2d(2, 3, 3)) == [""]
    assert set(plain_state_dict(HyperConv2d(2, 3, 3))) == {"weight", "bias"}
    assert names(nn.Linear(2, 3)) == [] and parameter_counts(nn.Linear(2, 3))["total"] == 9


def test_generated_layers_inside_of_a_hyper_module():
    model = nn.Sequential(HyperLinear(4, 5, z_dim=2), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(2, 4)
    expected = model(x)
    hyper = hyperfast.hyperize(model, z_dim=2)
    assert torch.equal(hyper(x), expected)
    assert sorted(names(hyper)) == ["0", "2"]
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(plain_state_dict(hyper))
    torch.testing.assert_close(plain(x), expected)
    assert parameter_counts(hyper)["generated"] == math.prod((4, 5)) + math.prod((5, 3))
