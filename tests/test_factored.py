"""factored_, invalidate and the guards around factored weights."""

import copy
import gc

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import nn

import hyperfast
from hyperfast import factored
from hyperfast.nn import HyperLinear, LinearGenerator
from hyperfast.nn.generator import generators
from hyperfast.optim import AdamW

X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)


def net() -> nn.Sequential:
    bare = HyperLinear(4, 3, generator=LinearGenerator((3, 4), 5, bias=False))
    return nn.Sequential(HyperLinear(4, 4, z_dim=3), nn.Tanh(), bare, nn.Linear(3, 2)).double()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(X).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_factors_make_the_dense_gradients():
    dense, ours = net(), None
    ours = hyperfast.factored_(copy.deepcopy(dense))
    expected, got = gradients(dense), gradients(ours)
    for name, grad in expected.items():
        if not name.endswith("generator.weight"):
            torch.testing.assert_close(got[name], grad)
    for i in (0, 2):
        assert got[f"{i}.generator.weight"] is None
        (f,) = ours[i].generator.factors()
        torch.testing.assert_close(torch.outer(f.bias.grad, f.z.detach()), expected[f"{i}.generator.weight"])
        assert f.weight is ours[i].generator.weight and f.z is ours[i].generator.z and f.z_is_parameter
        assert f.bias_is_trained == (i == 0)
    assert dense[0].generator.factors() == []


