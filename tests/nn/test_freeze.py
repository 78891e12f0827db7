"""Hypernetworks turned into plain networks: equal outputs, nothing of a generator left, exports."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.nn import (
    BatchNormReLUMaxPool2d,
    Conv2d,
    Generator,
    HyperConv2d,
    HyperLinear,
    Linear,
    LinearGenerator,
    generate_layers,
    named_weights,
)
from hyperfast.optim import AdamW


class Net(nn.Module):
    """Plain; a tied weight, an embedding, batch norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(F.relu(self.norm(self.conv(self.embedding(x).mT))).mT)


class Layers(nn.Module):
    """Generated layers, all in one launch, two of them on one generator, and ordinary ones."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.conv = HyperConv2d(3, 8, 3, padding=1, bias=False, z_dim=5, backend=backend)
        self.norm = BatchNormReLUMaxPool2d(8)
        self.plain = Conv2d(8, 8, (3, 1), stride=2)
        self.a = HyperLinear(8, 8, z_dim=3, init="hyperfan")
        self.b = HyperLinear(8, 8, bias=False, generator=self.a.generator)

    def forward(self, x):
        made = generate_layers(self)
        x = self.norm(self.conv(x, made["conv"]))
        x = self.plain(x, made["plain"]) if "plain" in made else self.plain(x)
        return self.b(torch.tanh(self.a(x.mean((2, 3)), made["a"])), made["b"])


TOKENS = torch.arange(14).view(2, 7) % 11
IMAGES = torch.linspace(-1, 1, 2 * 3 * 80).view(2, 3, 10, 8)


def train(model, x, steps=2):
    optimizer = AdamW(hyperfast.factored_(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def assert_plain_copy(plain: nn.Module, model: nn.Module) -> None:
    assert not any(isinstance(m, Generator) for m in plain.modules())
    assert not {t.data_ptr() for t in tensors(plain)} & {t.data_ptr() for t in tensors(model)}
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    assert [m.training for m in plain.modules()] == [False] * len(list(plain.modules()))


@pytest.mark.parametrize("generator", ["linear", "two_layer", "shared", "chunked"])
def test_a_hyper_module_is_its_network_again(generator):
    net = Net()
    targets = ["conv", "embedding"] + (["norm.bias"] if generator != "two_layer" else [])  # needs two sizes
    model = hyperfast.hyperize(net, generator, 3, targets, init="hyperfan")
    train(model, TOKENS)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(TOKENS)
    plain = hyperfast.freeze(model)
    assert type(plain) is Net and plain is not net
    assert torch.equal(plain(TOKENS), expected)
    assert plain.out.weight is plain.embedding.weight
    assert_plain_copy(plain, model)
    assert list(plain.state_dict()) == list(Net().state_dict())
    Net().load_state_dict(plain.state_dict())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(TOKENS), expected) and net.conv.weight is None
    plain.train()(TOKENS).sum().backward()  # ordinary parameters, that train
    again = hyperfast.hyperize(plain.eval(), z_dim=2)
    assert torch.equal(again(TOKENS), plain_outputs := hyperfast.freeze(again)(TOKENS))
    assert plain_outputs.shape == expected.shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_generated_layers_become_ordinary_ones(backend):
    model = train(Layers(backend), IMAGES)
    plain = hyperfast.freeze(model)
    kinds = [type(m) for m in (plain, plain.conv, plain.a, plain.b, plain.plain)]
    assert kinds == [Layers, Conv2d, Linear, Linear, Conv2d]
    assert isinstance(plain.conv, nn.Conv2d) and isinstance(plain.a, nn.Linear)
    assert torch.equal(plain(IMAGES), model(IMAGES))  # the model generates, then multiplies
    assert plain.a.weight is plain.b.weight and plain.b.bias is None and plain.conv.bias is None
    assert_plain_copy(plain, model)
    assert plain.conv.path == ("torch" if backend == "reference" else "auto")
    assert repr(plain.conv) == repr(Conv2d(3, 8, 3, padding=1, bias=False))
    assert list(plain.state_dict()) == list(hyperfast.freeze(plain).state_dict())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_large_channels_take_the_same_path(backend):
    """Where `ops.conv2d` leaves out the padding's zeros, in the frozen layer as well."""
    layer, x = HyperConv2d(256, 256, 3, padding=1, z_dim=2, backend=backend), torch.randn(4, 256, 2, 2)
    assert torch.equal(hyperfast.freeze(layer)(x), layer(x, layer.generated_weight()))


@pytest.mark.parametrize("layer", [HyperLinear(5, 7), HyperConv2d(3, 4, (3, 2), 2, "valid", 2)])
def test_a_layer_alone(layer):
    x = torch.randn(2, 5) if isinstance(layer, HyperLinear) else torch.randn(2, 3, 9, 8)
    plain = hyperfast.freeze(layer)
    assert type(plain) in (Linear, Conv2d) and torch.equal(plain(x), layer(x, layer.generated_weight()))
    assert list(plain.state_dict()) == ["weight", "bias"] and plain.training


