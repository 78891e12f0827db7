import csv
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import hyperfast
from tests.train import tiny
from tests.train.tiny import Net, data, make
from train import checkpoint, images, loop, summary
from train.checkpoint import CheckpointError
from train.loop import Interrupted, RunError, cosine, exponential_by_step, one_cycle, piecewise
from train.ranks import Ranks


def assert_same(a, b):
    """Bit for bit: weights, optimizer state, history but for the clock."""
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    for i, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][i][key]), (i, key)
    assert without_clock(a["history"]) == without_clock(b["history"])


def without_clock(history):
    return [{k: v for k, v in row.items() if "second" not in k} for row in history]


def epochs_of(path):
    with open(path / "metrics.csv") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def last(path):
    return checkpoint.load(path / "last.pt")


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_learns_and_records(tmp_path, fused):
    trainer = make(tmp_path / "a", fused, epochs=4)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert trainer.fit() == "all 4 epochs done"
    assert all(not torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    rows = trainer.history
    assert [row["epoch"] for row in rows] == epochs_of(tmp_path / "a") == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == [cosine(4, 0.01, 1e-4)(e, 0) for e in range(4)]
    assert rows[-1]["steps"] == 50 // 8 and trainer.steps == 24
    assert trainer.best["validation_accuracy"] == max(row["validation_accuracy"] for row in rows)
    assert rows[0]["z/conv/norm"] != trainer.initial_z["z/conv/norm"]
    z = trainer.model.conv.generator.z.detach()
    assert rows[-1]["z/conv/max"] == z.max().item()
    assert rows[-1]["z/conv/std"] == pytest.approx(z.std(correction=0).item())
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "last.pt", "best.pt", "metrics.csv", "tensorboard",
    }  # fmt: skip


def test_fused_and_plain_see_the_same_run(tmp_path):
    a, b = make(tmp_path / "a", True, epochs=1), make(tmp_path / "b", False, epochs=1)
    a.fit(), b.fit()
    # not the validation loss: a bias before batch norm has rounding for a gradient, which AdamW amplifies
    for key in ("train_loss", "gradient_norm", "z/conv/norm"):
        assert a.history[0][key] == pytest.approx(b.history[0][key], rel=1e-4)


