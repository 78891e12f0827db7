import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hyperfast
from hyperfast import analysis
from hyperfast.nn import (
    ChunkedGenerator,
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    SharedCoreGenerator,
    TwoLayerGenerator,
)

SHAPES = [(6, 4, 3, 3), (12, 4, 3, 3), (12, 8, 3, 3)]
KINDS = {
    "linear": lambda: LinearGenerator(SHAPES[0], 5, backend="reference"),
    "linear, no bias": lambda: LinearGenerator(SHAPES[0], 5, bias=False, backend="reference"),
    "shared": lambda: SharedCoreGenerator(SHAPES, 4, 7, backend="reference"),
    "two_layer": lambda: TwoLayerGenerator(SHAPES, 4, 7, unit=(6, 4, 3, 3), backend="reference"),
    "chunked": lambda: ChunkedGenerator(SHAPES, 3, 100, backend="reference"),
}


class Kernels(nn.Module):
    """Three convolutions, whose kernels `generator` can make."""

    def __init__(self, count=3):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(I, O, 3, bias=False) for O, I, _, _ in SHAPES[:count])


def model_of(kind):
    generator = KINDS[kind]()
    return hyperfast.hyperize(Kernels(len(generator.shapes)), generator, init="hyperfan")


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = HyperConv2d(3, 4, 3, z_dim=3, **options)
        self.first = HyperLinear(4, 4, z_dim=2, **options)
        self.second = HyperLinear(4, 4, generator=self.first.generator)
        self.fc = nn.Linear(4, 2)


# -- embeddings ----------------------------------------------------------------------------------


def test_z_report_of_layers():
    model = Net()
    report = analysis.z_report(model)
    assert [layer.name for layer in report.layers] == ["conv", "first"]  # the shared one once
    z = model.conv.generator.z.detach().double()
    figures = report.statistics()["conv"]
    expected = [z.min(), z.max(), z.mean(), z.var(correction=0).sqrt(), z.square().sum().sqrt()]
    assert list(figures) == ["min", "max", "mean", "std", "norm"]
    assert list(figures.values()) == pytest.approx([e.item() for e in expected], rel=1e-12)
    row = report.rows()[0]
    assert (row["layer"], row["embeddings"], row["z_dim"]) == ("conv", 1, 3)
    assert row["most_similar"] == "" and math.isnan(row["cosine"]) and math.isnan(row["within"])
    assert "| conv | 1 | 3 | " in report.to_markdown() and "nan" not in report.to_markdown()


def test_z_report_of_a_hyperized_network():
    model = model_of("two_layer")
    z, report = model.generators["all"].z.detach().double(), analysis.z_report(model)
    assert [layer.name for layer in report.layers] == ["convs.0", "convs.1", "convs.2"]
    assert [tuple(layer.z.shape) for layer in report.layers] == [(1, 4), (2, 4), (4, 4)]
    assert torch.equal(torch.cat([layer.z for layer in report.layers]), z)
    assert torch.equal(report.layers[2].norms(), z[3:].square().sum(1).sqrt())
    assert report.statistics()["convs.2"]["norm"] == pytest.approx(z[3:].norm().item())


def test_z_report_of_a_plain_network():
    report = analysis.z_report(nn.Linear(2, 2))
    assert report.layers == () and report.rows() == [] and report.similarities() == []


