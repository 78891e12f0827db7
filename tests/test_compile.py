"""torch.compile(fullgraph=True): outputs, gradients and training equal eager mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import hyperfast
from hyperfast import ops
from hyperfast.nn import HyperConv2d, HyperLinear, LinearGenerator, generate_layers
from hyperfast.optim import AdamW

X = torch.linspace(-1, 1, 3 * 2 * 16, dtype=torch.float64).reshape(3, 2, 4, 4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """All layers generated in one launch, as in `train.models`; `unused` is a layer forward leaves out."""

    def __init__(self, unused: bool = False):
        super().__init__()
        self.conv = HyperConv2d(2, 3, 3, padding=1, z_dim=3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = HyperLinear(3, 4, generator=LinearGenerator((4, 3), 5, bias=False, init="hyperfan"))
        self.unused = HyperLinear(2, 2, z_dim=2) if unused else None

    def forward(self, x):
        weights = generate_layers(self)
        x = F.relu(self.norm(self.conv(x, weights["conv"]))).mean((2, 3))
        return self.fc(x, weights["fc"])


class Layers(nn.Module):
    """Every layer generates its own weight; `b` and `c` share a generator."""

    def __init__(self):
        super().__init__()
        self.a = HyperConv2d(2, 4, 3, stride=2, z_dim=3)
        self.b = HyperLinear(4, 4, z_dim=2)
        self.c = HyperLinear(4, 4, bias=False, generator=self.b.generator)

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.a(x).flatten(1))))


def assert_same_gradients(model, twin, atol=1e-12):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-9, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("make", [Net, Layers])
def test_outputs_and_gradients(make, factored):
    model = hyperfast.factored_(make().double(), factored)
    twin = copy.deepcopy(model)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    expected = twin(y)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward(), expected.square().sum().backward()
    assert_same_gradients(model, twin)
    torch.testing.assert_close(x.grad, y.grad)


def test_inductor():
    model = hyperfast.factored_(Net().double())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    optimizer, reference = AdamW(model, lr=0.1), AdamW(twin, lr=0.1)
    for i in range(3):
        for net, o in ((compiled, optimizer), (twin, reference)):
            o.zero_grad()
            net(X + i).square().sum().backward()
        assert_same_gradients(model, twin, 1e-10)
        optimizer.step(), reference.step()


@pytest.mark.parametrize("factored", [False, True])
def test_training_without_endless_recompiles(factored, assert_equal_parameters):
    model = hyperfast.factored_(Net().double(), factored)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer, reference = AdamW(model, lr=0.1, max_grad_norm=1.0), AdamW(twin, lr=0.1, max_grad_norm=1.0)
    for i in range(12):
        if i in (6, 9):  # the next weights go and come again
            hyperfast.invalidate(model)
        for net, o in ((compiled, optimizer), (twin, reference)):
            o.zero_grad()
            net(X * (i + 1)).square().sum().backward()
            o.step()
    assert_equal_parameters(model, twin, 1e-9)
    assert (
        counter.frame_count <= 3
    )  # without next weights and with them; a buffer that changed address at most once


def test_next_weights_are_used_and_dropped():
    layer = hyperfast.factored_(HyperLinear(4, 3, z_dim=5).double())
    optimizer = AdamW(layer, lr=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.eye(4, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(x).sum().backward()
        optimizer.step()
    layer.generator.next_weight.data.fill_(7.0)  # unseen by autograd, so its use shows
    assert torch.equal(compiled(x) - layer.bias, torch.full((4, 3), 7.0).double())
    with torch.no_grad():
        layer.generator.z.mul_(2)
    torch.testing.assert_close(compiled(x), layer(x))
    assert not (compiled(x) - layer.bias == 7.0).any()
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))


def test_an_unused_layer():
    """Eager mode leaves its gradients None, as torch's layers do; the compiler makes zeros of them."""
    model = Net(unused=True).double()
    twin = copy.deepcopy(model)
    twin(X).square().sum().backward()
    assert all((p.grad is None) == name.startswith("unused") for name, p in twin.named_parameters())
    torch.compile(model, fullgraph=True, backend="aot_eager")(X).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("unused"):
            assert p.grad is None or p.grad.count_nonzero() == 0
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_the_same_tensor_twice():
    def f(weight, bias, z):
        made = ops.generate([weight, weight], [bias, z], [z, z])
        return made[0].sum() + made[1].pow(3).sum()

    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 4), (4,), (4,))]
    expected = torch.autograd.grad(f(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("factored", [False, True])
def test_autocast(factored):
    model = hyperfast.factored_(Net(), factored)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for net in (compiled, twin):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(net(X.float()))
        outputs[-1].float().square().sum().backward()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad - q.grad).norm() <= 0.02 * q.grad.norm()


def test_frozen_parts_and_inference():
    model = hyperfast.factored_(Layers().double())
    model.b.generator.z.requires_grad_(False)
    model.a.generator.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(X).square().sum().backward(), twin(X).square().sum().backward()
    assert_same_gradients(model, twin)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), twin(X))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), twin(X))


def test_dynamic_batch():
    model = hyperfast.factored_(Net().double()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 5):
        x = X[:1].expand(rows, 2, 4, 4)
        torch.testing.assert_close(compiled(x), model(x))


def test_export():
    model = Net().double().eval()
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # graph breaks are fine here
def test_adamw_generate_compiles():
    def problem():
        generator = torch.Generator().manual_seed(0)
        shapes = ((5, 3), (5, 3), (5, 3), (5,), (5,), (5,), (5,), (3,), (3,), (5,))
        return [[torch.rand(s, generator=generator)] for s in shapes]

    def step(*lists):
        row = ops.AdamWCoefficients(0.9, 0.1, 0.9, 0.99, 0.5, 1e-8)
        ops.adamw_generate(*lists, [row], [row])

    ours, theirs = problem(), problem()
    torch.compile(step, backend="aot_eager")(*ours)
    step(*theirs)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