def test_evaluation_is_exact_and_uses_every_image(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    x, y = trainer.data.validation
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(x.float() / 255)
    monkeypatch.setattr(images, "EVAL_BATCH", 7)
    loss, accuracy = trainer.evaluate("validation")
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    trainer.config.eval_batches = 2
    expected = nn.functional.cross_entropy(logits[:14], y[:14]).item()
    assert trainer.evaluate("validation")[0] == pytest.approx(expected, rel=1e-5)


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, 1e-6)
    ours = cosine(100, 1e-3, 1e-6)
    for epoch in range(100):
        assert ours(epoch, 0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step(), reference.step()


def test_one_cycle_is_two_lines():
    rate = one_cycle(20, 1e-2, 1e-3, 0.2)
    rates = [rate(9, step) for step in range(20)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    falls = [a - b for a, b in zip(rates[3:], rates[4:], strict=False)]
    assert falls == pytest.approx([9e-3 / 16] * 16) and rates[-1] == pytest.approx(1e-3)
    assert one_cycle(4, 1.0, 0.0, 0.0)(0, 0) == 0.75  # no way up
    assert [one_cycle(4, 1.0, 0.0, 1.0)(0, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_a_schedule_by_step_reaches_the_optimizer(tmp_path):
    trainer = make(tmp_path, epochs=2)
    trainer.schedule = one_cycle(12, 0.01, 1e-4, 0.25)
    real, rates = trainer.step, []
    trainer.step = lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), real())[1]
    trainer.fit()
    assert rates == [trainer.schedule(0, step) for step in range(12)]
    assert [row["lr"] for row in trainer.history] == [rates[5], rates[11]]


# ---- resume ----


@pytest.mark.parametrize("fused", [True, False])
def test_resume_is_bit_exact(tmp_path, fused):
    make(tmp_path / "whole", fused).fit()
    stopped = make(tmp_path / "parts", fused)
    stopped.config.max_steps = 6  # the end of epoch 1
    assert stopped.fit() == "6 steps done"
    torch.rand(13)  # the state of the global generator must not matter
    resumed = make(tmp_path / "parts", fused)
    assert resumed.resume() == []
    assert len(resumed.history) == 1 and resumed.steps == 6
    resumed.fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert epochs_of(tmp_path / "parts") == [1, 2, 3]


def test_resume_after_a_cut_epoch_starts_at_the_last_whole_one(tmp_path):
    make(tmp_path / "whole").fit()
    cut = make(tmp_path / "cut", max_steps=9, save_every=2)  # epoch 2 has 3 of 6 steps
    cut.fit()
    assert [row["steps"] for row in cut.history] == [6, 3]
    assert len(last(tmp_path / "cut")["history"]) == 1
    resumed = make(tmp_path / "cut")
    resumed.resume()
    resumed.fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert epochs_of(tmp_path / "cut") == [1, 2, 3]


def test_resume_may_change_fused_and_says_so(tmp_path):
    make(tmp_path, fused=False, max_steps=6).fit()
    resumed = make(tmp_path, fused=True)
    assert resumed.resume() == ["fused was False, now True"]
    resumed.fit()
    assert len(resumed.history) == 3


def test_resume_of_a_finished_run_does_nothing(tmp_path):
    make(tmp_path).fit()
    before = last(tmp_path)
    again = make(tmp_path)
    again.resume()
    assert again.fit() == "all 3 epochs done"
    assert_same(before, last(tmp_path))


# replace counts files: 1 last.pt at the start, then best.pt (if better), last.pt, metrics.csv of each epoch
@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("step", 3),
        pytest.param("step", 10, marks=pytest.mark.slow),
        pytest.param("fsync", 3, marks=pytest.mark.slow),
        pytest.param("replace", 2, marks=pytest.mark.slow),
        ("replace", 3),
        pytest.param("replace", 4, marks=pytest.mark.slow),
    ],
)
def test_kill_9_then_resume_equals_an_uninterrupted_run(tmp_path, moment, count):
    """Killed in the first and second epoch, while a file is written, and around each rename."""
    root = Path(loop.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, tiny.__file__, tmp_path / "killed", moment, str(count)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = make(tmp_path / "killed")
    resumed.resume()
    assert len(resumed.history) < 3
    resumed.fit()
    make(tmp_path / "whole").fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "killed"))
    best = [checkpoint.load(tmp_path / d / "best.pt") for d in ("whole", "killed")]
    assert without_clock([best[0]["row"]]) == without_clock([best[1]["row"]])
    assert all(torch.equal(v, best[1]["model"][k]) for k, v in best[0]["model"].items())
    assert epochs_of(tmp_path / "killed") == [1, 2, 3]
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_run(tmp_path, number):
    make(tmp_path / "whole").fit()
    trainer = make(tmp_path / "a")
    real, handlers = trainer.step, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def step():
        if trainer.steps == 8:
            os.kill(os.getpid(), number)
        return real()

    trainer.step = step
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    assert caught.value.number == number and trainer.steps == 9  # the step under way is finished
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = make(tmp_path / "a")
    resumed.resume()
    assert len(resumed.history) == 1
    resumed.fit()
    assert_same(last(tmp_path / "whole"), last(tmp_path / "a"))


def test_a_second_signal_acts_at_once():
    with pytest.raises(KeyboardInterrupt), loop._Signals(Ranks()) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.ranks.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


# ---- bad input and failures ----


def test_resume_refuses_what_does_not_fit(tmp_path):
    make(tmp_path).fit()
    with pytest.raises(
        RunError, match=r"last\.pt: the run had another recipe: seed was 42, now 7; x was None"
    ):
        make(tmp_path, recipe={"seed": 7, "x": 1}).resume()
    wide = make(tmp_path, net=lambda backend: Net(width=5, backend=backend))
    with pytest.raises(CheckpointError, match=r"last\.pt: weights of another model: conv.bias has shape"):
        wide.resume()
    (tmp_path / "best.pt").unlink()
    with pytest.raises(CheckpointError, match=r"best\.pt: no such file"):
        make(tmp_path).resume()
    data = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"last\.pt: damaged"):
        make(tmp_path).resume()
    checkpoint.save(tmp_path / "last.pt", {"model": {}})
    with pytest.raises(CheckpointError, match="optimizer, history, recipe, steps missing"):
        make(tmp_path).resume()


@pytest.mark.parametrize("fused", [True, False])
def test_non_finite_gradient_stops_and_keeps_the_checkpoint(tmp_path, fused):
    trainer = make(tmp_path, fused)
    real = trainer.step

    def step():
        if trainer.steps == 6 + 2:
            trainer.model.bn.weight.grad.fill_(float("nan"))
        return real()

    trainer.step = step
    with pytest.raises(RunError, match=r"^epoch 2, step 3: (the )?gradient norm is nan"):
        trainer.fit()
    state = last(tmp_path)
    assert len(state["history"]) == 1 and all(v.isfinite().all() for v in state["model"].values())
    resumed = make(tmp_path, fused)
    resumed.resume()
    resumed.fit()


