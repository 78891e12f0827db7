"""The step as a graph: on the CPU with recorded operators in place of CUDA's, with a GPU for real."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train import tiny
from tests.train.recorded import RecordedGraph
from tests.train.test_loop import assert_same, last
from train.graph import WARM_UP, CaptureError, GraphedStep
from train.loop import RunError


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


def same_figures(expected, got):
    """To rounding. Not the validation loss: a bias before batch norm has rounding for a gradient."""
    for a, b in zip(expected, got, strict=True):
        for key in ("steps", "lr", "train_accuracy"):
            assert a[key] == b[key]
        for key in ("train_loss", "gradient_norm", "z/conv/norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def graphed_run(out, **config):
    return tiny.make(out, **config, cuda_graph=True)


@pytest.fixture
def chunks(monkeypatch):
    """Batches are augmented as on a GPU: four at a time."""
    monkeypatch.setattr("train.loop.Trainer._batches_at_once", lambda self: 4)
    monkeypatch.setattr("train.loop.WINDOW", 4)


@pytest.mark.parametrize("fused", [True, False])
def test_a_graphed_run_is_the_eager_run(tmp_path, chunks, recorders, fused):
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
