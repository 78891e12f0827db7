"""train.compare: the command on tiny models in this process, its child process, its tables and pictures."""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import matplotlib.image
import pytest
import torch
from torch import nn

import hyperfast
from tests.train.test_cifar100 import images
from tests.train.test_report import legend_fits
from tests.train.tiny import Net
from train import charlm, checkpoint, cifar100, command, compare, comparison, report, summary
from train.checkpoint import CheckpointError
from train.compare import Plan
from train.data import ImageSet
from train.report import save_figure
from train.summary import MB, load_run

MODELS = "full,standard_deep"


class PlainNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 100))


def build(name, fused=False, **options):
    if name.startswith("standard"):
        return PlainNet()
    model = Net(width=4, classes=100, backend="auto" if fused else "reference")
    return hyperfast.factored_(model) if fused else model


@pytest.fixture
def trained(monkeypatch):
    """Models that were trained, in order: by the real command with tiny models and data, in this process."""
    monkeypatch.setattr(
        cifar100, "load_images", lambda name, root: ImageSet(*images(60, 0), *images(20, 1), [])
    )
    monkeypatch.setattr(cifar100, "VALIDATION", 20)
    monkeypatch.setattr(cifar100, "build_model", build)
    for module in (report, comparison):  # drawing takes most of the time
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())
    names = []

    def train(plan):
        names.append(plan.name)
        return cifar100.main([*plan.arguments, *plan.resume]), None

    monkeypatch.setattr(compare, "train", train)
    return names


def run(out, *options, models=MODELS):
    return compare.main(
        ["--models", models, "--out", str(out), "--epochs", "2", "--batch-size", "8", *options]
    )


def section(text, title):
    return re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", text, re.DOTALL).group(1)


