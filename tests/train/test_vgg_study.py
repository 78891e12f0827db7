"""`python -m train.vgg_study` on tiny networks and few random images, trained in this process."""

import csv
import dataclasses
import json
import math
import signal
import sys

import pytest
import torch
from torch import nn

from hyperfast import analysis
from hyperfast.analysis import LossLandscape, LRRange, MaxDifference, Predictiveness
from tests.train.test_cifar10 import images
from tests.train.test_compare import one_line
from tests.train.test_report import legend_fits
from train import checkpoint, compare, report, vgg, vgg_study
from train.data import DataError, ImageSet
from train.studies import analyses, pictures, study, trainings, verdict
from train.studies.trainings import AUGMENTATIONS, LOSSES, OPTIMIZERS, converged
from train.studies.verdict import Quantity

ANALYSES = {f"{part.name}/{own.name}" for part in analyses.PARTS for own in part.analyses}


class Tiny(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 10))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def shrink(patch):
    """The training command on tiny networks and data; patch(module, name, value)."""
    data = ImageSet(*images(40, 0), *images(10, 1), [])
    patch(vgg, "load_images", lambda name, root: data)
    patch(vgg, "build_vgg", lambda name, *own, **options: Tiny(norm=name != "vgg_a"))
    patch(vgg, "VALIDATION", 10)
    recipes = {name: dataclasses.replace(own, batch_size=8) for name, own in vgg.RECIPES["report"].items()}
    patch(vgg, "RECIPES", {"report": recipes})


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, in this process."""
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(analyses, "BATCH", 8)
    monkeypatch.setattr(study, "FULL", study.Effort(3, 2, 4, 5))
    for module in (report, trainings, analyses):  # drawing takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())
    monkeypatch.setattr(report, "curves", lambda *arguments: None)
    monkeypatch.setattr(report, "filter_sheet", lambda *arguments: None)
    names = []

    def train(plan):
        names.append(plan.name)
        return vgg.main([*plan.arguments, *plan.resume]), None

    monkeypatch.setattr(compare, "train", train)
    return names


def run(part, out, *options):
    return vgg_study.main([part, "--out", str(out), "--epochs", "1", *options])


def cells(text, *first):
    """The other cells of the one table row that starts with these."""
    start = "| " + " | ".join(first) + " |"
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- the command ----


def test_analyses_of_both_networks_at_both_states(trained, tmp_path, capsys):
    out = tmp_path / "s"
    for part in analyses.PARTS:
        assert run(part.name, out) == 0
    assert trained == ["vgg_a", "vgg_a_bn"]
    for name in ANALYSES:
        assert all((out / f"{name}.{suffix}").exists() for suffix in ("csv", "png", "json"))
        values = json.loads((out / f"{name}.json").read_text())["values"]
        assert {state: list(own) for state, own in values.items()} == dict.fromkeys(
            ("initial", "trained"), ["vgg_a", "vgg_a_bn"]
        )
        assert {(row["model"], row["state"]) for row in rows(out / f"{name}.csv")} == {
            (model, state) for model in ("vgg_a", "vgg_a_bn") for state in ("initial", "trained")
        }
    text = (out / "report.md").read_text()
    best = {m: checkpoint.load(out / "models" / m / "best.pt")["row"]["test_accuracy"] for m in trained}
    pair = " → ".join(f"{best[m]:.2f} %" for m in trained)
    holds = verdict.MARKS[trainings.ACCURACY[0].verdict(*best.values())]
    assert cells(text, "better accuracy: test, best epoch") == ["86.43 % → 89.54 %", "", "", "", pair, holds]
    health = json.loads((out / "gradients" / "health.json").read_text())["values"]["trained"]
    assert cells(text, "fewer vanishing gradients: vanishing")[4] == " → ".join(
        f"{health[m]['vanishing']:.2f} %" for m in trained
    )
    assert "## Not done yet\n\noptimizers, losses, augmentations.\n" in text
    titles = [
        line.partition(". ")[2] for line in text.splitlines() if line.startswith("## ") and ". " in line
    ]
    assert titles[:4] == ["Models", "Learning rates", "Loss landscape", "Gradient predictiveness"]

    files = {name: (out / f"{name}.json").read_bytes() for name in ANALYSES}
    assert run("gradients", out) == 0 and len(trained) == 2  # finished
    assert {name: (out / f"{name}.json").read_bytes() for name in ANALYSES} == files
    (out / "gradients" / "smoothness.json").unlink()
    capsys.readouterr()
    assert run("gradients", out) == 0
    again = capsys.readouterr().out
    assert "gradient smoothness: vgg_a_bn, trained" in again and "predictiveness" not in again


def test_figures_are_those_of_the_networks_of_the_runs(trained, tmp_path):
    """At initialisation the network that the run began with, trained its best epoch's, on its own images."""
    out = tmp_path / "s"
    assert run("gradients", out) == 0
    args = vgg.parse(["--model", "vgg_a_bn", "--epochs", "1", "--out", str(out / "x")])
    trainer = vgg.COMMAND.make_trainer(args)
    subjects = analyses.Subjects(make_study(out))
    for state, weights in (
        ("initial", trainer.model.state_dict()),
        ("trained", checkpoint.load(out / "models" / "vgg_a_bn" / "best.pt")["model"]),
    ):
        network = subjects.network("vgg_a_bn", state)
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
        assert [m.training for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.Dropout))] == [
            True, False,
        ]  # fmt: skip
        found = analysis.gradient_smoothness(network, subjects.batches, limit=3)
        values = json.loads((out / "gradients" / "smoothness.json").read_text())["values"]
        assert values[state]["vgg_a_bn"]["average"] == pytest.approx(found.average, rel=1e-5)
    known = {image.numpy().tobytes() for image in trainer.data.normalize(trainer.data.train[0])}
    seen = [image.contiguous().numpy().tobytes() for x, _ in subjects.batches for image in x]
    assert set(seen) <= known and len(set(seen)) == len(seen) == 24  # 30 images


