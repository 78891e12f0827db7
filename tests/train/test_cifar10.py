"""`python -m train.cifar10` on few random images; what all commands share is tested with cifar100."""

import re

import pytest
import torch
from torch import nn

import hyperfast
from tests.train.test_cifar100 import one_line
from tests.train.test_wrn import published
from train import checkpoint, cifar10, compare, comparison, report, speed_test
from train.data import ImageSet
from train.models.wrn import MODELS, build_wrn


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(n) % 10


class TinyNet(nn.Module):
    """Stands for every model where only the command is looked at."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.final = nn.Linear(4, 10)

    def forward(self, x):
        return self.final(self.bn(self.conv(x)).relu().mean((2, 3)))


def tiny_model(name, fused=True, init=None):
    if not MODELS[name].hyper:
        return TinyNet()
    backend = "auto" if fused else "reference"
    generator = hyperfast.nn.TwoLayerGenerator([(4, 3, 3, 3)], 4, 4, (2, 3, 3, 3), init=init, backend=backend)
    return hyperfast.hyperize(TinyNet(), generator, targets=["conv"], init=init, backend=backend)


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    data = ImageSet(*images(60, 0), *images(20, 1), [])
    monkeypatch.setattr(cifar10, "load_images", lambda name, root: data)
    monkeypatch.setattr(cifar10, "VALIDATION", 20)
    for module in (report, comparison):  # drawing takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())


@pytest.fixture
def small(small_data, monkeypatch):
    monkeypatch.setattr(cifar10, "build_wrn", tiny_model)


def run(out, *options):
    return cifar10.main(["--out", str(out), "--epochs", "2", "--batch-size", "8", *options])


# ---- recipes ----


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_the_reports(name):
    args = cifar10.parse(["--model", name])
    wanted = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 5e-4, "batch_size": 128, "epochs": 200,
              "schedule": "halving", "decay": "all", "generated_l2": 0.0, "patience": 0, "init": "hyperfan",
              "fused": True, "seed": 42, "precision": "fp32", "state_dtype": "fp32"}  # fmt: skip
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert str(args.out) == f"runs/cifar10_{name}"


def test_the_reports_command_line():
    args = cifar10.parse(["--batch_size", "64", "--epochs", "3", "--lr", "0.1", "--weight_decay", "0.2",
                          "--checkpoint_path", "a_b", "--resume"])  # fmt: skip
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (64, 3, 0.1, 0.2)
    assert str(args.out) == "a_b" and args.resume


def test_schedule_of_the_public_code():
    """Halved at 168k, 336k, 400k, 450k, 550k, 600k of 1M steps; here a tenth of a thousandth of them."""
    args = cifar10.parse(["--epochs", "10"])
    rate = cifar10.SCHEDULES[args.schedule](args, 100)  # 1000 steps
    changes = [step for step in range(1, 1000) if rate(0, step) != rate(0, step - 1)]
    assert changes == [168, 336, 400, 450, 550, 600]
    assert rate(0, 0) == 2e-3 and rate(0, 999) == pytest.approx(2e-3 / 64)


def test_schedule_of_the_paper():
    args = cifar10.parse(["--recipe", "paper"])
    assert (args.weight_decay, args.generated_l2, args.decay) == (5e-6, 5e-6, "kernels")
    steps = 45_000 // 128
    assert args.epochs * steps == pytest.approx(672_000, rel=1e-3)
    rate = cifar10.SCHEDULES[args.schedule](args, steps)
    for step, wanted in ((0, 2e-3), (167_000, 2e-3), (169_000, 1e-3), (335_000, 1e-3), (337_000, 2e-4),
                         (503_000, 2e-4), (505_000, 5e-5), (671_000, 5e-5)):  # fmt: skip
        assert rate(0, step) == pytest.approx(wanted)


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("name", ["hyper_wrn_40_1", "wrn_40_1"])
def test_weight_decay_of_the_paper(name, fused):
    """On the kernels of ordinary convolutions; on generated ones through their gradients."""
    args = cifar10.parse(["--model", name, "--recipe", "paper", fused])
    model, optimizer, _ = cifar10.build(args)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for p in model.parameters():
        assert decay[id(p)] == (5e-6 if p.dim() == 4 else 0.0)
    if MODELS[name].hyper:
        generator = model.generators["all"]
        assert generator.l2 == 5e-6
        weights = model.generate().values()
        torch.autograd.backward(list(weights), [torch.zeros_like(w) for w in weights])
        got = generator.z.grad.clone()
        generator.z.grad, generator.l2 = None, 0.0
        (2.5e-6 * sum(w.square().sum() for w in model.generate().values())).backward()
        assert torch.allclose(got, generator.z.grad, rtol=1e-4, atol=1e-9)


# ---- runs ----


@pytest.mark.parametrize("fused", ["--fused", "--no-fused"])
@pytest.mark.parametrize("name", ["hyper_wrn_40_1", "wrn_40_2"])
def test_a_run_leaves_everything(small, tmp_path, capsys, name, fused):
    assert run(tmp_path / "a", "--model", name, fused) == 0
    assert "all 2 epochs done; test accuracy" in capsys.readouterr().out
    text = (tmp_path / "a" / "report.md").read_text()
    assert f"# CIFAR-10, {name}" in text and "## Published" in text
    assert (
        "| published, Ha, Dai, Le |  |  | " + {"hyper_wrn_40_1": "91.98", "wrn_40_2": "94.34"}[name] in text
    )
    row = re.search(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE).group(1).split(" | ")
    best = checkpoint.load(tmp_path / "a" / "best.pt")["row"]
    assert row[0] == {"hyper_wrn_40_1": "8.02 %", "wrn_40_2": "5.66 %"}[name]
    assert row[2] == f"{100 - best['test_accuracy']:.2f} %"


def test_resume_ends_where_an_unbroken_run_does(small, tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "a", "--max-steps", "5")
    assert run(tmp_path / "a", "--resume") == 0
    whole, parts = (checkpoint.load(tmp_path / d / "last.pt")["model"] for d in ("whole", "a"))
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_the_real_hypernetwork_learns_its_images(small_data):
    """One batch, over and over: the loss falls."""
    data, _ = cifar10.load_data(cifar10.parse([]))
    model, _, step = cifar10.build(cifar10.parse(["--model", "hyper_wrn_40_1"]))
    x, y = data.normalize(data.train[0][:10]), data.train[1][:10]
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_comparison_of_twins(small, tmp_path, monkeypatch):
    def train(plan):
        return plan.training.main([*plan.arguments, *plan.resume]), None

    monkeypatch.setattr(compare, "train", train)
    options = ["--command", "cifar10", "--models", "hyper_wrn_40_1,wrn_40_1", "--epochs", "1"]
    assert compare.main([*options, "--batch-size", "8", "--out", str(tmp_path / "c")]) == 0
    text = (tmp_path / "c" / "compare.md").read_text()
    assert "[hyper_wrn_40_1](hyper_wrn_40_1/report.md)" in text and "91.98 %" in text and "93.27 %" in text


def test_init_from_a_published_checkpoint(small_data, tmp_path):
    state, _ = published()
    torch.save({"net": state, "acc": 91.0}, tmp_path / "x.pth")
    args = cifar10.parse(["--init-from", str(tmp_path / "x.pth")])
    model, _, _ = cifar10.build(args)
    assert torch.equal(model.generators["all"].z[0], state["zs.0.z_list.0"])
    assert cifar10.COMMAND.published(args) is None


# ---- the speed test ----


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(speed_test, "PASS", 1)
    monkeypatch.setattr(speed_test, "PASSES", 1)


def trained(kind, folder):
    """A file with a hypernetwork of some training, and what it answers."""
    state, theirs = published()
    path = folder / {"published": "x.pth", "best": "best.pt", "frozen": "frozen.safetensors"}[kind]
    model = build_wrn("hyper_wrn_40_1")
    model.load_state_dict(state)
    if kind == "published":
        torch.save({"net": state, "acc": 91.0}, path)
    elif kind == "best":
        checkpoint.save(path, {"model": model.state_dict(), "row": {}, "recipe": {}})
    else:
        cifar10.command.save_frozen(model, path)
    return path, theirs.eval()


@pytest.mark.parametrize("kind", ["published", "best"])
def test_speed_of_a_hypernetwork(small_data, short, tmp_path, capsys, kind):
    path, theirs = trained(kind, tmp_path)
    options = ["--speed-test", "--model-path", str(path), "--batch-size", "7"]
    assert cifar10.main(options) == 0
    out = capsys.readouterr().out
    data, _ = cifar10.load_data(cifar10.parse(options))
    x, y = data.test
    with torch.no_grad():
        wanted = f"{100 * float((theirs(data.normalize(x)).argmax(1) == y).float().mean()):.2f} %"
    assert f"hyper_wrn_40_1 ({path}), batches of 7, fp32" in out
    for way in ("kernels generated in every batch", "kernels generated once", "frozen"):
        assert re.search(rf"^\| {way} \| \d+ \| {re.escape(wanted)} \|$", out, re.MULTILINE), out
    assert re.search(r"Generating all kernels: \d+\.\d+ ms", out)
    assert "on the device and normalised beforehand" in out and "images only" not in out


def test_speed_of_a_plain_network(small_data, short, tmp_path, capsys):
    torch.save(build_wrn("wrn_40_1").state_dict(), tmp_path / "x.pt")
    options = [
        "--speed-test",
        "--model-path",
        str(tmp_path / "x.pt"),
        "--eval-batches",
        "1",
        "--batch-size",
        "12",
    ]
    assert cifar10.main([*options, "--model", "wrn_40_1"]) == 0
    out = capsys.readouterr().out
    assert "wrn_40_1 (" in out and "batches of 12" in out and "| plain network |" in out
    assert "Generating" not in out and "Test accuracy on the first 12 of 20 images only." in out
    assert cifar10.main([*options, "--model", "wrn_40_2"]) == 2
    assert f"--model wrn_40_2: {tmp_path / 'x.pt'} is wrn_40_1" in one_line(capsys)


def test_frozen_is_what_the_hypernetwork_computes():
    torch.manual_seed(0)
    model = build_wrn("hyper_wrn_40_1").eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        outputs = [forward(x) for forward in speed_test.ways(model).values()]
    assert torch.equal(outputs[1], outputs[0])
    assert torch.allclose(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)  # kernels in channels_last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speed-test"], "--speed-test and --model-path need each other"),
        (["--model-path", "x"], "--speed-test and --model-path need each other"),
        (["--model", "resnet"], "argument --model: invalid choice: 'resnet'"),
        (["--schedule", "cosine"], "argument --schedule: invalid choice: 'cosine'"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs --device cuda, got cpu"),
    ],
)
def test_command_line_errors(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cifar10.main(options)
    assert caught.value.code == 2 and message in one_line(capsys)


def test_files_that_are_no_network_of_this_command(small_data, tmp_path, capsys):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "x.pt")
    for path, message in (
        ("x.pt", "weights of another model, none of this command's"),
        ("y", "no such file"),
    ):
        assert cifar10.main(["--speed-test", "--model-path", str(tmp_path / path)]) == 2
        assert message in one_line(capsys)
