"""TwoLayerGenerator: the mathematics, the protocol, and the company of linear generators."""

import copy
import math

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.factored import generator_of
from hyperfast.nn import (
    HyperConv2d,
    HyperLinear,
    TwoLayerGenerator,
    generate_layers,
    parameter_counts,
    plain_state_dict,
)
from hyperfast.optim import AdamW


def kernel(g: TwoLayerGenerator, shape) -> torch.Tensor:
    """Element by element: a[i, k] = sum_j z[j] w2[j, i K + k] + b2, then a w1 + b1, in order into shape."""
    K, rows = g.z.numel(), shape[1]
    a = (g.z[:, None] * g.w2).sum(0) + g.b2
    out = torch.stack([sum(a[i * K + k] * g.w1[k] for k in range(K)) + g.b1 for i in range(rows)])
    return out.flatten().reshape(shape)


@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (1, 1), (7, 2), (4, 6, 1, 1), (2, 5, 3)])
@pytest.mark.parametrize("K", [1, 3, 8])
def test_forward_and_gradients(shape, K):
    g = TwoLayerGenerator(shape, K, init="hyperfan", dtype=torch.float64)
    for p in (g.b1, g.b2):
        nn.init.normal_(p)
    made, wanted = g()[0], kernel(g, shape)
    torch.testing.assert_close(made, wanted)
    seed, parameters = torch.randn(shape, dtype=torch.float64), list(g.parameters())
    got = torch.autograd.grad(made, parameters, seed)
    for a, b in zip(got, torch.autograd.grad(wanted, parameters, seed), strict=True):
        torch.testing.assert_close(a, b)


def test_names_and_sizes_of_has_example():
    g = TwoLayerGenerator((16, 16, 7, 7), 4)  # MNIST, 4,244 parameters instead of 12,544 weights
    assert {n: tuple(p.shape) for n, p in g.named_parameters()} == {
        "z": (4,), "w2": (4, 64), "b2": (64,), "w1": (4, 784), "b1": (784,),
    }  # fmt: skip
    counts = parameter_counts(HyperConv2d(16, 16, 7, generator=g))
    assert counts == {"total": 4244 + 16, "generator": 4240, "embedding": 4, "generated": 12_544, "other": 16}


def test_another_embedding():
    g, z = TwoLayerGenerator((3, 2), 4), torch.randn(4, requires_grad=True)
    g.init = "hyperfan"
    g.reset_parameters()
    (made,) = g(z)
    with torch.no_grad():
        g.z.copy_(z)
    torch.testing.assert_close(made, g()[0])
    made.sum().backward()
    assert g.z.grad is None and z.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"z must be \[4\], got shape \[5\]"):
        g(torch.randn(5))


@pytest.mark.parametrize("name", ["hyperfan", "he_bias"])
@pytest.mark.parametrize("K", [4, 64])
def test_hyperfan_makes_hes_variance(name, K):
    for _ in range(10):
        made = TwoLayerGenerator((64, 32, 3, 3), K, init=name)()[0]
        assert abs(made.std().item() / math.sqrt(2 / (32 * 9)) - 1) < 0.15


def test_report_and_kaiming():
    g = TwoLayerGenerator((64, 32, 5, 5), 8, init="report")
    assert all(p.std().item() == pytest.approx(0.01, rel=0.1) for p in (g.w1, g.w2))
    assert g.b1.count_nonzero() == g.b2.count_nonzero() == 0 and g.z.abs().max() < 0.05
    g = TwoLayerGenerator((64, 32, 5, 5), 8, init="kaiming")
    assert all(p.std().item() == pytest.approx(0.5, rel=0.1) for p in (g.w1, g.w2))


def net() -> nn.Module:
    return nn.Sequential(
        HyperConv2d(2, 4, 3, generator=TwoLayerGenerator((4, 2, 3, 3), 3)),
        nn.Flatten(),
        HyperLinear(16, 3, z_dim=3),
    ).double()


def test_beside_factored_generators_it_trains_dense():
    model, x = hyperfast.factored_(net()), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    twin = hyperfast.factored_(copy.deepcopy(model), False)
    two = model[0].generator
    assert not two.factored and two.factors() == [] and model[2].generator.factored
    assert all(generator_of(p) is None for p in two.parameters())
    ours = AdamW(model, lr=0.01, max_grad_norm=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for _ in range(20):
        for m in (model, twin):
            m.zero_grad()
            m(x).square().sum().backward()
        ours.step()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-9
    assert all(p.grad is not None for p in two.parameters())


def test_generated_together_and_as_plain_weights():
    model = net()
    made = generate_layers(model)
    assert torch.equal(made["0"], model[0].generated_weight())
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    plain.load_state_dict(plain_state_dict(model))
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x))


def test_parameter_groups():
    groups = {g["name"]: g["params"] for g in hyperfast.param_groups(net()[0])}
    assert [p.dim() for p in groups["weight"]] == [2, 2] and [p.dim() for p in groups["bias"]] == [1, 1]
    assert [tuple(p.shape) for p in groups["z"]] == [(3,)] and len(groups["other"]) == 1


def test_copies_and_conversion():
    model = hyperfast.factored_(net())
    twin = copy.deepcopy(model).float()
    x = torch.randn(5, 2, 4, 4)
    torch.testing.assert_close(twin(x), model(x.double()).float())
    hyperfast.invalidate(model)
    twin.load_state_dict(model.state_dict())


def test_compiled():
    model, x = net(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(("shape", "K"), [((4,), 3), ((4, 0), 3), ((4, 2), 0), ((), 3)])
def test_bad_sizes(shape, K):
    with pytest.raises(ValueError, match=r"at least 1|\(out, in, \*kernel\)"):
        TwoLayerGenerator(shape, K)
    with pytest.raises(ValueError, match="init must be one of"):
        TwoLayerGenerator((4, 2), init="xavier")
    with pytest.raises(ValueError, match="backend must be one of"):
        TwoLayerGenerator((4, 2), backend="gpu")
    with pytest.raises(ValueError, match="generator of one weight"):
        HyperLinear(2, 5, generator=TwoLayerGenerator((4, 2)))


def test_it_generates_in_the_memory_format_its_network_has():
    generator = TwoLayerGenerator([(4, 6, 3, 3), (2, 3, 3, 3)], 5, 7, (2, 3, 3, 3))
    before = generator()
    generator.to(memory_format=torch.channels_last).double().float()
    generator = copy.deepcopy(generator)
    after = generator()
    for old, new in zip(before, after, strict=True):
        assert new.is_contiguous(memory_format=torch.channels_last) and not new.is_contiguous()
        assert torch.equal(old, new)
    generator.to(memory_format=torch.contiguous_format)
    assert all(w.is_contiguous() for w in generator())
