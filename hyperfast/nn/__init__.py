"""Generators, layers with generated weights, and their initialisation."""

from hyperfast.nn import init
from hyperfast.nn.batch_norm import BatchNormReLUMaxPool2d
from hyperfast.nn.generator import (
    Generator,
    LinearGenerator,
    TwoLayerGenerator,
    generate_together,
    generated_l2_,
)
from hyperfast.nn.hyperize import hyperize
from hyperfast.nn.layers import (
    Conv2d,
    HyperConv2d,
    HyperLayer,
    HyperLinear,
    generate_layers,
    hyper_layers,
    named_generators,
    parameter_counts,
    plain_state_dict,
)

__all__ = [
    "BatchNormReLUMaxPool2d",
    "Conv2d",
    "Generator",
    "HyperConv2d",
    "HyperLayer",
    "HyperLinear",
    "LinearGenerator",
    "TwoLayerGenerator",
    "generate_layers",
    "generate_together",
    "generated_l2_",
    "hyper_layers",
    "hyperize",
    "init",
    "named_generators",
    "parameter_counts",
    "plain_state_dict",
]
