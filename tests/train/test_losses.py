"""train/losses.py against the formulas, written out one sample at a time, and in runs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import hyperfast
from tests.train import tiny
from tests.train.recorded import RecordedGraph
from train.losses import LOSSES, CenterLoss, FocalLoss, WithCenters


def example(batch=9, classes=5, features=7, dtype=torch.float64):
    """Logits, labels, features and centers; class 4 is in no sample, class 0 in several."""
    g = torch.Generator().manual_seed(4)
    logits, x = (3 * torch.randn(batch, n, generator=g, dtype=dtype) for n in (classes, features))
    centers = torch.randn(classes, features, generator=g, dtype=dtype)
    return logits, torch.randint(classes - 1, (batch,), generator=g).sort().values, x, centers


def shares(labels, classes=5):
    """Soft targets: of the label and the next sample's."""
    hot = F.one_hot(labels, classes).double()
    return 0.7 * hot + 0.3 * hot.roll(1, 0)


class TestFocal:
    @pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
    def test_formula(self, gamma):
        logits, labels, *_ = example()
        terms = torch.tensor([[(1 - p) ** gamma * -math.log(p) for p in row] for row in
                              logits.softmax(1).tolist()], dtype=torch.float64)  # fmt: skip
        expected = sum(terms[i, k] for i, k in enumerate(labels.tolist())) / len(labels)
        torch.testing.assert_close(FocalLoss(gamma)(logits, labels), expected, rtol=1e-12, atol=0)
        soft = shares(labels)
        expected = sum((terms[i] * soft[i]).sum() for i in range(len(labels))) / len(labels)
        torch.testing.assert_close(FocalLoss(gamma)(logits, soft), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("gamma", [0, 0.5, 2])
    def test_gradient(self, gamma):
        logits, labels, *_ = example(4)
        logits.requires_grad_()
        for target in (labels, shares(labels)):
            assert torch.autograd.gradcheck(lambda x, y=target: FocalLoss(gamma)(x, y), logits)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gamma_0_is_cross_entropy(self, dtype):
        logits, labels, *_ = example(dtype=dtype)
        logits.requires_grad_()
        for target in (labels, shares(labels).to(dtype)):
            ours, theirs = FocalLoss(0)(logits, target), F.cross_entropy(logits, target)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
            gradients = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
            torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
        assert torch.equal(FocalLoss(0)(logits, labels), F.cross_entropy(logits, labels))

    @pytest.mark.parametrize("gamma", [0, 0.5, 2])
    def test_sure_answers(self, gamma):
        """p of exactly 1 and 0 in float32: right and wrong by 200."""
        logits = torch.tensor([[200.0, 0, 0], [0.0, 200, 0]], requires_grad=True)
        loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
        loss.backward()
        assert loss.item() == pytest.approx(100) and logits.grad.isfinite().all()
        assert logits.grad[1].tolist() == pytest.approx([-0.5, 0.5, 0])

    def test_bad_gamma(self):
        for gamma in (-1, float("nan")):
            with pytest.raises(ValueError, match="gamma must be at least 0"):
                FocalLoss(gamma)


def test_label_smoothing_is_torchs():
    logits, labels, *_ = example()
    ours = LOSSES["label_smoothing"]()(logits, labels)
    assert torch.equal(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))
    log_p = logits.log_softmax(1)
    expected = -(0.9 * log_p[range(9), labels] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(ours, expected)
    assert torch.equal(LOSSES["cross_entropy"]()(logits, labels), F.cross_entropy(logits, labels))


class TestCenter:
    def test_formula(self):
        logits, labels, x, centers = example()
        squares = [(x[i] - centers[k]).square().sum() for i, k in enumerate(labels.tolist())]
        expected = F.cross_entropy(logits, labels) + 0.3 / 2 * sum(squares) / len(labels)
        loss = CenterLoss(0.3).eval()((logits, x, centers), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)

    def test_soft_targets(self):
        logits, labels, x, centers = example()
        hot, soft = F.one_hot(labels, 5).double(), shares(labels)
        results = []
        for target in (labels, hot):
            moved = centers.clone()
            results.append((CenterLoss(0.3)((logits, x, moved), target), moved))
        torch.testing.assert_close(*results)
        squares = [(x[i] - sum(soft[i, k] * centers[k] for k in range(5))).square().sum() for i in range(9)]
        expected = F.cross_entropy(logits, soft) + 0.3 / 2 * sum(squares) / 9
        torch.testing.assert_close(CenterLoss(0.3)((logits, x, centers), soft), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("soft", [False, True])
    def test_centers_move_by_the_papers_rule(self, soft):
        """After the loss, which is that of the centers as they were; class 4 has no sample."""
        logits, labels, x, centers = example()
        target = shares(labels) if soft else labels
        weight = target if soft else F.one_hot(labels, 5).double()
        expected = []
        for j in range(5):
            change = sum(weight[i, j] * (centers[j] - x[i]) for i in range(9)) / (1 + weight[:, j].sum())
            expected.append(centers[j] - 0.25 * change)
        before, moved = CenterLoss().eval()((logits, x, centers), target), centers.clone()
        assert torch.equal(CenterLoss(rate=0.25)((logits, x, moved), target), before)
        torch.testing.assert_close(moved, torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert torch.equal(moved[4], centers[4]) and not torch.equal(moved[0], centers[0])

    def test_centers_become_the_means(self):
        logits, labels, x, _ = example()
        centers, loss = torch.zeros(5, 7, dtype=torch.float64), CenterLoss()
        losses = [loss((logits, x, centers), labels).item() for _ in range(100)]
        for j in labels.unique():
            torch.testing.assert_close(centers[j], x[labels == j].mean(0))
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]

    def test_gradient(self):
        logits, labels, x, centers = example(4)
        inputs = logits.requires_grad_(), x.requires_grad_()
        loss = CenterLoss(0.3).eval()
        for target in (labels, shares(labels)):
            assert torch.autograd.gradcheck(lambda a, b, y=target: loss((a, b, centers), y), inputs)
        (gradient,) = torch.autograd.grad(CenterLoss(0.3)((logits, x, centers.clone()), labels), x)
        torch.testing.assert_close(gradient, 0.3 * (x - centers[labels]) / 4)

    def test_bad_options(self):
        for options, name in (({"weight": -1}, "weight"), ({"rate": 1.5}, "rate"), ({"rate": -1}, "rate")):
            with pytest.raises(ValueError, match=name):
                CenterLoss(**options)

    def test_autocast(self):
        """Features in bfloat16; centers and distances stay in float32, as outside of autocast."""
        torch.manual_seed(1)
        network = WithCenters(nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 5)), 5)
        inputs, labels, loss = torch.randn(16, 6), torch.arange(16) % 5, CenterLoss(0.3)
        with torch.autocast("cpu", torch.bfloat16):
            logits, x, centers = network(inputs)
            result = loss((logits, x, centers), labels)
        assert x.dtype == torch.bfloat16 and centers is network.centers
        assert result.dtype == centers.dtype == torch.float32
        expected = torch.zeros(5, 300)
        other = CenterLoss(0.3)((logits.float(), x.float(), expected), labels)
        torch.testing.assert_close(result, other)
        assert torch.equal(centers, expected) and centers.abs().sum() > 0
        result.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())


