"""Runs on several processes: the same as on one, whatever goes wrong on one of them."""

import contextlib
import csv
import datetime
import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import train
from tests.train import joined, tiny
from train import checkpoint, cifar100, command, compare, ranks, report
from train.loop import Interrupted
from train.task import RunError

ROOT = Path(train.__file__).parents[1]
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def history(path):
    """Of last.pt, without the clock."""
    rows = checkpoint.load(path / "last.pt")["history"]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def assert_alike(one, other):
    """The same figures but for rounding, which AdamW amplifies."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=2e-4, abs=1e-5), name


# ---- two ranks, in one spawn ----


class Spawned:
    """What one of the ranks does and sees."""

    def __init__(self, rank, folder):
        self.rank, self.folder, self.seen = rank, Path(folder), {}

    def group(self, name):
        """A new process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.FileStore(str(self.folder / f"store_{name}"), 2)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=2)

    def run(self, *options):
        """Exit status and both streams of the command."""
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = joined.run(*options)
        return status, out.getvalue(), error.getvalue()

    def work(self):
        self.group("first")
        self.batches()
        self.agreement()
        self.faults()
        self.one_run()

    def batches(self):
        """This rank's rows of every batch; with one generator they are all that one process has."""
        own = ranks.here()
        self.seen["rows"] = own.share(7), own.own_batch(6)
        for at_once in (1, 20):
            parts = tiny.data()
            parts.augment, parts.at_once = lambda x, chance: x.float(), at_once
            mine = list(parts.batches(3, 42, 8, own))
            whole = list(parts.batches(3, 42, 8))
            assert len(mine) == len(whole) == 6
            for (x, y), (u, v) in zip(mine, whole, strict=True):
                rows = slice(4 * self.rank, 4 * self.rank + 4)
                assert torch.equal(x, u[rows]) and torch.equal(y, v[rows])
        chances = []
        parts.augment = lambda x, chance: (chances.append(torch.rand(1, generator=chance)), x.float())[1]
        list(parts.batches(3, 42, 8, own))
        self.seen["chance"] = chances[0].item()

    def agreement(self):
        own = ranks.here()
        assert own.gather(torch.tensor([1.0 + self.rank])).tolist() == [[1.0], [2.0]]
        assert own.total(1 + self.rank, torch.tensor(0.5)) == (3, 1)
        assert own.together(lambda: 5) == 5
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(self.rank)
        own.settle(norm)
        assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 0
        seen = []
        own.on_first(lambda: seen.append(1))
        assert len(seen) == (self.rank == 0)

    def faults(self):
        """What ends a run on one rank ends it on both, with one reason."""
        own, errors = ranks.here(), []

        def on_one():
            if self.rank == 1:
                raise OSError("disk gone")

        def everywhere():
            raise RunError("bad")

        def check():
            own.check_equal(recipe={"lr": 0.1 + self.rank, "seed": 1})

        for work in (lambda: own.together(on_one), lambda: own.together(everywhere), check):
            with pytest.raises((RunError, OSError)) as caught:
                work()
            errors.append(str(caught.value))
        self.seen["errors"] = errors
        self.seen["divide"] = self.run(self.folder / "odd", "--batch-size", "9")
        self.seen["recipe"] = self.run(self.folder / "recipe", "--lr", 0.1 + self.rank)
        trainer = tiny.make(self.folder / "signal")
        real = trainer.step

        def step():
            if trainer.steps == 3 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return real()

        trainer.step = step
        with pytest.raises(Interrupted):
            trainer.fit()
        self.seen["stopped"] = trainer.steps
        trainer = tiny.make(self.folder / "nan", fused=False)
        if self.rank == 1:
            joined.nan(trainer)
        with pytest.raises(RunError) as caught:
            trainer.fit()
        self.seen["nan"] = str(caught.value)
        trainer = tiny.make(self.folder / "full")
        trainer.ranks.on_first(lambda: joined.full(trainer))
        with pytest.raises(checkpoint.CheckpointError) as caught:
            trainer.fit()
        self.seen["full"] = str(caught.value)
        checkpoint.torch.save = self.save

    def one_run(self):
        """An epoch sharded, one on the first process alone, one replicated."""
        writes = []
        real = checkpoint.write_atomically
        checkpoint.write_atomically = lambda path, write: (writes.append(str(path)), real(path, write))[1]
        out = self.folder / "run"
        report.save_figure = lambda figure, path: None  # half the time, and no matter of ranks
        self.seen["sharded"] = self.run(out, "--shard-generator", "--max-steps", 6)
        command.Command._report = lambda *args: None  # one is enough
        dist.destroy_process_group()
        if self.rank == 0:
            self.seen["alone"] = self.run(out, "--resume", "--max-steps", 12)
        self.group("second")
        args = cifar100.parse(["--out", str(out), "--epochs", "3", "--batch-size", "8", "--resume"])
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = cifar100.run(args, "the command")
        self.seen["history"] = [
            {k: v for k, v in row.items() if "second" not in k} for row in trainer.history
        ]
        self.seen["writes"] = len(writes)
        if self.rank == 0:
            dist.destroy_process_group()
            self.run(self.folder / "whole")