def test_non_finite_loss_stops(tmp_path):
    parts = data()
    parts.augment = lambda x, generator: x.float() * float("inf")
    with pytest.raises(RunError, match="^epoch 1, step 1: "):
        make(tmp_path, fused=False, parts=parts).fit()
    assert len(last(tmp_path)["history"]) == 0


def test_non_finite_evaluation_stops_before_the_checkpoint(tmp_path):
    parts = data()
    parts.normalize = lambda x: x.float() * float("nan")
    with pytest.raises(RunError, match="^epoch 1: validation loss is nan"):
        make(tmp_path, parts=parts).fit()
    assert len(last(tmp_path)["history"]) == 0


def test_values_wait_on_a_gpu_but_the_first_bad_step_is_named():
    meter = loop._Meter(epoch=4, window=3, device=torch.device("cpu"), ranks=Ranks())
    meter.add(torch.tensor([1.0, 4.0, 2.0]), 8)
    assert not meter.fresh and meter.steps == 0
    meter.add(torch.tensor([math.inf, 1.0, 2.0]), 8)
    with pytest.raises(RunError, match="^epoch 5, step 2: loss is inf"):
        meter.add(torch.tensor([math.nan, 1.0, 2.0]), 8)


def test_full_disk_during_training_keeps_the_last_epoch(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    real = torch.save

    def save(content, file):
        if len(content.get("history", [])) == 2:
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    with pytest.raises(CheckpointError, match=r"last\.pt: not saved, disk full"):
        trainer.fit()
    monkeypatch.undo()
    resumed = make(tmp_path)
    resumed.resume()
    assert len(resumed.history) == 1
    resumed.fit()


def test_batch_sizes(tmp_path):
    with pytest.raises(RunError, match="batch size 51 is larger than the 50 training images"):
        make(tmp_path / "a", batch_size=51)
    assert make(tmp_path / "b", batch_size=50).steps_per_epoch == 1
    one = make(tmp_path / "c", batch_size=1, epochs=1, max_steps=4)
    one.fit()
    assert one.history[0]["steps"] == 4


def test_bf16_autocast_reaches_the_model_and_not_the_loss(tmp_path):
    trainer = make(tmp_path, precision="bf16", epochs=1, fused=False)
    seen = []
    trainer.model.fc.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


# ---- ends and cadence ----


def test_early_stopping(tmp_path):
    trainer = make(tmp_path, epochs=50, patience=3)
    trainer.evaluate = lambda part: (1.0, {0: 10.0, 1: 20.0}.get(len(trainer.history), 20.0))
    assert trainer.fit() == "no better validation accuracy in 3 epochs"
    assert len(trainer.history) == 5 and trainer.best["epoch"] == 2  # an equal accuracy is not a better one
    assert checkpoint.load(tmp_path / "best.pt")["row"]["epoch"] == 2
    assert len(last(tmp_path)["history"]) == 5


def test_best_is_kept_and_loaded(tmp_path):
    trainer = make(tmp_path, epochs=3)
    trainer.evaluate = lambda part: (1.0, [10.0, 30.0, 20.0][len(trainer.history)])
    weights = []
    real = trainer._save_best
    trainer._save_best = lambda: (weights.append(trainer.model.fc.bias.detach().clone()), real())
    trainer.fit()
    assert len(weights) == 2 and not torch.equal(trainer.model.fc.bias, weights[1])
    trainer.load_best()
    assert torch.equal(trainer.model.fc.bias, weights[1])
    assert set(checkpoint.load(tmp_path / "best.pt")) == {"format", "version", "model", "row", "recipe"}


@pytest.mark.parametrize(("every", "saved"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])])
def test_cadence_of_last(tmp_path, every, saved, monkeypatch):
    trainer = make(tmp_path, epochs=5, save_every=every)
    seen = []
    real = trainer._save_last
    monkeypatch.setattr(trainer, "_save_last", lambda: (seen.append(len(trainer.history)), real()))
    trainer.fit()
    assert seen == saved and len(last(tmp_path)["history"]) == 5