def cells(text, title, *first):
    """The other cells of the row of a section's table that starts with these cells."""
    start = "| " + " | ".join(first) + " |"
    (line,) = [line for line in section(text, title).splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_compares_what_it_trained(trained, tmp_path, capsys):
    assert run(tmp_path / "c") == 0
    assert trained == ["full", "standard_deep"]
    assert {p.name for p in (tmp_path / "c").iterdir()} == {
        "full", "standard_deep", "compare.md", "accuracy.png", "size.png", "z_ranges.png",
    }  # fmt: skip
    text = (tmp_path / "c" / "compare.md").read_text()
    best = {name: checkpoint.load(tmp_path / "c" / name / "best.pt") for name in trained}
    row, plain = (best[name]["row"] for name in trained)
    assert cells(text, "Accuracy", "[full](full/report.md)") == [
        "2 of 2", str(row["epoch"]), f"{row['validation_accuracy']:.2f} %", f"{row['test_accuracy']:.2f} %",
        "54.16 %", f"{row['test_accuracy'] - 54.16:+.2f}",
    ]  # fmt: skip
    assert cells(text, "Accuracy", "[standard_deep](standard_deep/report.md)")[-2:] == ["", ""]
    # conv 3-4 3x3: 108 weights from K = 3, fc 4-100: 400; biases 104, batch norm 8
    assert cells(text, "Parameters", "full") == ["2,032", "6", "112", "2,150", "508", "620", "3.47"]
    assert cells(text, "Parameters", "standard_deep") == ["0", "0", "612", "612", "0", "612", "1.00"]
    size = (tmp_path / "c" / "full" / "best.pt").stat().st_size / MB
    points = row["test_accuracy"]
    ours = [f"{size:.1f}", f"{size / points:.2f}" if points else "-"]
    assert cells(text, "Size against accuracy", "full")[:2] == ours
    assert cells(text, "Size against accuracy", "full")[4:] == ["325.0", "6.00"]
    assert cells(text, "Size against accuracy", "standard_deep")[2:] == [""] * 4
    z = checkpoint.load(tmp_path / "c" / "full" / "last.pt")["model"]["fc.generator.z"]
    assert cells(text, "Embeddings z after the last epoch", "full", "fc")[:2] == [
        "3", f"[{z.min():.4f}, {z.max():.4f}]",
    ]  # fmt: skip
    history = load_run(tmp_path / "c" / "full").history
    seconds = sum(r["seconds"] for r in history)
    assert cells(text, "Time", "full")[0] == f"{seconds / 2:.1f}"
    assert cells(text, "Time", "full")[3] == f"{2 * 40 / seconds:.0f}"  # 5 steps of 8 of the 40 images
    assert "batch size 8" in section(text, "Recipe") and plain["epoch"] in (1, 2)
    assert f"python -m train.compare --models {MODELS}" in section(text, "Command")
    assert str(tmp_path / "c" / "compare.md") in capsys.readouterr().out


def test_a_run_of_a_comparison_is_an_ordinary_run(trained, tmp_path):
    run(tmp_path / "c", models="full")
    run_alone = ["--model", "full", "--out", str(tmp_path / "a"), "--epochs", "2", "--batch-size", "8"]
    assert cifar100.main(run_alone) == 0
    ours, alone = (checkpoint.load(f / "last.pt") for f in (tmp_path / "c" / "full", tmp_path / "a"))
    assert all(torch.equal(v, alone["model"][k]) for k, v in ours["model"].items())
    assert ours["recipe"] == alone["recipe"]
    assert (tmp_path / "c" / "full" / "report.md").exists()


def test_a_failure_does_not_lose_the_others_and_resume_goes_on(trained, tmp_path, capsys, monkeypatch):
    def broken(name, **options):
        if name == "full":
            raise RunFailure("no such kernel")
        return build(name, **options)

    class RunFailure(command.RunError):
        pass

    monkeypatch.setattr(cifar100, "build_model", broken)
    assert run(tmp_path / "c") == 1
    assert trained == ["full", "standard_deep"]
    error = capsys.readouterr().err
    assert (
        "error: no such kernel" in error and "error: full: exit status 2; continue with: python -m" in error
    )
    text = (tmp_path / "c" / "compare.md").read_text()
    assert cells(text, "Not finished", "full")[0].startswith("exit status 2")
    assert "[standard_deep]" in text and not (tmp_path / "c" / "z_ranges.png").exists()

    monkeypatch.setattr(cifar100, "build_model", build)
    trained.clear()
    before = (tmp_path / "c" / "standard_deep" / "report.md").read_bytes()
    assert run(tmp_path / "c", "--resume") == 0
    assert trained == ["full"]  # the other was finished
    assert (tmp_path / "c" / "standard_deep" / "report.md").read_bytes() == before
    text = (tmp_path / "c" / "compare.md").read_text()
    assert "[full]" in text and "[standard_deep]" in text and "Not finished" not in text
    trained.clear()
    assert run(tmp_path / "c", "--resume") == 0 and trained == []


def test_resume_continues_an_unfinished_run(trained, tmp_path):
    assert run(tmp_path / "c", "--max-steps", "5", models="full") == 0  # one of two epochs
    text = (tmp_path / "c" / "compare.md").read_text()
    assert cells(text, "Accuracy", "[full](full/report.md)")[0] == "1 of 2"
    assert run(tmp_path / "c", "--resume", models="full") == 0
    assert trained == ["full", "full"]
    text = (tmp_path / "c" / "compare.md").read_text()
    assert cells(text, "Accuracy", "[full](full/report.md)")[0] == "2 of 2"
    assert run(tmp_path / "c", "--resume", models="full") == 0 and len(trained) == 2


def test_resume_with_another_recipe_fails_and_keeps_the_run(trained, tmp_path, capsys):
    run(tmp_path / "c", models="full")
    assert run(tmp_path / "c", "--resume", "--lr", "0.01", models="full") == 1
    assert "another recipe: lr was 0.001, now 0.01" in capsys.readouterr().err
    assert run(tmp_path / "c", "--resume", models="full") == 0 and len(trained) == 2


def test_runs_alone_and_beside_new_ones(trained, tmp_path):
    for name, options in {"a": [], "b": ["--seed", "7"], "plain": ["--model", "standard_deep"]}.items():
        cifar100.main(["--out", str(tmp_path / name), "--epochs", "1", "--batch-size", "8", *options])
    folders = [str(tmp_path / name) for name in ("a", "b", "plain")]
    assert compare.main(["--runs", *folders, "--out", str(tmp_path / "c")]) == 0
    assert trained == []
    text = (tmp_path / "c" / "compare.md").read_text()
    for label in ("[a](../a/report.md)", "[b](../b/report.md)", "[standard_deep](../plain/report.md)"):
        assert cells(text, "Accuracy", label)
    assert cells(text, "Recipe", "seed") == ["42", "7", "42"]
    assert "batch size 8" in section(text, "Recipe")
    assert run(tmp_path / "d", "--runs", folders[2], models="full") == 0
    text = (tmp_path / "d" / "compare.md").read_text()
    assert cells(text, "Accuracy", "[full](full/report.md)")
    assert cells(text, "Accuracy", "[standard_deep](../plain/report.md)")


def test_short_runs_say_so(trained, tmp_path):
    run(tmp_path / "c", "--max-steps", "2", "--eval-batches", "1", models="full")
    text = section((tmp_path / "c" / "compare.md").read_text(), "Accuracy")
    assert "Evaluated on a few batches only, not comparable: full." in text
    assert "Best epoch cut short by --max-steps: full." in text


# ---- language models ----


@pytest.fixture
def texts(trained, tmp_path):
    """Folders of runs of an epoch: of two models on one text, of one on another part of it, and of one on
    Penn Treebank's layout, which has a test part."""
    text = "one and two are three. " * 20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "ptb").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.char.{part}.txt").write_text(" ".join(text.replace(" ", "_")))
    sizes = ["--seq-length", "6", "--batch-size", "8", "--embedding-size", "0", "--hidden-size", "3"]
    for name, data, *options in (
        ("lstm", "a.txt", "--model", "lstm"),
        ("ln_lstm", "a.txt", "--model", "ln_lstm"),
        ("split", "a.txt", "--model", "lstm", "--val-split", "0.3"),
        ("ptb", "ptb", "--model", "lstm"),
    ):
        out = tmp_path / f"on_{name}"
        options += ["--epochs", "1", "--gen-length", "5", "--data-path", str(tmp_path / data)]
        assert charlm.main(["--out", str(out), *sizes, *options]) == 0
    return {name: load_run(tmp_path / f"on_{name}") for name in ("lstm", "ln_lstm", "split", "ptb")}


