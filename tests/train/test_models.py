"""train.models: sizes, published checkpoints, and the plain twin."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfast
from hyperfast.nn import named_generators, parameter_counts, plain_state_dict
from train.models import MODELS, build_model
from train.models.full import FullNet

NAMES = [f"conv{i}" for i in range(1, 6)] + [f"fc{i}" for i in range(1, 4)]
SHAPES = {
    "conv1": (64, 3, 3, 3),
    "conv2": (128, 64, 3, 3),
    "conv3": (256, 128, 3, 3),
    "conv4": (512, 256, 3, 3),
    "conv5": (512, 512, 3, 3),
    "fc1": (1024, 512),
    "fc2": (512, 1024),
    "fc3": (100, 512),
}


@pytest.fixture(scope="module")
def full() -> FullNet:
    torch.manual_seed(4)
    return build_model("full").eval()


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as published checkpoints have it, built by hand."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in SHAPES.items():
        n, fan_in = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
        state[f"z_signal_{name}"] = torch.randn(1, 16, generator=generator) * 0.5
        state[f"hyper_{name}.weight"] = torch.randn(n, 16, generator=generator) * (0.5 / fan_in) ** 0.5
        state[f"hyper_{name}.bias"] = torch.randn(n, generator=generator) * (1 / fan_in) ** 0.5
        state[f"{name}_bias"] = torch.randn(shape[0], generator=generator) * 0.1
    for i in range(1, 6):
        channels = SHAPES[f"conv{i}"][0]
        for part in ("weight", "running_var"):
            state[f"bn{i}.{part}"] = torch.rand(channels, generator=generator) + 0.5
        for part in ("bias", "running_mean"):
            state[f"bn{i}.{part}"] = torch.randn(channels, generator=generator) * 0.1
        state[f"bn{i}.num_batches_tracked"] = torch.tensor(7)
    return state


def logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The report's network in evaluation, written down once more from its text."""

    def weight(name):
        z, matrix, bias = (state[k.format(name)] for k in ("z_signal_{}", "hyper_{}.weight", "hyper_{}.bias"))
        return F.linear(z, matrix, bias).view(SHAPES[name])

    for i in range(1, 6):
        x = F.conv2d(x, weight(f"conv{i}"), state[f"conv{i}_bias"], padding=1)
        bn = [state[f"bn{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *bn))
        if i < 5:
            x = F.max_pool2d(x, 2)
    x = x.mean((2, 3))
    x = F.relu(F.linear(x, weight("fc1"), state["fc1_bias"]))
    x = F.relu(F.linear(x, weight("fc2"), state["fc2_bias"]))
    return F.linear(x, weight("fc3"), state["fc3_bias"])


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(6))


def test_parameter_counts(full):
    counts = parameter_counts(full)
    assert counts["total"] == sum(p.numel() for p in full.parameters()) == 85_160_676
    assert counts["generated"] == sum(torch.Size(s).numel() for s in SHAPES.values()) == 5_009_088
    assert counts["embedding"] == 8 * 16
    assert counts["generator"] == 85_160_676 - 6_180
    assert counts["other"] + counts["embedding"] == 6_180
    plain = build_model("standard_deep")
    assert sum(p.numel() for p in plain.parameters()) == 5_015_140
    assert not list(named_generators(plain))


LISTED = {
    "full": 85_160_676,
    "enhanced": 10_913_412,
    "standard_deep": 5_015_140,
    "fixed": 1_087_404,
    "all_layers": 6_095_564,
    "mnist_style": 643_308,
    "standard": 677_796,
}
FIXED_SHAPES = {
    "conv1": (32, 3, 5, 5),
    "conv2": (64, 32, 5, 5),
    "conv3": (128, 64, 3, 3),
    "fc1": (256, 2048),
    "fc2": (100, 256),
}
TWINS = {
    "full": "standard_deep",
    "enhanced": "standard_deep",
    "fixed": "standard",
    "all_layers": "standard",
    "mnist_style": "standard",
}


def test_listed_parameter_counts():
    assert {name: parameter_counts(build_model(name))["total"] for name in MODELS} == LISTED
    enhanced = parameter_counts(build_model("enhanced"))
    assert enhanced["generator"] + enhanced["embedding"] == 6_266_912


GENERATED = {
    "enhanced": ["conv2", "conv3"],
    "fixed": ["conv2"],
    "all_layers": list(FIXED_SHAPES),
    "mnist_style": ["conv2"],
}


@pytest.mark.parametrize("name", GENERATED)
def test_names_of_the_other_models(name):
    shapes = FIXED_SHAPES if "conv4.bias" not in build_model(name).state_dict() else SHAPES
    generated = GENERATED[name]
    parts = ("z", "w1", "b1", "w2", "b2") if name == "mnist_style" else ("weight", "bias", "z")
    expected = {f"{n}.generator.{p}" for n in generated for p in parts} | {f"{n}.bias" for n in shapes}
    expected |= {f"{n}.weight" for n in shapes if n not in generated}
    model = build_model(name)
    assert {n for n, _ in model.named_parameters() if not n.startswith("bn")} == expected
    assert {n: tuple(g.shapes[0]) for n, g in named_generators(model)} == {n: shapes[n] for n in generated}
    z_dim = 16 if name == "enhanced" else 8
    assert all(g.z.shape == (z_dim,) for _, g in named_generators(model))


def fixed_logits(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The `fixed` network in evaluation, written down once more from the report's text."""
    for i in (1, 2, 3):
        x = F.conv2d(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"], padding="same")
        x = F.max_pool2d(F.relu(x), 2)
    x = F.relu(F.linear(x.reshape(-1, 2048), state["fc1.weight"], state["fc1.bias"]))
    return F.linear(x, state["fc2.weight"], state["fc2.bias"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["fixed", "all_layers", "mnist_style", "standard"])
def test_the_fixed_network(name, fused):
    model = build_model(name, fused=fused, init="hyperfan").eval()
    assert {n: tuple(t.shape) for n, t in plain_state_dict(model).items() if "weight" in n} == {
        f"{n}.weight": shape for n, shape in FIXED_SHAPES.items()
    }
    with torch.no_grad():
        expected = fixed_logits(plain_state_dict(model), images())
        assert expected.std() > 0.05
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    dropped = model.train()(images())
    assert not torch.allclose(dropped, expected) and model.dropout.p == 0.5


@pytest.mark.parametrize("name", TWINS)
def test_plain_state_dict_gives_the_twin(name):
    model, plain = build_model(name, init="hyperfan").eval(), build_model(TWINS[name]).eval()
    plain.load_state_dict(plain_state_dict(model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-5)


def stds(model) -> dict[str, float]:
    return {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}


def test_the_reports_initialisation():
    enhanced = build_model("enhanced", init="report")
    for name, std in stds(enhanced).items():
        K_or_fan_in = 16 if "generator" in name else enhanced.get_parameter(name)[0].numel()
        assert std == pytest.approx((2 / K_or_fan_in) ** 0.5, rel=0.1), name  # Kaiming everywhere
    for name in ("fixed", "all_layers", "mnist_style", "standard"):
        model = build_model(name, init="report")
        assert stds(model) == pytest.approx(dict.fromkeys(stds(model), 0.01), rel=0.1)
        assert all(g.z.abs().max() < 0.05 for _, g in named_generators(model))
        biases = [p for n, p in model.named_parameters() if p.dim() == 1 and not n.endswith(".z")]
        assert all(p.count_nonzero() == 0 for p in biases)


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_weights_start_at_hes(name):
    model = build_model(name)
    for n, std in stds(model).items():
        if "generator" not in n:
            assert std == pytest.approx((2 / model.get_parameter(n)[0].numel()) ** 0.5, rel=0.1), n


def test_subsets_and_embedding_sizes():
    model = build_model("standard", generated=["fc1", "conv3"], z_dim={"fc1": 5})
    assert {n: g.z_dim for n, g in named_generators(model)} == {"conv3": 8, "fc1": 5}
    model = build_model("full", generated=["conv1"], z_dim=3)
    assert {n: g.z_dim for n, g in named_generators(model)} == {"conv1": 3}
    assert not list(named_generators(build_model("all_layers", generated=[])))
    for wrong in ({"generated": ["conv4"]}, {"z_dim": {"conv4": 3}}):
        message = "fixed has no layer 'conv4'; its layers are conv1, conv2, conv3, fc1, fc2"
        with pytest.raises(ValueError, match=message):
            build_model("fixed", **wrong)


def test_names_of_parameters(full):
    expected = {f"{n}.generator.{p}" for n in NAMES for p in ("weight", "bias", "z")} | {
        f"{n}.bias" for n in NAMES
    }
    expected |= {f"bn{i}.{p}" for i in range(1, 6) for p in ("weight", "bias")}
    assert {name for name, _ in full.named_parameters()} == expected
    assert {n: tuple(g.shapes[0]) for n, g in named_generators(full)} == SHAPES


@pytest.mark.parametrize("fused", [False, True])
def test_published_state_dicts_load(fused, published):
    model = build_model("full", fused=fused).eval()
    state = dict(published)
    model.load_state_dict(state)
    assert state.keys() == published.keys()  # the caller's dict stays as it is
    x = images()
    expected = logits(published, x)
    assert expected.std() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_published_state_dicts_that_do_not_fit(full, published):
    for change in (
        lambda s: s.pop("z_signal_conv3"),
        lambda s: s.update({"z_signal_conv3": torch.zeros(1, 8)}),
        lambda s: s.update({"hyper_fc3.weight": torch.zeros(10 * 512, 16)}),
        lambda s: s.update({"another": torch.zeros(1)}),
    ):
        state = dict(published)
        change(state)
        with pytest.raises(RuntimeError, match=r"conv3\.generator\.z|fc3\.generator\.weight|another"):
            full.load_state_dict(state)


def test_own_state_dict_still_loads(full):
    twin = build_model("full", fused=True)
    twin.load_state_dict(full.state_dict(), strict=True)
    assert all(torch.equal(p, q) for p, q in zip(full.parameters(), twin.parameters(), strict=True))


def test_plain_state_dict_gives_the_plain_twin(full):
    plain = build_model("standard_deep").eval()
    plain.load_state_dict(plain_state_dict(full), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), full(images()), rtol=1e-5, atol=1e-5)


def test_fused_and_plain_expressions_agree(full):
    fused = build_model("full", fused=True)
    fused.load_state_dict(full.state_dict())
    full.train(), fused.train()
    losses = []
    for model in (full, fused):
        torch.manual_seed(7)
        model.zero_grad()
        loss = F.cross_entropy(model(images(4)), torch.arange(4))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, p in fused.named_parameters():
        expected = full.get_parameter(name).grad
        if name.endswith("generator.weight"):
            layer = name.removesuffix(".generator.weight")
            g = fused.get_submodule(layer).generator
            assert p.grad is None
            got = torch.outer(g.bias.grad[:1000], g.z.detach())
            expected = expected[:1000]
        else:
            got = p.grad
        assert (got - expected).norm() <= 1e-3 * expected.norm() + 1e-5, name
    full.zero_grad()
    full.eval()


def test_backends():
    assert {g.backend for _, g in named_generators(build_model("full"))} == {"reference"}
    fused = build_model("full", fused=True)
    assert {(g.backend, g.factored) for _, g in named_generators(fused)} == {("auto", True)}
    plain = build_model("standard_deep", fused=True)  # nothing to fuse, nothing to fail
    hyperfast.optim.AdamW(plain)


@pytest.mark.parametrize("init", ["report", "hyperfan", "he_bias"])
def test_initialisations(init):
    torch.manual_seed(0)
    model = build_model("full", init=init)
    assert {g.init for _, g in named_generators(model)} == {init}
    with torch.no_grad():
        w = model.conv4.generated_weight()
    expected = {"report": 1e-4 * 4, "hyperfan": (2 / 2304) ** 0.5, "he_bias": (2 / 2304) ** 0.5}[init]
    assert 0.4 * expected < w.std().item() < 2 * expected
    assert model.bn1.weight.eq(1).all() and model.conv1.bias.eq(0).all()


@pytest.mark.parametrize("name", MODELS)
def test_other_numbers_of_classes_and_batches_of_one(name):
    model = build_model(name, num_classes=10)
    assert model.eval()(images(1)).shape == (1, 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        build_model(name, num_classes=0)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown model 'fulll'; choose one of full, enhanced"):
        build_model("fulll")
    with pytest.raises(ValueError, match="init must be one of"):
        build_model("full", init="xavier")
