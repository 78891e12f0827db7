"""Networks turned into hypernetworks, and keep_, on which starting from a trained one rests."""

import copy
import math
import pickle
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import hyperfast
from hyperfast.nn import (
    ChunkedGenerator,
    Generator,
    HyperConv2d,
    HyperLinear,
    HyperModule,
    LinearGenerator,
    TwoLayerGenerator,
    named_weights,
)
from hyperfast.nn.hyperize import _Places
from hyperfast.ops._library import _cpu
from hyperfast.optim import AdamW


class Net(nn.Module):
    """Convolutions of several kinds, batch norm, attention and a tied weight; `encode` is no forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.checkpointed = False

    def encode(self, x):
        x = self.up(F.relu(self.norm(self.conv(x)))).flatten(2).mT
        return self.attention(x, x, x, need_weights=False)[0].mean(1)

    def forward(self, x, scale=1.0):
        if self.checkpointed:
            x = checkpoint(self.encode, x, use_reentrant=False)
        else:
            x = self.encode(x)
        return self.second(torch.tanh(self.first(x))) * scale


WEIGHTS = [
    "conv.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "first.weight",
]
NAMED = ["linear", "two_layer", "shared", "chunked"]
X = torch.linspace(-1, 1, 2 * 3 * 12, dtype=torch.float64).reshape(2, 3, 3, 4)


def hyper(generator="linear", z_dim=3, factored=True, **options) -> HyperModule:
    options = {"init": "keep" if generator in ("linear", "shared") else "hyperfan"} | options
    return hyperfast.factored_(hyperfast.hyperize(Net().double(), generator, z_dim, **options), factored)


def grow_z_(model: nn.Module) -> nn.Module:
    """Embeddings large enough to matter."""
    with torch.no_grad():
        for _, g, _ in named_weights(model):
            g.z.normal_(std=0.3)
            for p in g.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model


def encode_without_attention(net: Net, x):
    return net.up(F.relu(net.norm(net.conv(x)))).mean((2, 3))


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-9) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance, msg=name)


# -- starting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("generator", ["linear", "shared"])
def test_outputs_and_names_stay(generator, backend):
    net = Net().double()
    expected, before = net(X, scale=2.0), dict(net.named_parameters())
    model = hyperfast.hyperize(net, generator, 3, backend=backend)
    assert torch.equal(model(X, scale=2.0), expected)
    assert model.module is net and [n for n, _ in named_weights_of(model)] == WEIGHTS
    assert set(dict(net.named_parameters())) == set(before) - {*WEIGHTS, "second.weight"}
    assert all(p is before[name] for name, p in net.named_parameters())
    made = model.generate()
    assert made["second.weight"] is made["first.weight"] and set(made) == {*WEIGHTS, "second.weight"}
    assert all(torch.equal(w, before[name]) for name, w in made.items() if name != "second.weight")
    assert {g.backend for _, g, _ in named_weights(model)} == {backend}


def named_weights_of(model):
    """(full name, weight)."""
    return [
        (names[0], w)
        for g, own in zip(model.generators.values(), model.targets, strict=True)
        for names, w in zip(own, g(), strict=True)
    ]


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), dilation=2, padding="same"), (2, 3, 6, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2), (1, 2, 3, 3, 3)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 3), (5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layer(kind):
    layer, size = LAYERS[kind]
    layer, x = copy.deepcopy(layer), torch.randn(size)
    expected = layer(x)
    expected.square().sum().backward()
    dw = layer.weight.grad
    model = hyperfast.hyperize(layer, z_dim=2)
    assert torch.equal(model(x), expected) and list(model.generators) == ["weight"]
    model(x).square().sum().backward()
    assert torch.equal(model.generators["weight"].bias.grad.view_as(dw), dw)
    frozen = hyperfast.freeze(model)
    assert type(frozen) is type(layer) and torch.equal(frozen(x), expected)


ANY = {
    "bias": (nn.Linear(4, 3), ["bias"], (2, 4)),
    "batch norm": (nn.BatchNorm1d(4), ["weight", "bias"], (3, 4)),
    "embedding": (nn.Embedding(5, 4), [""], None),
    "attention": (nn.MultiheadAttention(4, 2, kdim=4, vdim=4), ["in_proj_bias", "out_proj"], (3, 2, 4)),
    "attention, other sizes": (nn.MultiheadAttention(4, 2, kdim=3, vdim=4), None, (3, 2, 4)),
    "cell": (nn.LSTMCell(4, 3), ["weight_ih", "weight_hh", "bias_ih"], (2, 4)),
    "recurrent": (nn.LSTM(4, 3, num_layers=2), ["weight_ih_l0", "weight_hh_l1"], (5, 2, 4)),
    "bilinear": (nn.Bilinear(4, 4, 3), ["weight"], (2, 4)),
    "transformer": (
        nn.TransformerEncoderLayer(4, 2, 8, 0.0),
        ["self_attn.in_proj_weight", "linear1"],
        (3, 2, 4),
    ),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", ANY)
def test_any_parameter(kind, mode):
    module, targets, size = ANY[kind]
    module = copy.deepcopy(module).train(mode)
    x = torch.arange(4) if size is None else torch.randn(size)
    inputs = {"bilinear": (x, x), "attention": (x, x, x)}.get(kind, (x,))
    if kind == "attention, other sizes":
        inputs = (x, x[..., :3], x)

    def output(model):
        out = model(*inputs)
        return out[0] if isinstance(out, tuple) else out

    expected = output(copy.deepcopy(module))
    model = hyperfast.hyperize(module, z_dim=2, targets=targets)
    assert torch.equal(output(model), expected)
    output(model).square().sum().backward()
    assert any(g.bias.grad.count_nonzero() for g in model.generators.values())
    model = pickle.loads(pickle.dumps(copy.deepcopy(model.double().float())))
    with torch.no_grad():
        assert torch.allclose(output(model), expected, atol=1e-6)
    assert type(hyperfast.freeze(model)) is type(module)


def test_targets_and_sizes():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 2))
    twice = ["2", "0.bias", "2.weight", "0.bias"]
    model = hyperfast.hyperize(net, z_dim={"2": 7, "0.bias": 2}, targets=twice)
    assert [(name, g.z_dim) for name, g, _ in named_weights(model)] == [("2", 7), ("0.bias", 2)]
    assert isinstance(net[0].weight, nn.Parameter) and net[0].bias is None


class Perceptron(Generator):
    """A user's own generator, which has layers of its own."""

    per_layer = True

    def __init__(self, shape, z_dim=3, **_):
        super().__init__()
        self.shapes = (torch.Size(shape),)
        self.z = nn.Parameter(torch.randn(z_dim))
        self.layers = nn.Sequential(nn.Linear(z_dim, 5), nn.Tanh(), nn.Linear(5, math.prod(shape)))

    def forward(self, z=None):
        return (self.layers(self._check_z(z)).view(self.shapes[0]),)

    def embeddings(self):
        return (self.z.view(1, -1),)


