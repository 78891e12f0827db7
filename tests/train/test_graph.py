"""The step as a graph: on the CPU with recorded operators in place of CUDA's, with a GPU for real."""

import copy
import gc
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hyperfast.factored import generator_of
from tests.train import tiny
from tests.train.recorded import RecordedGraph
from tests.train.test_cifar100 import images
from tests.train.test_loop import assert_same, last
from train import cifar100, graph
from train.data import ImageSet
from train.graph import WARM_UP, CaptureError, GraphedStep
from train.images import ImageData
from train.loop import Config, Interrupted, RunError, Trainer


class Toy:
    """A step that draws numbers, keeps state and has a rate, as `GraphedStep` wants it."""

    def __init__(self):
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=torch.tensor(0.0), fused=True)
        self.python_runs = 0

    def __call__(self, x, y):
        self.python_runs += 1
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack((loss.detach(), norm))


def drive(step, toy, steps=9):
    """The figures of some steps with other batches and rates."""
    torch.manual_seed(5)
    g, figures = torch.Generator().manual_seed(7), []
    for i in range(steps):
        x, y = torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)
        toy.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + i))
        figures.append(step(x, y).clone())
    return figures


def test_graphed_steps_are_the_eager_ones():
    eager, toy, recorder = Toy(), Toy(), RecordedGraph()
    graphed = GraphedStep(toy, recorder)
    expected, got = drive(eager, eager), drive(graphed, toy)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    for a, b in zip(eager.net.state_dict().values(), toy.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert toy.python_runs == WARM_UP + 1 and recorder.captures == 1 and recorder.replays == 9 - WARM_UP
    assert graphed.captured and graphed.seconds > 0
    assert all(p.grad is None for p in toy.net.parameters())


def test_the_stand_in_can_fail():
    """A rate that is a Python number is frozen in the graph: the recording shows it."""
    eager, toy = Toy(), Toy()
    got = []
    for step, of in ((eager, eager), (GraphedStep(toy, RecordedGraph()), toy)):
        of.optimizer = torch.optim.SGD(of.net.parameters(), lr=0.0)
        rates = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        torch.manual_seed(1)
        for rate in rates:
            of.optimizer.param_groups[0]["lr"] = rate
            step(x, y)
        got.append(of.net[0].weight.detach())
    assert not torch.equal(*got)


def test_other_shapes_are_refused():
    toy = Toy()
    graphed = GraphedStep(toy, RecordedGraph())
    drive(graphed, toy, WARM_UP + 1)
    with pytest.raises(ValueError, match=r"batch must be \[8, 4\] as captured, got \[1, 4\]"):
        graphed(torch.ones(1, 4), torch.zeros(8, dtype=torch.int64))


def test_a_capture_that_fails_names_the_first_reason():
    class Broken(RecordedGraph):
        def capture(self, work):
            try:
                return super().capture(work)
            finally:
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    toy = Toy()
    graphed = GraphedStep(lambda x, y: toy(x, y) * float(x[0, 0]), Broken())
    with pytest.raises(
        CaptureError, match="^operation not permitted when stream is capturing: _local_scalar"
    ):
        drive(graphed, toy)


# ---- the whole loop ----


@pytest.fixture
def recorders(monkeypatch):
    """Graphs on the CPU are recorded ones; here they are all."""
    made = []

    def recorder(device):
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr("train.loop.CudaGraph", recorder)
    return made


def same_figures(expected, got, rel=1e-4):
    """To rounding. Not the validation loss: a bias before batch norm has rounding for a gradient."""
    for a, b in zip(expected, got, strict=True):
        assert (a["steps"], a["lr"]) == (b["steps"], b["lr"])
        for key in ("train_loss", "gradient_norm", "z/conv/norm"):
            assert a[key] == pytest.approx(b[key], rel=rel)


def graphed_run(out, **config):
    """A trainer whose step is a graph, with chunks and windows on the CPU too."""
    trainer = tiny.make(out, **config, cuda_graph=True)
    trainer.window, trainer.data.at_once = 4, 4 * trainer.config.batch_size
    return trainer


@pytest.mark.parametrize("fused", [True, False])
def test_a_graphed_run_is_the_eager_run(tmp_path, recorders, fused):
    whole = tiny.make(tmp_path / "eager", fused)
    whole.fit()
    trainer = graphed_run(tmp_path / "graph", fused=fused)
    assert trainer.fit() == "all 3 epochs done"
    same_figures(whole.history, trainer.history)
    assert [r.captures for r in recorders] == [1] and recorders[0].replays == 18 - WARM_UP
    assert trainer.history[0]["startup_seconds"] > 0 == trainer.history[1]["startup_seconds"]
    assert "startup_seconds" not in whole.history[0]


@pytest.mark.parametrize("fused", [True, False])
def test_a_graphed_run_resumes(tmp_path, recorders, fused):
    graphed_run(tmp_path / "whole", fused=fused).fit()
    stopped = graphed_run(tmp_path / "parts", fused=fused, max_steps=6)
    assert stopped.fit() == "6 steps done"
    resumed = graphed_run(tmp_path / "parts", fused=fused)
    resumed.resume()
    resumed.fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert recorders[-1].captures == 1  # of the parameters that were loaded


@pytest.mark.parametrize("fused", [True, False])
def test_resume_may_change_whether_it_is_a_graph(tmp_path, recorders, fused):
    whole = tiny.make(tmp_path / "eager", fused)
    whole.fit()
    for first, then in ((tiny.make, graphed_run), (graphed_run, tiny.make)):
        out = tmp_path / first.__name__
        first(out, fused=fused, max_steps=6).fit()
        resumed = then(out, fused=fused)
        resumed.resume()
        resumed.fit()
        same_figures(whole.history, resumed.history)
        rates = [group["lr"] for group in resumed.optimizer.param_groups]
        assert all(torch.is_tensor(rate) == (then is graphed_run) for rate in rates)


def test_load_best_captures_anew(tmp_path, recorders):
    trainer = graphed_run(tmp_path, epochs=2)
    trainer.fit()
    trainer.load_best()
    trainer._train(1)
    assert [r.captures for r in recorders] == [1, 1]


def test_what_cannot_be_captured_says_so(tmp_path, recorders):
    trainer = graphed_run(tmp_path, fused=False)
    real = trainer.step
    trainer.step = lambda: real().item()
    with pytest.raises(RunError, match="CUDA graph, operation not .*: _local.*; train with --no-cuda-graph"):
        trainer.fit()
    assert last(tmp_path)["history"] == []


def test_a_spoilt_step_in_a_graph_is_named(tmp_path, recorders):
    """At the next look at the figures; the optimizer has skipped the step, others came after it."""
    trainer = graphed_run(tmp_path)
    real, seen = trainer.data.augment, []

    def augment(x, generator):
        x = real(x, generator)
        seen.append(len(x))
        if len(seen) == 4:  # the second chunk of epoch 2: batches 5 and 6
            x[:8] = float("nan")
        return x

    trainer.data.augment = augment
    with pytest.raises(RunError, match="^epoch 2, step 5: loss is nan"):
        trainer.fit()
    assert seen == [32, 16, 32, 16] and trainer.steps == 12
    assert len(last(tmp_path)["history"]) == 1 and int(trainer.optimizer.skipped_steps) == 1
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def fake_step(fused, precision, device):
    """Two steps of `full` on tensors without contents: whatever looks into one raises, and so does what mixes
    those of the host with those of the device."""
    arguments = ["--device", "cuda", "--fused" if fused else "--no-fused", "--precision", precision]
    args = cifar100.parse(arguments)
    with FakeTensorMode():
        with torch.device(device):
            model = cifar100.build_model("full", fused=fused)
        trainer = object.__new__(Trainer)  # without the data and records of a run
        trainer.model = trainer._trained = model
        trainer.device, trainer.data = torch.device(device), object.__new__(ImageData)
        trainer.config = Config(1, 64, precision=precision, cuda_graph=True)
        trainer.optimizer, trainer.step = cifar100.make_optimizer(model, args)
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)
            group["capturable"] = group.get("capturable", False) and (fused or device != "cpu")
        x = torch.zeros(64, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        y = torch.zeros(64, dtype=torch.int64, device=device)

        def backward(loss):
            assert loss.requires_grad
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if generator_of(p) is None else None

        def fused_kernel(*tensors, **options):
            assert {t.device.type for t in tree_leaves((tensors, options)) if torch.is_tensor(t)} == {device}

        with pytest.MonkeyPatch.context() as patch:
            if device == "cuda" and not torch.cuda.is_available():  # torch has neither without a GPU
                patch.setattr(torch.Tensor, "backward", backward)
                patch.setattr(torch, "_fused_adamw_", fused_kernel)
            return [trainer._eager_step(x, y) for _ in range(2)]


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("device", "fused", "precision"),
    [
        ("cpu", True, "bf16"),
        ("cuda", True, "fp32"),
        ("cuda", False, "fp32"),
        pytest.param("cpu", True, "fp32", marks=pytest.mark.slow),
        pytest.param("cpu", False, "bf16", marks=pytest.mark.slow),
        pytest.param("cuda", True, "bf16", marks=pytest.mark.slow),
    ],
)
def test_nothing_in_a_step_waits_for_the_device(fused, precision, device):
    for figures in fake_step(fused, precision, device):
        assert figures.shape == (3,) and figures.dtype == torch.float32 and figures.device.type == device