def spawned(rank, folder):
    torch.set_num_threads(1)
    joined.install()
    own = Spawned(rank, folder)
    own.save = torch.save
    own.work()
    torch.save(own.seen, f"{folder}/rank{rank}.pt")


@needs_gloo
@pytest.mark.timeout(120)
def test_two_ranks(tmp_path):
    mp.start_processes(spawned, (str(tmp_path),), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert one["rows"] == (slice(0, 3), 3) and two["rows"] == (slice(3, 7), 3)
    assert one["chance"] != two["chance"]
    assert one["errors"] == two["errors"]
    assert one["errors"] == [
        "rank 1: disk gone", "bad", "rank 1 has another recipe than rank 0: lr 1.1 instead of 0.1",
    ]  # fmt: skip
    for name in ("stopped", "nan", "full", "history", "divide", "recipe"):
        assert one[name] == two[name], name
    assert one["stopped"] == 4 and one["nan"].startswith("epoch 1, step 1: ")
    assert "disk full" in one["full"]
    assert one["divide"] == (2, "", "error: batch size 9 cannot be divided by 2 processes\n")
    assert one["recipe"][0] == 2 and "lr 1.1 instead of 0.1" in one["recipe"][2]

    assert one["sharded"][0] == two["sharded"][0] == one["alone"][0] == 0, one
    assert "epoch 1/3: loss" in one["sharded"][1] and two["writes"] == 0 < one["writes"]
    for change in ("ranks was 2, now 1", "shard_generator was True, now False"):
        assert change in one["alone"][1]
    run = tmp_path / "run"
    assert one["history"] == history(run)
    assert_alike(history(run), history(tmp_path / "whole"))
    with open(run / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert (run / "report.md").exists() and len(list((run / "tensorboard").glob("events*"))) == 3
    ours, theirs = (checkpoint.load(d / "last.pt")["model"] for d in (run, tmp_path / "whole"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-4)
    assert not list(tmp_path.glob("*/.*"))


# ---- one process ----


def test_one_process_does_nothing():
    own = ranks.here()
    x = torch.rand(8, 2)
    assert own.own_rows(x, 4) is x and own.share(5) == slice(0, 5) and own.own_batch(7) == 7
    assert own.gather(x).shape == (1, 8, 2) and own.total(1, 2) == (1, 2)
    model = nn.Linear(2, 2)
    assert own.parallel(model) is model


def refused(capsys, *options):
    with pytest.raises(SystemExit) as caught:
        cifar100.parse(list(options))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_environment(monkeypatch, capsys):
    for name in ranks.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert ranks.processes() == 1 and ranks.launcher() == "python"
    monkeypatch.setenv("RANK", "1")
    error = refused(capsys)
    assert "RANK in the environment without a right WORLD_SIZE, LOCAL_RANK" in error and "torchrun" in error
    values = {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    with monkeypatch.context() as one:
        one.setenv("WORLD_SIZE", "1")
        assert ranks.launcher() == "torchrun --nproc-per-node 1"  # where a group of one is wanted
    for name, value in (values | {"MASTER_PORT": "port"}).items():
        monkeypatch.setenv(name, value)
    assert "without a right MASTER_PORT" in refused(capsys)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert ranks.processes() == 4 and ranks.launcher() == "torchrun --nproc-per-node 2 --nnodes 2"
    assert not cifar100.parse(["--device", "cuda"]).cuda_graph
    assert "--cuda-graph is for one process" in refused(capsys, "--device", "cuda", "--cuda-graph")
    with pytest.raises(RunError, match="--speed-test is for one process"):
        ranks.alone("--speed-test")
    with pytest.raises(RunError, match="each process takes a GPU of its own"):
        ranks.join(cifar100.parse(["--device", "cuda:1"]))


def test_options_that_do_not_go_with_sharding(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "load_images", joined.load_images)
    monkeypatch.setattr(cifar100, "VALIDATION", joined.VALIDATION)
    assert "needs --fused" in refused(capsys, "--shard-generator", "--no-fused")
    assert "--progressive" in refused(capsys, "--shard-generator", "--progressive", "fc1@2")
    assert cifar100.main(["--shard-generator", "--out", str(tmp_path / "a"), "--batch-size", "8"]) == 2
    assert "there is one process alone" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar100", ["--model", "standard_deep"]),
        ("cifar100", ["--model", "mnist_style"]),
        ("cifar100", ["--generate", "none"]),
        ("mnist", ["--model", "single"]),
        ("vgg", []),
        ("vgg", ["--hyper", "two_layer"]),
        ("conditional", []),
        ("cifar10", []),
        ("charlm", []),
    ],
)
def test_sharding_is_for_models_that_have_something_to_shard(capsys, name, options):
    training = compare.training_command(name)
    with pytest.raises(SystemExit) as caught:
        training.parse([*options, "--shard-generator"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "--shard-generator" in error and error.count("\n") == 1
    own = {"vgg": ["--hyper", "shared"], "conditional": ["--model", "static"]}.get(name, [])
    if name not in ("cifar10", "charlm"):
        assert training.build and training.parse([*own, "--shard-generator"]).shard_generator


def test_a_restarted_job_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    def opened(restarted):
        try:
            return command._open(cifar100.parse(["--out", str(tmp_path)]), restarted)
        except RunError as error:
            return str(error)

    refused = f"{tmp_path} already holds a run: continue it with --resume, or choose another --out"
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "last.pt").touch()
    assert opened(restarted=False) == refused == opened(restarted=True)
    ranks.mark(tmp_path)
    assert opened(restarted=True) is True
    with monkeypatch.context() as other:
        other.setenv("TORCHELASTIC_RUN_ID", "2")
        assert opened(restarted=False) == refused == opened(restarted=True)
    assert opened(restarted=True) is True
    assert opened(restarted=False) == refused == opened(restarted=True)  # of the same name, but another
    ranks.mark(tmp_path)
    ranks.unmark(tmp_path)
    assert opened(restarted=True) == refused and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@needs_gloo
@pytest.mark.timeout(60)
def test_a_group_has_a_part_of_the_store_that_the_dead_did_not_see():
    store, limit = dist.HashStore(), datetime.timedelta(seconds=30)
    store.set("asks 1", "dead")
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(ranks._agreed, store, rank, 3, limit) for rank in (2, 0, 1)]
        parts = [future.result() for future in started]
    parts[0].set("key", "value")
    assert [part.get("key") for part in parts] == [b"value"] * 3
    with pytest.raises(RuntimeError, match="timed out waiting for rank 1"):
        ranks._agreed(dist.HashStore(), 0, 2, datetime.timedelta())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[/gloo/pair.cc:5] Connection closed by peer [::1]:1. Look up", "another process ended or does not "
         "answer: Connection closed by peer [::1]:1"),
        ("got 0 bytes. Connection was likely closed. Did the server crash?", "another process"),
        ("Read error [::1]:5: Connection reset by peer", "another process ended"),
        ("writev: Broken pipe", "another process ended"),
        ("Timed out waiting 5000ms for recv operation to complete", "another process ended"),
        ("NCCL error in: a.cpp:1\nLast error:\nDuplicate GPU detected : rank 1", "communication failed: NCCL "
         "error in: a.cpp:1 Last error: Duplicate GPU detected : rank 1"),
        ("NCCL WARN Cuda failure 'out of memory'", "communication failed: NCCL WARN Cuda failure 'out of"),
        ("shape '[2]' is invalid for input of size 3", None),
    ],
)  # fmt: skip
def test_what_is_said_of_errors_of_communication(text, said):
    line = ranks.lost(RuntimeError(text))
    assert line is None if said is None else line.startswith(said) and "\n" not in line