def test_layers_of_generators_are_no_targets():
    net = nn.Sequential(HyperLinear(4, 3, generator=Perceptron((3, 4))), nn.Linear(3, 2), nn.Linear(2, 2))
    model = hyperfast.hyperize(net, Perceptron, targets=["1"], init="hyperfan")
    model = hyperfast.hyperize(model)
    assert [name for name, _ in named_weights_of(model)] == ["1.weight", "2.weight"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(hyperfast.freeze(model)(x), model(x))
    with pytest.raises(ValueError, match="'0.generator.layers.0.weight' belongs to a generator"):
        hyperfast.hyperize(model, targets=["0.generator.layers.0"])


def test_a_hyper_module_gets_more_generators():
    net = Net().double()
    expected = net(X)
    model = hyperfast.hyperize(net, "shared", 2, ["first"])
    model = hyperfast.hyperize(model, "shared", 3, ["conv"])
    model = hyperfast.hyperize(model, z_dim=5)
    assert list(model.generators)[:2] == ["all", "all2"] and model.module is net
    sizes = {name: g.z_dim for name, g, _ in named_weights(model)}
    assert sizes == {"first": 2, "conv": 3, "up": 5, "attention.in_proj_weight": 5, "attention.out_proj": 5}
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="no layer to generate"):
        hyperfast.hyperize(model)