def test_language_models_and_their_texts(texts, tmp_path):
    def results(*names):
        path = comparison.write([texts[name] for name in names], tmp_path, "command")
        return section(path.read_text(), "Bits per character")

    same = results("lstm", "ln_lstm")
    assert "\nValidation bits per character at the best" in same and "test" not in same
    assert "\nText: a.txt.\n" in same and "not comparable" not in same
    ptb = results("ptb")
    assert "\nTest bits per character at the best" in ptb and "\nText: ptb.\n" in ptb
    mixed = results("ln_lstm", "ptb")
    assert "\nValidation or test bits per character at the best" in mixed
    warning = "Different texts, or different parts of one, not comparable"
    assert f"\n{warning}: ln_lstm (a.txt), lstm (ptb).\n" in mixed
    assert f"\n{warning}: on_lstm (a.txt), on_split (a.txt).\n" in results("lstm", "split")


def test_the_report_of_a_language_model_says_nothing_of_images(texts):
    text = (texts["ln_lstm"].folder / "report.md").read_text()
    for word in ("batch norm", "augmented", "state dtype", "image", "accuracy"):
        assert word not in text
    total = texts["ln_lstm"].summary["parameters"]["total"]
    assert section(text, "Parameters").strip() == f"{total:,} in all."
    assert "those of the steps: batches as trained on, weights still moving." in text