def make_study(out, subset=None, models=("vgg_a", "vgg_a_bn"), epochs=1):
    options = study.Options(models, None, epochs, subset, "bf16", 42)
    return study.Study(out, options, None, "cpu", None, "the command")


def test_trainings_beside_what_was_published(trained, tmp_path):
    out = tmp_path / "s"
    assert run("losses", out) == 0
    assert trained == ["cross_entropy", "focal", "label_smoothing", "center"]
    assert run("models", out) == 0 and trained[4:] == ["vgg_a"]  # the other is the cross-entropy's run
    (row,) = [row for row in rows(out / "losses" / "losses.csv") if row["run"] == "focal"]
    best = checkpoint.load(out / "losses" / "focal" / "best.pt")["row"]
    assert float(row["test_accuracy"]) == best["test_accuracy"] and row["notebook_accuracy"] == "59.87"
    text = (out / "report.md").read_text()
    theirs = cells(text, "[focal](losses/focal/report.md)")
    assert theirs[4] == f"{best['test_accuracy']:.2f} %" and theirs[-1] == "59.87 %"
    assert cells(text, "[cross_entropy](models/vgg_a_bn/report.md)")[-2] == "89.54 %"
    assert run("losses", out) == 0 and len(trained) == 5


def test_a_failed_run_leaves_the_others_and_is_tried_again(trained, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "s", vgg.make_trainer

    def broken(args, *data):
        trainer = real(args, *data)
        if args.loss == "focal":
            monkeypatch.setattr(trainer, "schedule", lambda epoch, step: math.nan)
        return trainer

    monkeypatch.setattr(vgg, "make_trainer", broken)
    assert run("losses", out) == 1
    assert "error: focal: exit status 2" in capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert cells(text, "focal")[0].startswith("exit status 2; continue with: python -m train.vgg")
    assert (
        "[center](losses/center/report.md)" in text and "Not done yet\n\nmodels, optimizers, losses" in text
    )
    monkeypatch.setattr(vgg, "make_trainer", real)
    trained.clear()
    assert run("losses", out) == 0 and trained == ["focal"]
    assert "Not done yet\n\nmodels, optimizers, augmentations, lr_finder" in (out / "report.md").read_text()


def test_ctrl_c_leaves_a_study_that_goes_on(trained, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "s", compare.train
    monkeypatch.setattr(compare, "train", lambda p: (130, signal.SIGINT) if p.name == "vgg_a_bn" else real(p))
    assert run("weights", out) == 130
    assert one_line(capsys).endswith(
        f"continue with: python -m train.vgg_study weights --out {out} --epochs 1\n"
    )
    monkeypatch.setattr(compare, "train", real)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "weights", interrupted)
    monkeypatch.setattr(analyses.Analysis, "run", interrupted)
    assert run("weights", out) == 130 and trained == ["vgg_a", "vgg_a_bn"]
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["filters"], "invalid choice: 'filters'"),
        (["all", "--models", "vgg_a"], "--models: two different models at least are compared, got vgg_a"),
        (["all", "--models", "vgg_a,vgg_a"], "two different models at least"),
        (["all", "--models", "vgg_a,vgg_b"], "unknown model 'vgg_b'; choose from vgg_a, vgg_a_bn"),
        (["all", "--subset", "50001"], "--subset: CIFAR-10 has 50000 training images, got 50001"),
        (["all", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["all", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (["all", "--device", "gpu"], "--device gpu: "),
        (["all", "--precision", "tf32", "--device", "cpu"], "--precision tf32 needs --device cuda"),
    ],
)
def test_command_line_errors(arguments, message, trained, tmp_path, capsys):
    try:
        status = vgg_study.main([*arguments, "--out", str(tmp_path / "s")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in one_line(capsys)
    assert trained == [] and not (tmp_path / "s").exists()


def test_other_options_and_files_that_are_no_study(trained, tmp_path, capsys):
    out = tmp_path / "s"
    assert run("models", out) == 0
    capsys.readouterr()
    assert vgg_study.main(["models", "--out", str(out), "--epochs", "2", "--seed", "7"]) == 2
    assert "the study has other options: epochs was 1, now 2; seed was 42, now 7; choose" in one_line(capsys)
    (out / "study.json").write_text("{}")
    assert run("models", out) == 2 and "not a file of a study" in one_line(capsys)
    (out / "study.json").write_text("{")
    assert run("models", out) == 2 and "study.json: damaged" in one_line(capsys)
    (tmp_path / "file").touch()
    assert run("models", tmp_path / "file" / "s") == 2 and "cannot be written" in one_line(capsys)
    assert trained == ["vgg_a", "vgg_a_bn"]


def test_data_that_are_missing_stop_the_study_at_once(trained, tmp_path, capsys, monkeypatch):
    def missing(name, root):
        raise DataError("no cifar10 data")

    real = vgg.load_images
    monkeypatch.setattr(vgg, "load_images", missing)
    assert run("all", tmp_path / "s") == 2 and trained == ["vgg_a"]
    assert one_line(capsys) == "error: no cifar10 data\n"
    monkeypatch.setattr(vgg, "load_images", real)
    assert run("models", tmp_path / "s", "--seed", "7") == 0  # nothing was there that had another one


CHILD = """
import sys
from tests.train.test_vgg_study import shrink, vgg
shrink(setattr)
sys.exit(vgg.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_in_processes_of_their_own(tmp_path, monkeypatch):
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(analyses, "BATCH", 8)
    monkeypatch.setattr(study, "FULL", study.Effort(3, 2, 4, 5))
    monkeypatch.setattr(compare, "program", lambda training: [sys.executable, "-c", CHILD])
    assert run("all", tmp_path / "s") == 0
    pictures = {str(path.relative_to(tmp_path / "s").with_suffix("")) for path in tmp_path.glob("s/*/*.png")}
    compared = {f"{name}/{name}" for name in ("models", "optimizers", "losses", "augmentations")}
    assert pictures == ANALYSES | compared
    assert "Not done yet" not in (tmp_path / "s" / "report.md").read_text()


# ---- what is trained ----


def test_every_choice_is_what_its_name_says(tmp_path):
    own = make_study(tmp_path, epochs=15)

    def options(part):
        plans = {
            c.name: own.plan(c.folder or f"{part.name}/{c.name}", c.name, c.arguments) for c in part.choices
        }
        return {name: vgg.parse(plan.arguments) for name, plan in plans.items()}

    optimizers = options(OPTIMIZERS)
    assert {name: (a.optimizer, a.lr, a.weight_decay, a.schedule) for name, a in optimizers.items()} == {
        "sgd_steps": ("sgd", 0.01, 5e-4, "steps"),
        "sgd_cosine": ("sgd", 0.01, 5e-4, "cosine"),
        "adam_steps": ("adam", 1e-3, 0.0, "steps"),
        "adamw_steps": ("adamw", 1e-3, 0.01, "steps"),
        "rmsprop_steps": ("rmsprop", 1e-3, 0.0, "steps"),
        "nesterov_steps": ("nesterov", 0.01, 5e-4, "steps"),
    }
    report_and_notebook = [(c.report, c.notebook) for c in OPTIMIZERS.choices if c.report]
    assert [(r.accuracy, r.epochs, n.accuracy) for r, n in report_and_notebook] == [
        (89.5, 15, 81.20), (89.1, 12, 82.63), (89.8, 13, 82.98), (88.7, 16, 75.16), (89.7, 14, 82.27),
    ]  # fmt: skip
    for part, key in ((LOSSES, "loss"), (AUGMENTATIONS, "augment")):
        for name, args in options(part).items():
            recipe = {"loss": "cross_entropy", "augment": "crop_flip"} | {key: name}
            assert {k: getattr(args, k) for k in recipe} == recipe
            assert (args.model, args.lr, args.epochs, args.seed) == ("vgg_a_bn", 0.02, 15, 42)
            assert args.precision == "bf16"
    quick = vgg.parse(make_study(tmp_path, subset=300).plan("x", "x", ["--model", "vgg_a"]).arguments)
    assert quick.subset == 300
    defaults = vgg_study.parse(["all"]), vgg_study.parse(["all", "--subset", "300"])
    assert [a.epochs for a in defaults] == [15, 1]


def test_converged():
    def after(*accuracies):
        return converged([{"epoch": e, "validation_accuracy": a} for e, a in enumerate(accuracies, 1)])

    assert after(50.0) == 1
    assert after(10.0, 88.9, 89.0, 90.0, 85.0) == 3
    assert after(90.0, 10.0, 90.5) == 1


# ---- verdicts ----

SMALLER = Quantity("a", "average", "smaller difference", (0.3, 0.1), (0.2, 0.4))
LARGER = Quantity("b", "test", "better accuracy", (80.0, 90.0), larger=True, unit="%")


def found(a, b):
    return {"trained": {"vgg_a": {"a": a[0], "b": b[0]}, "vgg_a_bn": {"a": a[1], "b": b[1]}}}


def test_verdicts():
    assert verdict.sentences([SMALLER, LARGER], found((0.5, 0.25), (70.0, 60.0))) == [
        "- Smaller difference, average (report 0.3 → 0.1, notebook 0.2 → 0.4): trained here 0.5 → 0.25, "
        "**as reported**.",
        "- Better accuracy, test (report 80.00 % → 90.00 %): trained here 70.00 % → 60.00 %, **not as "
        "reported**.",
    ]
    assert "not comparable" in verdict.sentences([SMALLER], found((None, 1.0), (0, 0)))[0]
    assert SMALLER.verdict(1.0, math.nan) == "not comparable" and SMALLER.verdict(1, 2) == "not as reported"
    assert SMALLER.verdict(1.0, 1.000001) == LARGER.verdict(0.001, 0.0) == "no difference"
    text = verdict.summary([([SMALLER, LARGER], found((0.5, 0.25), (60.0, 70.0)))])
    assert cells(text, "smaller difference: average") == [
        "0.3 → 0.1",
        "0.2 → 0.4",
        "",
        "",
        "0.5 → 0.25",
        "yes",
    ]
    assert cells(text, "better accuracy: test")[-1] == "yes"


def test_no_verdict_without_both_networks():
    values = {"trained": {"vgg_a_bn": {"a": 1.0}, "vgg_a_gelu": {"a": 2.0}}}
    assert verdict.sentences([SMALLER], values) == [] and verdict.summary([([SMALLER], values)]) == ""


# ---- files ----


def test_json_has_no_nan(tmp_path):
    own = make_study(tmp_path)
    (tmp_path / "p").mkdir()
    own.save("p", "n", {"values": {"a": math.nan, "b": [math.inf, 1.0]}})
    text = (tmp_path / "p" / "n.json").read_text()
    assert "NaN" not in text and own.figures("p", "n")["values"] == {"a": None, "b": [None, 1.0]}


# ---- pictures ----


def both(make):
    return {
        state: {m: make(i + 1) for i, m in enumerate(("vgg_a", "vgg_a_bn"))}
        for state in ("initial", "trained")
    }


def measured(measure):
    """Of tiny networks, both states the same."""
    torch.manual_seed(0)
    nets = [Tiny(norm=False), Tiny(norm=True)]
    batches = [(torch.randn(4, 3, 9, 9), torch.arange(4)) for _ in range(3)]
    return both(lambda i: measure(nets[i - 1], batches))


def curves(axis):
    """Those of the networks, with markers."""
    return [line for line in axis.lines if line.get_marker() not in ("None", "", None)]


def assert_looks_differ(axis):
    looks = [(line.get_marker(), line.get_linestyle()) for line in curves(axis)]
    assert len(set(looks)) == 2


def test_picture_of_learning_rates():
    def made(i):
        losses = torch.tensor([2.0, 1.0, 0.5 * i, math.inf], dtype=torch.float64)
        rates = torch.tensor([1e-3, 1e-2, 1e-1, 1.0], dtype=torch.float64)
        return LRRange(rates, losses, losses, 10.0**-i, 0.1, 1.0)

    figure = pictures.lr_finder(both(made))
    assert legend_fits(figure) and [a.get_title() for a in figure.axes] == ["at initialisation", "trained"]
    axis = figure.axes[1]
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "learning rate"
    upright = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
    assert upright == [0.1, 0.01]
    assert_looks_differ(axis)


def test_picture_of_the_landscape():
    figure = pictures.landscape(
        both(lambda i: LossLandscape((0.1, 0.2), torch.tensor([[3.0, 2.0], [1.0, i]])))
    )
    axis = figure.axes[0]
    assert [list(line.get_ydata()) for line in curves(axis)] == [[1, 1], [3, 2], [1, 2], [3, 2]]
    assert legend_fits(figure) and len({c.get_hatch() for c in axis.collections} - {None}) == 2
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "loss")


def test_pictures_of_gradients():
    some = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    figure = pictures.predictiveness(both(lambda i: Predictiveness(0.1, some, i * some, some)))
    assert legend_fits(figure)
    change, _, ratio, _ = figure.axes
    assert [list(line.get_ydata()) for line in curves(change)] == [[1, 2, 3], [2, 4, 6]]
    assert [list(line.get_ydata()) for line in curves(ratio)] == [[1, 1, 1], [2, 2, 2]]
    assert_looks_differ(change)
    figure = pictures.max_difference(both(lambda i: MaxDifference(some / 6, i * some)))
    assert [list(line.get_xdata()) for line in curves(figure.axes[0])] == [list(some / 6)] * 2
    assert figure.axes[0].get_xlabel() == "distance along the gradient"


def test_pictures_of_layers():
    figure = pictures.health(measured(lambda net, batches: analysis.gradient_health(net, batches)))
    assert legend_fits(figure) and len(figure.axes) == 4
    assert [len(line.get_xdata()) for line in curves(figure.axes[0])] == [2, 2]  # not of the norm
    results = measured(lambda net, batches: analysis.activation_statistics(net, batches))
    figure = pictures.activations(results)
    share = 100 * results["trained"]["vgg_a"].layers[0].values.near_zero
    assert list(curves(figure.axes[3])[0].get_ydata()) == [share]
    figure = pictures.weights(measured(lambda net, batches: analysis.weight_statistics(net)))
    assert [a.get_title() for a in figure.axes if a.get_visible()] == ["1: conv 3 to 4", "2: linear 4 to 10"]
    edges = figure.axes[0].patches[1].get_data()
    assert (edges.values * (edges.edges[1:] - edges.edges[:-1])).sum() == pytest.approx(1)