class TestWithCenters:
    @pytest.mark.parametrize("width", [1, 7, 64])
    def test_output(self, width):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 5))
        model, inputs = WithCenters(network, 5), torch.randn(3, 3, 2, 2)
        logits, x, centers = model(inputs)
        assert torch.equal(logits, network(inputs)) and torch.equal(x, network[:3](inputs))
        assert centers.shape == (5, width) and not centers.any()
        assert torch.equal(model.eval()(inputs), logits)
        assert not any(m._forward_hooks for m in model.modules())
        assert model.state_dict().keys() >= {"centers", "network.1.weight"}
        assert [name for name, _ in model.named_parameters()] == [
            f"network.{name}" for name, _ in network.named_parameters()
        ]

    def test_loss_trains_the_network(self):
        """Gradients equal those of the sum written out."""
        torch.manual_seed(2)
        model = WithCenters(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 3).double()
        model.centers.normal_()
        inputs, labels = torch.randn(8, 4).double(), torch.arange(8) % 3
        x = model.network[:2](inputs)
        squares = (x - model.centers[labels]).square().sum(1)
        wanted = F.cross_entropy(model.network[2](x), labels) + 0.05 * squares.mean()
        wanted = torch.autograd.grad(wanted, list(model.parameters()))
        CenterLoss(0.1)(model(inputs), labels).backward()
        for p, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient)

    @pytest.mark.parametrize("generator", ["linear", "two_layer", "shared"])
    def test_hypernetworks(self, generator):
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        inputs, labels = torch.randn(5, 4), torch.arange(5) % 3
        hyper = hyperfast.hyperize(network, generator, z_dim=4, init="hyperfan")
        model = WithCenters(hyper, 3)
        plain = hyperfast.freeze(hyper)
        logits, x, _ = output = model(inputs)
        torch.testing.assert_close(x, plain[:2](inputs))
        torch.testing.assert_close(logits, plain(inputs))
        CenterLoss()(output, labels).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_a_failing_network_keeps_no_hook(self):
        model = WithCenters(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), 3)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5))
        assert not any(m._forward_hooks for m in model.modules())

    def test_no_linear_layer(self):
        with pytest.raises(ValueError, match="end with a linear layer, Conv2d has none"):
            WithCenters(nn.Conv2d(3, 4, 3), 5)

    @pytest.mark.parametrize("kind", ["another layer's", "changed", "never called"])
    def test_a_network_that_does_not_return_its_last_layers_output(self, kind):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

            def forward(self, x):
                if kind == "never called":
                    return self.first(x)
                return (
                    self.first(self.last(x)) if kind == "another layer's" else self.last(self.first(x)).tanh()
                )

        model = WithCenters(Other(), 3)
        x = torch.randn(2, 6 if kind == "another layer's" else 4)
        with pytest.raises(ValueError, match="Other must return the output of its last linear layer"):
            model(x)
        assert model.eval()(x).shape[0] == 2  # no features in evaluation

    def test_copies(self):
        model = WithCenters(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), 3)
        other = copy.deepcopy(model)
        CenterLoss()(other(torch.randn(2, 4)), torch.tensor([0, 1]))
        assert other.centers.any() and not model.centers.any()