# ---- bad input: exit status 2, one line, nothing trained ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "full,resnet"], "unknown model 'resnet'; choose from full, "),
        (["--models", "full,full"], "full is named twice"),
        (["--models", ""], "unknown model ''"),
        (["--models", "full", "--typo"], "unrecognized arguments: --typo"),
        (["--models", "full", "--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--models", "full,fixed", "--generate", "conv5"], "--generate: no layer 'conv5'"),
        (["--models", "full", "--model", "full"], "--model: every model is one of --models"),
        (
            ["--command", "charlm", "--models", "ln_lstm,lstm", "--use-layer-norm"],
            "--models lstm: the other options make it ln_lstm; name that one instead",
        ),
    ],
)
def test_command_line_errors(options, message, trained, tmp_path, capsys):
    try:
        status = compare.main([*options, "--out", str(tmp_path / "c")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in one_line(capsys)
    assert trained == [] and not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", compare.COMMANDS)
def test_all_models_by_default(name, tmp_path):
    args, options = compare.parser().parse_known_args(["--command", name, "--out", str(tmp_path)])
    assert [p.name for p in compare.plan(args, options)] == list(compare.training_command(name).models)


def test_an_existing_comparison_is_not_overwritten(trained, tmp_path, capsys):
    run(tmp_path / "c", models="full")
    capsys.readouterr()
    assert run(tmp_path / "c") == 2
    assert f"{tmp_path / 'c' / 'full'}: already there; continue with --resume" in one_line(capsys)
    assert trained == ["full"]


def test_runs_that_cannot_be_compared(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        ("--runs", str(tmp_path / "nowhere")): "no such file; is",
        ("--runs", str(tmp_path / "empty")): "summary.json: no such file; is",
        ("--runs", str(tmp_path / "file")): "cannot be read, Not a directory",
        ("--runs", str(tmp_path / "empty"), "--lr", "1"): "no such file",
    }
    for options, message in cases.items():
        assert compare.main([*options, "--out", str(tmp_path / "c")]) == 2
        assert message in one_line(capsys)
    assert run(tmp_path / "file") == 2
    assert "cannot be written" in one_line(capsys)
    assert trained == []


def test_training_options_without_models(trained, tmp_path, capsys):
    cifar100.main(["--out", str(tmp_path / "a"), "--epochs", "1", "--batch-size", "8"])
    capsys.readouterr()
    assert compare.main(["--runs", str(tmp_path / "a"), "--lr", "1", "--out", str(tmp_path / "c")]) == 2
    assert "--lr 1: options of the training, but no --models to train" in one_line(capsys)


# ---- summary.json ----


@pytest.fixture
def finished(trained, tmp_path):
    cifar100.main(["--out", str(tmp_path / "a"), "--epochs", "1", "--batch-size", "8"])
    return tmp_path / "a"


def test_summary_holds_what_the_report_says(finished):
    s, text = load_run(finished).summary, (finished / "report.md").read_text()
    assert f"{s['best']['test_accuracy']:.2f} %" in text and f"**{s['parameters']['total']:,}**" in text
    assert s["bytes"]["last"] == (finished / "last.pt").stat().st_size
    assert s["recipe"] == checkpoint.load(finished / "last.pt")["recipe"]
    assert s["command"] in text and s["machine"]["CPU"] in text


def test_a_run_that_goes_on_has_no_summary(finished, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Trainer, "fit", interrupted)
    status = cifar100.main(["--out", str(finished), "--epochs", "1", "--batch-size", "8", "--resume"])
    assert status == 130
    with pytest.raises(CheckpointError, match="summary.json: no such file"):
        load_run(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"format": "other"}, "not the summary of a run of this project"),
        (lambda s: [], "not the summary of a run of this project"),
        (lambda s: s | {"version": 99}, "format version 99, this program reads 1"),
        (lambda s: s | {"epochs": 3}, "metrics.csv has 1 epochs, summary.json 3"),
        (lambda s: None, "not the summary"),
    ],
)
def test_damaged_summaries(finished, change, message):
    path = finished / summary.FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        load_run(finished)


