"""hyperfast.analysis: activations, against their definition and on networks whose answer is known."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import analysis
from hyperfast.analysis.distribution import BINS, CHUNK, Tally
from tests.analysis_models import MODELS, everything


def check(distribution, values, threshold):
    """Against the definition, on all values at once in float64."""
    x = values.detach().double().flatten()
    assert distribution.count == len(x) and distribution.nonfinite == 0
    assert distribution.mean == pytest.approx(x.mean().item(), rel=1e-12, abs=1e-14 * x.abs().max().item())
    assert distribution.std == pytest.approx(x.std(correction=0).item(), rel=1e-10)
    assert (distribution.min, distribution.max) == (x.min().item(), x.max().item())
    assert distribution.near_zero == (x.abs() < threshold).double().mean().item()
    counts, edges = distribution.counts, distribution.edges
    expected = (torch.bucketize(x, edges, right=True) - 1).bincount(minlength=len(counts))  # edge <= x
    assert torch.equal(counts, expected) and counts.sum() == len(x)
    assert counts[0] and counts[-1] and len(edges) == len(counts) + 1


# -- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tally_of_parts_is_that_of_all(dtype):
    # growing, shrinking, one of zeros, one that the mean of all is far from
    parts = [torch.zeros(3), torch.randn(5, 7), 100 * torch.randn(11), 1e-3 * torch.randn(2, 3, 4, 5)]
    parts = [part.to(dtype) for part in [*parts, 300 + torch.randn(13), torch.tensor(-0.25)]]
    tally, other = Tally(0.01), Tally(0.01)
    for i, part in enumerate(parts):
        (tally if i % 2 else other).add(part)
    tally.merge(other)
    check(tally.distribution(), torch.cat([part.flatten() for part in parts]), 0.01)


def test_several_chunks_and_any_layout_of_memory():
    x = torch.randn(3, 5, 67, 71)
    assert x.numel() > CHUNK["cpu"]
    layouts = x, x.contiguous(memory_format=torch.channels_last), x[:, ::2, 3:], x[:1].expand(3, -1, -1, -1)
    for values in layouts:
        tally = Tally(0.1)
        tally.add(values)
        check(tally.distribution(), values, 0.1)


def test_moments_of_values_far_from_zero():
    x = 1e6 + torch.rand(200_000, dtype=torch.float64)
    tally = Tally(0.01)
    for part in x.split(70_000):
        tally.add(part)
    # the sum of squares less the square of the sum would lose 12 of 16 digits
    assert tally.distribution().std == pytest.approx(x.std(correction=0).item(), rel=1e-9)


def test_a_histogram_does_not_depend_on_the_order():
    x = torch.cat([torch.randn(1000) * 10.0**e for e in range(-4, 5)])
    forth, back = Tally(1.0), Tally(1.0)
    for part in x.split(100):
        forth.add(part)
    for part in reversed(x.split(100)):
        back.add(part)
    forth, back = forth.distribution(), back.distribution()
    assert torch.equal(forth.counts, back.counts) and torch.equal(forth.edges, back.edges)
    assert 0 in forth.edges.tolist() and BINS // 4 <= len(forth.counts) <= BINS
    assert (forth.density() * forth.edges.diff()).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("extreme", [5e-324, 1e-310, 2.0**-1000, 2.0**1022])
def test_a_histogram_of_extreme_values(extreme):
    x = torch.tensor([0, extreme, -extreme], dtype=torch.float64)
    tally = Tally(0.01)
    tally.add(x)
    distribution = tally.distribution()
    assert distribution.counts.sum() == 3 and distribution.max == extreme
    assert distribution.edges[0] <= -extreme and distribution.edges[-1] > extreme


def test_what_is_not_finite_counts_apart():
    x = torch.randn(50)
    tally = Tally(0.01)
    tally.add(torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf, math.nan])]))
    distribution = tally.distribution()
    assert (distribution.count, distribution.nonfinite) == (50, 4)
    assert distribution.mean == pytest.approx(x.double().mean().item())
    tally = Tally(0.01)
    tally.add(torch.full((3,), math.nan))
    distribution = tally.distribution()
    assert (distribution.count, distribution.nonfinite) == (0, 3) and math.isnan(distribution.mean)
    assert len(distribution.counts) == len(distribution.edges) == 0


# -- which outputs, and what of them -------------------------------------------------------------


def batches_of(*shape, count=3):
    return [(torch.randn(shape), torch.zeros(shape[0], dtype=torch.long)) for _ in range(count)]


def test_dead_units_of_a_linear_layer():
    """ReLU(x + b) of inputs between -1 and 1."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        # dead; dead but for one sample; alive; below the threshold everywhere, not zero
        model[0].bias.copy_(torch.tensor([-1.0, -0.5, 2.0, 0.0]))
        model[0].weight[3, 3] = 0.005
    inputs = [torch.rand(6, 4) * 2 - 1 for _ in range(3)]
    for x in inputs:
        x[:, 1] = -1
    inputs[2][4, 1] = 0.75
    statistics = analysis.activation_statistics(model, [(x, None) for x in inputs])
    (layer,) = statistics.layers
    out = torch.cat([model(x) for x in inputs]).detach()
    assert (layer.name, layer.kind, statistics.batches) == ("1", "ReLU", 3)
    assert layer.dead().tolist() == [True, False, False, True] and layer.dead_share == 0.5
    assert torch.equal(layer.peak, out.double().abs().amax(0)) and layer.peak[1] == 0.25
    check(layer.values, out, 0.01)
    # all of units 0 and 3, all of unit 1 but one
    assert layer.values.near_zero == (2 * 18 + 17) / 72
    assert (
        analysis.activation_statistics(model, [(x, None) for x in inputs], limit=2).layers[0].dead().sum()
        == 3
    )
    assert analysis.activation_statistics(model, [(x, None) for x in inputs], 0.3).layers[0].dead().sum() == 3


