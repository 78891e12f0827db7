"""generated_l2_: the gradients of the explicit penalty coefficient / 2 |w|^2, without writing it."""

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
    generated_l2_,
    hyper_layers,
)
from hyperfast.nn.generator import generators
from hyperfast.optim import AdamW

L2 = 0.3


class Net(nn.Module):
    """Linear generators, one shared, one without bias, a two-layer one, and an ordinary layer."""

    def __init__(self, backend="auto"):
        super().__init__()
        shared = LinearGenerator((4, 4), 3, backend=backend)
        bare = LinearGenerator((4, 4), 3, bias=False, backend=backend)
        self.conv = HyperConv2d(2, 4, 3, generator=TwoLayerGenerator((4, 2, 3, 3), 3, backend=backend))
        self.a, self.b = HyperLinear(4, 4, generator=shared), HyperLinear(4, 4, generator=shared)
        self.c, self.d = HyperLinear(4, 4, generator=bare), HyperLinear(4, 4, z_dim=5, backend=backend)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        w = generate_layers(self)
        x = torch.tanh(self.conv(x, w["conv"]).mean((2, 3)))
        for name in "abcd":
            x = torch.tanh(self.get_submodule(name)(x, w[name]))
        return self.out(x)


X = torch.linspace(-1, 1, 5 * 2 * 16, dtype=torch.float64).reshape(5, 2, 4, 4)


def penalty(model):
    made = {id(layer.generator): layer.generated_weight() for _, layer in hyper_layers(model)}
    return sum(L2 / 2 * w.square().sum() for w in made.values())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_explicit_penalty(backend, factored):
    model = Net(backend).double()
    wanted = gradients(model, model(X).square().sum() + penalty(model))
    without = gradients(model, model(X).square().sum())
    assert generated_l2_(model, L2) is model
    assert torch.equal(model(X), copy.deepcopy(model)(X))
    hyperfast.factored_(model, factored)
    got = gradients(model, model(X).square().sum())
    for name, expected in wanted.items():
        if factored and got[name] is None:
            (f,) = model.get_submodule(name.rpartition(".")[0]).factors()
            got[name] = torch.outer(f.bias.grad, f.z.detach())
        torch.testing.assert_close(got[name], expected, rtol=1e-11, atol=1e-13)
        changed = not torch.allclose(expected, without[name])
        assert changed == ("generator" in name), name
    generated_l2_(model, 0)
    again = gradients(hyperfast.factored_(model, False), model(X).square().sum())
    assert all(torch.equal(again[name], g) for name, g in without.items())


def test_twenty_steps_in_factored_mode():
    ours = hyperfast.factored_(generated_l2_(Net().double(), L2))
    plain = hyperfast.factored_(generated_l2_(copy.deepcopy(ours), 0), False)
    fused, stock = AdamW(ours, lr=0.01, max_grad_norm=0.5), torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(20):
        gradients(ours, ours(X).square().sum())
        gradients(plain, plain(X).square().sum() + penalty(plain))
        fused.step()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        stock.step()
        assert fused.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    theirs = plain.state_dict()
    assert max((t - theirs[name]).abs().max() for name, t in ours.state_dict().items()) < 1e-9


@pytest.mark.parametrize("factored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled(factored):
    model = hyperfast.factored_(generated_l2_(Net().double(), L2), factored)
    wanted = gradients(model, model(X).square().sum())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(model, compiled(X).square().sum())
    for name, expected in wanted.items():
        if expected is not None:
            torch.testing.assert_close(got[name], expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_a_layer_on_its_own(rows, factored):
    """Whatever path the layer takes for this number of rows."""
    model = hyperfast.factored_(HyperLinear(96, 64, z_dim=16).double(), factored)
    x = torch.randn(rows, 96, dtype=torch.float64)
    wanted = gradients(model, model(x).square().sum() + L2 / 2 * model.generated_weight().square().sum())
    got = gradients(generated_l2_(model, L2), model(x).square().sum())
    for name, expected in wanted.items():
        assert (expected is None) == (got[name] is None) == (factored and name == "generator.weight")
        if expected is not None:
            torch.testing.assert_close(got[name], expected)


def test_create_graph_and_another_embedding():
    model = generated_l2_(HyperLinear(3, 2, z_dim=3, init="hyperfan").double(), L2)
    x, z = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = model.generator(z)[0]
    (got,) = torch.autograd.grad((x @ w.t()).pow(3).sum(), z, create_graph=True)
    generated_l2_(model, 0)
    w = model.generator(z)[0]
    (wanted,) = torch.autograd.grad((x @ w.t()).pow(3).sum() + L2 / 2 * w.square().sum(), z)
    torch.testing.assert_close(got, wanted)


def test_functional_transforms():
    model = generated_l2_(HyperLinear(3, 2, z_dim=3).double(), L2)
    x = torch.randn(6, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        for name, g in gradients(model, model(row).square().sum()).items():
            torch.testing.assert_close(got[name][i], g)


def test_under_autocast_the_term_keeps_its_precision():
    """Tiny beside dw, it would vanish if it were added in bfloat16."""
    model = HyperLinear(8, 4, z_dim=3)
    x = torch.ones(2, 8)
    grads = []
    for l2 in (0.0, 1e-4):
        generated_l2_(model, l2)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).sum()
        loss.backward()
        grads.append(model.generator.bias.grad.clone())
    wanted = 1e-4 * model.generated_weight().flatten().detach()
    torch.testing.assert_close(grads[1] - grads[0], wanted, rtol=1e-2, atol=1e-6)


def test_copies_keep_it_and_state_dicts_do_not():
    model = generated_l2_(Net(), L2)
    assert {g.l2 for _, g in generators(copy.deepcopy(model))} == {L2}
    assert set(model.state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_bad_coefficients(wrong):
    with pytest.raises(ValueError, match="coefficient must be at least 0 and finite, got"):
        generated_l2_(Net(), wrong)


def test_the_op_wants_one_number_for_each_layer():
    weight, z = torch.randn(4, 3), torch.randn(3)
    with pytest.raises(ValueError, match="l2 must have one number for each of 1 weights, got 2"):
        hyperfast.ops.generate([weight], [None], [z], l2=[0.1, 0.2])