def test_a_truncated_summary(finished):
    path = finished / summary.FILE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"summary\.json or metrics\.csv is damaged"):
        load_run(finished)


# ---- the child process ----

CHILD = """
import signal, sys, time
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
print("ready", flush=True)
end = time.monotonic() + 20
while not received and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.2)  # long enough for a second signal, were there one
sys.exit(10 * len(received))
"""


def plan(tmp_path):
    return Plan(cifar100.COMMAND, "full", tmp_path, ["--model", "full"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_once(number, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "program", lambda training: [sys.executable, "-c", CHILD])
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt():
        end = time.monotonic() + 20
        while "ready" not in capfd.readouterr().out and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=interrupt)
    killer.start()
    assert compare.train(plan(tmp_path)) == (10, number)
    killer.join()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_training_knows_that_it_is_not_alone(tmp_path, monkeypatch):
    child = [sys.executable, "-c", f"import os, sys; sys.exit({command.PARENT!r} not in os.environ)"]
    monkeypatch.setattr(compare, "program", lambda training: child)
    assert compare.train(plan(tmp_path)) == (0, None) and command.PARENT not in os.environ


def test_the_exit_status_comes_back(tmp_path, monkeypatch):
    for code, status in (("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("pass", 0)):
        child = [sys.executable, "-c", f"import os, sys; {code}"]
        monkeypatch.setattr(compare, "program", lambda training, child=child: child)
        assert compare.train(plan(tmp_path)) == (status, None)


def test_an_interruption_stops_all_and_says_how_to_go_on(trained, tmp_path, capsys, monkeypatch):
    real = compare.train

    def stopped(plan):
        return real(plan) if plan.name == "full" else (130, signal.SIGINT)

    monkeypatch.setattr(compare, "train", stopped)
    assert run(tmp_path / "c", models="full,standard_deep") == 130
    error = capsys.readouterr().err
    assert error.rstrip().endswith("--epochs 2 --batch-size 8 --resume")
    assert "[full]" in (tmp_path / "c" / "compare.md").read_text()
    monkeypatch.setattr(compare, "train", real)
    trained.clear()
    assert run(tmp_path / "c", "--resume") == 0 and trained == ["standard_deep"]


def test_an_interruption_while_drawing(trained, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "write", interrupted)
    assert run(tmp_path / "c") == 130 and trained == ["full"]
    assert capsys.readouterr().err.rstrip().endswith("--batch-size 8 --resume")


def test_a_killed_training_is_a_failure(trained, tmp_path, capsys, monkeypatch):
    real = compare.train
    monkeypatch.setattr(compare, "train", lambda p: (-9, None) if p.name == "full" else real(p))
    assert run(tmp_path / "c") == 1
    assert (
        "error: full: killed by SIGKILL; continue with: python -m train.cifar100" in capsys.readouterr().err
    )
    assert "[standard_deep]" in (tmp_path / "c" / "compare.md").read_text()


REAL = """
import sys
from train import cifar100
from tests.train.test_compare import ImageSet, build, images
cifar100.load_images = lambda name, root: ImageSet(*images(60, 0), *images(20, 1), [])
cifar100.VALIDATION, cifar100.build_model = 20, build
sys.exit(cifar100.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "program", lambda training: [sys.executable, "-c", REAL])
    assert run(tmp_path / "c") == 0
    assert all((tmp_path / "c" / name / "report.md").exists() for name in MODELS.split(","))


@pytest.mark.slow
def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "train.compare", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "All other options go to python -m train.cifar100" in done.stdout


# ---- pictures ----


@pytest.fixture
def named(trained, tmp_path):
    run(tmp_path / "c")
    runs = [load_run(tmp_path / "c" / name) for name in MODELS.split(",")]
    return comparison.labels(runs)


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_pictures(named, tmp_path, epochs):
    for r in named.values():
        r.history = [r.history[0] | {"epoch": e + 1} for e in range(epochs)]
        r.summary["published"] = {"accuracy": 50.0, "megabytes": 3.0, "z_ranges": {"conv": [-2.0, 1.0]}}
    figures = {
        "accuracy": comparison.curves(named),
        "size": comparison.against_size(named),
        "z": comparison.z_ranges({"full": named["full"]}),
    }
    for figure in figures.values():
        assert legend_fits(figure)
        save_figure(figure, tmp_path / "x.png")
        pixels = matplotlib.image.imread(io.BytesIO((tmp_path / "x.png").read_bytes()))
        assert pixels.shape[1] > 700 and pixels.std() > 0.01
    training, test = figures["accuracy"].axes
    assert [a.get_ylabel() for a in (training, test)] == ["training accuracy (%)", "test accuracy (%)"]
    for line, r in zip(test.lines, named.values(), strict=True):
        assert list(line.get_ydata()) == [row["test_accuracy"] for row in r.history]
    names = [text.get_text() for text in figures["size"].legends[0].get_texts()]
    assert names == ["full", "standard_deep", "hollow: published"]
    sizes = [
        line.get_xdata()[0] for line in figures["size"].axes[0].lines if line.get_marker() not in ("", "None")
    ]
    assert sizes == [x for r in named.values() for x in (3.0, r.summary["bytes"]["best"] / MB)]
    assert [a.get_title() for a in figures["z"].axes] == ["conv", "fc"]
    named["full"].summary["parameters"]["layers"].pop("fc")
    assert legend_fits(comparison.z_ranges({"full": named["full"]}))  # a single panel
    conv, fc = figures["z"].axes
    (bar,) = conv.patches
    assert (bar.get_y(), bar.get_height()) == (-2.0, 3.0) and not fc.patches


def test_high_accuracies_are_shown_close(named):
    """0 to 100 % where something is low; otherwise the differences of good models must be seen."""
    assert comparison.curves(named).axes[0].get_ylim()[0] == 0
    assert comparison.against_size(named).axes[0].get_ylim()[0] == 0
    for r in named.values():
        r.history = [row | {"train_accuracy": 98.5, "test_accuracy": 99.0} for row in r.history]
        r.summary |= {"best": r.history[0], "published": None}
    assert comparison.curves(named).axes[0].get_ylim()[0] > 90
    assert comparison.against_size(named).axes[0].get_ylim()[0] > 90


def test_looks_differ_without_colour():
    for key in ("marker", "linestyle", "color"):
        values = [str(style[key]) for style in comparison.LOOKS]
        assert len(set(values)) >= (len(values) if key != "linestyle" else 6)
    assert comparison.look(len(comparison.LOOKS))["markerfacecolor"] == "white"


def test_many_runs_of_one_model(named, tmp_path):
    runs = [copy.copy(named["full"]) for _ in range(11)]
    for i, r in enumerate(runs):
        r.folder = tmp_path / f"{i}" / "same" if i > 8 else tmp_path / f"r{i}"
    labels = comparison.labels(runs)
    assert list(labels)[:2] == ["r0", "r1"] and list(labels)[10] == str(tmp_path / "10" / "same")
    (tmp_path / "m").mkdir()
    text = comparison.write(runs, tmp_path / "m", "command").read_text()
    assert cells(text, "Parameters", "r8") == cells(text, "Parameters", "r0")
    assert "## Recipe\n\nThe same in all:" in text