def test_dead_channels_of_a_convolution_and_all_together():
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 3, 1), nn.GELU()
    )
    with torch.no_grad():
        model[1].weight.zero_()  # every channel is its bias
        model[1].bias.copy_(torch.tensor([-3.0, 0.0, 0.009, 0.011, 2.0]))
    batches = batches_of(4, 2, 6, 6)
    statistics = analysis.activation_statistics(model, batches)
    relu, gelu = statistics.layers
    assert (relu.name, gelu.name, gelu.kind) == ("2", "4", "GELU")
    assert relu.dead().tolist() == [True, True, True, False, False]
    assert relu.values.near_zero == relu.dead_share == 0.6 and relu.values.min == 0
    out = torch.cat([model(x) for x, _ in batches])
    check(gelu.values, out, 0.01)
    total = statistics.total
    assert total.values.count == relu.values.count + gelu.values.count and len(total.peak) == 8
    share = (relu.values.near_zero * 5 + gelu.values.near_zero * 3) / 8
    assert total.values.near_zero == pytest.approx(share, rel=1e-12)
    assert total.dead_share == (3 + int(gelu.dead().sum())) / 8
    mean = (relu.values.mean * 5 + gelu.values.mean * 3) / 8
    assert total.values.mean == pytest.approx(mean, rel=1e-12)


def test_units_by_dimension():
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = 1
    batches = [(x, None)]
    last = analysis.activation_statistics(nn.ReLU(), batches).layers[0]
    assert last.name == "" and last.peak.tolist() == [0, 0, 0, 1]
    middle = analysis.activation_statistics(nn.ReLU(), batches, unit_dim=1).layers[0]
    assert middle.peak.tolist() == [0, 0, 1]
    first = analysis.activation_statistics(nn.ReLU(), batches, unit_dim=-3).layers[0]
    assert first.peak.tolist() == [0, 1]
    alone = analysis.activation_statistics(nn.ReLU(), [(torch.tensor([0.5, -3]), None)], unit_dim=0).layers[0]
    assert alone.peak.tolist() == [0.5, 0]
    for few in (torch.tensor([0.5, -3.0]), torch.tensor(-3.0)):
        one = analysis.activation_statistics(nn.Tanh(), [(few, None)]).layers[0]
        assert one.peak.tolist() == [pytest.approx(math.tanh(3))]


