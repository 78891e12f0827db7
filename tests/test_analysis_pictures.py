import builtins
import importlib.util
import io

import numpy as np
import pytest
import torch
from torch import nn

from hyperfast import analysis
from hyperfast.nn import generate_layers
from tests.test_analysis import Kernels, Net, model_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def drawn(figure, panel=0):
    """The numbers and the title of a sheet."""
    axis = [axis for axis in figure.axes if axis.images][panel]
    return np.ma.filled(axis.images[0].get_array(), np.nan), axis.get_title()


def test_filter_sheet_draws_every_filter():
    weight = torch.randn(5, 2, 3, 4)
    sheet, title = drawn(analysis.filter_sheet(weight))
    assert title == "5 outputs, 2 inputs, 3 x 4"
    assert sheet.shape == (3 * 4 - 1, 2 * (2 * 5 + 1) - 2)  # two outputs beside each other
    for o in range(5):
        row, column = divmod(o, 2)
        for i in range(2):
            top, left = 4 * row, 11 * column + 5 * i
            assert np.array_equal(sheet[top : top + 3, left : left + 4], weight[o, i].double().numpy())
    assert np.isnan(sheet).sum() == sheet.size - 5 * 2 * 12
    sheet, _ = drawn(analysis.filter_sheet(torch.randn(16, 1, 5, 5)))
    assert sheet.shape == (4 * 6 - 1, 4 * 6 - 1)


@pytest.mark.parametrize(
    ("shape", "limit", "title"),
    [
        ((64, 32, 5, 5), 256, "first 16 of 64 outputs, first 16 of 32 inputs, 5 x 5"),
        ((64, 3, 3, 3), 100, "first 33 of 64 outputs, 3 inputs, 3 x 3"),
        ((2, 30, 1, 1), 1, "first 1 of 2 outputs, first 1 of 30 inputs, 1 x 1"),
        ((1, 1, 1, 1), 7, "1 output, 1 input, 1 x 1"),
    ],
)
def test_the_limit_is_said(shape, limit, title):
    weight = torch.randn(shape)
    sheet, said = drawn(analysis.filter_sheet({"conv": weight}, limit))
    assert said == f"conv\n{title}" and (~np.isnan(sheet)).sum() <= limit * shape[2] * shape[3]
    assert np.array_equal(sheet[: shape[2], : shape[3]], weight[0, 0].double().numpy())


def test_plain_and_generated_side_by_side():
    import matplotlib.image

    model = Net()
    generated = analysis.layer_weight(model, "conv")
    assert torch.equal(generated, generate_layers(model)["conv"])
    figure = analysis.filter_sheet({"plain": torch.zeros(4, 3, 3, 3), "generated": 2 * generated})
    assert [drawn(figure, i)[1].split("\n")[0] for i in (0, 1)] == ["plain", "generated"]
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert images[0].get_clim() == (-1, 1)
    extreme = 2 * generated.abs().max().item()
    assert images[1].get_clim() == pytest.approx((-extreme, extreme))
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    assert matplotlib.image.imread(io.BytesIO(pixels.getvalue())).std() > 0.01


def test_a_common_scale():
    small, large = torch.ones(2, 1, 3, 3), -3 * torch.ones(2, 1, 3, 3)
    for common, limits in ((False, [(-1, 1), (-3, 3)]), (True, [(-3, 3), (-3, 3)])):
        figure = analysis.filter_sheet({"plain": small, "generated": large}, common_scale=common)
        images = [axis.images[0] for axis in figure.axes if axis.images]
        assert [image.get_clim() for image in images] == limits
        assert [a.get_ylabel() for a in figure.axes[2:]] == ["weight"] * (1 if common else 2)


def test_the_scale_is_signed_in_grey_too():
    import matplotlib

    colours = matplotlib.colormaps[analysis.pictures.SIGNED](np.linspace(0, 1, 255))[:, :3]
    grey = colours @ (0.299, 0.587, 0.114)
    assert (np.diff(grey) > 0).all() and np.ptp(colours[127]) < 0.05 and 0.4 < grey[127] < 0.6


def test_layer_weight_of_any_model():
    plain, hyper = Kernels(), model_of("shared")
    assert torch.equal(analysis.layer_weight(plain, "convs.1"), plain.convs[1].weight)
    assert torch.equal(analysis.layer_weight(hyper, "convs.1"), hyper.generate()["convs.1.weight"])
    assert torch.equal(analysis.layer_weight(hyper, "convs.1.weight"), hyper.generate()["convs.1.weight"])
    assert analysis.layer_weight(Net(), "fc.bias").shape == (2,)
    with pytest.raises(ValueError, match=r"no weight of 'conv9'; it has .*convs\.0\.weight"):
        analysis.layer_weight(hyper, "conv9")


@pytest.mark.parametrize("shape", [(3, 4), (0, 1, 3, 3)])
def test_filter_sheet_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"weight 'fc' must be \[O, I, R, S\], not empty, got"):
        analysis.filter_sheet({"fc": torch.zeros(shape)})


def test_refused_limits():
    with pytest.raises(ValueError, match="got 0, 1"):
        analysis.filter_sheet(torch.zeros(1, 1, 1, 1), limit=0)
    with pytest.raises(ValueError, match="at least 1, got 0, 24"):
        analysis.z_bars(nn.Linear(2, 2))


def test_z_bars():
    model = model_of("two_layer")
    figure = analysis.z_bars(model)
    z = model.generators["all"].z.detach()
    heights = [bar.get_height() for bar in figure.axes[2].patches]
    assert heights == pytest.approx(z[3:].mean(0).tolist())
    assert [axis.get_title() for axis in figure.axes[:3]] == [
        "convs.0", "convs.1 (E = 2)", "convs.2 (E = 4)",
    ]  # fmt: skip
    assert len({axis.get_ylim() for axis in figure.axes[:3]}) == 1
    assert figure.get_suptitle() == "bars: mean of E embeddings, lines: smallest to largest"
    assert analysis.z_bars(analysis.z_report(model), limit=1).get_suptitle() == "first 1 of 3 layers"


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        analysis.filter_sheet(torch.zeros(1, 1, 1, 1))
    assert analysis.z_report(Net()).to_markdown() and analysis.generator_costs(Net()).to_markdown()
