"""VGG-A on 32 x 32 images: plain, with batch norm, with residual blocks, with GELU; also as hypernetworks.

Simonyan and Zisserman, "Very deep convolutional networks" (ICLR 2015), configuration A with a classifier of
512 units; the residual variants have the blocks of He et al. (CVPR 2016) in its stages. Parameters: 9,750,922
of vgg_a, 9,756,426 with batch norm, 20,514,954 with residual blocks: every convolution has a bias.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import hyperfast
from hyperfast.nn import BatchNormReLUMaxPool2d, Conv2d
from train.models.layers import check_classes

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
FEATURES = 512


@dataclass(frozen=True)
class Variant:
    """dropout: of channels, after each half of a residual block."""

    batch_norm: bool = True
    residual: bool = False
    dropout: float = 0.0
    activation: type[nn.Module] = nn.ReLU


MODELS = {
    "vgg_a": Variant(batch_norm=False),
    "vgg_a_bn": Variant(),
    "vgg_a_residual": Variant(residual=True),
    "vgg_a_residual_dropout": Variant(residual=True, dropout=0.3),
    "vgg_a_gelu": Variant(activation=nn.GELU),
}


# -- layers --------------------------------------------------------------------------------------


class BatchNorm2d(BatchNormReLUMaxPool2d):
    """`nn.BatchNorm2d`, which can also run as one with the ReLU and the max pool of `pool` x `pool` that
    follow it."""

    forward = nn.BatchNorm2d.forward

    def with_relu(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The outputs of the last of the layers; residual: added before the ReLU."""
        return super().forward(x, residual)


def is_watched(*layers: nn.Module) -> bool:
    """Whether hooks want to see what goes into these layers or comes out of them."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in layers
    )


class Features(nn.Sequential):
    """Layers in a row: x [B, 3, H, W] -> [B, 512, H', W'].

    Batch norm, ReLU and max pool that follow each other run as one pass each way, and of a ReLU before a max
    pool the max pool runs first, which is equal. Where hooks look at one of them all run alone, in order.
    """

    def forward(self, x: Tensor) -> Tensor:
        for layers in self._runs():
            x = _run(layers, x)
        return x

    def _runs(self) -> Iterator[list[nn.Module]]:
        layers, begin = list(self), 0
        while begin < len(layers):
            end = begin + 1
            for kind in (nn.ReLU, nn.MaxPool2d):
                joins = isinstance(layers[end - 1], (BatchNorm2d, nn.ReLU)) and end < len(layers)
                end += joins and isinstance(layers[end], kind)
            yield layers[begin:end]
            begin = end


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x after these layers, together if they are a run of `Features`."""
    first, *others = layers
    together = others and not is_watched(*layers)
    if together and isinstance(first, BatchNorm2d):
        return first.with_relu(x)
    if together and isinstance(first, nn.ReLU):
        return first(others[-1](x))
    for layer in layers:
        x = layer(x)
    return x


class Block(nn.Module):
    """x [B, I, H, W] -> [B, O, H, W]: twice conv -> batch norm (-> dropout), a ReLU in between and one after
    the shortcut is added: the identity, or a 1 x 1 convolution with batch norm where channels change."""

    def __init__(self, in_channels: int, channels: int, dropout: float, backend: str):
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels, 3, backend), _batch_norm(channels, 1, backend)
        self.relu1, self.dropout1 = nn.ReLU(), _dropout(dropout)
        self.conv2, self.bn2 = _conv(channels, channels, 3, backend), _batch_norm(channels, 1, backend)
        self.dropout2, self.relu2 = _dropout(dropout), nn.ReLU()
        self.shortcut = nn.Identity()
        if in_channels != channels:
            shortcut = _conv(in_channels, channels, 1, backend), _batch_norm(channels, 1, backend)
            self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.dropout1(_run((self.bn1, self.relu1), self.conv1(x)))
        x = self.conv2(x)
        layers = self.bn2, self.dropout2, self.relu2
        alone = isinstance(self.dropout2, nn.Dropout2d) or is_watched(*layers)
        if isinstance(self.bn2, BatchNorm2d) and not alone:
            return self.bn2.with_relu(x, shortcut)
        return self.relu2(self.dropout2(self.bn2(x)) + shortcut)


def _conv(in_channels: int, channels: int, kernel_size: int, backend: str) -> nn.Conv2d:
    kind = nn.Conv2d if backend == "reference" else Conv2d
    return kind(in_channels, channels, kernel_size, padding=kernel_size // 2)


def _batch_norm(channels: int, pool: int, backend: str) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels) if backend == "reference" else BatchNorm2d(channels, pool)


def _dropout(share: float) -> nn.Module:
    return nn.Dropout2d(share) if share else nn.Identity()


# -- networks ------------------------------------------------------------------------------------