def test_open_run(tmp_path):
    out = tmp_path / "runs" / "a"
    with pytest.raises(RunError, match=r"--resume: no run in .*a \(no last.pt\)"):
        loop.open_run(out, resume=True)
    loop.open_run(out, resume=False)
    assert list(out.iterdir()) == []
    (out / "last.pt").write_text("precious")
    with pytest.raises(RunError, match="already holds a run: continue it with --resume"):
        loop.open_run(out, resume=False)
    loop.open_run(out, resume=True)
    assert (out / "last.pt").read_text() == "precious"
    with pytest.raises(RunError, match="cannot be written, Not a directory"):
        loop.open_run(out / "last.pt" / "b", resume=False)
    with pytest.raises(RunError, match="cannot be written"):
        loop.open_run(Path("/proc/a"), resume=False)


def test_seeds_differ_by_epoch_and_purpose():
    seeds = {
        loop.derive_seed(s, e, p) for s in (1, 2) for e in range(20) for p in ("model", "order", "augment")
    }
    assert len(seeds) == 120 and all(0 <= s < 2**63 for s in seeds)


def test_every_epoch_has_its_own_order_and_augmentation(tmp_path):
    trainer = make(tmp_path)
    one, again, two = ([x for x, _ in trainer._train_batches(e)] for e in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], two[0])
    assert one[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "at_once"), [(8, 4), (8, 1), (50, 3), (7, 100), (1, 16)])
def test_chunks_hold_the_batches_of_the_epoch(tmp_path, size, at_once):
    """Same order and labels however many batches are augmented at once; every sample its own chance."""
    parts = data()
    parts.augment = lambda x, generator: x.float()
    trainer = make(tmp_path, parts=parts, batch_size=size)
    expected = list(trainer._train_batches(3))
    trainer.data.at_once = at_once * size
    calls = []
    trainer.data.augment = lambda x, generator: (calls.append(len(x)), x.float())[1]
    got = list(trainer._train_batches(3))
    assert len(got) == len(expected) == 50 // size == trainer.steps_per_epoch
    for (x, y), (u, v) in zip(expected, got, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
        assert u.is_contiguous(memory_format=torch.channels_last) and len(y) == size
    assert sum(calls) == 50 // size * size and max(calls) == min(at_once, 50 // size) * size


def test_a_target_ends_the_run(tmp_path):
    trainer = make(tmp_path, epochs=5, target=30.0)
    accuracies = {"test": [10.0, 20.0, 31.0, 5.0], "validation": [3.0, 2.0, 1.0, 0.0]}
    trainer.evaluate = lambda part: (1.0, accuracies[part][len(trainer.history)])
    assert trainer.fit() == "test accuracy 31.00 % reached after epoch 3"
    seconds = [row["seconds"] for row in trainer.history]
    totals = [row["training_seconds"] for row in trainer.history]
    assert totals == pytest.approx([sum(seconds[:i]) for i in (1, 2, 3)])
    assert trainer.target_row() is trainer.history[2] and trainer.best["epoch"] == 1
    assert len(last(tmp_path)["history"]) == 3
    again = make(tmp_path, epochs=5, target=30.0)
    again.resume()
    assert again.fit() == "test accuracy 31.00 % reached after epoch 3" and again.steps == 18
    figures = summary.collect(trainer, "Tiny", "the end", "command")
    assert figures["target"] == {
        "accuracy": 30.0, "epoch": 3, "seconds": totals[2], "startup_seconds": 0.0,
        "evaluation_seconds": sum(row["evaluation_seconds"] for row in trainer.history),
    }  # fmt: skip


def test_plain_model_has_no_z(tmp_path):
    assert loop.z_statistics(nn.Linear(2, 2)) == {}
    assert hyperfast.nn.parameter_counts(nn.Linear(2, 2))["generator"] == 0


def test_csv_is_written_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    loop.write_csv(path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
    loop.write_csv(path, [{"epoch": 1, "loss": 0.5}])
    assert path.read_text() == textwrap.dedent("""\
        epoch,loss
        1,0.5
        """)
    loop.write_csv(path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "z/conv/min": -1.0}])
    assert path.read_text() == "epoch,loss,z/conv/min\n1,0.5,\n2,0.25,-1.0\n"


@pytest.mark.parametrize("own", [None, "0"])
def test_training_asks_for_huge_pages_unless_told_otherwise(own):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if own is None else {"THP_MEM_ALLOC_ENABLE": own}
    program = (
        "import sys, train, os; assert 'torch' not in sys.modules; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (own or "1")


def test_schedules_by_step():
    rate = exponential_by_step(0.5, 0.1, 0.004)
    assert [rate(9, step) for step in range(4)] == pytest.approx([0.5, 0.05, 0.005, 0.004])
    rate = piecewise((3, 2, 1), (2, 4.5))
    assert [rate(9, step) for step in range(7)] == [3, 3, 2, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="one more than the 2 of until, got 2"):
        piecewise((3, 2), (1, 2))
