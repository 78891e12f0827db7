import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

import hyperfast
from tests.train.test_compare import section
from train import checkpoint, command, compare, mnist, report, twins
from train.data import DataError, ImageSet
from train.loop import Interrupted
from train.models.mnist import MODELS, ConvNet, build_mnist
from train.summary import load_run

PAIR = ("shared", "shared_plain")


def digits(n, seed):
    """Grey squares whose place says the class: learnt in a few steps."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, 1, 28, 28), dtype=torch.uint8, generator=g)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 5 * (label // 2) :, 14 * (label % 2) :][:5, :14] = 255
    return images, labels


@pytest.fixture
def small(monkeypatch):
    """Tiny data, and narrow networks: the heads of `shared` have 4 million parameters."""
    sizes = {"shared": ((2, 3, 4), 5), "single": ((2, 2), 7)}
    for name, size in sizes.items():
        for own in (name, f"{name}_plain"):
            model = replace(MODELS[own], network=lambda size=size: ConvNet(*size))
            monkeypatch.setitem(MODELS, own, model)
    monkeypatch.setitem(MODELS["shared"].options, "hidden_dim", 3)
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    data = ImageSet(*digits(60, 0), *digits(20, 1), [])
    monkeypatch.setattr(mnist, "load_images", lambda name, root: data)
    monkeypatch.setattr(mnist, "VALIDATION", 20)
    for module in (report, twins):  # drawing takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())


@pytest.fixture
def trained(small, monkeypatch):
    """What was trained, in order, in this process."""
    names = []

    def train(plan):
        names.append(plan.name)
        return mnist.main([*plan.arguments, *plan.resume]), None

    monkeypatch.setattr(compare, "train", train)
    return names


def run(out, *options):
    return mnist.main(["--out", str(out), "--epochs", "2", "--batch-size", "10", *options])


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0 and "Traceback" not in error, error
    return error


# ---- models ----


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "total", "generator", "embedding"),
    [
        ("shared", 4_192_214, 4_186_320, 12),  # 320 of them in the core
        ("shared_plain", 70_282, 0, 0),
        ("single", 4_244 + 8_666, 4_240, 4),
        ("single_plain", 21_210, 0, 0),
    ],
)
def test_published_counts(name, total, generator, embedding, fused):
    model = build_mnist(name, fused)
    counts = hyperfast.nn.parameter_counts(model)
    assert [counts[key] for key in ("total", "generator", "embedding")] == [total, generator, embedding]
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    if MODELS[name].twin:
        plain = build_mnist(MODELS[name].twin)
        assert counts["generated"] + counts["other"] == sum(p.numel() for p in plain.parameters())


def test_shared_counts_both_ways():
    text = twins.counting_section(build_mnist("shared"))
    rows = dict(re.findall(r"\| \**([^|*]+)\** \| \**([\d,]+)\** \|", text))
    assert rows == {
        "z": "12",
        "core": "320",
        '"effective": z and core': "332",
        "heads": "4,186,000",
        "other: biases, ordinary weights": "5,882",
        "all that is trained and stored": "4,192,214",
    }
    assert not twins.counting_section(build_mnist("single"))


@pytest.mark.parametrize("fused", [True, False])
def test_shared_starts_as_its_plain_twin(fused):
    models = []
    for name in PAIR:
        torch.manual_seed(3)
        models.append(build_mnist(name, fused))
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(*(model(x) for model in models))


def test_fused_and_plain_arithmetic_agree():
    for name, init in (("shared", "he_bias"), ("single", "hyperfan")):
        fused, reference = (build_mnist(name, f, init).double() for f in (True, False))
        reference.load_state_dict(fused.state_dict())
        x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
        for model in (fused, reference):
            model(x).square().sum().backward()
        assert torch.allclose(fused(x), reference(x), rtol=1e-10)
        z = fused.generators["all"].z if name == "shared" else next(iter(fused.generators.values())).z
        other = dict(reference.named_parameters())[next(n for n, p in fused.named_parameters() if p is z)]
        assert torch.allclose(z.grad, other.grad, rtol=1e-8)


def test_max_pool_before_relu_is_the_published_order():
    model, x = build_mnist("single_plain"), torch.randn(2, 1, 28, 28)
    y = x
    for conv in (model.conv1, model.conv2):
        y = torch.nn.functional.max_pool2d(conv(y).relu(), 2)
    assert torch.equal(model(x), model.fc(y.flatten(1)))


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown model 'triple'.*shared_plain"):
        build_mnist("triple")
    with pytest.raises(ValueError, match="cannot start from a given weight"):
        build_mnist("single", init="keep")


# ---- options ----


def test_recipe_of_the_report():
    """The same for every model."""
    wanted = {"optimizer": "adam", "schedule": "decay", "epochs": 10, "batch_size": 1000, "lr_decay": 0.999,
              "min_lr": 1e-4, "weight_decay": 0.0, "clip": 100.0, "patience": 0, "augment": "none",
              "lr": 5e-3, "seed": 42, "save_frozen": True, "twin": True}  # fmt: skip
    for name in MODELS:
        args = mnist.parse(["--model", name, "--recipe", "report"])
        assert {key: getattr(args, key) for key in wanted} == wanted
        assert str(args.out) == f"runs/mnist_{name}"
    assert mnist.VALIDATION == 10_000


def test_the_tuned_recipe_is_for_single():
    assert mnist.parse([]).recipe == "report" and mnist.parse([]).model == "shared"
    single = mnist.parse(["--model", "single", "--recipe", "tuned"])
    assert (single.schedule, single.epochs, single.augment) == ("one_cycle", 20, "shift")


@pytest.mark.parametrize("kind", mnist.RECIPES)
def test_twins_have_one_recipe(kind):
    recipes = mnist.RECIPES[kind]
    for name, model in MODELS.items():
        if model.twin and name in recipes:
            assert recipes[name] == recipes[model.twin]


def test_each_model_has_its_start():
    inits = {name: mnist.parse(["--model", name]).init for name in MODELS}
    assert inits["shared"] == "keep" and inits["single"] == "hyperfan"


def test_schedules():
    args = mnist.parse(["--model", "shared_plain", "--recipe", "report"])
    rate = mnist.SCHEDULES[args.schedule](args, 50)
    assert [rate(0, step) for step in (0, 1, 10_000)] == pytest.approx([5e-3, 4.995e-3, 1e-4])
    args = mnist.parse(["--model", "single", "--recipe", "tuned", "--epochs", "2", "--warm-up", "0.5"])
    rate = mnist.SCHEDULES[args.schedule](args, 4)
    assert [rate(0, step) for step in (0, 3, 7)] == pytest.approx([args.lr / 4, args.lr, 0.0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "fast"], "argument --recipe: invalid choice: 'fast'"),
        (["--model", "single", "--init", "keep"], "--init keep: the generator of single"),
        (["--min-lr", "1"], "--min-lr 1.0 is larger than --lr"),
    ],
)
def test_bad_options(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        mnist.main(options)
    assert stop.value.code == 2 and words in one_line(capsys)


def test_augmentation_is_of_the_recipe(small):
    images = digits(30, 5)[0]
    for augment in ("none", "shift"):
        args = mnist.parse(["--model", "single", "--augment", augment])
        data, _ = mnist.load_data(args)
        made = data.augment(images, torch.Generator().manual_seed(1))
        same = (made == data.normalize(images)).flatten(1).all(1)
        assert same.all() if augment == "none" else same.sum() < 10
        assert made.shape == images.shape and made.dtype == torch.float32


def test_data_errors_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HYPERFAST_DATA", str(tmp_path / "absent"))
    assert run(tmp_path / "a", "--no-twin") == 2
    assert "does not exist" in one_line(capsys)
    assert issubclass(DataError, ValueError)


# ---- runs ----


@pytest.mark.parametrize(
    "options", [["--fused"], pytest.param(["--no-fused", "--precision", "bf16"], marks=pytest.mark.slow)]
)
def test_trains_and_compares_twins(trained, tmp_path, options):
    out = tmp_path / "pair"
    assert run(out, *options) == 0 and tuple(trained) == PAIR
    pictures = {
        f"{name}.png" for name in ("curves", "filters_conv1", "filters_conv2", "filters_conv3", "z_bars")
    }
    assert {p.name for p in out.iterdir()} == {*PAIR, "report.md", "z.npz", "z.safetensors", *pictures}
    text = (out / "report.md").read_text()
    assert all(f"({name})" in text for name in pictures)
    hyper, plain = (load_run(out / name) for name in PAIR)
    for own, published in ((hyper, "99.05 %"), (plain, "98.98 %")):
        best = own.summary["best"]
        row = f"| [{own.model}]({own.model}/report.md) | 2 | {best['epoch']} "
        assert row in text and f"{best['test_accuracy']:.2f} % |" in text and published in text
    # 50 + 150 + 300 generated weights, 4 numbers in a head for each; core 15; FC 370, biases 9
    assert "| shared | 12 | 2,015 | 379 | 2,406 | 500 |" in section(text, "Parameters")
    assert "**27**" in section(text, "Two ways to count")
    assert "--resume" not in section(text, "Command")
    recipe = section(text, "Recipe")
    assert "lr 0.005" in recipe and "lr decay 0.999" in recipe and "| option |" not in recipe  # none differs


def test_single_and_its_twin(trained, tmp_path):
    assert run(tmp_path / "pair", "--model", "single", "--recipe", "tuned") == 0
    assert trained == ["single", "single_plain"]
    text = (tmp_path / "pair" / "report.md").read_text()
    assert "Two ways to count" not in text and "99.24 %" in text and "filters_conv2.png" in text


def test_exports_z_and_loadable_models(trained, tmp_path):
    out = tmp_path / "pair"
    run(out)
    models = [mnist.load_trained(out / name) for name in PAIR]
    z = models[0].generators["all"].z
    tensors = safetensors.torch.load_file(out / "z.safetensors")
    arrays = np.load(out / "z.npz")
    assert list(tensors) == ["conv1", "conv2", "conv3"] == list(arrays)
    for i, name in enumerate(tensors):
        assert torch.equal(tensors[name], z[i : i + 1].detach())
        assert np.array_equal(arrays[name], tensors[name].numpy())
    x = torch.randn(4, 1, 28, 28)
    for name, model in zip(PAIR, models, strict=True):
        frozen = build_mnist("shared_plain")
        frozen.load_state_dict(safetensors.torch.load_file(out / name / "frozen.safetensors"))
        assert torch.allclose(frozen(x), model(x), atol=1e-5)
    saved = checkpoint.load(out / "shared" / "best.pt")
    saved["recipe"]["model"] = "full"
    checkpoint.save(out / "shared" / "best.pt", saved)
    with pytest.raises(checkpoint.CheckpointError, match="full is no MNIST model"):
        mnist.load_trained(out / "shared")


def test_stopped_and_resumed_twins(trained, tmp_path, capsys, monkeypatch):
    """The second model is stopped: the first is not trained again, and the report comes at the end."""
    out, real = tmp_path / "pair", compare.train
    monkeypatch.setattr(compare, "train", lambda p: real(p) if p.name == "shared" else (0, 2))
    assert run(out) == 130
    assert "continue with: python -m train.mnist" in one_line(capsys) and not (out / "report.md").exists()
    monkeypatch.setattr(compare, "train", real)
    assert run(out) == 2 and "already there; continue with --resume" in one_line(capsys)
    assert run(out, "--resume") == 0
    assert tuple(trained) == PAIR and (out / "report.md").exists()
    assert run(out, "--resume") == 0 and tuple(trained) == PAIR
    assert run(tmp_path / "none", "--resume") == 2 and "no run in" in one_line(capsys)


def test_stopped_before_anything_is_saved(small, tmp_path, capsys, monkeypatch):
    """There is nothing to resume, and the command given does start."""
    monkeypatch.setattr(compare, "train", lambda p: (130, 2))
    assert run(tmp_path / "pair") == 130
    assert "continue with: python -m train.mnist" in (error := one_line(capsys)) and "--resume" not in error


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_one_command_says_how_to_go_on(small, tmp_path, capsys, monkeypatch, parent, saved):
    def interrupted(trainer):
        if saved:
            (trainer.out / "last.pt").touch()
        raise Interrupted(2)

    monkeypatch.setattr(command.Trainer, "fit", interrupted)
    if parent:
        monkeypatch.setenv(command.PARENT, "1")
    assert run(tmp_path / "run", "--no-twin") == 130
    error = capsys.readouterr().err
    assert "stopped by SIGINT" in error and ("holds the last epoch's end" in error) == saved
    assert ("Continue with" in error) == (not parent)
    assert error.rstrip().endswith("--resume") == (saved and not parent)


def test_refused_input_ends_the_pair_with_one_message(trained, tmp_path, capsys, monkeypatch):
    def absent(name, root):
        raise DataError(f"{root}: no such folder")

    with monkeypatch.context() as patch:
        patch.setattr(mnist, "load_images", absent)
        assert run(tmp_path / "pair", "--data", "nowhere") == 2
    assert one_line(capsys) == "error: nowhere: no such folder\n" and trained == ["shared"]
    assert run(tmp_path / "pair") == 0 and trained == ["shared", *PAIR]


def test_a_failed_model_is_an_exit_status(trained, tmp_path, capsys, monkeypatch):
    real = compare.train
    monkeypatch.setattr(compare, "train", lambda p: real(p) if p.name == "shared" else (3, None))
    assert run(tmp_path / "pair") == 1
    assert "shared_plain: exit status 3" in capsys.readouterr().err
    assert not (tmp_path / "pair" / "report.md").exists()


def test_one_model_alone(small, tmp_path):
    assert run(tmp_path / "run", "--no-twin") == 0
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"best.pt", "last.pt", "frozen.safetensors", "z.npz", "z.safetensors", "report.md"} <= files
    assert "**27**" in (tmp_path / "run" / "report.md").read_text()
    assert run(tmp_path / "plain", "--model", "shared_plain") == 0
    assert not (tmp_path / "plain" / "z.npz").exists()


def test_compare_trains_each_model_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.comparison, "save_figure", lambda figure, path: path.touch())
    options = ["--command", "mnist", "--models", "shared,single_plain", "--epochs", "1", "--batch-size", "20"]
    assert compare.main([*options, "--out", str(tmp_path / "c")]) == 0
    assert trained == ["shared", "single_plain"]


@pytest.mark.parametrize("fused", [True, False])
def test_learns(small, tmp_path, fused):
    args = ["--no-twin", "--out", str(tmp_path / "run"), "--epochs", "4", "--batch-size", "5", "--lr", "0.01",
            "--fused" if fused else "--no-fused"]  # fmt: skip
    assert mnist.main(args) == 0
    history = load_run(tmp_path / "run").history
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["z/conv1/norm"] != history[0]["z/conv1/norm"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_curves(trained, tmp_path, epochs):
    run(tmp_path / "pair", "--epochs", str(epochs))
    runs = [load_run(tmp_path / "pair" / name) for name in PAIR]
    figure = twins.curves(runs, [mnist.PUBLISHED[name] for name in PAIR])
    left, right = figure.axes
    assert left.get_ylabel() == "accuracy (%)" and right.get_yscale() == "log"
    for axis, value in ((left, lambda a: a), (right, lambda a: 100 - a)):
        drawn = [line.get_ydata() for line in axis.lines[:4]]
        wanted = [
            [value(row[f"{part}_accuracy"]) for row in r.history]
            for r in runs
            for part in ("validation", "test")
        ]
        assert np.allclose(drawn, wanted)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[-1] == "hollow: published (epoch 1: validation)" and len(names) == 5
    looks = [(line.get_marker(), line.get_linestyle()) for line in left.lines[:4]]
    assert "None" not in dict(looks) and len({marker for marker, _ in looks}) == 4
    assert looks[0][1] != looks[2][1]