# ---- runs ----


def center_net(backend):
    return WithCenters(tiny.Net(backend=backend), 5)


def center_run(out, **options):
    trainer = tiny.make(out, net=center_net, **options)
    trainer.data.criterion = CenterLoss(0.1)
    return trainer


def test_evaluation_reports_cross_entropy_whatever_is_trained_on(tmp_path):
    trainer = center_run(tmp_path)
    trainer.model.centers.normal_()
    loss, accuracy = trainer.evaluate("test")
    images, labels = trainer.data.test
    with torch.no_grad():
        logits = trainer.model.eval()(images.float() / 255)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert "the recipe's loss" in trainer.data.steps_see
    assert "recipe's loss" not in tiny.data().steps_see


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_captured_run_with_center_loss_is_the_eager_one(tmp_path, monkeypatch, fused):
    made = []
    monkeypatch.setattr("train.loop.CudaGraph", lambda device: made.append(RecordedGraph()) or made[-1])
    eager = center_run(tmp_path / "a", fused=fused, epochs=2)
    graphed = center_run(tmp_path / "b", fused=fused, epochs=2, cuda_graph=True)
    for trainer in (eager, graphed):
        trainer.fit()
    assert made[0].captures == 1 and made[0].replays > 6
    for a, b in zip(eager.history, graphed.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert eager.model.centers.any()
    torch.testing.assert_close(graphed.model.centers, eager.model.centers, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("soft", [False, True])
def test_nothing_waits_for_the_device(name, soft):
    """Tensors without contents: whatever looks into one raises."""
    with FakeTensorMode(), torch.device("cuda"):
        target = torch.zeros(8, 5) if soft else torch.zeros(8, dtype=torch.int64)
        output = torch.zeros(8, 5)
        if name == "center":
            output = output, torch.zeros(8, 7, dtype=torch.bfloat16), torch.zeros(5, 7)
        loss = LOSSES[name]()(output, target)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("soft", [False, True])
def test_gpu_capture(name, soft):
    """Replays of a captured loss and its gradient are what the CPU gives, centers included."""
    logits, labels, x, centers = (v.float() if v.is_floating_point() else v for v in example())
    target, loss = shares(labels).float() if soft else labels, LOSSES[name]()
    cpu = [logits.requires_grad_(), x.requires_grad_(), centers]
    gpu = [v.detach().cuda().requires_grad_(v.requires_grad) for v in cpu]
    target_on_gpu = target.cuda()

    def step(tensors, target):
        value = loss(tuple(tensors) if name == "center" else tensors[0], target)
        return value.detach(), torch.autograd.grad(value, tensors[0])[0]

    with torch.cuda.stream(torch.cuda.Stream()):
        expected = [step(cpu, target) for _ in range(3)][-1]
        step(gpu, target_on_gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(gpu, target_on_gpu)
    for _ in range(2):
        graph.replay()
    for a, b in zip((*got, gpu[2]), (*expected, centers), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