# ---- torchrun ----


def torchrun(count, *arguments, timeout=240):
    """Exit status, what the ranks printed and said."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    said = [line for line in done.stderr.splitlines() if line.startswith(("rank ", "stopped"))]
    return done.returncode, done.stdout, said


PROGRAM = joined.__file__


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_rank_ends_the_run_which_then_goes_on(tmp_path, sharded):
    out, options = tmp_path / "a", ["--shard-generator"] * sharded
    status, _, said = torchrun(2, PROGRAM, "kill@1@8", out, *options)
    assert status and len(said) == 1
    assert said[0].startswith("rank 0: error: another process ended or does not answer: ")
    assert said[0].endswith("--resume") and f"{out} holds the last epoch's end" in said[0]
    assert len(history(out)) == 1
    status, printed, said = torchrun(2, PROGRAM, out, *options, "--resume")
    assert status == 0 and not said and f"resumed {out} after epoch 1" in printed
    assert torchrun(2, PROGRAM, tmp_path / "whole", *options)[0] == 0
    assert history(out) == history(tmp_path / "whole")  # two numbers have one sum: bit for bit


@needs_gloo
@pytest.mark.slow
def test_a_silent_rank_ends_the_run_within_the_timeout(tmp_path):
    status, _, said = torchrun(2, PROGRAM, "freeze@1@8", tmp_path / "a", "--timeout", 5)
    assert status and len(said) == 1 and "does not answer: Timed out waiting 5000ms" in said[0]


@needs_gloo
@pytest.mark.slow
def test_a_report_may_take_longer_than_the_timeout(tmp_path):
    status, printed, _ = torchrun(2, PROGRAM, "slow_report@0@2", tmp_path / "a", "--timeout", 3)
    assert status == 0 and "all 3 epochs done" in printed and not list(tmp_path.glob("a/.*"))


@needs_gloo
@pytest.mark.slow
def test_a_restarted_job_does_not_go_on_with_another_run(tmp_path):
    assert torchrun(2, PROGRAM, tmp_path / "a", "--max-steps", 6)[0] == 0
    status, _, said = torchrun(2, "--max-restarts=1", PROGRAM, tmp_path / "a")
    assert status and said and all("already holds a run" in line for line in said)
    assert len(history(tmp_path / "a")) == 1


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_torchrun_restarts_and_the_run_goes_on(tmp_path, sharded):
    out, options = tmp_path / "a", ["--shard-generator"] * sharded
    status, printed, _ = torchrun(2, "--max-restarts=1", PROGRAM, "kill@0@8", out, *options)
    assert status == 0 and f"resumed {out} after epoch 1" in printed
    assert torchrun(2, PROGRAM, tmp_path / "whole", *options)[0] == 0
    assert history(out) == history(tmp_path / "whole")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (["nan@1@7"], "epoch 2, step 2: the gradient norm is nan; nothing was updated"),
        (["full@0@7"], "not saved, disk full; an earlier file is unchanged"),
        (["interrupt@1@7"], "stopped by SIGINT; "),
        (["--rank1=--lr=0.5"], "rank 1 has another recipe than rank 0: lr 0.5 instead of 0.001"),
        (["--rank1=--save-every=2"], "rank 1 has another circumstances than rank 0: save_every 2"),
        (["--batch-size=9"], "batch size 9 cannot be divided by 2 processes"),
    ],
)
def test_what_ends_a_run_on_one_rank_ends_it_on_all(tmp_path, fault, reason):
    first = [text for text in fault if "@" in text]
    rest = [text for text in fault if "@" not in text]
    status, _, said = torchrun(2, PROGRAM, *first, tmp_path / "a", *rest, "--timeout", 60)
    assert status and said and all(reason in line for line in said), said  # torchrun may stop one before


@needs_gloo
@pytest.mark.slow
def test_any_number_of_processes_goes_on(tmp_path):
    out = tmp_path / "a"
    shard = "--shard-generator"
    assert torchrun(2, PROGRAM, out, shard, "--max-steps", 6)[0] == 0
    assert torchrun(4, PROGRAM, out, shard, "--resume", "--max-steps", 12)[0] == 0
    status, printed, said = torchrun(1, PROGRAM, out, "--resume")
    assert status == 0 and "ranks was 4, now 1" in printed
    assert torchrun(1, PROGRAM, tmp_path / "whole", shard)[0] == 0  # a group of one
    assert_alike(history(out), history(tmp_path / "whole"))
    recorded = json.loads((out / "summary.json").read_text())
    assert recorded["steps"] == 18 and "4" not in recorded["command"].partition("-m")[0]
