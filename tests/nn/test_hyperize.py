"""Plain layers turned into generated ones, and keep_, on which it rests."""

import copy

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.nn import (
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    TwoLayerGenerator,
    generate_layers,
    hyperize,
    named_generators,
)
from hyperfast.optim import AdamW


def net() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, dilation=2, groups=2, bias=False))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), body, nn.Flatten(), nn.Linear(96, 5))


X = torch.linspace(-1, 1, 2 * 3 * 48).reshape(2, 3, 6, 8)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_and_outputs_stay(backend, factored):
    model = net()
    expected, biases = model(X), [model[0].bias, model[4].bias]
    weights = [model[0].weight, model[2][0].weight, model[4].weight]
    assert hyperize(model, 3, backend=backend) is model
    hyperfast.factored_(model, factored)
    assert [name for name, _ in named_generators(model)] == ["0", "2.0", "4"]
    assert torch.equal(model(X), expected)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(X.to(memory_format=torch.channels_last)), expected)
    made = generate_layers(model).values()
    assert all(torch.equal(w, old) for w, old in zip(made, weights, strict=True))
    assert [model[0].bias, model[4].bias] == biases and model[2][0].bias is None
    assert {g.backend for _, g in named_generators(model)} == {backend}
    assert all(g.z.count_nonzero() == 3 for _, g in named_generators(model))


def test_everything_trains_after_a_kept_start():
    model = hyperfast.factored_(hyperize(net()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, lr=0.01)
    for _ in range(2):  # dz = weight^T dw is 0 in the first
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_first_gradient_of_the_bias_is_that_of_the_weight():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    model(x).square().sum().backward()
    expected = model.weight.grad
    model = hyperize(model, 2)
    assert isinstance(model, HyperLinear)
    model(x).square().sum().backward()
    assert torch.equal(model.generator.bias.grad.view(3, 4), expected)


def test_targets_and_sizes():
    model = hyperize(net(), {"4": 7, "0": 2}, targets=["4", "0"])
    assert {n: g.z_dim for n, g in named_generators(model)} == {"0": 2, "4": 7}
    assert type(model[2][0]) is nn.Conv2d
    with pytest.raises(ValueError, match=r"no nn.Linear or nn.Conv2d named '5'; there are 0, 2.0, 4"):
        hyperize(net(), targets=["0", "5"])
    model = net()
    with pytest.raises(ValueError, match="z_dim has no size for '2.0', it names 0"):
        hyperize(model, {"0": 2})
    assert not list(named_generators(model))  # unchanged


def test_fresh_starts_and_other_generators():
    torch.manual_seed(1)
    model = hyperize(net(), 3, init="hyperfan")
    assert all(g.init == "hyperfan" and g.bias.count_nonzero() == 0 for _, g in named_generators(model))
    model = hyperize(net(), 3, generator=TwoLayerGenerator, init="report")
    assert all(isinstance(g, TwoLayerGenerator) for _, g in named_generators(model))
    assert model(X).shape == (2, 5)
    with pytest.raises(ValueError, match="TwoLayerGenerator cannot start from a given weight"):
        hyperize(net(), generator=TwoLayerGenerator)
    with pytest.raises(ValueError, match="init must be one of"):
        hyperize(net(), init="xavier")


def test_a_layer_under_two_names_stays_one():
    layer = nn.Linear(4, 4)
    model = hyperize(nn.Sequential(layer, nn.Tanh(), layer))
    assert model[0] is model[2] and isinstance(model[0], HyperLinear)


def test_dtype_device_and_mode():
    model = hyperize(net().double().eval())
    assert {p.dtype for p in model.parameters()} == {torch.float64} and not model[0].training
    assert {p.device.type for p in hyperize(net().to("meta")).parameters()} == {"meta"}


def test_special_layers_are_left_alone():
    attention = nn.MultiheadAttention(4, 2)  # reads the weight of its linear layer itself
    assert not list(named_generators(hyperize(attention)))
    with pytest.raises(ValueError, match="padding_mode must be zeros, got 'circular'"):
        hyperize(nn.Conv2d(2, 3, 3, padding_mode="circular"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 7, 16, 600])
def test_keep_is_exact(dtype, K):
    for layer in (HyperConv2d(3, 5, 3, z_dim=K, dtype=dtype), HyperLinear(7, 11, z_dim=K, dtype=dtype)):
        weight = torch.randn(layer.generator.shapes[0], dtype=dtype)
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.generator.keep_(weight)
        assert torch.equal(layer.generated_weight(), weight)


def test_keep_drops_next_weights():
    layer = hyperfast.factored_(HyperLinear(4, 3, z_dim=2))
    optimizer = AdamW(layer, lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    weight = torch.randn(3, 4)
    layer.generator.keep_(weight)
    assert torch.equal(layer.generated_weight(), weight)


def test_keep_refuses():
    with pytest.raises(ValueError, match="without bias"):
        LinearGenerator((3, 4), bias=False).keep_(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"weight must be \[3, 4\], got shape \[4, 3\]"):
        LinearGenerator((3, 4)).keep_(torch.randn(4, 3))
    with pytest.raises(ValueError, match="TwoLayerGenerator cannot start"):
        TwoLayerGenerator((3, 4)).keep_(torch.randn(3, 4))


def test_a_copy_is_independent():
    model = net()
    twin = hyperize(copy.deepcopy(model))
    with torch.no_grad():
        twin[0].generator.bias.add_(1)
    assert not torch.equal(twin(X), model(X))
