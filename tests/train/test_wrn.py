"""Wide residual networks and their hypernetworks, against the public version's arithmetic."""

import copy

import pytest
import torch
from torch import nn

import hyperfast
from benchmarks.plain import PlainHyperWideResNet
from hyperfast.nn import init
from train import checkpoint
from train.models.wrn import MODELS, build_wrn, model_of, rename_published_

# by hand: stem 448 + 32, batch norms, shortcuts, final; kernels, or generator 9,360 + 66,560 and 64 per unit
COUNTS = {
    "wrn_40_1": 480 + 2688 + 544 + 2112 + 650 + 557_568,
    "hyper_wrn_40_1": 97_882,
    "wrn_40_2": 480 + 5376 + 544 + 2112 + 8320 + 1290 + 2_225_664,
    "hyper_wrn_40_2": 480 + 5376 + 544 + 2112 + 8320 + 1290 + 75_920 + 64 * 966,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_embeddings(name):
    model = build_wrn(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert model_of(model.state_dict()) == name
    if MODELS[name].hyper:
        generator = model.generators["all"]
        assert len(generator.z) == {1: 242, 2: 966}[MODELS[name].width] and len(generator.shapes) == 36
        assert [len(z) for z in generator.embeddings()] == [s[0] * s[1] // 256 for s in generator.shapes]


def published(width=1, seed=0, **options):
    """A published checkpoint's state, statistics of a trained network included, and its network."""
    torch.manual_seed(seed)
    theirs = PlainHyperWideResNet(width, **options)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return theirs.state_dict(), theirs


def same(got, wanted):
    """In float64; a bias before a batch norm has gradient 0, to rounding."""
    return torch.allclose(got, wanted, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_published_checkpoints_give_their_outputs(width, fused, assert_accurate):
    state, theirs = published(width)
    ours = build_wrn(f"hyper_wrn_40_{width}", fused=fused)
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    theirs.eval(), ours.eval()
    wanted = theirs.double()(x.double()).detach()
    got = ours(x.contiguous(memory_format=torch.channels_last)).detach()
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5  # of 40 layers
    for got, (i, (inputs, outputs)) in zip(
        ours.generate().values(),
        ((2 * i + j, (pair[j], pair[1])) for i, pair in enumerate(theirs.blocks) for j in range(2)),
        strict=True,
    ):
        assert_accurate(got, theirs.kernel(i, inputs, outputs), torch.float32)


def test_old_checkpoints(tmp_path):
    """{'net', 'acc'}, without num_batches_tracked, as torch of the time saved them."""
    state, theirs = published()
    torch.save(
        {"net": {k: v for k, v in state.items() if "num_batches" not in k}, "acc": 91.0}, tmp_path / "x"
    )
    loaded = checkpoint.load_weights(tmp_path / "x")
    rename_published_(loaded)
    model = build_wrn("hyper_wrn_40_1")
    checkpoint.load_model(model, loaded, "x")
    assert torch.equal(model.generators["all"].z[-1], theirs.zs[35]["z_list"][15])
    again = dict(loaded)
    rename_published_(again)  # names of our own stay
    assert list(again) == list(loaded)


def test_checkpoints_of_data_parallel(tmp_path):
    """Every name has `module.` before it."""
    state, _ = published()
    torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "x")
    loaded = checkpoint.load_weights(tmp_path / "x")
    rename_published_(loaded)
    rename_published_(state)
    assert list(loaded) == list(state) and all(torch.equal(v, state[k]) for k, v in loaded.items())
    checkpoint.load_model(build_wrn("hyper_wrn_40_1"), loaded, "x")


def test_gradients_are_those_of_the_loop():
    """A training step of 4 images, batch statistics and all 242 embeddings, in float64."""
    state, theirs = published()
    theirs.double().train()
    ours = build_wrn("hyper_wrn_40_1").double().train()
    ours.load_state_dict(state)
    x, y = torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    for model in (theirs, ours):
        nn.functional.cross_entropy(model(x), y).backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    rename_published_(wanted)
    for name, p in ours.named_parameters():
        assert same(p.grad, wanted[name]), name


@pytest.mark.parametrize("name", ["wrn_40_1", "hyper_wrn_40_1"])
def test_starts_at_he_scale(name):
    torch.manual_seed(0)
    model = build_wrn(name)
    kernels = model.generate() if MODELS[name].hyper else model.kernels()
    for w in kernels.values():
        assert 0.7 < float(w.detach().std() / (2 / w[0].numel()) ** 0.5) < 1.3
    logits = model(torch.randn(8, 3, 32, 32))
    assert logits.isfinite().all() and 0.1 < logits.std() < 20


def test_plain_twin_is_the_generated_network():
    """The plain network with the generated kernels computes the same."""
    torch.manual_seed(0)
    hyper, plain = build_wrn("hyper_wrn_40_1").eval(), build_wrn("wrn_40_1").eval()
    state = {n.removeprefix("module."): t for n, t in hyper.state_dict().items() if n.startswith("module.")}
    plain.load_state_dict(state | hyper.generate())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(hyper(x), plain(x))


def test_fused_and_plain_pytorch_train_alike():
    """The same loss and gradients with fused kernels and without."""
    torch.manual_seed(0)
    a = build_wrn("hyper_wrn_40_1", fused=True).double()
    b = build_wrn("hyper_wrn_40_1", fused=False).double()
    b.load_state_dict(a.state_dict())
    x, y = torch.randn(3, 3, 32, 32).double(), torch.arange(3)
    for model in (a, b):
        nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same(p.grad, q.grad), name
    for (name, s), t in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.allclose(s, t), name


def test_copies_and_bad_names():
    model = build_wrn("hyper_wrn_40_1")
    other = copy.deepcopy(model)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))
    with pytest.raises(ValueError, match="unknown model 'resnet'; choose one of hyper_wrn_40_1, "):
        build_wrn("resnet")
    with pytest.raises(ValueError, match="init must be one of"):
        build_wrn("hyper_wrn_40_1", init="zero")
    assert init.check("hyperfan") and isinstance(model, hyperfast.nn.HyperModule)
    assert model_of({"final.weight": torch.zeros(10, 5)}) is None and model_of({}) is None
