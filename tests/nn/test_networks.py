"""Networks people use, as hypernetworks: start, train, freeze, with every generator."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.nn import named_weights
from hyperfast.optim import AdamW

NAMED = ["linear", "two_layer", "shared", "chunked"]


class UNet(nn.Module):
    """An encoder and a decoder with strided, grouped, depthwise and transposed convolutions and skips, in 1,
    2 or 3 dimensions: x [B, 3, 8, ...] -> [B, 2, 8, ...]."""

    def __init__(self, dimensions: int, width: int = 8):
        super().__init__()
        conv = getattr(nn, f"Conv{dimensions}d")
        up = getattr(nn, f"ConvTranspose{dimensions}d")
        norm = getattr(nn, f"BatchNorm{dimensions}d")
        self.stem = nn.Sequential(conv(3, width, 3, padding=1), norm(width), nn.ReLU())
        self.down1 = conv(width, 2 * width, 3, stride=2, padding=1)
        self.depthwise = conv(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.pointwise = nn.Sequential(conv(2 * width, 2 * width, 1, bias=False), norm(2 * width), nn.ReLU())
        self.down2 = conv(2 * width, 4 * width, 3, stride=2, padding=1, groups=4)
        self.up2 = up(4 * width, 2 * width, 2, stride=2)
        self.up1 = up(4 * width, width, 4, stride=2, padding=1, groups=2)
        self.head = conv(2 * width, 2, 3, padding=1)

    def forward(self, x):
        first = self.stem(x)
        second = self.pointwise(self.depthwise(F.relu(self.down1(first))))
        x = F.relu(self.up2(F.relu(self.down2(second))))
        x = F.relu(self.up1(torch.cat([x, second], 1)))
        return self.head(torch.cat([x, first], 1))


def vision(name: str, **options) -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return getattr(models, name)(num_classes=10, **options)


def small_vit() -> nn.Module:
    kind = pytest.importorskip("torchvision").models.VisionTransformer
    return kind(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)


NETWORKS = {
    "unet": (lambda: UNet(2), (2, 3, 8, 8)),
    "unet, 3d": (lambda: UNet(3, 4), (2, 3, 8, 8, 8)),
    "small vit": (small_vit, (2, 3, 16, 16)),
    "resnet18": (lambda: vision("resnet18"), (2, 3, 32, 32)),
    "mobilenet": (lambda: vision("mobilenet_v3_small"), (2, 3, 32, 32)),
    "vit_b_16": (lambda: vision("vit_b_16", image_size=32), (2, 3, 32, 32)),
}
HEAVY = {"resnet18", "mobilenet", "vit_b_16"}


def marked(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in names]


@pytest.mark.parametrize("generator", NAMED)
@pytest.mark.parametrize("name", marked(NETWORKS))
def test_start_train_freeze(name, generator):
    make, size = NETWORKS[name]
    net, x = make(), torch.randn(size)
    kept = generator in ("linear", "shared")
    expected, keys, twin = copy.deepcopy(net).eval()(x), list(net.state_dict()), copy.deepcopy(net)
    options = {"hidden_dim": 4} if generator == "shared" else {}
    model = hyperfast.hyperize(net, generator, 2, init="keep" if kept else "hyperfan", **options)
    assert not kept or torch.equal(model.eval()(x), expected)
    weights = {name: w.detach().clone() for name, w in model.generate().items()}
    optimizer = AdamW(hyperfast.factored_(model.train()), lr=1e-3, max_grad_norm=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()  # torchvision's ViT starts with zeros in its head
        optimizer.step()
    made = model.eval().generate()
    assert [name for name, w in made.items() if torch.equal(w, weights[name])] == []
    with torch.no_grad():
        plain = hyperfast.freeze(model)
        assert type(plain) is type(twin) and list(plain.state_dict()) == keys
        assert torch.equal(plain(x), model(x))
    twin.load_state_dict(hyperfast.nn.plain_state_dict(model))
    assert torch.equal(twin.eval()(x), model(x))


def fan_in(layer: nn.Module, weight: torch.Tensor) -> float:
    """Inputs that one output of a layer is a sum of, on average over its outputs."""
    if not hasattr(layer, "stride"):
        return weight[0].numel()
    taps = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return taps / math.prod(layer.stride) if layer.transposed else taps


@pytest.mark.parametrize("generator", NAMED)
@pytest.mark.parametrize("name", marked(["unet", "unet, 3d", "resnet18", "mobilenet"]))
def test_fresh_weights_start_at_hes_scale(name, generator):
    """Of every single layer: strided, grouped, depthwise, transposed, and those of other sizes beside it."""
    net = NETWORKS[name][0]()
    layers = dict(net.named_modules())
    for init in ("hyperfan", "he_bias"):
        model = hyperfast.hyperize(copy.deepcopy(net), generator, 4, init=init)
        made = model.generate()
        assert len(made) == len(list(named_weights(model))) > 7
        for parameter, w in made.items():
            he = math.sqrt(2 / fan_in(layers[parameter.removesuffix(".weight")], w))
            assert 0.7 < w.square().mean().sqrt() / he < 1.3, (parameter, init)


@pytest.mark.parametrize("transposed", [False, True])
def test_he_scale_keeps_the_variance_of_what_a_layer_is_given(transposed):
    """What the fans are for: after the ReLU the second moment is that of the input."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = hyperfast.hyperize(kind(64, 64, 4, stride=2, groups=2, bias=False), init="hyperfan")
    x = torch.randn(4, 64, 16, 16)
    y = F.relu(model(x))[:, :, 2:-2, 2:-2]
    assert 0.7 < y.square().mean() / x.square().mean() < 1.3