class VGG(nn.Module):
    """images float [B, 3, 32, 32] -> logits [B, num_classes].

    variant: a name in MODELS. backend: "auto" (fused kernels where there are any) or "reference" (plain
    PyTorch). Layers are torchvision's in `features` and `classifier`, so that entries of state dicts have the
    names of its vgg11 and vgg11_bn. Weights start at Xavier's normal, biases at 0, batch norm at 1 and 0.
    Raises ValueError for an unknown variant and fewer than one class.
    """

    def __init__(self, variant: str, num_classes: int = 10, backend: str = "auto"):
        super().__init__()
        check_classes(num_classes)
        if variant not in MODELS:
            raise ValueError(f"unknown model {variant!r}; choose one of {', '.join(MODELS)}")
        own = MODELS[variant]
        make = _residual_layers if own.residual else _plain_layers
        self.features = Features(*make(own, backend))
        hidden: list[nn.Module] = []
        for _ in range(1 if own.residual else 2):
            hidden += nn.Linear(FEATURES, FEATURES), own.activation(), nn.Dropout(0.5)
        self.classifier = nn.Sequential(*hidden, nn.Linear(FEATURES, num_classes))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """images -> [B, 512], the input of the last linear layer."""
        x = self.features(x).mean((2, 3))
        for layer in list(self.classifier)[:-1]:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[-1](self.forward_features(x))


def _plain_layers(variant: Variant, backend: str) -> Iterator[nn.Module]:
    before = 3
    for stage in STAGES:
        for i, channels in enumerate(stage, start=1):
            yield _conv(before, channels, 3, backend)
            if variant.batch_norm:
                yield _batch_norm(channels, 2 if i == len(stage) else 1, backend)
            yield variant.activation()
            before = channels
        yield nn.MaxPool2d(2)


def _residual_layers(variant: Variant, backend: str) -> Iterator[nn.Module]:
    before = STAGES[0][0]
    yield from (_conv(3, before, 3, backend), _batch_norm(before, 1, backend), variant.activation())
    for i, stage in enumerate(STAGES):
        if i:
            yield nn.MaxPool2d(2)
        for channels in stage:
            yield Block(before, channels, variant.dropout, backend)
            before = channels


# -- hypernetworks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyper:
    """How a network becomes a hypernetwork: the defaults of `build_vgg`, and options of the generator.

    units: one generator makes all kernels of 3 x 3 whose channels are multiples of its unit's, the rest stays
    ordinary (Ha et al.'s); otherwise the weights of all convolutions and linear layers are generated.
    """

    z_dim: int
    hidden_dim: int | None
    init: str
    unit: tuple[int, ...] | None = None


HYPERS = {
    "linear": Hyper(4, None, "keep"),
    "two_layer": Hyper(64, 64, "hyperfan", (64, 64, 3, 3)),
    "shared": Hyper(4, 4, "keep"),
}


def build_vgg(
    name: str,
    num_classes: int = 10,
    fused: bool = True,
    hyper: str | None = None,
    z_dim: int | Mapping[str, int] | None = None,
    hidden_dim: int | None = None,
    init: str | None = None,
    targets: Collection[str] | None = None,
) -> nn.Module:
    """The network `name` of `MODELS`: images float [B, 3, 32, 32] -> logits [B, num_classes].

    fused: as in `train.models.build_model`. hyper: a name in HYPERS makes it a `hyperfast.nn.HyperModule`,
    its weights generated; with `init` "keep", the default but for "two_layer", it starts as the plain network
    of the same random numbers. z_dim, hidden_dim, init: of the generators instead of those of HYPERS, init
    "keep" or a name in `hyperfast.nn.init.INITIALISATIONS`. targets: which weights are generated. Raises
    ValueError for unknown names, and for "keep" with "two_layer".
    """
    backend = "auto" if fused else "reference"
    network = VGG(name, num_classes, backend)
    if hyper is None:
        return network
    if hyper not in HYPERS:
        raise ValueError(f"unknown hypernetwork {hyper!r}; choose one of {', '.join(HYPERS)}")
    own, options = HYPERS[hyper], {}
    if own.hidden_dim:
        options["hidden_dim"] = hidden_dim or own.hidden_dim
    if own.unit:
        options["unit"] = own.unit
        targets = targets or _tiled(network, own.unit)
    made = hyperfast.hyperize(
        network, hyper, z_dim or own.z_dim, targets, init or own.init, backend=backend, **options
    )
    return hyperfast.factored_(made) if fused else made


def _tiled(network: nn.Module, unit: tuple[int, ...]) -> list[str]:
    """The convolutions whose kernels units of this shape tile."""
    return [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.kernel_size == unit[2:]
        and m.out_channels % unit[0] == m.in_channels % unit[1] == 0
    ]