def test_similarity_is_the_mean_cosine_of_pairs():
    (similarity,) = analysis.z_report(model_of("two_layer")).similarities()
    z = torch.cat([layer.z for layer in analysis.z_report(model_of("two_layer")).layers])
    assert similarity.z_dim == 4 and similarity.counts == (1, 2, 4) and similarity.matrix.shape == (7, 7)
    report = analysis.ZReport(
        tuple(analysis.LayerEmbeddings(str(i), part) for i, part in enumerate(z.split([1, 2, 4])))
    )
    (similarity,) = report.similarities()
    places = [range(0, 1), range(1, 3), range(3, 7)]
    for a, rows in enumerate(places):
        for b, columns in enumerate(places):
            pairs = [F.cosine_similarity(z[i], z[j], dim=0) for i in rows for j in columns if i != j]
            mean = torch.stack(pairs).mean().item() if pairs else math.nan
            assert similarity.between()[a, b].item() == pytest.approx(mean, abs=1e-12, nan_ok=True)
    row = report.rows()[1]
    best = max((0, 2), key=lambda b: similarity.between()[1, b])
    assert row["most_similar"] == str(best) and row["cosine"] == similarity.between()[1, best].item()
    assert row["within"] == similarity.between()[1, 1].item()


def test_similarity_of_known_embeddings():
    layers = {"a": [[1.0, 0]], "b": [[0, 3.0]], "c": [[-2.0, 0], [0, 0]], "d": [[1.0, 2, 3]]}
    report = analysis.ZReport(
        tuple(analysis.LayerEmbeddings(name, torch.tensor(z).double()) for name, z in layers.items())
    )
    two, three = report.similarities()
    assert two.layers == ("a", "b", "c") and three.layers == ("d",)
    assert two.matrix.tolist() == [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    assert two.between().nan_to_num(9).tolist() == [[9, 0, -0.5], [0, 9, 0], [-0.5, 0, 0]]
    assert [row["most_similar"] for row in report.rows()] == ["b", "a", "b", ""]
    text = report.to_markdown()
    assert (
        "| K = 2 | a | b | c |" in text and "| c | -0.500 | 0.000 | 0.000 |" in text and "K = 3" not in text
    )


def test_many_layers_have_no_matrix_in_the_text():
    z = torch.eye(13).double()
    report = analysis.ZReport(tuple(analysis.LayerEmbeddings(f"l{i}", z[i : i + 1]) for i in range(13)))
    assert report.to_markdown().count("\n") == 14 and report.similarities()[0].matrix.shape == (13, 13)


# -- costs ---------------------------------------------------------------------------------------


def counted_flops(work):
    """Two for each multiplication and addition of matrix products, those with one vector included."""
    products = {
        torch.ops.aten.mv: lambda a, x, **_: 2 * math.prod(a),
        torch.ops.aten.addmv: lambda c, a, x, **_: 2 * math.prod(a),
    }
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_are_counted(kind):
    model = model_of(kind)
    (generator,) = model.generators.values()
    costs = analysis.generator_costs(model)
    assert all(cost.step_bytes > cost.forward_bytes for cost in (*costs.layers, *costs.shared, costs.total))
    made = []
    assert counted_flops(lambda: made.extend(generator())) == costs.total.forward_flops
    backward = counted_flops(lambda: sum(w.sum() for w in made).backward())
    assert costs.total.forward_flops + backward == costs.total.step_flops
    assert costs.total.forward_flops == sum(cost.forward_flops for cost in costs.layers)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_once(kind, factored):
    model = hyperfast.factored_(model_of(kind), factored)
    costs, counts = analysis.generator_costs(model), hyperfast.nn.parameter_counts(model)
    assert costs.total.parameters == counts["total"] == counts["generator"] + counts["embedding"]
    assert costs.total.generator == counts["generator"] and costs.total.embedding == counts["embedding"]
    assert costs.total.generated == counts["generated"]
    assert [cost.generated for cost in costs.layers] == [math.prod(s) for s in SHAPES[: len(costs.layers)]]
    assert costs.total.ratio == counts["total"] / counts["generated"]


def test_costs_of_a_linear_generator():
    N, K = 216, 5
    costs = analysis.generator_costs(hyperfast.factored_(model_of("linear")))
    (cost,) = costs.layers
    assert cost == analysis.Cost(
        "convs.0", "LinearGenerator", 1, K, N, K, N * (K + 1) + K, 2 * N * K, 4 * (N * (K + 1) + K + N),
        4 * N * K, 28 * N * K + 52 * (N + K) + 8 * N, True,
    )  # fmt: skip
    assert cost.ratio == (N * (K + 1) + K) / N and costs.shared == ()
    dense = analysis.generator_costs(model_of("linear")).total
    assert dense.step_bytes == 52 * cost.parameters + 8 * N and dense.step_flops == 6 * N * K
    assert not analysis.generator_costs(model_of("linear")).layers[0].next_weights


def test_costs_of_a_shared_core():
    K, D = 4, 7
    costs = analysis.generator_costs(hyperfast.factored_(model_of("shared")))
    n = [math.prod(shape) for shape in SHAPES]
    assert [cost.parameters for cost in costs.layers] == [N * (D + 1) + K for N in n]
    assert [cost.step_flops for cost in costs.layers] == [6 * K * D + 4 * D * N for N in n]
    assert [cost.step_bytes for cost in costs.layers] == [32 * N * D + 52 * (N + K) + 8 * N for N in n]
    assert not any(cost.next_weights for cost in costs.layers)
    (core,) = costs.shared
    assert core.name == "shared by convs.0, convs.1, convs.2" and core.parameters == D * (K + 1)


def test_costs_of_embeddings_on_one_generator():
    K, D, I, C = 4, 7, 4, 54
    costs = analysis.generator_costs(model_of("two_layer"))
    assert [cost.embeddings for cost in costs.layers] == [1, 2, 4]
    assert [cost.parameters for cost in costs.layers] == [K, 2 * K, 4 * K]
    assert [cost.forward_flops for cost in costs.layers] == [2 * E * I * D * (K + C) for E in (1, 2, 4)]
    assert costs.shared[0].parameters == (K + 1) * I * D + (D + 1) * C
    assert costs.total.step_bytes == 52 * costs.total.parameters + 8 * costs.total.generated


def test_a_shared_generator_costs_once():
    costs = analysis.generator_costs(Net())
    assert [cost.name for cost in costs.layers] == ["conv", "first"] and costs.shared == ()
    first, second = HyperLinear(4, 4, z_dim=2), HyperLinear(4, 4, z_dim=2)
    second.generator.weight = first.generator.weight
    costs = analysis.generator_costs(nn.Sequential(first, second))
    assert [cost.parameters for cost in costs.layers] == [16 + 2, 16 + 2]
    assert [(cost.name, cost.parameters) for cost in costs.shared] == [("shared by 0, 1", 32)]


def test_a_generator_that_does_not_give_its_products():
    class Own(hyperfast.nn.Generator):
        def __init__(self):
            super().__init__()
            self.shapes = (torch.Size([2, 3]),)
            self.z = nn.Parameter(torch.zeros(4))
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))

        def forward(self, z=None):
            return (self.net(self.z).view(2, 3),)

        def embeddings(self):
            return (self.z.view(1, 4),)

    (cost,) = analysis.generator_costs(HyperLinear(3, 2, bias=False, generator=Own())).layers
    assert cost.forward_flops is None and cost.step_flops is None and cost.kind == "Own"
    assert cost.parameters == 4 + 25 + 36 and cost.step_bytes == 52 * cost.parameters + 8 * cost.generated


def test_cost_tables():
    costs = analysis.generator_costs(model_of("shared"))
    rows, text = costs.rows(), costs.to_markdown()
    assert [row["name"] for row in rows][-2:] == ["shared by convs.0, convs.1, convs.2", "all"]
    assert rows[0]["generator"] == 216 * 8 and rows[0]["ratio"] == pytest.approx((216 * 8 + 4) / 216)
    assert (
        len(text.splitlines()) == 2 + 3 + 1 + 1 and "| convs.1 | SharedCoreGenerator | 1 x 4 | 432 |" in text
    )
    assert analysis.generator_costs(nn.Linear(2, 2)).total.parameters == 0