class Functional(nn.Module):
    """No activation module, and an in-place function after a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))

    def forward(self, x):
        return self.head(F.relu_(self.conv(x)))


def test_leaves_where_there_are_no_activation_modules():
    model, batches = Functional(), batches_of(2, 2, 6, 6)
    statistics = analysis.activation_statistics(model, batches)
    assert [layer.name for layer in statistics.layers] == ["conv", "head.0", "head.1"]
    conv, flat, _ = statistics.layers
    check(conv.values, torch.cat([model.conv(x) for x, _ in batches]), 0.01)  # before the function changed it
    assert conv.values.min < 0 == flat.values.min


def test_named_layers():
    model, batches = Functional(), batches_of(2, 2, 6, 6)
    statistics = analysis.activation_statistics(model, batches, layers=["head", "conv", ""])
    assert [(layer.name, layer.kind) for layer in statistics.layers] == [
        ("conv", "Conv2d"), ("head", "Sequential"), ("", "Functional"),
    ]  # fmt: skip
    check(statistics.layers[2].values, torch.cat([model(x) for x, _ in batches]), 0.01)


class Reused(nn.Module):
    """One activation module, called on different widths, as in torchvision's Bottleneck."""

    def __init__(self):
        super().__init__()
        self.relu, self.wide, self.unused = nn.ReLU(), nn.Linear(3, 7), nn.Sigmoid()

    def forward(self, x):
        return self.relu(self.wide(self.relu(x)))


def test_a_module_called_several_times():
    model, batches = Reused(), batches_of(4, 3)
    statistics = analysis.activation_statistics(model, batches)
    assert [(layer.name, len(layer.peak)) for layer in statistics.layers] == [("relu", 3), ("relu call 2", 7)]
    check(statistics.layers[1].values, torch.cat([model(x) for x, _ in batches]), 0.01)
    check(statistics.layers[0].values, torch.cat([x for x, _ in batches]).relu(), 0.01)


def test_outputs_of_several_tensors():
    model, batches = nn.LSTM(3, 5, batch_first=True), batches_of(2, 4, 3)
    statistics = analysis.activation_statistics(model, batches)
    assert [(layer.name, len(layer.peak)) for layer in statistics.layers] == [
        ("[0]", 5),
        ("[1]", 5),
        ("[2]", 5),
    ]
    for i, layer in enumerate(statistics.layers):
        outs = [(lambda out, state: (out, *state)[i])(*model(x)) for x, _ in batches]
        check(layer.values, torch.cat(outs, 0 if i == 0 else 1), 0.01)


def test_a_fused_activation_is_one():
    norm = hyperfast.nn.BatchNormReLUMaxPool2d(3)
    batches = batches_of(2, 3, 4, 4)
    statistics = analysis.activation_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), norm), batches)
    assert [layer.kind for layer in statistics.layers] == ["BatchNormReLUMaxPool2d"]

    class Norm(hyperfast.nn.BatchNormReLUMaxPool2d):
        forward = nn.BatchNorm2d.forward

    statistics = analysis.activation_statistics(nn.Sequential(Norm(3), nn.ReLU()), batches)
    assert [layer.kind for layer in statistics.layers] == ["ReLU"]


@pytest.mark.parametrize("layers", [None, ["0", "2"]])
def test_a_hypernetwork_is_its_plain_network(layers):
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    model = hyperfast.hyperize(plain, z_dim=3, init="hyperfan")
    batches = batches_of(2, 2, 6, 6)
    ours = analysis.activation_statistics(model, batches, layers=layers)
    theirs = analysis.activation_statistics(hyperfast.freeze(model), batches, layers=layers)
    assert ours.rows() == theirs.rows() and len(ours.layers) == len(layers or "1")


def test_leaves_of_layers_with_generators():
    model = nn.Sequential(hyperfast.nn.HyperLinear(4, 3, z_dim=2), nn.Identity())
    statistics = analysis.activation_statistics(model, batches_of(2, 4))
    assert [(layer.name, layer.kind) for layer in statistics.layers] == [
        ("0", "HyperLinear"),
        ("1", "Identity"),
    ]


