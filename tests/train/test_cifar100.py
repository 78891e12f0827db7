import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import hyperfast
from tests.train.tiny import Net
from train import checkpoint, cifar100, command
from train.data import DataError, ImageSet
from train.models import MODELS, build_model


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(n) % 100


def tiny_model(name, fused=False, init=None, **_):
    """Stands for every model: 5 of the 100 classes are enough to keep the labels in range."""
    model = Net(width=4, classes=100, backend="auto" if fused else "reference")
    return hyperfast.factored_(model) if fused else model


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    monkeypatch.setattr(
        cifar100, "load_images", lambda name, root: ImageSet(*images(60, 0), *images(20, 1), [])
    )
    monkeypatch.setattr(cifar100, "VALIDATION", 20)


@pytest.fixture
def small(small_data, monkeypatch):
    monkeypatch.setattr(cifar100, "build_model", tiny_model)


def run(out, *options):
    return cifar100.main(["--out", str(out), "--epochs", "2", "--batch-size", "8", *options])


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


DEEP = {
    "optimizer": "adamw", "schedule": "cosine", "epochs": 100, "batch_size": 64, "lr": 1e-3, "min_lr": 1e-6,
    "weight_decay": 1e-4, "clip": 1.0, "patience": 15,
}  # fmt: skip
FIXED = {
    "optimizer": "adam", "schedule": "exponential", "epochs": 100, "batch_size": 128, "lr": 1e-3,
    "lr_decay": 0.995, "weight_decay": 0.0, "clip": 100.0, "patience": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_the_recipe(name):
    args = cifar100.parse(["--model", name])
    wanted = DEEP if name in ("full", "enhanced", "standard_deep") else FIXED
    wanted |= {"augment": "report", "recipe": "report", "target_accuracy": None, "cuda_graph": False}
    wanted |= {"fused": True, "seed": 42, "precision": "fp32", "resume": False, "max_steps": None}
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert args.init == hyperfast.nn.init.DEFAULT and args.out == Path(f"runs/cifar100_{name}")
    assert command.BETAS == (0.9, 0.999) and cifar100.VALIDATION == 5000
    assert cifar100.parse([]).model == "full"


def test_options_override_the_recipe():
    options = {"optimizer": "adamw", "schedule": "cosine", "epochs": 7, "batch_size": 9, "lr": 0.1,
               "min_lr": 0.01, "warm_up": 0.5, "augment": "crop_flip", "lr_decay": 0.9,
               "weight_decay": 0.2, "clip": 3.0, "patience": 2}  # fmt: skip
    arguments = [
        text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    args = cifar100.parse(["--model", "fixed", *arguments])
    assert {key: getattr(args, key) for key in options} == options
    args = cifar100.parse(["--batch_size=3", "--min_lr", "0", "--out=a_b"])  # as in the reports
    assert (args.batch_size, args.min_lr, args.out) == (3, 0, Path("a_b"))


def test_schedules():
    args = cifar100.parse(["--model", "fixed", "--lr", "0.5", "--lr-decay", "0.9"])
    schedule = cifar100.SCHEDULES[args.schedule](args, 10)
    assert [schedule(epoch, 99) for epoch in range(3)] == pytest.approx([0.5, 0.45, 0.405])
    args = cifar100.parse(["--lr", "0.5", "--min-lr", "0.1", "--epochs", "2"])
    schedule = cifar100.SCHEDULES[args.schedule](args, 10)
    assert [schedule(epoch, 99) for epoch in range(3)] == pytest.approx([0.5, 0.3, 0.1])


def test_fast_is_a_recipe_of_the_deep_networks(capsys):
    args = cifar100.parse(["--recipe", "fast", "--lr", "0.5"])
    wanted = {"optimizer": "adamw", "schedule": "one_cycle", "epochs": 20, "batch_size": 256, "lr": 0.5,
              "min_lr": 1e-6, "warm_up": 0.2, "weight_decay": 0.02, "clip": 1.0, "patience": 0,
              "augment": "crop_flip"}  # fmt: skip
    assert {key: getattr(args, key) for key in wanted} == wanted
    schedule = cifar100.SCHEDULES[args.schedule](args, 10)  # 200 steps
    assert [schedule(0, step) for step in (0, 39, 199)] == pytest.approx([0.5 / 40, 0.5, 1e-6])
    assert schedule(0, 119) == pytest.approx(0.25, rel=1e-3)
    with pytest.raises(SystemExit):
        cifar100.parse(["--recipe", "fast", "--model", "mnist_style"])
    assert "--recipe fast is for full, enhanced, standard_deep, not for mnist_style" in one_line(capsys)


def test_crop_flip_changes_no_colour():
    x = images(40, 5)[0]
    augment = cifar100.Augment((0, 0, 0), (1, 1, 1), **cifar100.AUGMENTS["crop_flip"])
    got = augment(x, torch.Generator().manual_seed(1)).mul(255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i in range(len(x)):
        crops = padded[i].unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2).movedim(1, 0)
        assert (crops == got[i]).flatten(1).all(1).any() or (crops.flip(3) == got[i]).flatten(1).all(1).any()
    assert (got != x).flatten(1).any(1).sum() > 30


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_of_a_graph(monkeypatch, fused):
    """What the optimizers are asked for; they run in tests/train/test_graph.py."""
    asked = {}
    owner = hyperfast.optim if fused else torch.optim
    monkeypatch.setattr(owner, "AdamW", lambda parameters, **options: asked.update(options))
    args = cifar100.parse(["--device", "cuda", "--fused" if fused else "--no-fused"])
    assert args.cuda_graph
    cifar100.make_optimizer(tiny_model("full", fused), args)
    wanted = {"capturable": True, "nonfinite": "skip"} if fused else {"capturable": True, "fused": True}
    assert wanted.items() <= asked.items()
    asked.clear()
    args.cuda_graph = False
    cifar100.make_optimizer(tiny_model("full", fused), args)
    assert not wanted.keys() & asked.keys()


def test_precision_of_a_gpu():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision in ("tf32", "fp32", "tf32", "bf16"):
            command.set_precision(precision)
            tf32 = precision == "tf32"
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.backends.cudnn.benchmark = False


def test_fast_runs_to_a_target(small, tmp_path, capsys):
    options = ("--recipe", "fast", "--augment", "crop_flip", "--target-accuracy", "0.5")
    assert run(tmp_path / "a", *options) == 0
    state = checkpoint.load(tmp_path / "a" / "last.pt")
    assert {"augment": "crop_flip", "schedule": "one_cycle", "warm_up": 0.2}.items() <= state[
        "recipe"
    ].items()
    text, out = (tmp_path / "a" / "report.md").read_text(), capsys.readouterr().out
    history = state["history"]
    if history[-1]["test_accuracy"] >= 0.5:
        seconds = f"{history[-1]['training_seconds']:.1f} s of training"
        assert f"reached after epoch {len(history)}, {seconds}; test accuracy" in out
        assert f"reached the target of 0.50 % after epoch {len(history)}: {seconds}, " in text
    else:
        assert "No epoch reached the target of 0.50 % test accuracy." in text


@pytest.mark.parametrize("name", ["full", "fixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_gets_the_recipe(name, fused):
    options = [
        "--model",
        name,
        "--fused" if fused else "--no-fused",
        "--clip",
        "0.5",
        "--weight-decay",
        "0.1",
    ]
    args = cifar100.parse(options)
    model = tiny_model(name, fused)
    optimizer, step = cifar100.make_optimizer(model, args)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.1)
    kind = "AdamW" if name == "full" else "Adam"
    assert type(optimizer) is getattr(hyperfast.optim if fused else torch.optim, kind)
    model(torch.randn(8, 3, 32, 32)).square().sum().mul(1e3).backward()
    gradient, weight = model.bn.weight.grad.clone(), model.bn.weight.detach().clone()
    norm = float(step())
    # the first moment after one step is a tenth of the clipped gradient, which Adam adds the decay to
    clipped = 0.1 * (gradient * 0.5 / norm + (0.1 * weight if kind == "Adam" else 0))
    assert norm > 0.5 and torch.allclose(optimizer.state[model.bn.weight]["exp_avg"], clipped, rtol=1e-4)


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_a_run_leaves_everything(small, tmp_path, capsys, fused):
    assert run(tmp_path / "a", fused, "--save-frozen") == 0
    out = capsys.readouterr().out
    assert "epoch 2/2: loss" in out and "all 2 epochs done; test accuracy" in out
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "best.pt", "last.pt", "metrics.csv", "report.md", "curves.png", "z.png", "z_bars.png", "filters.png",
        "frozen.safetensors", "tensorboard", "summary.json",
    }  # fmt: skip
    state = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert state["recipe"]["model"] == "full" and len(state["history"]) == 2


def test_frozen_is_the_plain_network_of_the_best_epoch(small, tmp_path):
    run(tmp_path / "a", "--save-frozen")
    frozen = safetensors.torch.load_file(tmp_path / "a" / "frozen.safetensors")
    model = tiny_model("full")
    model.load_state_dict(checkpoint.load(tmp_path / "a" / "best.pt")["model"])
    assert set(frozen) == {
        "conv.weight", "conv.bias", "fc.weight", "fc.bias", "bn.weight", "bn.bias", "bn.running_mean",
        "bn.running_var", "bn.num_batches_tracked",
    }  # fmt: skip
    generator = model.conv.generator
    expected = (generator.weight @ generator.z + generator.bias).view(4, 3, 3, 3)
    assert torch.allclose(frozen["conv.weight"], expected, atol=1e-6)


def test_resume_continues(small, tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "a", "--max-steps", "5")  # an epoch has 5 steps
    assert run(tmp_path / "a", "--resume", "--threads", str(torch.get_num_threads())) == 0
    out = capsys.readouterr().out
    assert "note: max_steps was 5, now None" in out and "after epoch 1" in out
    whole, parts = (checkpoint.load(tmp_path / d / "last.pt")["model"] for d in ("whole", "a"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_the_seed_decides_the_run(small, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(tmp_path / name, "--seed", seed, "--max-steps", "2")
    a, b, c = (checkpoint.load(tmp_path / name / "best.pt")["model"]["fc.bias"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- bad input: exit status 2, one line on stderr, nothing lost ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: 'many' is not a number"),
        (["--batch-size", "-1"], "argument --batch-size: must be at least 1, got -1"),
        (["--lr", "nan"], "argument --lr: must be above 0, got nan"),
        (["--lr", "0"], "argument --lr: must be above 0, got 0"),
        (["--clip", "inf"], "argument --clip: must be above 0, got inf"),
        (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
        (["--init", "zero"], "argument --init: invalid choice: 'zero'"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--precision", "tf32", "--device", "cpu"], "--precision tf32 needs --device cuda, got cpu"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs --device cuda, got cpu"),
        (["--recipe", "slow"], "argument --recipe: invalid choice: 'slow'"),
        (["--warm-up", "1.5"], "argument --warm-up: must be at most 1, got 1.5"),
        (["--target-accuracy", "0"], "argument --target-accuracy: must be above 0, got 0"),
        (["--target-accuracy", "101"], "argument --target-accuracy: must be at most 100, got 101"),
        (["--min-lr", "1"], "--min-lr 1.0 is larger than --lr 0.001"),
        (["--no-fused", "--state-dtype", "bf16"], "--state-dtype bf16 needs --fused"),
        (["--typo"], "unrecognized arguments: --typo"),
    ],
)
def test_command_line_errors(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cifar100.main(options)
    assert caught.value.code == 2 and message in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_unknown_model_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        cifar100.main(["--model", "resnet"])
    error = one_line(capsys)
    assert all(name in error for name in MODELS)


def test_out_is_checked_before_the_data_is_read(small, tmp_path, capsys, monkeypatch):
    def never(name, root):
        raise AssertionError("data was read")

    monkeypatch.setattr(cifar100, "load_images", never)
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "a") == 2
    assert "cannot be written" in one_line(capsys)
    assert run(tmp_path / "a", "--resume") == 2
    assert "--resume: no run in" in one_line(capsys)
    for device in ("cuda:99", "nonsense"):
        assert run(tmp_path / "a", "--device", device) == 2
        assert f"--device {device}" in one_line(capsys)


def test_an_existing_run_is_not_overwritten(small, tmp_path, capsys):
    run(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()}
    capsys.readouterr()
    assert run(tmp_path / "a") == 2
    assert "already holds a run" in one_line(capsys)
    assert run(tmp_path / "a", "--resume", "--lr", "0.01", "--seed", "3") == 2
    assert "another recipe: lr was 0.001, now 0.01; seed was 42, now 3" in one_line(capsys)
    (tmp_path / "a" / "last.pt").write_bytes(before["last.pt"][:-100])
    assert run(tmp_path / "a", "--resume") == 2
    assert "last.pt: damaged" in one_line(capsys)
    (tmp_path / "a" / "last.pt").write_bytes(before["last.pt"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()} == before


def test_other_data_is_another_recipe(small, tmp_path, capsys, monkeypatch):
    run(tmp_path / "a")
    capsys.readouterr()
    x, y = images(60, 0)
    monkeypatch.setattr(
        cifar100, "load_images", lambda name, root: ImageSet(x, y.flip(0), *images(20, 1), [])
    )
    assert run(tmp_path / "a", "--resume") == 2
    assert "label_checksum was" in one_line(capsys)


def test_faults_of_data_and_batch_size(small, tmp_path, capsys, monkeypatch):
    assert run(tmp_path / "a", "--batch-size", "41") == 2
    assert "batch size 41 is larger than the 40 training images" in one_line(capsys)

    def missing(name, root):
        raise DataError("no data here")

    monkeypatch.setattr(cifar100, "load_images", missing)
    assert run(tmp_path / "a") == 2
    assert one_line(capsys) == "error: no data here\n"


def test_missing_data_folder(tmp_path, capsys):
    assert run(tmp_path / "a", "--data", str(tmp_path / "nowhere")) == 2
    assert "nowhere does not exist" in one_line(capsys)


def test_full_disk(small, tmp_path, capsys, monkeypatch):
    def full(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert run(tmp_path / "a") == 2
    assert "last.pt: not saved, disk full" in one_line(capsys)


def test_a_signal_tells_how_to_go_on(small, tmp_path, capsys, monkeypatch):
    def interrupted(model, args):
        optimizer, step = real(model, args)
        calls = iter(range(100))

        def then_stop():
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return step()

        return optimizer, then_stop

    real = cifar100.make_optimizer
    monkeypatch.setattr(cifar100, "make_optimizer", interrupted)
    assert run(tmp_path / "a") == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "stopped by SIGTERM" in error
    again = f"python -m train.cifar100 --out {tmp_path / 'a'} --epochs 2 --batch-size 8 --resume"
    assert error.rstrip().endswith(again)
    monkeypatch.setattr(cifar100, "make_optimizer", real)
    assert run(tmp_path / "a", "--resume") == 0


# ---- the real models ----


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_standard_deep_and_a_batch_of_one(small_data, tmp_path, fused):
    options = ("--model", "standard_deep", "--batch-size", "1", "--max-steps", "2", "--eval-batches", "1")
    assert run(tmp_path / "a", fused, *options) == 0
    text = (tmp_path / "a" / "report.md").read_text()
    assert "5,015,140" in text and "z.png" not in text and "published" not in text
    assert not (tmp_path / "a" / "z.png").exists()


SMALL = ("--model", "standard", "--epochs", "4")  # 5 steps an epoch
GROW = ("--generate", "conv2,conv3,fc2", "--z-dim", "4,fc2=3", "--progressive", "conv3@1", "fc2@3")


def same_checkpoints(a, b):
    """Bit for bit: weights and optimizer state of two last.pt."""
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())


def generated(state):
    return [name.removesuffix(".generator.z") for name in state["model"] if name.endswith("generator.z")]


@pytest.mark.parametrize(
    ("fused", "optimizer"),
    [
        ("--fused", "adamw"),
        pytest.param("--fused", "adam", marks=pytest.mark.slow),
        pytest.param("--no-fused", "adamw", marks=pytest.mark.slow),
        pytest.param("--no-fused", "adam", marks=pytest.mark.slow),
    ],
)
def test_progressive_resumes_bit_for_bit(small_data, tmp_path, capsys, fused, optimizer):
    options = (fused, *SMALL, *GROW, "--optimizer", optimizer)
    assert run(tmp_path / "whole", *options) == 0
    out = capsys.readouterr().out
    assert (
        "epoch 2: generated from here on: conv3\n" in out and "epoch 4: generated from here on: fc2\n" in out
    )
    whole = checkpoint.load(tmp_path / "whole" / "last.pt")
    assert generated(whole) == ["conv2", "conv3", "fc2"]
    # ends at both switches, in between, and in the midst of epochs
    expected = {
        5: ["conv2"],
        7: ["conv2"],
        10: ["conv2", "conv3"],
        15: ["conv2", "conv3"],
        18: ["conv2", "conv3"],
    }
    for steps, layers in expected.items():
        again = ("--resume",) if steps > 5 else ()
        assert run(tmp_path / "parts", *options, "--max-steps", str(steps), *again) == 0
        assert generated(checkpoint.load(tmp_path / "parts" / "last.pt")) == layers
    assert run(tmp_path / "parts", *options, "--resume") == 0
    parts = checkpoint.load(tmp_path / "parts" / "last.pt")
    same_checkpoints(whole, parts)
    clock = [{k: v for k, v in row.items() if "second" not in k} for row in whole["history"]]
    assert clock == [{k: v for k, v in row.items() if "second" not in k} for row in parts["history"]]
    assert ["z/fc2/norm" in row for row in clock] == [False, False, False, True]


def make(out, *options):
    args = cifar100.parse(["--out", str(out), "--batch-size", "8", *options])
    out.mkdir(exist_ok=True)
    return cifar100.make_trainer(args, *cifar100.load_data(args))


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_a_switch_keeps_outputs_and_moments(small_data, tmp_path, fused):
    trainer = make(tmp_path / "a", fused, *SMALL, *GROW, "--optimizer", "adamw")
    trainer.config.max_steps = 5
    trainer.fit()
    plain, moments, x = trainer.model.eval(), trainer.optimizer.state, images(7, 3)[0].float() / 255
    with torch.no_grad():
        before = plain(x)
        trainer._change(0)
        assert trainer.model is plain  # nothing to do
        trainer._change(1)
        torch.testing.assert_close(trainer.model.eval()(x), before, rtol=1e-4, atol=1e-6)
    generator = trainer.model.conv3.generator
    assert torch.equal(generator.bias, plain.conv3.weight.flatten()) and generator.z.count_nonzero() == 4
    after = trainer.optimizer.state
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(after[generator.bias][key], moments[plain.conv3.weight][key].flatten().squeeze())
        for name in ("conv1.weight", "conv2.generator.weight", "conv2.generator.z", "fc2.weight"):
            ours, theirs = trainer.model.get_parameter(name), plain.get_parameter(name)
            assert torch.equal(after[ours][key], moments[theirs][key])
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.config.max_steps = 10
    trainer.fit()
    assert all(not torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


def test_best_of_an_earlier_stage_is_loaded_and_reported(small_data, tmp_path, monkeypatch):
    real = command.Trainer.evaluate

    def evaluate(self, part):
        return real(self, part)[0], [10.0, 30.0, 20.0, 20.0][len(self.history)]

    monkeypatch.setattr(command.Trainer, "evaluate", evaluate)
    args = cifar100.parse(["--out", str(tmp_path / "a"), "--batch-size", "8", *SMALL, *GROW])
    trainer = cifar100.run(args, "command")
    best = checkpoint.load(tmp_path / "a" / "best.pt")
    assert best["row"]["epoch"] == 2 and generated(best) == ["conv2", "conv3"]
    assert trainer.model.state_dict().keys() == best["model"].keys()
    assert len(trainer.history) == 4
    text = (tmp_path / "a" / "report.md").read_text()
    assert "| conv3 | LinearGenerator | 1 x 4 | 73,728 | 368,644 | 5.00 |" in text and "| fc2 |" not in text
    assert "published" not in text  # of this model with other layers
    assert "| generate | conv2,conv3,fc2 |" in text and "| progressive | conv3@1 fc2@3 |" in text
    assert "| z dim | conv2=4,conv3=4,fc2=3 |" in text


def test_init_from_keeps_the_outputs(small_data, tmp_path):
    assert run(tmp_path / "plain", "--model", "standard", "--save-frozen") == 0
    source = cifar100.build_model("standard")
    source.load_state_dict(checkpoint.load(tmp_path / "plain" / "best.pt")["model"])
    x = images(7, 3)[0].float() / 255
    for model, file in (("fixed", "best.pt"), ("all_layers", "frozen.safetensors"), ("standard", "best.pt")):
        options = ("--model", model, "--init-from", str(tmp_path / "plain" / file))
        trainer = make(tmp_path / "a", *options)
        with torch.no_grad():
            wanted, got = source.eval()(x), trainer.model.eval()(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    options = ("--model", "fixed", "--init-from", str(tmp_path / "plain" / "best.pt"))
    assert run(tmp_path / "b", *options, "--max-steps", "5") == 0
    assert run(tmp_path / "b", *options, "--resume") == 0
    assert run(tmp_path / "whole", *options) == 0
    same_checkpoints(*(checkpoint.load(tmp_path / name / "last.pt") for name in ("b", "whole")))


@pytest.mark.parametrize(
    ("layers", "targets"),
    [(["conv1", "fc3"], ["enhanced"]), pytest.param(None, ["full", "enhanced"], marks=pytest.mark.slow)],
)
def test_init_from_takes_published_names(small_data, tmp_path, layers, targets):
    full = cifar100.build_model("full", init="hyperfan", generated=layers).eval()
    state = {}
    for name, tensor in full.state_dict().items():
        layer, _, part = name.partition(".generator.")
        name = {"z": f"z_signal_{layer}", "": name}.get(part, f"hyper_{layer}.{part}")
        if name.endswith(".bias") and name[:2] in ("co", "fc"):
            name = name.replace(".", "_")
        state[name] = tensor.view(1, -1) if part == "z" else tensor
    assert {"z_signal_conv1", "hyper_fc3.weight", "conv5_bias", "bn1.running_var"} <= state.keys()
    torch.save({"model_state_dict": state}, tmp_path / "published.pth")
    x = images(2, 3)[0].float() / 255
    with torch.no_grad():
        wanted = full(x)
        for model in targets:
            options = ("--model", model, "--init-from", str(tmp_path / "published.pth"))
            got = make(tmp_path / "a", *options).model.eval()(x)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_generated_l2_reaches_every_stage(small_data, tmp_path):
    trainer = make(tmp_path / "a", *SMALL, *GROW, "--generated-l2", "0.25")
    for epoch in (0, 1, 3):
        trainer._change(epoch)
        assert {g.l2 for _, g in hyperfast.nn.named_generators(trainer.model)} == {0.25}
    assert trainer.recipe["generated_l2"] == 0.25


def test_layer_options_are_part_of_the_recipe(small_data, tmp_path, capsys):
    assert run(tmp_path / "a", *SMALL, *GROW, "--max-steps", "5") == 0
    capsys.readouterr()
    changes = {
        ("--generate", "all"): "generate was conv2,conv3,fc2, now conv1,conv2,conv3,fc1,fc2",
        ("--z-dim", "4"): "z_dim was conv2=4,conv3=4,fc2=3, now 4",
        ("--progressive", "conv3@1", "fc2@2"): "progressive was conv3@1 fc2@3, now conv3@1 fc2@2",
        ("--generated-l2", "0.1"): "generated_l2 was 0.0, now 0.1",
        ("--init-from", "x.pt"): "init_from was none, now x.pt",
        ("--optimizer", "adamw"): "optimizer was adam, now adamw",
    }
    for change, message in changes.items():
        assert run(tmp_path / "a", *SMALL, *GROW, *change, "--resume") == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--generate", "conv9"],
            "--generate: no layer 'conv9'; the layers are conv1, conv2, conv3, fc1, fc2",
        ),
        (["--z-dim", "0"], "--z-dim: '0' is not a size"),
        (["--z-dim", "conv1=4"], "--z-dim: no generated layer 'conv1'; there are conv2"),
        (["--progressive", "conv2@0.5"], "--progressive: 'conv2@0.5' is not LAYERS@EPOCHS"),
        (["--progressive", "fc1@1"], "--progressive: no generated layer 'fc1'; there are conv2"),
        (["--progressive", "conv2@100"], "--progressive conv2@100: the run has 100 epochs only"),
        (
            ["--model", "mnist_style", "--progressive", "conv2@1"],
            "the generators of mnist_style cannot start",
        ),
        (["--generated-l2", "-1"], "argument --generated-l2: must be at least 0, got -1"),
        (["--lr-decay", "0"], "argument --lr-decay: must be above 0, got 0"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
    ],
)
def test_layer_option_errors(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cifar100.main(["--model", "fixed", *options])
    assert caught.value.code == 2 and message in one_line(capsys)


def test_init_from_errors(small_data, tmp_path, capsys):
    assert run(tmp_path / "a", "--model", "fixed", "--init-from", str(tmp_path / "x.pt")) == 2
    assert "x.pt: no such file" in one_line(capsys)
    torch.save(cifar100.build_model("standard", num_classes=10).state_dict(), tmp_path / "x.pt")
    assert run(tmp_path / "a", "--model", "fixed", "--init-from", str(tmp_path / "x.pt")) == 2
    assert "fc2.weight has shape (10, 256), wanted (100, 256)" in one_line(capsys)
    assert run(tmp_path / "a", "--model", "mnist_style", "--init-from", str(tmp_path / "x.pt")) == 2
    assert not (tmp_path / "a" / "last.pt").exists()


REAL = """
import sys, torch
from train import cifar100
from tests.train.test_cifar100 import ImageSet, images
cifar100.load_images = lambda name, root: ImageSet(*images(60, 0), *images(20, 1), [])
cifar100.VALIDATION = 20
sys.exit(cifar100.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
def test_full_resumes_bit_exact_in_another_process(tmp_path, fused):
    root = Path(cifar100.__file__).parents[1]

    def command(out, *options):
        arguments = [fused, "--out", str(tmp_path / out), "--epochs", "2", "--batch-size", "16", *options]
        code = [sys.executable, "-c", REAL, *arguments]
        done = subprocess.run(
            code, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    command("whole")
    command("parts", "--max-steps", "2")
    command("parts", "--resume")
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert len(parts["history"]) == 2
    assert all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
    for i, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(v, parts["optimizer"]["state"][i][k]) for k, v in state.items())
    assert set(parts["model"]) == set(build_model("full").state_dict())
