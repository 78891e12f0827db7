"""A model, changed in every way within `preserved`, is what it was."""

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.analysis import preserve, preserved
from tests.analysis_models import MODELS, everything


def prepared(kind):
    model = MODELS[kind]()
    model(torch.randn(5, 3, 6, 6)).sum().backward()
    module = model.module if kind != "plain" else model
    module.norm.eval()
    return model, module


def disturb(model, module):
    assert all(p.grad is None for p in model.parameters())
    model.train()
    x = torch.randn(5, 3, 6, 6)
    optimizer = hyperfast.optim.SGD(model, lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        module.zeros.neg_()
    module.head.requires_grad_(True)
    module.head.weight = nn.Parameter(torch.zeros(3, 4))
    module.mean = torch.tensor([7.0])
    module.norm.bias.data = torch.ones(4)
    module.second.bias.data.fill_(3.0)
    del module.second.bias
    module.drop = nn.Identity()
    module.eval()
    torch.randn(3)


@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_put_back(kind):
    model, module = prepared(kind)
    before = everything(model)
    with preserved(model):
        disturb(model, module)
        assert everything(model) != before
    assert everything(model) == before


@pytest.mark.parametrize("kind", MODELS)
def test_an_error_within_passes_and_everything_is_put_back(kind):
    model, module = prepared(kind)
    before = everything(model)
    with pytest.raises(ZeroDivisionError), preserved(model):
        disturb(model, module)
        raise ZeroDivisionError
    assert everything(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_whatever_the_caller_does(mode):
    model, module = prepared("plain")
    before = everything(model)
    with mode():
        with preserved(model):
            disturb(model, module)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (
            mode is torch.inference_mode
        )
    assert everything(model) == before


def test_a_graph_of_before_stays_good():
    """What nobody changed is not written, so a backward that began before can end after."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    loss = model(torch.randn(5, 3)).sum()
    with preserved(model):
        model(torch.randn(5, 3)).sum().backward()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_next_weights_of_generators_stay_current_or_are_made_again():
    model = hyperfast.factored_(hyperfast.hyperize(nn.Linear(3, 4), z_dim=2))
    optimizer, x = hyperfast.optim.SGD(model, lr=0.1), torch.randn(5, 3)
    model(x).sum().backward()
    optimizer.step()
    before = model(x)
    with preserved(model):
        model(x).sum().backward()
        optimizer.step()
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        norm = nn.BatchNorm1d(3)
    with torch.inference_mode(), preserved(norm):
        with torch.inference_mode():
            norm(torch.randn(5, 3))
            assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(3))


def test_what_cannot_be_put_back_keeps_nothing_else_from_it(monkeypatch):
    model, module = prepared("plain")
    before = everything(model)
    put_back, calls = preserve._Kept.put_back, []

    def fail_first(kept):
        put_back(kept)
        calls.append(kept)
        if len(calls) == 1:
            raise ZeroDivisionError

    monkeypatch.setattr(preserve._Kept, "put_back", fail_first)
    with pytest.raises(ZeroDivisionError), preserved(model):
        disturb(model, module)
    assert everything(model) == before and len(calls) > 2


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused_untouched():
    scripted = torch.jit.trace(nn.Linear(3, 2), torch.randn(1, 3))
    for model, words in ((scripted, "it is a"), (nn.Sequential(nn.ReLU(), scripted), "module '1' is a")):
        with pytest.raises(TypeError, match=words), preserved(model):
            raise AssertionError
        assert model(torch.randn(4, 3)).shape == (4, 2)