def test_a_compiled_model_runs_eagerly():
    def make():
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU())

    plain = make()
    batches = batches_of(4, 3)
    rows = analysis.activation_statistics(plain, batches).rows()
    compiled = torch.compile(plain, backend="eager")
    compiled(batches[0][0])  # is compiled before there is a hook
    assert analysis.activation_statistics(compiled, batches).rows() == rows
    outer = nn.Sequential(plain)
    plain.compile(backend="eager")
    outer(batches[0][0])
    assert [
        row | {"layer": "1"} for row in analysis.activation_statistics(outer, batches).rows()[:1]
    ] == rows[:1]


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_stays_as_it_was(kind):
    model, batches = MODELS[kind](), batches_of(2, 3, 6, 6)
    model(batches[0][0]).sum().backward()
    before = everything(model)
    statistics = analysis.activation_statistics(model, batches)
    assert analysis.activation_statistics(model, batches).rows() == statistics.rows()  # dropout too
    assert "conv" in [layer.name for layer in statistics.layers]
    broken = [*batches, (torch.zeros(2, 1, 6, 6), None)]
    with pytest.raises(RuntimeError):
        analysis.activation_statistics(model, broken)
    analysis.weight_statistics(model)
    assert everything(model) == before and not any(m._forward_hooks for m in model.modules())


def test_the_mode_is_that_of_the_model():
    model, batches = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), [(5 + torch.randn(6, 3), None)]
    (training,) = analysis.activation_statistics(model, batches).layers
    (evaluation,) = analysis.activation_statistics(model.eval(), batches).layers
    assert abs(training.values.mean) < 0.1 and evaluation.values.mean > 0.9


def test_no_activations_are_kept():
    class Watch(nn.ReLU):
        def forward(self, x):
            assert not any(before() is not None for before in seen)
            seen.append(weakref.ref(out := F.relu(x)))
            return out

    seen = []
    analysis.activation_statistics(nn.Sequential(Watch(), nn.Linear(4, 2)), batches_of(3, 4))
    assert len(seen) == 3


def test_what_is_not_finite_is_counted_and_said():
    x = torch.tensor([[1.0, math.nan, 0], [math.inf, 2, 0]])
    statistics = analysis.activation_statistics(nn.ReLU(), [(x, None)])
    (layer,) = statistics.layers
    assert (layer.values.count, layer.values.nonfinite, layer.values.mean) == (4, 2, 0.75)
    assert (
        layer.dead().tolist() == [False, False, True]
        and "2 activations are not finite" in statistics.to_markdown()
    )


def test_tables():
    statistics = analysis.activation_statistics(Reused(), batches_of(4, 3))
    rows, text = statistics.rows(), statistics.to_markdown()
    assert [row["layer"] for row in rows] == ["relu", "relu call 2", "all"] and rows[2]["units"] == 10
    assert list(rows[0]) == [
        "layer", "kind", "count", "nonfinite", "mean", "std", "min", "max", "near_zero", "units", "dead",
        "dead_share", "threshold", "batches",
    ]  # fmt: skip
    assert (
        text.startswith("| layer | module | mean |")
        and "| relu call 2 | ReLU | " in text
        and "3 batches" in text
    )


def test_bad_input():
    model, batches = Functional(), batches_of(2, 2, 6, 6)
    with pytest.raises(ValueError, match="no module 'con'; it has conv, head, head.0, head.1"):
        analysis.activation_statistics(model, batches, layers=["con"])
    with pytest.raises(TypeError, match="layers must be a list"):
        analysis.activation_statistics(model, batches, layers="conv")
    with pytest.raises(ValueError, match="at least one module"):
        analysis.activation_statistics(model, batches, layers=[])
    with pytest.raises(ValueError, match="at least one batch"):
        analysis.activation_statistics(model, [])
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        analysis.activation_statistics(model, batches, limit=0)
    with pytest.raises(ValueError, match="no forward called unused"):
        analysis.activation_statistics(Reused(), batches_of(4, 3), layers=["relu", "unused"])
    with pytest.raises(ValueError, match="same units in every batch, got 3 units after 4"):
        analysis.activation_statistics(nn.ReLU(), [(torch.zeros(1, 4), None), (torch.zeros(1, 3), None)])
    with pytest.raises(ValueError, match="unit_dim must be a dimension of the output of 'conv', got 4"):
        analysis.activation_statistics(model, batches, unit_dim=4)
