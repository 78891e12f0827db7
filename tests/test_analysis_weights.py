"""hyperfast.analysis: distributions of weights."""

import math

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import analysis
from hyperfast.analysis.weights import QUANTILES


def test_weights_of_known_distribution():
    model = nn.Linear(101, 1)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 101)[torch.randperm(101)].view(1, -1))
        model.bias.fill_(3)
    weight, bias = analysis.weight_statistics(model, threshold=0.205).layers
    assert (weight.name, weight.shape, bias.name, bias.shape) == ("weight", (1, 101), "bias", (1,))
    assert weight.values.mean == pytest.approx(0, abs=1e-8)
    assert weight.values.std == pytest.approx(0.02 * math.sqrt((101**2 - 1) / 12), rel=1e-6)
    assert (weight.values.min, weight.values.max, weight.values.near_zero) == (-1, 1, 21 / 101)
    assert weight.quantiles == pytest.approx([2 * q - 1 for q in QUANTILES], abs=1e-6)
    assert weight.norm == pytest.approx(model.weight.norm().item(), rel=1e-6)
    assert bias.quantiles == (3,) * 7 and (bias.values.std, bias.values.mean, bias.norm) == (0, 3, 3)
    assert bias.values.counts.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_figures_are_those_of_torch(dtype):
    model = nn.Conv2d(7, 11, 3, dtype=dtype)
    nn.init.normal_(model.weight, std=0.05)
    weight = analysis.weight_statistics(model).layers[0]
    w = model.weight.detach().double().flatten()
    expected = w.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    assert weight.quantiles == pytest.approx(expected, rel=1e-12)
    assert weight.values.std == pytest.approx(w.std(correction=0).item(), rel=1e-12)
    assert weight.values.counts.sum() == len(w)
    low, high = weight.values.edges[[0, -1]].tolist()
    assert low <= weight.values.min < low + 0.002 and high - 0.002 < weight.values.max <= high


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("generator", ["linear", "two_layer", "shared"])
def test_a_hypernetwork_has_the_weights_it_makes(generator, factored):
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    names = [name for name, _ in plain.named_parameters()]
    options = {} if generator == "linear" else {"hidden_dim": 6}
    model = hyperfast.hyperize(plain, generator, z_dim=3, init="hyperfan", **options)
    hyperfast.factored_(model, factored)
    statistics, twin = analysis.weight_statistics(model), hyperfast.freeze(model)
    assert statistics.rows() == analysis.weight_statistics(twin).rows()
    assert [layer.name for layer in statistics.layers] == names
    assert statistics.layers[0].values.max == twin[0].weight.max().item()


def test_shared_and_other_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    statistics = analysis.weight_statistics(model)
    assert [layer.name for layer in statistics.layers] == ["empty", "0.weight", "0.bias", "1.bias"]
    assert statistics.layers[0].values.count == 0 and all(map(math.isnan, statistics.layers[0].quantiles))


def test_names_of_a_compiled_model_are_those_of_the_plain_one():
    plain, other = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    for model in (plain, hyperfast.hyperize(other, z_dim=2)):
        rows = analysis.weight_statistics(model).rows()
        assert [row["parameter"] for row in rows][0] == "0.weight"
        assert analysis.weight_statistics(torch.compile(model)).rows() == rows


def test_weights_that_are_not_finite():
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.nan, 1, 2]]))
    (weight,) = analysis.weight_statistics(model).layers
    assert weight.values.nonfinite == 1 and weight.values.mean == 1.5 and weight.quantiles[3] == 1.5


def test_tables():
    statistics = analysis.weight_statistics(nn.Linear(3, 2))
    row = statistics.rows()[0]
    assert (row["parameter"], row["shape"], row["count"], row["threshold"]) == ("weight", "2 x 3", 6, 1e-3)
    assert row["q01"] <= row["q05"] <= row["q50"] <= row["q99"] and row["norm"] > 0
    assert "| weight | 2 x 3 | " in statistics.to_markdown() and "q50" in statistics.to_markdown()
    assert analysis.weight_statistics(nn.ReLU()).rows() == []