def test_returns_the_module_and_can_be_undone():
    model = net()
    names, state = [n for n, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    assert hyperfast.factored_(model) is model
    assert hyperfast.factored_(model) is model  # twice is once
    assert all(g.factored for _, g in generators(model))
    assert hyperfast.factored_(model, False) is model
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(grad is not None for grad in gradients(model).values())


def test_models_without_generators():
    plain = nn.Linear(2, 2)
    assert hyperfast.factored_(plain) is plain
    hyperfast.invalidate(plain)


def test_on_a_part_of_a_model():
    model = net()
    hyperfast.factored_(model[0])
    got = gradients(model)
    assert got["0.generator.weight"] is None and got["2.generator.weight"] is not None
    AdamW(model).step()


def test_an_error_switches_nothing():
    model = net()
    model.append(HyperLinear(2, 2).double())
    model[-1].generator.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen bias"):
        hyperfast.factored_(model)
    assert not any(g.factored for _, g in generators(model))
    assert all(p.grad is not None for p in model.parameters() if gradients(model) and p.requires_grad)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_generator_that_stands_alone():
    g = hyperfast.factored_(LinearGenerator((3, 4), 5))
    g()[0].square().sum().backward()
    before = g.weight.detach().clone()
    AdamW(g, lr=0.1).step()
    assert not torch.equal(g.weight, before)


class TestStandIns:
    """What takes the place of a missing bias."""

    def test_is_no_part_of_the_state(self):
        model = net()
        names = set(model.state_dict())
        hyperfast.factored_(model)
        assert set(model.state_dict()) == names
        model.load_state_dict(model.state_dict())
        fresh = net()
        fresh.load_state_dict(model.state_dict())
        model.load_state_dict(fresh.state_dict(), assign=True)
        missing = model.load_state_dict({}, strict=False).missing_keys
        assert set(missing) == names

    def test_still_misses_what_is_missing(self):
        model = hyperfast.factored_(net())
        state = model.state_dict()
        state["2.generator.more"] = state.pop("2.generator.z")
        with pytest.raises(
            RuntimeError, match=r"(?s)Missing.*2\.generator\.z.*Unexpected.*2\.generator\.more"
        ):
            model.load_state_dict(state)

    @pytest.mark.parametrize("how", ["deepcopy", "double", "load assign"])
    def test_survives(self, how):
        model = hyperfast.factored_(net())
        if how == "deepcopy":
            model = copy.deepcopy(model)
        elif how == "double":
            model = model.float().double()
        else:
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        optimizer = AdamW(model, lr=0.1)
        before = model[2].generator.weight.detach().clone()
        gradients(model)
        optimizer.step()
        (f,) = model[2].generator.factors()
        assert factored.is_stand_in(f.bias) and f.bias.count_nonzero() == 0
        assert not torch.equal(model[2].generator.weight, before)

    def test_is_dropped_with_factored_mode(self):
        model = hyperfast.factored_(net())
        stand_in = model[2].generator.factors()[0].bias
        hyperfast.factored_(model, False)
        assert all(p is not stand_in for p in model.parameters())


class TestRegister:
    def test_forgets_dead_models(self):
        gc.collect()
        before = len(factored._generators), len(factored._stand_ins)
        model = hyperfast.factored_(net())
        assert len(factored._generators) == before[0] + 2
        del model
        gc.collect()
        assert (len(factored._generators), len(factored._stand_ins)) == before

    def test_a_shallow_copy_that_dies_takes_nothing_with_it(self):
        layer = hyperfast.factored_(HyperLinear(4, 3))
        copied = copy.copy(layer.generator)
        del copied
        gc.collect()
        assert factored.generator_of(layer.generator.weight) is layer.generator

    def test_switching_a_shallow_copy_off_leaves_the_original(self):
        layer = hyperfast.factored_(HyperLinear(4, 3))
        hyperfast.factored_(copy.copy(layer.generator), False)
        assert factored.generator_of(layer.generator.weight) is layer.generator

    def test_a_replaced_weight_is_known_and_the_old_one_is_not(self):
        layer = hyperfast.factored_(HyperLinear(4, 3))
        old = layer.generator.weight
        layer.generator.weight = nn.Parameter(torch.randn(12, 16))
        assert factored.generator_of(old) is None
        assert factored.generator_of(layer.generator.weight) is layer.generator

    def test_assigned_weights_are_known(self):
        layer = hyperfast.factored_(HyperLinear(4, 3))
        old = layer.generator.weight
        layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
        assert layer.generator.weight is not old
        assert factored.generator_of(layer.generator.weight) is layer.generator
        assert factored.generator_of(old) is None

    def test_parameters_swapped_on_conversion(self):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer = hyperfast.factored_(HyperLinear(4, 3)).double()
            optimizer = AdamW(layer)
            layer(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            layer.float()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert factored.generator_of(layer.generator.weight) is layer.generator
        assert layer.generator.weight.dtype == torch.float32


def test_lists_the_weights_that_ddp_ignores():
    model = net()
    model._ddp_params_and_buffers_to_ignore = ["3.bias"]  # somebody else's wish
    hyperfast.factored_(model)
    assert set(model._ddp_params_and_buffers_to_ignore) == {
        "0.generator.weight",
        "2.generator.weight",
        "3.bias",
    }
    hyperfast.factored_(model, False)
    assert set(model._ddp_params_and_buffers_to_ignore) == {"3.bias"}


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class TestRefusals:
    """A weight computed from something else has no factored gradient: nothing may pass for trained."""

    def test_parametrised_weight(self):
        layer = HyperLinear(4, 3)
        torch.nn.utils.parametrize.register_parametrization(layer.generator, "weight", Doubled())
        layer(X.float()).sum().backward()
        assert layer.generator.parametrizations.weight.original.grad is not None  # dense is fine
        with pytest.raises(ValueError, match="weight"):
            hyperfast.factored_(layer)
            AdamW(layer)

    def test_weight_parametrised_or_pruned_later(self):
        for change in (
            lambda g: torch.nn.utils.parametrize.register_parametrization(g, "weight", Doubled()),
            lambda g: torch.nn.utils.prune.random_unstructured(g, "weight", 0.5),
        ):
            layer = hyperfast.factored_(HyperLinear(4, 3))
            with pytest.raises(ValueError, match="weight"):
                change(layer.generator)
                layer(X.float()).sum().backward()
                AdamW(layer).step()
