import io
import math

import matplotlib.image
import pytest
import torch
from torch import nn

from tests.train.tiny import make
from train import report
from train.checkpoint import CheckpointError
from train.report import Published


class Plain(nn.Sequential):
    def __init__(self, backend):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.fixture
def trained(tmp_path):
    trainer = make(tmp_path, epochs=2)
    trainer.fit()
    return trainer


def cells(text, first):
    """The cells of the table row that starts with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def write(trainer, **options):
    return report.write(trainer, "Tiny", "the end", "python -m train.tiny", **options).read_text()


def test_report_of_a_hypernetwork(trained):
    published = Published(54.16, 325, {"conv": (-2.18, 1.2)})
    text = write(trained, published=published)
    best = trained.best
    assert cells(text, "this run, best validation epoch") == [
        str(best["epoch"]), f"{best['validation_accuracy']:.2f} %", f"{best['test_accuracy']:.2f} %",
    ]  # fmt: skip
    assert cells(text, "published, best test epoch")[-1] == "54.16 %"
    assert cells(text, "published, saved model") == ["325.0", "6.00"]
    # conv 3-4 3x3: 108 weights from K = 3, so 108 * 4 generator parameters and z; fc 4-5: 20 and 80
    assert "| conv | LinearGenerator | 1 x 3 | 108 | 435 | 4.03 |" in text
    assert "| fc | LinearGenerator | 1 x 3 | 20 | 83 | 4.15 |" in text
    assert "| **all** |  | **2** | **128** | **518** | **4.05** |" in text
    assert cells(text, "generator") == ["512"] and cells(text, "z") == ["6"]
    assert cells(text, "other (biases, batch norm, ordinary weights)") == ["17"]
    assert cells(text, "**total**") == ["**535**"]
    assert cells(text, "main network after generation") == ["145"]
    assert cells(text, "expansion (total / main network)") == [f"{535 / 145:.2f}"]
    z = trained.model.conv.generator.z
    assert all((trained.out / f"{name}.png").exists() for name in ("z", "z_bars", "filters"))
    assert cells(text, "K = 3") == ["conv", "fc"] and "| conv | 1 | 3 | " in text
    row = next(line for line in text.splitlines() if "[-2.18, 1.20]" in line)
    assert (
        row.startswith("| conv |") and f"{trained.history[-1]['z/conv/norm']:.4f}" in row and z.numel() == 3
    )
    assert "python -m train.tiny" in text and "Trained 2 of 2 epochs, 12 steps (the end)." in text
    assert cells(text, "torch") == [str(torch.__version__)]
    assert "batches as trained on (augmented where the recipe says so), weights still moving." in text


def test_sizes_are_those_of_the_files(trained, tmp_path):
    frozen = tmp_path / "frozen.safetensors"
    frozen.write_bytes(bytes(3 * 2**20))
    trained.best["test_accuracy"] = 50.0
    text = write(trained, frozen=frozen)
    assert cells(text, "frozen.safetensors, plain network") == ["3.0", "0.06"]
    trained.best["test_accuracy"] = 0.0  # no division by zero
    assert cells(write(trained, frozen=frozen), "frozen.safetensors, plain network") == ["3.0", "-"]
    assert cells(write(trained), "plain network (not written; --save-frozen)") == ["0.0", "-"]


def test_report_of_a_plain_network(tmp_path):
    trainer = make(tmp_path, net=Plain, epochs=1, fused=False)
    trainer.fit()
    text = write(trainer)
    assert not (tmp_path / "z.png").exists() and "z.png" not in text and "generator" not in text
    assert cells(text, "**total**") == [f"**{3 * 4 * 9 + 4 + 4 * 5 + 5}**"]
    assert "published" not in text


def test_a_short_run_says_that_it_is_not_comparable(tmp_path):
    trainer = make(tmp_path, max_steps=4, eval_batches=1)
    trainer.fit()
    text = write(trainer)
    assert "Evaluated on 1 batches only: not comparable." in text and "cut short by --max-steps" in text


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_pictures(trained, tmp_path, epochs):
    history = [trained.history[0] | {"epoch": e + 1} for e in range(epochs)]
    figures = report.curves(history, 1), report.z_evolution([trained.initial_z, *history], ["conv", "fc"])
    for figure in figures:
        report.save_figure(figure, tmp_path / "x.png")
        pixels = matplotlib.image.imread(io.BytesIO((tmp_path / "x.png").read_bytes()))
        assert pixels.shape[1] > 700 and pixels.std() > 0.01
    accuracy, loss = figures[0].axes
    assert accuracy.get_xlabel() == loss.get_xlabel() == "epoch"
    assert accuracy.get_ylabel() == "accuracy (%)" and loss.get_ylabel() == "cross-entropy"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "train", "validation", "test", "best validation epoch",
    ]  # fmt: skip
    assert all(len(line.get_xdata()) == epochs for line in accuracy.lines[:3])
    assert len(figures[1].axes[0].lines[0].get_xdata()) == epochs + 1


def test_a_layer_generated_later_has_no_earlier_embeddings(trained):
    early = {key: value for key, value in trained.history[0].items() if not key.startswith("z/fc")}
    figure = report.z_evolution([early, early, *trained.history], ["conv", "fc"])
    conv, fc = (axis.lines[0].get_ydata() for axis in figure.axes)
    assert len(conv) == len(fc) == 4
    assert [math.isnan(y) for y in fc] == [True, True, False, False] and not any(map(math.isnan, conv))


def legend_fits(figure):
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    return 0 <= box.x0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("layers", [["conv"], ["conv", "fc"]])
def test_the_legend_of_few_layers_fits(trained, layers):
    assert legend_fits(report.z_evolution([trained.initial_z, *trained.history], layers))


def test_every_curve_has_a_marker():
    for points in (1, 2, 5, 30, 100):
        for curve in range(3):
            first, every = report.marks(points, curve, 3)
            assert 0 <= first < points and every >= 1


def test_unwritable_folder(trained, tmp_path):
    figure = report.curves(trained.history, 1)
    with pytest.raises(CheckpointError, match=r"x\.png: not saved, No such file"):
        report.save_figure(figure, tmp_path / "nowhere" / "x.png")


def test_table_escapes_bars():
    assert report.table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
