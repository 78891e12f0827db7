"""Generators, layers with generated weights, and their initialisation."""

from hyperfast.nn import init
from hyperfast.nn.batch_norm import BatchNormReLUMaxPool2d
from hyperfast.nn.chunked import ChunkedGenerator
from hyperfast.nn.generator import Generator, LinearGenerator, generate_together, generated_l2_
from hyperfast.nn.hyperize import HyperModule
from hyperfast.nn.layers import (
    Conv2d,
    HyperConv2d,
    HyperLayer,
    HyperLinear,
    Linear,
    generate_layers,
    hyper_layers,
)
from hyperfast.nn.lstm import LSTM, HyperLSTM, HyperLSTMCell, LSTMCell
from hyperfast.nn.per_sample import PerSampleWeight
from hyperfast.nn.shared_core import SharedCoreGenerator
from hyperfast.nn.two_layer import TwoLayerGenerator
from hyperfast.nn.weights import named_generators, named_weights, parameter_counts, plain_state_dict
from hyperfast.ops.generate import penalize_l2
from hyperfast.reference import LSTMState

__all__ = [
    "LSTM",
    "BatchNormReLUMaxPool2d",
    "ChunkedGenerator",
    "Conv2d",
    "Generator",
    "HyperConv2d",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperLayer",
    "HyperLinear",
    "HyperModule",
    "LSTMCell",
    "LSTMState",
    "Linear",
    "LinearGenerator",
    "PerSampleWeight",
    "SharedCoreGenerator",
    "TwoLayerGenerator",
    "generate_layers",
    "generate_together",
    "generated_l2_",
    "hyper_layers",
    "init",
    "named_generators",
    "named_weights",
    "parameter_counts",
    "penalize_l2",
    "plain_state_dict",
]