def test_one_two_layer_generator_of_units():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    model = hyperfast.hyperize(net, "two_layer", 5, init="hyperfan", unit=(4, 4, 3, 3), hidden_dim=6)
    assert list(model.generators) == ["all"] and model.generators["all"].z.shape == (2 + 4, 5)
    assert model(torch.randn(1, 4, 6, 6)).shape == (1, 8, 2, 2)


def test_modes_stay():
    net = Net()
    net.norm.eval()
    model = hyperfast.hyperize(net)
    assert model.training and net.training and not net.norm.training
    model = hyperfast.hyperize(Net().eval())
    assert not any(m.training for m in model.modules())


def test_on_meta_and_in_bfloat16():
    for generator in NAMED:
        init = {"init": "hyperfan"}
        model = hyperfast.hyperize(Net().to("meta"), generator, 3, **init)
        assert {p.device.type for p in model.parameters()} == {"meta"}
    model = hyperfast.hyperize(nn.Linear(4, 3, dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    mixed = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4))
    dtypes = [g.z.dtype for _, g, _ in named_weights(hyperfast.hyperize(mixed))]
    assert dtypes == [torch.float64, torch.float32]


# -- refusing ----------------------------------------------------------------------------------------


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


def pruned():
    net = nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def two_dtypes():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())


def two_devices():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))