# ---- the real graph ----

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(*marks):
    def mark(test):
        for one in (*gpu, *marks):
            test = one(test)
        return test

    return mark


class Sure(tiny.Net):
    """Without dropout."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drop = nn.Identity()


def gpu_steps(out, fused, net, graphed, steps=12, **config):
    """Figures and final weights of some steps, graphed or with the same optimizer eagerly."""
    trainer = graphed_run(out, fused=fused, net=net, device="cuda", **config)
    if not graphed:
        trainer._run_step = trainer._eager_step
    torch.manual_seed(5)
    trainer.model.train()
    batches = [batch for epoch in range(3) for batch in trainer._train_batches(epoch)][:steps]
    figures = []
    for i, (x, y) in enumerate(batches):
        trainer._set_rate(0.01 / (1 + i), None)
        figures.append(trainer._run_step(x, y).clone())
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return torch.stack(figures).cpu(), weights, trainer


@on_gpu(pytest.mark.parametrize("fused", [True, False]))
def test_gpu_graphed_steps_equal_eager_ones(tmp_path, fused):
    eager, eager_weights, _ = gpu_steps(tmp_path / "a", fused, Sure, graphed=False)
    got, weights, trainer = gpu_steps(tmp_path / "b", fused, Sure, graphed=True)
    assert trainer._run_step.captured
    torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    for name, value in eager_weights.items():
        if name not in ("conv.bias", "bn.running_mean"):  # its gradient is rounding
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


@on_gpu(pytest.mark.parametrize("fused", [True, False]))
def test_gpu_dropout_in_a_graph_is_that_of_eager_steps(tmp_path, fused):
    """Loss and norm follow the masks: other masks would show in the first digits."""
    eager, _, _ = gpu_steps(tmp_path / "a", fused, tiny.Net, graphed=False)
    got, _, _ = gpu_steps(tmp_path / "b", fused, tiny.Net, graphed=True)
    torch.testing.assert_close(got, eager, rtol=1e-3, atol=1e-5)
    assert len({round(loss, 4) for loss in got[:, 0].tolist()}) > 6


@on_gpu()
def test_gpu_seeds_set_between_replays_hold(tmp_path):
    _, _, trainer = gpu_steps(tmp_path, True, tiny.Net, graphed=True)
    state = copy.deepcopy(trainer.model.state_dict())
    trainer.optimizer.param_groups[0]["lr"].zero_()  # a step leaves the weights as they are
    x, y = next(trainer._train_batches(0))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(trainer._run_step(x, y)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - losses[2]) > 1e-4
    torch.testing.assert_close(trainer.model.state_dict()["fc.bias"], state["fc.bias"])


@on_gpu(pytest.mark.parametrize("fused", [True, False]))
def test_gpu_run_resumes(tmp_path, fused):
    whole = graphed_run(tmp_path / "whole", fused=fused, device="cuda")
    whole.fit()
    graphed_run(tmp_path / "parts", fused=fused, device="cuda", max_steps=6).fit()
    saved = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert {t.device.type for t in tree_leaves(saved) if torch.is_tensor(t)} == {"cpu"}
    resumed = graphed_run(tmp_path / "parts", fused=fused, device="cuda")
    resumed.resume()
    resumed.fit()
    assert resumed._run_step.captured
    same_figures(whole.history, resumed.history, rel=1e-2)  # cuDNN adds in no fixed order
    on_cpu = tiny.make(tmp_path / "parts", fused, epochs=4)
    on_cpu.resume()
    on_cpu.fit()
    assert len(on_cpu.history) == 4


@on_gpu(pytest.mark.parametrize("fused", ["--fused", "--no-fused"]))
def test_gpu_progressive_run_and_interruption(tmp_path, monkeypatch, fused):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    data = ImageSet(*images(120, 0), *images(20, 1), [])
    monkeypatch.setattr(cifar100, "load_images", lambda name, root: data)
    monkeypatch.setattr(cifar100, "VALIDATION", 20)
    options = f"{fused} --device cuda --batch-size 16 --epochs 3 --precision bf16"
    options = [*options.split(), "--progressive", "conv4,fc1@1", "fc2@2", "--out", str(tmp_path / "a")]
    args = cifar100.parse(options)
    real, calls = graph.CudaGraph.replay, []

    def replay(self):
        real(self)
        calls.append(self)
        if len(calls) == 4:  # in epoch 2: three of six steps of each epoch are replays
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(graph.CudaGraph, "replay", replay)
    with pytest.raises(Interrupted):
        cifar100.run(args, "command")
    args.resume = True
    trainer = cifar100.run(args, "command")
    assert len(trainer.history) == 3 and len({id(g) for g in calls}) >= 3
    assert all(row["startup_seconds"] > 0 for row in trainer.history)
    text = (tmp_path / "a" / "report.md").read_text()
    assert "peak memory of the GPU" in text and "capturing the step" in text


@on_gpu()
def test_gpu_capture_costs_no_second_set_of_parameters(tmp_path):
    """Peak memory of graphed steps of `full` against the same steps run eagerly."""
    peaks = []
    for graphed in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        args = cifar100.parse(["--device", "cuda", "--out", str(tmp_path)])
        model, optimizer, step = cifar100.build(args, 0)
        parts = [images(64 * n, n) for n in (8, 1, 1)]
        data = ImageData(*parts, lambda x, chance: x.float() / 255, lambda x: x.float() / 255)
        config = Config(1, 64, device="cuda", cuda_graph=True)
        trainer = Trainer(model, data, optimizer, step, lambda e, s: 1e-3, config, tmp_path, {})
        if not graphed:
            trainer._run_step = trainer._eager_step
        torch.cuda.reset_peak_memory_stats()
        trainer._train(0)
        peaks.append(torch.cuda.max_memory_allocated())
        del model, optimizer, step, trainer
    assert peaks[1] < 1.15 * peaks[0]