def test_parts_of_larger_networks():
    inner = hyperfast.hyperize(nn.Sequential(HyperLinear(4, 5), nn.Tanh(), nn.Linear(5, 4)), z_dim=2)
    head = HyperLinear(4, 3, z_dim=2)
    model = nn.Sequential(inner, head, nn.Tanh(), nn.Linear(3, 4), inner)  # one network twice
    x = torch.randn(2, 4)
    plain = hyperfast.freeze(model)
    assert plain[0] is plain[4] and type(plain[0]) is nn.Sequential and type(plain[0][0]) is Linear
    torch.testing.assert_close(plain(x), model(x))
    assert_plain_copy(plain.eval(), model)
    model = hyperfast.hyperize(nn.ModuleDict({"a": inner, "b": nn.Linear(4, 4)}), z_dim=3)
    assert [name for name, *_ in named_weights(model)] == ["b", "a.2", "a.0"]
    assert type(hyperfast.freeze(model)["a"][0]) is Linear
    plain = nn.Linear(2, 2)
    assert type(hyperfast.freeze(plain)) is nn.Linear and hyperfast.freeze(plain) is not plain


def test_nested_hyper_modules():
    inner = hyperfast.hyperize(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), targets=["0"])
    model = hyperfast.hyperize(nn.Sequential(inner, HyperLinear(6, 3)), targets=["0.module.1", "1.bias"])
    assert [name for name, *_ in named_weights(model)] == ["0.1", "1.bias", "0.0", "1"]
    x = torch.randn(2, 4)
    plain = hyperfast.freeze(model)
    assert repr(plain[0]) == repr(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)))
    weight = model.module[1].generated_weight()
    with model.generated() as module:
        assert torch.equal(plain(x), module[1](module[0](x), weight))
    assert_plain_copy(plain.eval(), model)
    assert list(hyperfast.nn.plain_state_dict(model)) == [
        f"{n}.{p}" for n in ("0.0", "0.1", "1") for p in ("weight", "bias")
    ]


def test_at_another_embedding():
    model = nn.Sequential(HyperLinear(4, 5, z_dim=3), nn.Tanh(), HyperLinear(5, 2, z_dim=3))
    z, x = torch.randn(3), torch.randn(2, 4)
    plain = hyperfast.freeze(model, z={"2": z})
    assert torch.equal(plain[2].weight, model[2].generator(z)[0])
    assert torch.equal(plain[0].weight, model[0].generated_weight())
    assert plain(x).shape == (2, 2)
    net = hyperfast.hyperize(nn.Linear(4, 5), "shared", 3)
    net.generators["all"].reset_parameters()
    z = torch.randn(1, 3)
    assert torch.equal(hyperfast.freeze(net, z={"": z}).weight, net.generators["all"](z)[0])
    with pytest.raises(ValueError, match="z has no generator 'fc'; there are 0, 2"):
        hyperfast.freeze(model, z={"fc": z})
    for shape in ([2], [4, 3]):
        with pytest.raises(ValueError, match=rf"z of '0' must be \[3\], got shape {re.escape(str(shape))}"):
            hyperfast.freeze(model, z={"0": torch.randn(shape)})


def test_within_inference_mode():
    model, x = nn.Sequential(HyperLinear(4, 5, z_dim=3), nn.BatchNorm1d(5)), torch.randn(3, 4)
    with torch.inference_mode():
        plain = hyperfast.freeze(model)
    plain(x).square().sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in plain.parameters())


def test_what_cannot_be_frozen():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = LinearGenerator((3, 4))
            self.layer = HyperLinear(4, 4)

        def forward(self, x):
            return F.linear(self.layer(x), self.made()[0])

    with pytest.raises(ValueError, match="generator 'made' makes weights of no layer"):
        hyperfast.freeze(Own())


def test_modes_hooks_and_types_stay():
    model = nn.Sequential(HyperLinear(4, 4, dtype=torch.bfloat16), nn.BatchNorm1d(4))
    seen = []
    model[0].register_forward_hook(lambda layer, x, y: seen.append(type(layer)))
    model[1].eval()
    plain = hyperfast.freeze(model)
    assert [m.training for m in plain] == [True, False] and plain[0].weight.dtype == torch.bfloat16
    plain[0](torch.randn(2, 4, dtype=torch.bfloat16))
    assert seen == [Linear]


def test_a_frozen_network_under_autocast():
    model = train(Layers(), IMAGES)
    plain = hyperfast.freeze(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(IMAGES), model(IMAGES))


# -- exports -----------------------------------------------------------------------------------------


def models():
    """(name, model, inputs): what freezes in either way."""
    hyper = hyperfast.hyperize(Net(), "shared", 3, ["conv", "embedding"])
    return [("hyper module", train(hyper, TOKENS), TOKENS), ("layers", train(Layers(), IMAGES), IMAGES)]


@pytest.mark.parametrize("kind", [0, 1])
def test_safetensors(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, model, x = models()[kind]
    plain = hyperfast.freeze(model)
    file = tmp_path / "plain.safetensors"
    safetensors.save_model(plain, str(file))
    again = hyperfast.freeze(type(model)()) if kind else Net()
    safetensors.load_model(again, str(file))
    assert torch.equal(again.eval()(x), model(x))
    safetensors.save_file(hyperfast.nn.plain_state_dict(model), str(file))
    again.load_state_dict(safetensors.load_file(str(file)))
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", [0, 1])
def test_torch_export(kind, tmp_path):
    _, model, x = models()[kind]
    file = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(hyperfast.freeze(model), (x,)), file)
    program = torch.export.load(file)
    assert not any("hyperfast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("kind", [0, 1])
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, model, x = models()[kind]
    file = str(tmp_path / "plain.onnx")
    torch.onnx.export(hyperfast.freeze(model), (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