def integers():
    net = nn.Sequential(nn.Linear(3, 3))
    net.register_parameter("table", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    return net


def scalar():
    net = nn.Sequential(nn.Linear(3, 3))
    net.register_parameter("scale", nn.Parameter(torch.zeros(())))
    return net


BAD = {
    "no such layer": (
        Net,
        {"targets": ["conv", "fc"]},
        ValueError,
        "no layer or parameter named 'fc'; there are conv.weight",
    ),
    "a layer without weight": (
        Net,
        {"targets": ["attention"]},
        ValueError,
        "no layer or parameter named 'attention'",
    ),
    "a buffer": (
        Net,
        {"targets": ["norm.running_mean"]},
        ValueError,
        "no layer or parameter named 'norm.running_mean'",
    ),
    "one string": (
        Net,
        {"targets": "conv"},
        TypeError,
        "targets must be a list of names, got the string 'conv'",
    ),
    "no targets": (Net, {"targets": []}, ValueError, "no layer to generate"),
    "nothing to generate": (nn.ReLU, {}, ValueError, "no layer to generate"),
    "no bias": (Net, {"targets": ["up.bias"]}, ValueError, "'up.bias' is generated already, or None"),
    "sizes": (Net, {"z_dim": {"conv": 2}}, ValueError, "z_dim has no size for 'up.weight', it names conv"),
    "size of no target": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        {"z_dim": {"0": 2, "typo": 4}},
        ValueError,
        "z_dim of 'typo': no such target",
    ),
    "init beside a generator": (
        Net,
        {"generator": LinearGenerator((6, 6)), "targets": ["first"], "init": "xavier"},
        ValueError,
        "init must be one of report",
    ),
    "size 0": (Net, {"z_dim": 0}, ValueError, "conv.weight: shape and z_dim must be at least 1"),
    "several sizes": (
        Net,
        {"z_dim": {"conv": 2}, "generator": "shared"},
        TypeError,
        "z_dim must be one number",
    ),
    "generator": (
        Net,
        {"generator": "quadratic"},
        ValueError,
        "generator must be one of linear, two_layer, shared, chunked",
    ),
    "class": (Net, {"generator": nn.Linear}, ValueError, "a class of generators or a generator, got"),
    "init": (Net, {"init": "xavier"}, ValueError, "conv.weight: init must be one of report"),
    "keep, two_layer": (
        Net,
        {"generator": "two_layer"},
        ValueError,
        'init="keep" needs "linear" or "shared"; init="hyperfan"',
    ),
    "keep, chunked": (
        Net,
        {"generator": ChunkedGenerator},
        ValueError,
        "ChunkedGenerator cannot start from a given weight: init",
    ),
    "keep, no bias": (
        Net,
        {"bias": False},
        ValueError,
        "without bias cannot start from a given weight: init",
    ),
    "two-layer bias": (
        Net,
        {"generator": "two_layer", "targets": ["norm"], "init": "report"},
        ValueError,
        r"norm.weight: unit must be \(out, in",
    ),
    "option": (Net, {"hidden_dim": 3}, TypeError, "hidden_dim"),
    "parametrised": (weight_normed, {}, ValueError, "'0.weight' is computed from other parameters"),
    "pruned": (pruned, {"targets": ["0"]}, ValueError, "'0' is computed from other parameters"),
    "lazy": (lazy, {}, ValueError, "0.weight has no shape yet: run the network once"),
    "dtypes": (
        two_dtypes,
        {"generator": "shared"},
        ValueError,
        "of one dtype on one device, here torch.float32 on cpu; 1.weight is torch.float64",
    ),
    "devices": (
        two_devices,
        {"generator": "chunked", "init": "report"},
        ValueError,
        "1.weight is torch.float32 on meta",
    ),
    "integers": (
        integers,
        {"targets": ["table"]},
        TypeError,
        "table must be dense and one of float32.*got torch.int8",
    ),
    "a number": (scalar, {"targets": ["scale"]}, ValueError, "scale: shape and z_dim must be at least 1"),
    "a generator": (
        lambda: nn.Sequential(HyperLinear(3, 3)),
        {"targets": ["0.generator.bias"]},
        ValueError,
        "'0.generator.bias' belongs to a generator",
    ),
    "too few": (
        Net,
        {"generator": LinearGenerator((6, 6)), "targets": ["first", "conv"]},
        ValueError,
        "generator makes 1 weights, there are 2 targets",
    ),
    "other shapes": (
        Net,
        {"generator": LinearGenerator((6, 5)), "targets": ["first"]},
        ValueError,
        r"generator makes \(6, 5\) for first.weight, which is \(6, 6\)",
    ),
    "other dtype": (
        Net,
        {"generator": LinearGenerator((6, 6)).double(), "targets": ["first"]},
        ValueError,
        "here torch.float64 on cpu",
    ),
    "made already": (
        Net,
        {"generator": LinearGenerator((6, 6)), "targets": ["first"], "hidden_dim": 2},
        TypeError,
        "takes no hidden_dim",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_leave_the_module_as_it_was(case):
    make, options, error, message = BAD[case]
    module = make()
    before = {name: (id(p), p._version) for name, p in module.named_parameters(remove_duplicate=False)}
    with pytest.raises(error, match=message):
        hyperfast.hyperize(module, **options)
    after = {name: (id(p), p._version) for name, p in module.named_parameters(remove_duplicate=False)}
    assert after == before


# -- running -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", NAMED)
def test_gradients_of_every_parameter(generator):
    model = grow_z_(hyper(generator, factored=False))
    y = model(X)
    y.square().sum().backward()
    got = gradients(model)
    assert all(g is not None and g.count_nonzero() for n, g in got.items() if "in_proj_bias" not in n)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for n, p in model.named_parameters():
                p.add_(direction[n], alpha=step)
            values.append(model(X).square().sum())
    slope = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(
        slope, sum((got[n] * d).sum() for n, d in direction.items()), rtol=1e-5, atol=0
    )


def test_factored_steps_equal_dense_training(plain_twin, assert_equal_parameters):
    model = grow_z_(hyper())
    twin = plain_twin(model)
    ours = AdamW(model, lr=1e-2, weight_decay=0.05, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.05)
    for step in range(5):
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            each(X + 0.1 * step).square().sum().backward()
        assert all(g.weight.grad is None for g in model.generators.values())
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        ours.step(), theirs.step()
    assert_equal_parameters(model, twin, 1e-9)  # batch norm's buffers too
    assert model.module.norm.num_batches_tracked == 5


def test_a_step_makes_the_weights_of_the_next_forward(monkeypatch, plain_twin):
    """In factored mode generation runs in the first forward alone."""
    model = grow_z_(hyper())
    twin, launches = plain_twin(model), []
    native = _cpu.generate
    monkeypatch.setattr(_cpu, "generate", lambda *a: (launches.append(len(a[0])), native(*a)))
    optimizer = AdamW(model, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        assert launches == [len(WEIGHTS)], step  # all of them, in one launch
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(X), twin.eval()(X))
    assert launches == [len(WEIGHTS)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("generator", [*NAMED[::2], *(pytest.param(g, marks=SLOW) for g in NAMED[1::2])])
def test_compiled_as_a_whole(generator):
    torch._dynamo.reset()
    model = grow_z_(hyper(generator, targets=["conv", "up", "first"]))
    model.module.attention = nn.Identity()  # compiles in a second, not in ten
    model.module.encode = types.MethodType(encode_without_attention, model.module)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(2):
        got, expected = compiled(X + step), twin(X + step)
        torch.testing.assert_close(got, expected)
        got.square().sum().backward(), expected.square().sum().backward()
    assert_same(gradients(model), gradients(twin))
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), twin(X))
    assert model.module.norm.num_batches_tracked == 3
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    """[B, 6] -> [B, 6], so that it can be applied to its own output."""

    def __init__(self, use_reentrant: bool | None):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def layers(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x):
        if self.use_reentrant is None:
            return self.layers(x)
        return checkpoint(self.layers, x, use_reentrant=self.use_reentrant)


COMBINED = {
    "one after the other": lambda h, x, z1, z2: h(h(x, z=z1), z=z2),
    "side by side": lambda h, x, z1, z2: h(x, z=z1) + 2 * h(2 * x, z=z2),
    "checkpoint around": lambda h, x, z1, z2: (
        h(checkpoint(lambda x: h(x, z=z1), x, use_reentrant=False), z=z2) + h(x, z=z1)
    ),
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("combined", COMBINED)
@pytest.mark.parametrize("generator", NAMED)
def test_checkpoints_inside(generator, combined, per_sample):
    """Every forward is run again with the weights it had."""

    def grads(use_reentrant):
        torch.manual_seed(0)
        model = hyperfast.hyperize(Checkpointed(use_reentrant).double(), generator, 3, init="hyperfan")
        batch = (2,) if per_sample else ()
        zs = [
            {
                name: torch.randn(*batch, *g.z.shape, dtype=torch.float64, requires_grad=True)
                for name, g in model.generators.items()
            }
            for _ in range(2)
        ]
        x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        COMBINED[combined](model, x, *zs).square().sum().backward()
        assert model.module.first.weight is None
        inputs = {"x": x} | {f"{i}/{name}": z for i, own in enumerate(zs) for name, z in own.items()}
        return {name: t.grad for name, t in inputs.items()} | gradients(model)

    assert_same(grads(False), grads(None))


@pytest.mark.parametrize("generator", NAMED)
def test_checkpoints_inside_with_its_own_embeddings(generator):
    model = grow_z_(hyper(generator))
    model(X).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.module.checkpointed = True
    (model(X) + model(X)).square().sum().mul(0.25).backward()
    assert_same(gradients(model), expected)
    assert model.module.conv.weight is None


def fail(_):
    raise RuntimeError("stop")


def test_a_backward_that_fails_leaves_the_model_usable():
    model = hyper()
    expected, names = model.eval()(X), [name for name, _ in model.named_parameters()]
    handle = model.module.up.register_forward_hook(lambda *a: a[2].register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="stop"):
        model(X).sum().backward()
    handle.remove()
    assert [name for name, _ in model.named_parameters()] == names
    AdamW(model)
    assert not set(model.state_dict()) & {f"module.{name}" for name in WEIGHTS}
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(model(X), expected) and model.module.conv.weight is None


@pytest.mark.parametrize("use", ["freeze", "load", "save", "copy", "forward"])
def test_weights_that_a_failed_backward_has_not_let_go_of(use):
    """Another thread of the engine may hold it for a moment."""
    model = hyper().eval()
    expected, state = model(X), copy.deepcopy(model.state_dict())
    weights = model.generate()
    _Places(model.module, weights).put(weights.values())
    model._backward = 1 << 40
    if use == "freeze":
        assert torch.equal(hyperfast.freeze(model)(X), expected)
    elif use == "load":
        model.load_state_dict(state)
    elif use == "save":
        assert list(model.state_dict()) == list(state)
    else:
        assert torch.equal((copy.deepcopy(model) if use == "copy" else model)(X), expected)
    model._end_backward(1 << 40)
    assert model.module.conv.weight is None and torch.equal(model(X), expected)


def test_weights_go_with_the_graph(monkeypatch):
    model, made = grow_z_(hyper()), []
    generate = HyperModule.generate

    def watched(self, z=None):
        weights = generate(self, z)
        made.append([weakref.ref(w) for w in weights.values()])
        return weights

    monkeypatch.setattr(HyperModule, "generate", watched)

    def alive(weights):
        return sum(w() is not None for w in weights)

    model.module.checkpointed = True
    out = model(X)
    loss = out.square().sum()
    first = torch.autograd.grad(loss, model.generators["conv/weight"].z, retain_graph=True)
    assert alive(made[0]) == len(WEIGHTS) + 1  # for another backward
    assert torch.equal(*first, *torch.autograd.grad(loss, model.generators["conv/weight"].z))
    assert alive(made[0]) == 0 and out.grad_fn is not None
    with torch.no_grad():
        model(X)
    assert alive(made[1]) == 0


def test_an_exception_inside_forward_leaves_the_model_usable():
    model = hyper().eval()
    expected = model(X)
    with pytest.raises(RuntimeError, match="channels"):
        model(X[:, :2])
    assert model.module.conv.weight is None and torch.equal(model(X), expected)


def test_other_methods_than_forward():
    net = Net().double().eval()
    expected = net.encode(X)
    model = hyperfast.hyperize(net)
    with model.generated() as module:
        got = module.encode(X)
        assert torch.equal(got, expected)
        assert torch.equal(model(X), module(X))  # forward inside of it
        got.sum().backward()
    assert model.generators["conv/weight"].bias.grad.count_nonzero()
    assert net.conv.weight is None


def test_several_forwards_in_one_graph(plain_twin):
    model = grow_z_(hyper().eval())
    (model(X) * model(2 * X)).sum().backward()
    got = gradients(model)
    twin = plain_twin(model)
    (twin(X) * twin(2 * X)).sum().backward()
    dense = {n: g for n, g in gradients(twin).items() if not n.endswith("weight") or "generators" not in n}
    assert_same({n: got[n] for n in dense}, dense)


def test_without_gradients():
    model = hyper().eval()
    expected = model(X)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(X), expected)
    assert torch.equal(model(X), expected)


def test_an_inner_layer_is_replaced():
    """Nobody keeps the old one."""
    model = hyper().eval()
    model(X)
    old, model.module.first = model.module.first, copy.deepcopy(model.module.first)
    expected = model(X)
    with torch.no_grad():
        old.bias.add_(1)
    assert torch.equal(model(X), expected)
    model.module.first.bias = None
    assert not torch.equal(model(X), expected)


def test_hooks_of_inner_layers():
    model, seen = hyper(), []
    model.module.first.register_forward_hook(lambda layer, x, y: seen.append((layer.weight.shape, y.shape)))
    model.module.first.register_full_backward_hook(lambda *a: seen.append("backward"))
    model(X).sum().backward()
    assert seen == [((6, 6), (2, 6)), "backward"]


def test_autocast():
    model = grow_z_(hyper().float()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X.float())
        frozen = hyperfast.freeze(model)
        assert torch.equal(frozen(X.float()), out)
    assert out.dtype == torch.bfloat16 and {p.dtype for p in frozen.parameters()} == {torch.float32}
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_functional_call_and_vmap():
    model = hyperfast.factored_(grow_z_(hyper()), False).eval()
    names = [n for n, _ in model.named_parameters()]
    others = {n: p.detach() + 0.01 for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.copy_(others[n])
    torch.testing.assert_close(torch.func.functional_call(model, others, (X,)), twin(X))

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    own = dict(model.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))({n: own[n].detach() for n in names}, X)
    model(X).square().sum().backward()
    assert_same({n: g.sum(0) for n, g in per_sample.items()}, gradients(model))


@pytest.mark.parametrize("generator", NAMED)
def test_state_dicts_copies_and_pickles(generator):
    model = grow_z_(hyper(generator).eval())
    model(X).sum().backward()  # nothing of a graph is copied
    expected = model(X)
    again = hyper(generator).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), expected)
    twin = copy.deepcopy(model)
    assert twin.module.conv is not model.module.conv
    for each in (twin, pickle.loads(pickle.dumps(model)), copy.deepcopy(model).float().double()):
        torch.testing.assert_close(each(X), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        twin.module.first.bias.add_(1), twin.module.conv.bias.add_(1)
    assert torch.equal(model(X), expected)


def test_shows_module_and_generators():
    shown = repr(hyper())
    for line in ("5 generated weights", "(conv): Conv2d(3, 4", "(conv/weight): LinearGenerator((4, 3, 3, 3)"):
        assert line in shown


def test_everything_trains_after_a_kept_start():
    model = hyper()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, lr=0.01)
    for _ in range(2):  # dz = weight^T dw is 0 in the first
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- keep_ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 7, 16, 600])
def test_keep_is_exact(dtype, K):
    for layer in (HyperConv2d(3, 5, 3, z_dim=K, dtype=dtype), HyperLinear(7, 11, z_dim=K, dtype=dtype)):
        weight = torch.randn(layer.generator.shapes[0], dtype=dtype)
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.generator.keep_(weight)
        assert torch.equal(layer.generated_weight(), weight)


