"""NesterovSGD against torch.optim.SGD(nesterov=True), which it is to equal."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tests.train.recorded import RecordedGraph
from train import optimizers
from train.graph import WARM_UP, GraphedStep
from train.optimizers import NesterovSGD

OPTIONS = [{"lr": 0.05}, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.03}]


def net(dtype=torch.float64):
    """One kernel in channels_last; the last layer takes no part, so that its gradients are None."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.Linear(2, 2)
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)


def steps(network, optimizer, count, seed=0):
    chance = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(5, 3, 6, 6, generator=chance, dtype=torch.float64)
        network[:-1](x.to(network[0].weight.dtype)).square().mean().backward()
        optimizer.step()


def theirs(parameters, options, **more):
    return torch.optim.SGD(parameters, **{"momentum": 0.9} | options, nesterov=True, **more)


def assert_equal(a, b, tolerance=0.0):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_torchs_sgd(options):
    a, b = net(), net()
    ours, torchs = NesterovSGD(a.parameters(), **options), theirs(b.parameters(), options)
    steps(a, ours, 10)
    steps(b, torchs, 10)
    assert_equal(a, b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (p not in ours.state) == (q not in torchs.state)
        if p in ours.state:
            assert torch.equal(ours.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"])
    plain = net()
    steps(plain, torch.optim.SGD(plain.parameters(), **{"momentum": 0.9} | options), 10)
    assert not torch.equal(plain[0].weight, a[0].weight)  # the comparison can tell Nesterov's momentum


def test_groups_have_their_own_options():
    a, b = net(), net()
    groups = [[dict(params=n[:2].parameters(), lr=0.2, weight_decay=0.1), dict(params=n[2:].parameters())]
              for n in (a, b)]  # fmt: skip
    steps(a, NesterovSGD(groups[0], **OPTIONS[0]), 5)
    steps(b, theirs(groups[1], OPTIONS[0]), 5)
    assert_equal(a, b)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_tensor_as_learning_rate(options):
    """Read in every step, one element of any shape; equal to rounding."""
    a, b = net(), net()
    lr = torch.tensor([options["lr"]], dtype=torch.float64)
    ours, torchs = NesterovSGD(a.parameters(), **options | {"lr": lr}), theirs(b.parameters(), options)
    for seed in range(3):
        steps(a, ours, 2, seed)
        steps(b, torchs, 2, seed)
        lr /= 2
        torchs.param_groups[0]["lr"] /= 2
    assert_equal(a, b, 1e-14)


def test_parameters_of_several_dtypes():
    a, b = (nn.ModuleList([net(), net(torch.float32)]) for _ in range(2))
    ours, torchs = NesterovSGD(a.parameters(), **OPTIONS[1]), theirs(b.parameters(), OPTIONS[1])
    for network, optimizer in ((a, ours), (b, torchs)):
        for part in network:
            steps(part, optimizer, 2)
    assert_equal(a, b)


@pytest.mark.parametrize("from_torch", [True, False])
def test_state_goes_on_in_torch_and_back(from_torch):
    a, b, whole = net(), net(), net()
    kinds = theirs, lambda parameters, options: NesterovSGD(parameters, **options)
    first, second = kinds if from_torch else kinds[::-1]
    before, after = first(a.parameters(), OPTIONS[1]), second(b.parameters(), {"lr": 9.0})
    steps(a, before, 3)
    b.load_state_dict(a.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    steps(b, after, 3, seed=5)
    torchs = theirs(whole.parameters(), OPTIONS[1])
    steps(whole, torchs, 3)
    steps(whole, torchs, 3, seed=5)
    assert_equal(b, whole)
    again = copy.deepcopy(after)
    assert again.param_groups[0]["lr"] == 0.1


def test_states_of_other_methods_are_refused():
    a = net()
    for options in ({"nesterov": False}, {"nesterov": False, "dampening": 0.1}, {"maximize": True}):
        other = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9, **{"nesterov": True} | options)
        ours = NesterovSGD(a.parameters())
        with pytest.raises(ValueError, match="has Nesterov momentum without dampening and minimizes"):
            ours.load_state_dict(other.state_dict())
        assert ours.param_groups[0]["nesterov"]


def test_bad_input():
    a = net()
    for options, message in (
        ({"lr": -1.0}, "lr must be at least 0, got lr -1.0"),
        ({"momentum": 0.0}, "momentum must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            NesterovSGD(a.parameters(), **options)
    ours = NesterovSGD(a[0].parameters())
    with pytest.raises(ValueError, match="momentum must be above 0"):
        ours.add_param_group({"params": a[4].parameters(), "momentum": -1.0})
    assert len(ours.param_groups) == 1
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="takes no sparse gradients"):
        NesterovSGD(sparse.parameters()).step()


def test_a_closure_and_no_gradients():
    a = net()
    ours = NesterovSGD(a.parameters())
    assert ours.step() is None and not ours.state

    def closure():
        ours.zero_grad()
        loss = a[:-1](torch.ones(2, 3, 6, 6, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    first = ours.step(closure)
    assert ours.step(closure) < first


# ---- graphs ----


def test_steps_in_a_graph():
    """A recorded graph refuses whatever looks into a tensor, and replays with the rate of then."""
    nets, lr = (net(), net()), torch.tensor(0.1, dtype=torch.float64)
    ours = [NesterovSGD(n.parameters(), lr, weight_decay=0.1, capturable=True) for n in nets]

    def step_of(network, optimizer):
        def step(x, y):
            optimizer.zero_grad()
            loss = (network[:-1](x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    eager, graphed = step_of(nets[0], ours[0]), GraphedStep(step_of(nets[1], ours[1]), RecordedGraph())
    for i in range(WARM_UP + 4):
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
        lr.fill_(0.1 / (1 + i))
        for step in (eager, graphed):
            step(x, torch.ones(5, 3, dtype=torch.float64))
    assert graphed.captured
    assert_equal(*nets)


def test_captures_that_would_replay_a_wrong_step(monkeypatch):
    a = net()
    a[:-1](torch.ones(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    monkeypatch.setattr(optimizers, "is_capturing", lambda device: True)
    for capturable, message in ((False, "needs capturable=True"), (True, "take one step outside")):
        ours = NesterovSGD(a.parameters(), capturable=capturable)
        with pytest.raises(RuntimeError, match=message):
            ours.step()
    monkeypatch.undo()
    ours.step()
    monkeypatch.setattr(optimizers, "is_capturing", lambda device: True)
    ours.step()


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla")
def test_nothing_waits_for_a_gpu():
    """Tensors of a GPU without contents: reading one raises."""
    with FakeTensorMode():
        params = [torch.zeros(3, 4, device="cuda", requires_grad=True) for _ in range(3)]
        lr = torch.zeros((), device="cuda")
        ours = NesterovSGD(params, lr, weight_decay=0.1, capturable=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            ours.step()
        assert all(s["momentum_buffer"].device.type == "cuda" for s in ours.state.values())
        with pytest.raises(RuntimeError, match="local_scalar_dense"):
            float(lr)
