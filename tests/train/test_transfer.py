"""Starting a network from another: every pair of ordinary, linear and two-layer layers."""

import pytest
import safetensors.torch
import torch
from torch import nn

import hyperfast
from hyperfast.nn import named_generators, plain_state_dict
from train import checkpoint
from train.checkpoint import CheckpointError, load_weights
from train.models import build_model
from train.transfer import carry_moments, start_from_

X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
KINDS = {
    "plain": {"name": "standard"},
    "fixed": {"name": "fixed"},
    "all, other K": {"name": "all_layers", "z_dim": 3},
    "some": {"name": "all_layers", "generated": ["conv1", "fc2"]},
    "two-layer": {"name": "mnist_style"},
    "two-layer, other K": {"name": "mnist_style", "z_dim": 2},
}


def outputs(model):
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_outputs_are_those_of_the_source(source, target, fused):
    source_model = build_model(**KINDS[source], init="hyperfan")
    model = build_model(**KINDS[target], fused=fused)
    before = outputs(model)
    if "two" in target and source != target:
        with pytest.raises(
            CheckpointError, match="^x.pt: TwoLayerGenerator cannot start from a given weight"
        ):
            start_from_(model, source_model.state_dict(), "x.pt")
        return
    start_from_(model, source_model.state_dict(), "x.pt")
    expected = outputs(source_model)
    assert expected.std() > 0.05 and not torch.allclose(before, expected)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def test_equal_generators_are_taken_over_and_others_kept():
    source = build_model("all_layers", z_dim={"conv2": 5}, init="hyperfan")
    model = build_model("fixed", generated=["conv1", "conv2"])
    start_from_(model, source.state_dict(), "x.pt")
    ours, theirs = dict(named_generators(model)), dict(named_generators(source))
    assert all(torch.equal(p, getattr(theirs["conv1"], n)) for n, p in ours["conv1"].named_parameters())
    conv2 = ours["conv2"]
    assert conv2.weight.count_nonzero() == 0 and conv2.z.count_nonzero() == 8
    torch.testing.assert_close(conv2.bias.detach(), plain_state_dict(source)["conv2.weight"].flatten())
    torch.testing.assert_close(model.fc1.weight.detach(), plain_state_dict(source)["fc1.weight"])


def test_batch_norm_comes_along():
    source = build_model("standard_deep")
    source.train()(X)  # running statistics other than the initial ones
    model = build_model("enhanced")
    start_from_(model, source.state_dict(), "x.pt")
    torch.testing.assert_close(outputs(model), outputs(source), rtol=1e-4, atol=1e-4)


def test_generators_without_bias():
    source = nn.Sequential(
        hyperfast.nn.HyperLinear(4, 3, generator=hyperfast.nn.LinearGenerator((3, 4), 2, False))
    )
    model = nn.Sequential(nn.Linear(4, 3))
    start_from_(model, source.state_dict(), "x.pt")
    assert torch.equal(model[0].weight, source[0].generated_weight())


@pytest.mark.parametrize("target", ["standard", "all_layers"])
def test_what_does_not_fit(target):
    def refused(change, message, source="fixed", **options):
        state = build_model(source, **options).state_dict()
        change(state)
        model = build_model(target)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            start_from_(model, state, "x.pt")
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    another = "^x.pt: weights of another model: "
    refused(lambda s: s.update(more=torch.zeros(1)), another + "more unexpected")
    refused(lambda s: s.pop("fc1.bias"), another + "fc1.bias missing")
    refused(lambda s: s.pop("fc1.weight"), "^x.pt: weights of another model: fc1.* missing")
    refused(
        lambda s: s.update({"conv9.generator.z": torch.zeros(1)}), another + "conv9.generator.z unexpected"
    )
    refused(lambda s: s.update({"conv2.generator.z": torch.zeros(3)}), "conv2.generator: weights of another")
    refused(lambda s: None, another + "(conv1.weight has shape|.*bn1)", source="standard_deep")
    refused(lambda s: None, "fc2.*has shape", num_classes=10)


# ---- files ----


def test_files_of_every_kind(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    checkpoint.save(tmp_path / "best.pt", {"model": state, "row": {"epoch": 1}, "recipe": {}})
    torch.save(state, tmp_path / "bare.pth")
    for key in ("model_state_dict", "state_dict", "net"):
        torch.save({key: state, "epoch": 3}, tmp_path / f"{key}.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        loaded = load_weights(path)
        assert loaded.keys() == state.keys() and all(torch.equal(t, loaded[n]) for n, t in state.items()), (
            path
        )


def test_files_that_hold_none(tmp_path):
    for i, content in enumerate(({}, [1], {"epoch": 3}, {"state_dict": {"a": 1}}, torch.zeros(3))):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(CheckpointError, match=rf"{i}\.pt: holds no state dict"):
            load_weights(tmp_path / f"{i}.pt")
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            load_weights(tmp_path / name)
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match=r"damaged or not"):
            load_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path)


# ---- optimizers ----


@pytest.mark.parametrize("fused", [False, True])
def test_moments_go_on(fused):
    """One more step after the switch moves the kept weight just as the ordinary one."""

    def optimizer_of(model, fused):
        kind = hyperfast.optim.AdamW if fused else torch.optim.AdamW
        return kind(model if fused else model.parameters(), lr=0.01)

    def step(model, optimizer):
        optimizer.zero_grad()
        model.eval()(X).square().sum().backward()  # no dropout
        optimizer.step()

    plain = build_model("standard").to(memory_format=torch.channels_last)
    optimizer = optimizer_of(plain, False)
    for _ in range(3):
        step(plain, optimizer)
    model = build_model("standard", generated=["conv2", "fc2"], fused=fused)
    start_from_(model, plain.state_dict(), "plain")
    ours = optimizer_of(model, fused)
    carry_moments(plain, optimizer, model, ours)
    state, before = ours.state[model.conv2.generator.bias], optimizer.state[plain.conv2.weight]
    assert float(state["step"]) == 3
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], before[key].flatten())
        assert torch.equal(ours.state[model.fc1.weight][key], optimizer.state[plain.fc1.weight][key])
    assert not ours.state.get(model.conv2.generator.weight)
    before = plain.conv2.weight.detach().clone()
    step(plain, optimizer), step(model, ours)
    moved, own = plain.conv2.weight - before, model.conv2.generator.bias.view_as(before) - before
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(own, moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"], ids=str)
def test_low_precision_states_go_on(state_dtype):
    def step(model, optimizer):
        optimizer.zero_grad()
        model.eval()(X).square().sum().backward()
        optimizer.step()

    before = build_model("fixed", fused=True)
    old = hyperfast.optim.Adam(before, state_dtype=state_dtype)
    step(before, old)
    model = build_model("fixed", fused=True, generated=["conv2", "fc2"])
    start_from_(model, before.state_dict(), "fixed")
    optimizer = hyperfast.optim.Adam(model, state_dtype=state_dtype)
    carry_moments(before, old, model, optimizer)
    for name in ("conv2.generator.weight", "conv2.generator.bias", "conv2.generator.z", "fc1.weight"):
        ours, theirs = (o.state[m.get_parameter(name)] for o, m in ((optimizer, model), (old, before)))
        assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[key]) for key, v in ours.items())
    moments = old.state[before.fc2.weight]["exp_avg"]
    assert torch.equal(optimizer.state[model.fc2.generator.bias]["exp_avg"], moments.flatten())
    step(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
