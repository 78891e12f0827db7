"""HyperLinear and HyperConv2d against torch's layers with the generated weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.nn import (
    HyperConv2d,
    HyperLinear,
    LinearGenerator,
    generate_layers,
    named_generators,
    parameter_counts,
    plain_state_dict,
)

CONVOLUTIONS = {
    "plain": ((3, 5, 3), {}),
    "stride": ((3, 5, 3), {"stride": 2, "padding": 1}),
    "pairs": ((3, 5, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "same": ((3, 5, 4), {"padding": "same"}),
    "same, dilated": ((3, 5, (3, 5)), {"padding": "same", "dilation": 2}),
    "valid": ((3, 5, 3), {"padding": "valid"}),
    "groups": ((4, 6, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((4, 8, 3), {"groups": 4, "padding": 1, "stride": 2}),
    "no bias": ((3, 5, 1), {"bias": False}),
    "everything": ((6, 9, (2, 3)), {"stride": (2, 3), "padding": 2, "dilation": 2, "groups": 3}),
}


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, factored):
    arguments, options = CONVOLUTIONS[case]
    ours = HyperConv2d(*arguments, **options, z_dim=7, dtype=torch.float64)
    if ours.bias is not None:
        nn.init.normal_(ours.bias)
    hyperfast.factored_(ours, factored)
    theirs = nn.Conv2d(*arguments, **options, dtype=torch.float64)
    theirs.load_state_dict(plain_state_dict(ours))
    x = torch.randn(2, arguments[0], 11, 9, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, arguments[0], 11, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(y[0]), theirs(y[0]))  # without a batch
    (got,) = torch.autograd.grad((ours(x) ** 2).sum(), x)
    (wanted,) = torch.autograd.grad((theirs(x) ** 2).sum(), x)
    torch.testing.assert_close(got, wanted)
    (ours(y) ** 2).sum().backward()
    (theirs(y) ** 2).sum().backward()
    dw, g = theirs.weight.grad.reshape(-1), ours.generator
    torch.testing.assert_close(g.bias.grad, dw)
    torch.testing.assert_close(g.z.grad, g.weight.detach().t() @ dw)
    if factored:
        assert g.weight.grad is None
    else:
        torch.testing.assert_close(g.weight.grad, torch.outer(dw, g.z.detach()))
    if ours.bias is not None:
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
def test_linear(shape, bias):
    ours = HyperLinear(4, 5, bias, z_dim=3)
    theirs = nn.Linear(4, 5, bias)
    theirs.load_state_dict(plain_state_dict(ours))
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_weight_made_elsewhere():
    layer, x = HyperLinear(4, 5), torch.randn(2, 4)
    weight = torch.randn(5, 4)
    assert torch.equal(layer(x, weight), F.linear(x, weight, layer.bias))
    conv, x = HyperConv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    assert torch.equal(conv(x, conv.generated_weight()), conv(x))


def test_dtype_and_device_arguments():
    layer = HyperConv2d(2, 3, 3, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(1, 2, 5, 5).bfloat16()).dtype == torch.bfloat16
    assert {p.device.type for p in HyperLinear(2, 3, device="meta").parameters()} == {"meta"}


class Net(nn.Module):
    """Two layers that share a generator, one on a generator without bias, and an ordinary one."""

    def __init__(self):
        super().__init__()
        self.conv = HyperConv2d(2, 4, 3, padding=1, generator=LinearGenerator((4, 2, 3, 3), 5, bias=False))
        self.norm = nn.BatchNorm2d(4)
        shared = LinearGenerator((4, 4), 3)
        self.a = HyperLinear(4, 4, generator=shared)
        self.b = HyperLinear(4, 4, bias=False, generator=shared)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.out(self.b(torch.relu(self.a(x))))


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    forward = Net.forward


@pytest.mark.parametrize("factored", [False, True])
def test_plain_state_dict_of_a_net(factored):
    net, plain, x = hyperfast.factored_(Net(), factored), PlainNet(), torch.randn(6, 2, 5, 5)
    net(x)  # running statistics other than the initial ones
    state = plain_state_dict(net)
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain.eval()(x), net.eval()(x))
    own = {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
    assert not own & {t.data_ptr() for t in state.values()}
    assert not any(t.requires_grad for t in state.values()) and all(t.is_contiguous() for t in state.values())


def test_plain_state_dict_under_autocast_keeps_the_dtype():
    layer = HyperLinear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        state = plain_state_dict(layer)
    assert torch.equal(state["weight"], plain_state_dict(layer)["weight"])


def test_generate_layers_makes_each_once():
    net = Net()
    made = generate_layers(net)
    assert list(made) == ["conv", "a", "b"]
    assert made["a"] is made["b"] and made["a"].shape == (4, 4) and made["conv"].shape == (4, 2, 3, 3)
    for name in made:
        assert torch.equal(made[name], net.get_submodule(name).generated_weight())
    assert generate_layers(nn.Linear(2, 2)) == {}


def test_names_and_counts():
    net = Net()
    assert [name for name, _ in named_generators(net)] == ["conv", "a"]
    assert parameter_counts(net) == {
        "total": sum(p.numel() for p in net.parameters()),
        "generator": 72 * 5 + 16 * 3 + 16,
        "embedding": 5 + 3,
        "generated": 72 + 16,
        "other": 4 + 8 + 4 + 15,
    }
    before = parameter_counts(net)
    hyperfast.factored_(net)  # stand-ins are not parameters of the model
    assert parameter_counts(net) == before


@pytest.mark.parametrize("shared_with", ["a copy", "itself"])
def test_gradients_of_a_shared_generator_add_up(shared_with, plain_twin):
    net = nn.Sequential(HyperLinear(4, 4, dtype=torch.float64))
    net.append(nn.Tanh())
    net.append(
        net[0]
        if shared_with == "itself"
        else HyperLinear(4, 4, generator=net[0].generator, dtype=torch.float64)
    )
    twin, x = plain_twin(net), torch.randn(3, 4, dtype=torch.float64)
    for factored in (False, True):
        hyperfast.factored_(net, factored)
        net.zero_grad(), twin.zero_grad()
        net(x).square().sum().backward(), twin(x).square().sum().backward()
        ours, theirs = net[0].generator, twin[0].generator
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
        torch.testing.assert_close(ours.z.grad, theirs.z.grad)
        dense = torch.outer(ours.bias.grad, ours.z.detach()) if factored else ours.weight.grad
        torch.testing.assert_close(dense, theirs.weight.grad)


def test_deepcopy_is_independent():
    net, x = Net().eval(), torch.randn(2, 2, 5, 5)
    twin = copy.deepcopy(net)
    assert twin.a.generator is twin.b.generator and twin.a.generator is not net.a.generator
    before = net(x)
    with torch.no_grad():
        twin.a.generator.weight.add_(1)
    assert torch.equal(net(x), before) and not torch.equal(twin(x), before)


BAD = {
    "groups": (
        lambda: HyperConv2d(3, 4, 3, groups=2),
        ValueError,
        "divisible by groups: in 3, out 4, groups 2",
    ),
    "groups 0": (lambda: HyperConv2d(3, 4, 3, groups=0), ValueError, "groups 0"),
    "no channels": (lambda: HyperConv2d(0, 4, 3), ValueError, "at least 1"),
    "negative": (lambda: HyperLinear(-2, 4), ValueError, "at least 1"),
    "no kernel": (lambda: HyperConv2d(3, 4, 0), ValueError, "at least 1"),
    "z_dim": (lambda: HyperLinear(3, 4, z_dim=0), ValueError, "z_dim 0"),
    "z_dim of no integer": (lambda: HyperLinear(3, 4, z_dim=2.5), TypeError, "integer"),
    "z_dim of two": (lambda: HyperLinear(3, 4, z_dim=torch.ones(2)), TypeError, "integer"),
    "x of no tensor": (lambda: HyperConv2d(3, 4, 3)([1.0]), TypeError, "list"),
    "backend": (lambda: HyperLinear(3, 4, backend="gpu"), ValueError, "backend must be one of"),
    "padding": (lambda: HyperConv2d(3, 4, 3, padding="sam"), ValueError, "padding"),
    "same, stride": (lambda: HyperConv2d(3, 4, 3, padding="same", stride=2), ValueError, "padding"),
    "kernel of 3": (lambda: HyperConv2d(3, 4, (3, 3, 3)), ValueError, "kernel_size"),
    "generator": (
        lambda: HyperLinear(3, 4, generator=LinearGenerator((3, 4))),
        ValueError,
        r"generator of one weight \(4, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_shapes_on_the_meta_device():
    layer = HyperConv2d(2, 3, 3, device="meta")
    assert layer(torch.empty(1, 2, 5, 5, device="meta")).shape == (1, 3, 3, 3)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_ordinary_convolution(padding_mode):
    ours = hyperfast.nn.Conv2d(256, 256, 3, padding=1, padding_mode=padding_mode)
    theirs = nn.Conv2d(256, 256, 3, padding=1, padding_mode=padding_mode)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 256, 2, 2)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert (type(y.grad_fn).__name__ == "Conv2dBackward") == (padding_mode == "zeros")
