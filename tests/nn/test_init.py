"""Initialisations of generators."""

import math

import pytest
import torch

from hyperfast.nn import HyperConv2d, LinearGenerator, SharedCoreGenerator, init


def generated(name: str, K: int = 16, bias: bool = True) -> tuple[LinearGenerator, torch.Tensor]:
    """A generator for a layer of fan_in 9 * 32 and what it makes."""
    g = LinearGenerator((64, 32, 3, 3), K, bias, init=name)
    return g, g()[0].detach()


def test_report():
    g, _ = generated("report")
    assert abs(g.weight.std().item() / 0.01 - 1) < 0.02 and abs(g.weight.mean().item()) < 1e-4
    assert g.bias.count_nonzero() == 0
    assert 0.003 < g.z.std().item() < 0.03


@pytest.mark.parametrize("K", [4, 16])
def test_kaiming(K):
    g, _ = generated("kaiming", K)
    assert abs(g.weight.std().item() / math.sqrt(2 / K) - 1) < 0.02
    assert g.bias.count_nonzero() == 0 and g.z.abs().max() < 0.05


@pytest.mark.parametrize("K", [4, 64])
@pytest.mark.parametrize("name, fan", [("hyperfan", 32 * 9), ("hyperfan_out", 64 * 9)])
def test_hyperfan_makes_hes_variance(name, fan, K):
    for _ in range(10):  # whatever z is
        assert abs(generated(name, K)[1].std().item() / math.sqrt(2 / fan) - 1) < 0.05
    assert generated(name)[0].bias.count_nonzero() == 0


def test_he_bias_makes_hes_variance():
    g, made = generated("he_bias")
    assert abs(made.std().item() / math.sqrt(2 / (32 * 9)) - 1) < 0.02
    assert g.weight.std() < 0.011


def test_he_bias_without_a_bias_is_hyperfan():
    torch.manual_seed(1)
    expected = generated("hyperfan", bias=False)[1]
    torch.manual_seed(1)
    assert torch.equal(generated("he_bias", bias=False)[1], expected)


def test_fan_in_of_a_grouped_convolution():
    layer = HyperConv2d(32, 64, 3, groups=8, init="he_bias")
    assert layer.generator.fan == 4 * 9
    assert abs(layer.generator.bias.std().item() / math.sqrt(2 / 36) - 1) < 0.05


@pytest.mark.parametrize("name", init.INITIALISATIONS)
def test_seeded_and_repeatable(name):
    torch.manual_seed(3)
    g, made = generated(name)
    torch.manual_seed(3)
    g.reset_parameters()
    assert torch.equal(g()[0], made)


def test_names():
    assert init.check(None) == init.DEFAULT and init.DEFAULT in init.INITIALISATIONS
    with pytest.raises(
        ValueError, match="init must be one of report, hyperfan, hyperfan_out, he_bias, kaiming, got 'xavier'"
    ):
        LinearGenerator((2, 2), init="xavier")
    with pytest.raises(ValueError, match="init must be one of"):
        HyperConv2d(2, 2, 3, init="He")


def test_heads_of_a_shared_core_start_small_with_he_bias():
    """h of std 0.01, as the z of a linear generator: at norm 1 Adam moves generated weights by many lr."""
    for name, low, high in (("he_bias", 0.005, 0.02), ("hyperfan", 0.08, 0.25)):
        torch.manual_seed(0)
        g = SharedCoreGenerator([(4, 3), (5, 2)], z_dim=4, hidden_dim=64, init=name)
        g()
        for head in g.heads:
            assert low < head.z.std() < high