def test_keep_drops_next_weights():
    layer = hyperfast.factored_(HyperLinear(4, 3, z_dim=2))
    optimizer = AdamW(layer, lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    weight = torch.randn(3, 4)
    layer.generator.keep_(weight)
    assert torch.equal(layer.generated_weight(), weight)


def test_keep_refuses():
    with pytest.raises(ValueError, match="without bias"):
        LinearGenerator((3, 4), bias=False).keep_(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"weight must be \[3, 4\], got shape \[4, 3\]"):
        LinearGenerator((3, 4)).keep_(torch.randn(4, 3))
    with pytest.raises(ValueError, match="TwoLayerGenerator cannot start"):
        TwoLayerGenerator((3, 4)).keep_(torch.randn(3, 4))


def test_fans_are_those_of_the_layer():
    """A fresh start takes groups, strides and transposition into account, which a shape does not show."""
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 4, stride=2), nn.MultiheadAttention(8, 2)
    )
    model = hyperfast.hyperize(layers, init="hyperfan")
    fans = {name: g.fan for name, g, _ in named_weights(model)}
    assert fans == {"0": 2 * 9, "1": 8 * 16 // 4, "2.in_proj_weight": 8, "2.out_proj": 8}
    model = hyperfast.hyperize(nn.Conv2d(8, 16, 3, stride=2, groups=2), init="hyperfan_out")
    assert model.generators["weight"].fan == math.ceil(8 * 9 / 4)
