"""capturable=True: the same steps as without, no wait for the device, and all of it in a CUDA graph."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR

import hyperfast
from hyperfast.nn import HyperLinear, named_generators
from hyperfast.optim import SGD, Adam, AdamW
from hyperfast.states import EightBit
from tests.optim.net import CLIP, Net, backward, batch, train_step

VARIANTS = {
    "AdamW": (AdamW, {"lr": 1e-2, "weight_decay": 0.05}),
    "Adam": (Adam, {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "SGD": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "Nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
}
TORCH = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW, SGD: torch.optim.SGD}
STATE_DTYPES = [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow), "8bit"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=VARIANTS)
def make(request):
    """make(model, **more): an optimizer"""
    kind, options = VARIANTS[request.param]
    return lambda net, **more: kind(net, **{**options, **more})


def new_net(dtype=torch.float64, device="cpu"):
    torch.manual_seed(7)
    net = Net().to(dtype)
    for _, generator in named_generators(net):
        nn.init.normal_(generator.z, std=0.3)
    return hyperfast.factored_(net).to(device)


def assert_equal(ours, theirs, tolerance=0.0):
    """Models and optimizers: parameters, buffers and states, step counters included."""
    for name, expected in theirs[0].state_dict().items():
        torch.testing.assert_close(ours[0].state_dict()[name], expected, rtol=0, atol=tolerance, msg=name)
    got, expected = (o.state_dict()["state"] for _, o in (ours, theirs))
    assert got.keys() == expected.keys()
    for i in expected:
        for name in expected[i].keys() - {"step"}:
            torch.testing.assert_close(got[i][name], expected[i][name], rtol=0, atol=tolerance)
        if "step" in expected[i]:
            assert got[i]["step"].item() == expected[i]["step"].item()


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestEqualsTheOrdinaryStep:
    @pytest.mark.parametrize("clip", [None, CLIP])
    def test_twenty_steps(self, make, clip):
        ours, theirs = new_net(), new_net()
        a, b = make(ours, max_grad_norm=clip, capturable=True), make(theirs, max_grad_norm=clip)
        for i in range(20):
            losses = train_step(ours, a, i), train_step(theirs, b, i)
            torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        assert_equal((ours, a), (theirs, b), 1e-12)
        assert a.grad_norm.shape == () and a.grad_norm.item() == pytest.approx(b.grad_norm, rel=1e-12)
        assert a.skipped_steps.dtype == torch.int64 and a.skipped_steps.item() == 0

    @pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
    def test_storages(self, make, state_dtype):
        """In float32, where the states of both are rounded by the same random numbers."""
        ours, theirs = new_net(torch.float32), new_net(torch.float32)
        options = {"state_dtype": state_dtype, "max_grad_norm": CLIP}
        a, b = make(ours, **options, capturable=True), make(theirs, **options)
        plain = a.param_groups[0].get("dampening", 0) != 0  # no fused kernel: other roundings of z
        for i in range(1 if plain else 4):
            train_step(ours, a, i), train_step(theirs, b, i)
        assert_equal((ours, a), (theirs, b), 0.0 if state_dtype and not plain else 1e-6)

    def test_gradients_stay(self, make):
        net = new_net()
        optimizer = make(net, max_grad_norm=1e-3, capturable=True)
        backward(net, 0)
        before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
        for name, p in net.named_parameters():
            assert p.grad is None or torch.equal(p.grad, before[name])

    def test_groups_with_rates_in_tensors(self, make):
        """Tensors, shared and not, and a number, one rate for each group, changed by fill_."""
        rates = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(3e-2, dtype=torch.float64)
        nets, optimizers = [new_net(), new_net()], []
        for net, capturable in zip(nets, (True, False), strict=True):
            lrs = (rates[0], rates[0], rates[1], 5e-3) if capturable else (1e-2, 1e-2, 3e-2, 5e-3)
            roles = {role: {"lr": lr} for role, lr in zip(("weight", "bias", "z"), lrs, strict=False)}
            groups = hyperfast.param_groups(net, **roles, lr=lrs[3])
            optimizers.append(make(groups, max_grad_norm=CLIP, capturable=capturable))
        for i in range(6):
            for net, optimizer in zip(nets, optimizers, strict=True):
                train_step(net, optimizer, i)
            rates[0].fill_(1e-2 / (i + 2)), rates[1].fill_(2e-2 * (i + 1))
            for group, lr in zip(optimizers[1].param_groups, (1e-2 / (i + 2),) * 2, strict=False):
                group["lr"] = lr
            optimizers[1].param_groups[2]["lr"] = 2e-2 * (i + 1)
        assert_equal(*zip(nets, optimizers, strict=True), 1e-12)

    def test_schedulers_fill_a_tensor(self, make):
        nets = new_net(), new_net()
        lr = torch.tensor(0.02, dtype=torch.float64)
        optimizers = make(nets[0], lr=lr, capturable=True), make(nets[1], lr=0.02)
        schedulers = [CosineAnnealingLR(optimizer, 5, 1e-6) for optimizer in optimizers]
        for i in range(6):
            for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
                train_step(net, optimizer, i)
                scheduler.step()
            assert optimizers[0].param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(optimizers[1].param_groups[0]["lr"], rel=1e-12)
        assert_equal((nets[0], optimizers[0]), (nets[1], optimizers[1]), 1e-12)

    def test_dense_models_too(self, make):
        ours, theirs = (hyperfast.factored_(new_net(), False) for _ in range(2))
        a, b = make(ours, max_grad_norm=CLIP, capturable=True), make(theirs, max_grad_norm=CLIP)
        for i in range(3):
            train_step(ours, a, i), train_step(theirs, b, i)
        assert_equal((ours, a), (theirs, b), 1e-12)

    def test_layouts_that_fused_kernels_do_not_take(self, make):
        """A gradient of other strides than its parameter."""
        nets = new_net(), new_net()
        optimizers = make(nets[0], capturable=True), make(nets[1])
        for net, optimizer in zip(nets, optimizers, strict=True):
            for i in range(3):
                optimizer.zero_grad()
                backward(net, i)
                net.out.weight.grad = net.out.weight.grad.t().contiguous().t()
                optimizer.step()
        usual = new_net()
        optimizer = make(usual)
        for i in range(3):
            train_step(usual, optimizer, i)
        for net, each in zip(nets, optimizers, strict=True):
            assert_equal((net, each), (usual, optimizer), 1e-12)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize(("value", "first"), [(math.nan, True), (math.inf, False)])
def test_a_skipped_step_changes_nothing(make, state_dtype, value, first):
    """And what follows is as if it had not been, the first step included."""
    nets = new_net(torch.float32), new_net(torch.float32)
    options = {"state_dtype": state_dtype, "max_grad_norm": CLIP, "capturable": True}
    a, b = (make(net, **options) for net in nets)
    if not first:
        for net, optimizer in zip(nets, (a, b), strict=True):
            train_step(net, optimizer, 0)
    states = copy.deepcopy(a.state_dict()["state"])
    made = nets[0].a.generator()[0].detach().clone()
    a.zero_grad()
    norm = nets[0].norm.state_dict() | {k: v.clone() for k, v in nets[0].norm.state_dict().items()}
    backward(nets[0], 1)
    nets[0].norm.load_state_dict(norm)
    nets[0].a.generator.bias.grad[1] = value
    before = copy.deepcopy(nets[0].state_dict())
    a.step()
    assert a.skipped_steps.item() == 1 and not math.isfinite(a.grad_norm.item())
    assert all(torch.equal(p, before[name]) for name, p in nets[0].state_dict().items())
    for i, state in a.state_dict()["state"].items():
        for name, now in state.items():
            assert torch.equal(now, states[i][name]) if i in states else now.count_nonzero() == 0
    torch.testing.assert_close(nets[0].a.generator()[0], made, rtol=1e-6, atol=1e-6)
    for i in range(2, 5):
        train_step(nets[0], a, i), train_step(nets[1], b, i)
    assert_equal((nets[0], a), (nets[1], b))


class TestStates:
    @pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
    @pytest.mark.parametrize("how", ["state_dict", "deepcopy", "ordinary and back"])
    def test_goes_on_bit_for_bit(self, make, how, state_dtype):
        options = {"state_dtype": state_dtype, "max_grad_norm": CLIP, "capturable": True}
        net = new_net(torch.float32)
        optimizer = make(net, **options)
        for i in range(3):
            train_step(net, optimizer, i)
        if how == "deepcopy":
            other, again = copy.deepcopy((net, optimizer))
            assert again.capturable
        else:
            other, state = new_net(torch.float32), saved(optimizer.state_dict())
            other.load_state_dict(saved(net.state_dict()))
            if how == "ordinary and back":
                ordinary = make(other, state_dtype=state_dtype)
                ordinary.load_state_dict(state)
                assert not ordinary.param_groups[0].get("capturable", False)
                state = saved(ordinary.state_dict())
            again = make(other, **options)
            again.load_state_dict(state)
        for i in range(3, 6):
            train_step(net, optimizer, i), train_step(other, again, i)
        assert_equal((other, again), (net, optimizer))

    @pytest.mark.parametrize(
        "how", [pytest.param("capturable", marks=[pytest.mark.gpu, needs_gpu]), "fused", "plain"]
    )
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_torch(self, variant, how, plain_twin):
        """3 steps here, 3 there, 3 here."""

        def step(model, optimizer, i):
            optimizer.zero_grad()
            x, y = (t.to(model.out.weight.device) for t in batch(i))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        kind, options = VARIANTS[variant]
        net, usual = new_net(), new_net()
        twin = plain_twin(net)
        if how == "capturable":  # torch's is for GPUs only
            net, usual, twin = net.cuda(), usual.cuda(), twin.cuda()
        a, b = kind(net, **options, capturable=True), kind(usual, **options)
        theirs = TORCH[kind](twin.parameters(), **options, fused=how == "fused")
        for i in range(3):
            step(net, a, i)
        twin.load_state_dict(net.state_dict())
        theirs.load_state_dict(saved(a.state_dict()))
        for group in theirs.param_groups:  # options travel with the state
            assert group.get("capturable", True)
            group["fused"] = how == "fused"
            if "capturable" in group:
                group["capturable"] = how == "capturable"  # on GPUs only
        for i in range(3, 6):
            step(twin, theirs, i)
        net.load_state_dict(twin.state_dict())
        a = kind(net, **options, capturable=True)
        a.load_state_dict(saved(theirs.state_dict()))
        assert not a.param_groups[0].get("fused") or how == "fused"
        assert a.param_groups[0].get("capturable", True)
        for i in range(6, 9):
            step(net, a, i)
        for i in range(9):
            step(usual, b, i)
        for name, expected in usual.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], expected, rtol=0, atol=1e-10)

    def test_a_group_added_later(self, make):
        nets = [nn.ModuleList([HyperLinear(4, 3), HyperLinear(4, 3)]) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        optimizers = []
        for net, capturable in zip(nets, (True, False), strict=True):
            hyperfast.factored_(net.double())
            optimizer = make(net[0], capturable=capturable)
            for i in range(4):
                if i == 2:
                    optimizer.add_param_group({"params": list(net[1].parameters()), "lr": 0.03})
                optimizer.zero_grad()
                x = torch.ones(2, 4, dtype=torch.float64) / (i + 1)
                (net[0](x).square().mean() + net[1](x).square().mean()).backward()
                optimizer.step()
            optimizers.append(optimizer)
        assert_equal(*zip(nets, optimizers, strict=True), 1e-12)


class TestRefused:
    def test_raising(self):
        with pytest.raises(ValueError, match="nonfinite must be 'skip'"):
            AdamW(HyperLinear(2, 2), capturable=True, nonfinite="raise")

    def test_a_rate_elsewhere(self):
        net = HyperLinear(2, 2)
        optimizer = AdamW(net, capturable=True)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        net(torch.randn(2, 2)).sum().backward()
        with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
            optimizer.step()


@pytest.fixture
def fused_without_gpu(monkeypatch):
    """torch has no fake kernels of these, or asks for a driver: what reaches them is checked instead."""

    def checked(params, grads, *lists, lr, found_inf, **options):
        for t in (*params, *grads, *(t for ts in lists for t in ts), found_inf):
            assert t.device.type == "cuda"
        assert found_inf.dtype == torch.float32 and found_inf.shape == ()
        assert isinstance(lr, float) or (lr.dtype == torch.float32 and lr.shape == () and lr.is_cuda)
        reached.append(len(params))

    reached = []
    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
        monkeypatch.setattr(torch, name, checked)
    return reached


@pytest.mark.skipif(torch.cuda.is_available(), reason="captured for real instead")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("rates", ["number", pytest.param("tensor", marks=pytest.mark.slow), "tensors"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_nothing_waits_for_the_device(make, state_dtype, rates, fused_without_gpu):
    """On tensors without values, of a GPU that need not be there, whoever asks for a value raises."""
    with FakeTensorMode():
        with torch.device("cuda"):
            net = hyperfast.factored_(Net())
        optimizer = make(
            hyperfast.param_groups(net), state_dtype=state_dtype, max_grad_norm=CLIP, capturable=True
        )
        with pytest.raises(RuntimeError, match="local_scalar_dense"):
            float(optimizer.skipped_steps)
        shared = torch.tensor(0.1, device="cuda")
        for group in optimizer.param_groups:
            each = {"tensor": shared, "tensors": torch.tensor(0.1, device="cuda")}
            group["lr"] = each.get(rates, group["lr"])
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(5, 2, 6, 6, device="cuda"))
            for p in net.parameters():  # autograd's engine asks for the GPU
                factors = [f for _, g in named_generators(net) for f in g.factors()]
                if all(f.weight is not p for f in factors):
                    p.grad = torch.randn_like(p)
            optimizer.step()
        assert isinstance(optimizer.grad_norm, torch.Tensor) and optimizer.grad_norm.is_cuda
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert all(step.is_cuda for step in steps)
    assert bool(fused_without_gpu) == (optimizer.param_groups[0].get("dampening", 0) == 0)


@pytest.mark.gpu
@needs_gpu
class TestGraph:
    def nets(self, make, **options):
        nets = [new_net(torch.float32, "cuda") for _ in range(2)]
        lrs = [torch.tensor(0.01, device="cuda") for _ in nets]
        optimizers = [
            make(net, lr=lr, max_grad_norm=CLIP, capturable=True, **options)
            for net, lr in zip(nets, lrs, strict=True)
        ]
        return nets, lrs, optimizers

    def capture(self, net, optimizer, x, y):
        """step(): forward, backward and step as one graph, after three steps outside."""

        def step():
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return step, graph

    @pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
    def test_equals_steps_outside(self, make, state_dtype):
        """Bit for bit, over 20 replays with a changing lr, one of them skipped."""
        nets, lrs, optimizers = self.nets(make, state_dtype=state_dtype)
        x = torch.randn(5, 2, 6, 6, device="cuda")
        y = torch.arange(5, device="cuda") % 3
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        steps, graphs = zip(
            *(self.capture(net, o, x, y) for net, o in zip(nets, optimizers, strict=True)), strict=True
        )
        for i in range(20):
            x.normal_()
            if i == 7:
                x[0, 0, 0, 0] = float("nan")
            for lr in lrs:
                lr.fill_(0.02 / (i + 1))
            graphs[0].replay()
            steps[1]()
            if i == 7:  # the batch norm saw it
                for net in nets:
                    net.norm.reset_running_stats()
        assert_equal(*zip(nets, optimizers, strict=True))
        assert all(o.skipped_steps.item() == 1 for o in optimizers)
        assert torch.equal(nets[0].a.generator()[0], nets[1].a.generator()[0])
        torch.use_deterministic_algorithms(deterministic)

    def test_ordinary_steps_are_those_of_the_cpu(self, make):
        """Without capturable: step counters on the CPU, one wait for the norm."""
        nets = new_net(), new_net(device="cuda")
        optimizers = [make(net, max_grad_norm=CLIP) for net in nets]
        for i in range(5):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                net(x.to(next(net.parameters()).device)).square().mean().backward()
                optimizer.step()
        nets[1].cpu()
        for state in optimizers[1].state.values():
            assert "step" not in state or state["step"].device.type == "cpu"
        for name, expected in nets[0].state_dict().items():
            torch.testing.assert_close(nets[1].state_dict()[name], expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize(("capturable", "waits"), [(True, 0), (False, 1)])
    def test_waits(self, make, capturable, waits):
        """As torch itself counts them: none, or one for the norm."""
        net = new_net(torch.float32, "cuda")
        optimizer = make(net, max_grad_norm=CLIP, capturable=capturable)
        x = torch.randn(5, 2, 6, 6, device="cuda")
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        assert sum("synchronizing" in str(warning.message) for warning in caught) == waits

    def test_needs_capturable_and_a_step_before(self, make):
        net = new_net(torch.float32, "cuda")
        net(torch.randn(5, 2, 6, 6, device="cuda")).square().mean().backward()
        for capturable, message in ((False, "capturable=True"), (True, "take one just so")):
            optimizer = make(net, capturable=capturable)
            with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()


def test_codes_of_both_are_the_same_bits():
    """8-bit states of a capturable and an ordinary optimizer, from the same seeds."""
    nets = new_net(torch.float32), new_net(torch.float32)
    optimizers = (
        AdamW(nets[0], state_dtype="8bit", capturable=True),
        AdamW(nets[1], state_dtype="8bit", capturable=False),
    )
    for net, optimizer in zip(nets, optimizers, strict=True):
        train_step(net, optimizer, 0)
    found = [o._states(net.b.generator.weight, "8bit") for net, o in zip(nets, optimizers, strict=True)]
    for a, b in zip(*found, strict=True):
        assert isinstance(a, EightBit) and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
