"""clip_grad_norm_ of factored gradients against torch's on the dense ones."""

import copy

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.nn import HyperLinear, LinearGenerator
from hyperfast.optim import clip_grad_norm_

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)


def net() -> nn.Module:
    bare = HyperLinear(4, 3, generator=LinearGenerator((3, 4), 5, bias=False, init="hyperfan"))
    return nn.Sequential(HyperLinear(4, 4, z_dim=3), nn.Tanh(), bare, nn.Linear(3, 2)).double()


@pytest.fixture
def pair(plain_twin):
    ours = net()
    theirs = plain_twin(ours)
    hyperfast.factored_(ours)
    for model in (ours, theirs):
        model(X).square().sum().backward()
    return ours, theirs


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, float("inf"), 0.5])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("given", ["model", "parameters", "generator"])
def test_equals_torch_on_the_dense_gradients(norm_type, max_norm, given, pair):
    ours, theirs = pair
    arguments = {"model": ours, "parameters": list(ours.parameters()), "generator": ours.parameters()}
    got = clip_grad_norm_(arguments[given], max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for i in (0, 2):
        g, h = ours[i].generator, theirs[i].generator
        dense = torch.outer(g.factors()[0].bias.grad, g.z.detach())
        torch.testing.assert_close(dense, h.weight.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(g.z.grad, h.z.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(ours[i].bias.grad, theirs[i].bias.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        ours[0].generator.bias.grad, theirs[0].generator.bias.grad, rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(ours[3].weight.grad, theirs[3].weight.grad, rtol=1e-12, atol=1e-15)


def test_dense_models_and_single_tensors():
    model = net()
    model(X).sum().backward()
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    got = clip_grad_norm_(model, 0.1)
    torch.testing.assert_close(got, torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 4.0, 0.0])
    assert clip_grad_norm_(p, 1.0).item() == 5.0
    torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))


def test_no_gradients():
    assert clip_grad_norm_(hyperfast.factored_(net()), 1.0).item() == 0.0
    assert clip_grad_norm_([], 1.0).item() == 0.0


def test_a_frozen_weight_does_not_count(plain_twin):
    for i in (0, 2):
        ours = net()
        theirs = plain_twin(ours)
        hyperfast.factored_(ours)
        ours[i].generator.weight.requires_grad_(False), theirs[i].generator.weight.requires_grad_(False)
        for model in (ours, theirs):
            model(X).square().sum().backward()
        got, expected = clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("where", ["dw", "z"])
def test_nonfinite(where, pair):
    ours, _ = pair
    g = ours[0].generator
    (g.bias if where == "dw" else g.z).grad[0] = float("nan")
    before = ours[3].weight.grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert torch.equal(ours[3].weight.grad, before)
    assert clip_grad_norm_(ours, 1.0).isnan()


def test_large_gradients_do_not_overflow():
    """float32: |dw| and |z| each fit, and so does their product."""
    layer = hyperfast.factored_(HyperLinear(4, 3, z_dim=2))
    layer(torch.full((1, 4), 1e15)).sum().backward()
    got = clip_grad_norm_(layer, 1.0)
    g = layer.generator
    dense = torch.outer(g.bias.grad, g.z.detach())
    assert got.isfinite() and dense.isfinite().all()
    torch.testing.assert_close(
        sum(p.grad.norm() ** 2 for p in (g.bias, g.z, layer.bias)) + dense.norm() ** 2,
        torch.tensor(1.0),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("missing", ["bias", "z", "carrier"])
def test_a_missing_part_raises_and_clips_nothing(missing, pair):
    ours, _ = pair
    g = ours[2 if missing == "carrier" else 0].generator
    rest = [p for p in ours.parameters() if p is not getattr(g, missing)]
    before = [None if p.grad is None else p.grad.clone() for p in rest]
    with pytest.raises(ValueError, match="without its " + missing.replace("carrier", "bias")):
        clip_grad_norm_(rest, 1e-3)
    assert all(b is None or torch.equal(p.grad, b) for p, b in zip(rest, before, strict=True))


def test_numbers_are_what_torch_takes_for_numbers(pair):
    ours, theirs = pair
    for max_norm in (2**70, "1.5", torch.tensor(0.5)):
        torch.testing.assert_close(
            clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        )
    for max_norm in (None, 1j, torch.ones(2)):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            clip_grad_norm_(ours, max_norm)
