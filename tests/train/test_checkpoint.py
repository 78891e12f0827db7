import errno
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from train import checkpoint
from train.checkpoint import CheckpointError


@pytest.fixture
def payload():
    return {"model": {"w": torch.arange(50_000.0)}, "row": {"epoch": 3, "betas": (0.9, 0.999)}}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_and_weights_only(tmp_path, payload):
    path = tmp_path / "a.pt"
    checkpoint.save(path, payload)
    loaded = checkpoint.load(path, ("model", "row"))
    assert torch.equal(loaded["model"]["w"], payload["model"]["w"]) and loaded["row"] == payload["row"]
    assert torch.load(path, weights_only=True)["version"] == checkpoint.VERSION
    assert names(tmp_path) == ["a.pt"]


def full_disk(limit):
    """An `open` whose binary files take `limit` bytes and then report a full disk."""
    real = open

    def fake(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file

        class Full:
            written = 0

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                self.written += len(data)
                if self.written > limit:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()

    return fake


@pytest.mark.parametrize("limit", [0, 100, 100_000])
def test_full_disk_keeps_the_old_file(tmp_path, payload, monkeypatch, limit):
    path = tmp_path / "a.pt"
    checkpoint.save(path, payload)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "open", full_disk(limit), raising=False)
    with pytest.raises(CheckpointError, match=r"a\.pt: not saved, disk full"):
        checkpoint.save(path, {"model": torch.zeros(100_000)})
    assert path.read_bytes() == before and names(tmp_path) == ["a.pt"]


def test_real_write_error_of_the_system(tmp_path):
    """A file size limit makes write() itself fail, inside torch.save."""
    code = (
        "import resource, signal, sys, torch; from train import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"checkpoint.save({str(tmp_path / 'a.pt')!r}, {{'a': torch.ones(10)}})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    checkpoint.save({str(tmp_path / 'a.pt')!r}, {{'a': torch.zeros(1_000_000)}})\n"
        "except checkpoint.CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "a.pt: not saved, File too large" in done.stdout, done.stderr
    assert torch.equal(checkpoint.load(tmp_path / "a.pt")["a"], torch.ones(10))
    assert names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("moment", ["write", "os.fsync", "os.replace"])
def test_kill_in_the_middle_of_a_save(tmp_path, payload, moment):
    path = tmp_path / "a.pt"
    checkpoint.save(path, payload)
    before = path.read_bytes()
    kill = "lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    patch = {
        "write": f"checkpoint.torch.save = lambda c, f: (f.write(b'half'), f.flush(), ({kill})())",
        "os.fsync": f"os.fsync = {kill}",
        "os.replace": f"os.replace = {kill}",
    }[moment]
    code = (
        f"import os, signal, torch; from train import checkpoint\n{patch}\n"
        f"checkpoint.save({str(path)!r}, {{'a': torch.zeros(1000)}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    checkpoint.save(path, {"a": torch.zeros(1)})
    assert names(tmp_path) == ["a.pt"]  # the left-over is used up by the next save


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_other_failures_pass_and_leave_nothing(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        checkpoint.write_atomically(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not saved, Not a directory"):
        checkpoint.save(tmp_path / "file" / "a.pt", {})
    with pytest.raises(CheckpointError, match="not saved, No such file"):
        checkpoint.save(tmp_path / "nowhere" / "a.pt", {})


def test_damaged_and_foreign_files(tmp_path, payload):
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"a\.pt: no such file"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)
    checkpoint.save(path, payload)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for data in (good[: len(good) // 2], good[:-10], b"", b"not a zip", good[10:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.pt: damaged"):
            checkpoint.load(path)
    path.write_bytes(flipped)
    torch.load(path, weights_only=True)  # torch itself takes the flipped bit
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged file, check sum of .*data/0"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged or not a checkpoint"):
        checkpoint.load(path)
    for foreign in ({"net": {}}, torch.zeros(3), {"format": "other", "version": 1}):
        torch.save(foreign, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="format version 99, this program reads 1"):
        checkpoint.load(path)
    checkpoint.save(path, {"model": {}})
    with pytest.raises(CheckpointError, match="optimizer missing"):
        checkpoint.load(path, ("model", "optimizer"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 1, "x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_model():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(model, state, "x.pt")
    assert str(caught.value) == (
        "x.pt: weights of another model: bias missing; scale unexpected; "
        "weight has shape (2, 4), wanted (2, 3)"
    )
    assert torch.equal(model.weight, before)
    checkpoint.load_model(model, nn.Linear(3, 2).state_dict(), "x.pt")


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_optimizer_state_of_another_model():
    optimizer = stepped(nn.Linear(3, 2))
    other = stepped(nn.Linear(4, 2)).state_dict()
    with pytest.raises(CheckpointError, match=r"exp_avg of parameter 0 has shape \(2, 4\), wanted \(2, 3\)"):
        checkpoint.load_optimizer(optimizer, other, "x.pt")
    with pytest.raises(CheckpointError, match="x.pt: optimizer state does not fit"):
        checkpoint.load_optimizer(optimizer, stepped(nn.Linear(3, 2, bias=False)).state_dict(), "x.pt")
    checkpoint.load_optimizer(optimizer, stepped(nn.Linear(3, 2)).state_dict(), "x.pt")
