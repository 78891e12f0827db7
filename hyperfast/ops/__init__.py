"""The ops: library registration, autograd and the public functions with their checks, one file each."""

from hyperfast.ops.adamw_generate import adamw_generate
from hyperfast.ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from hyperfast.ops.conv2d import conv2d
from hyperfast.ops.generate import generate
from hyperfast.ops.generate_backward import generate_backward
from hyperfast.ops.generate_units import generate_units
from hyperfast.ops.hyper_layers import hyper_conv2d, hyper_linear
from hyperfast.ops.lstm import lstm
from hyperfast.ops.sgd_generate import sgd_generate
from hyperfast.reference import AdamWCoefficients, SGDCoefficients

__all__ = [
    "AdamWCoefficients",
    "SGDCoefficients",
    "adamw_generate",
    "batch_norm_relu_max_pool",
    "conv2d",
    "generate",
    "generate_backward",
    "generate_units",
    "hyper_conv2d",
    "hyper_linear",
    "lstm",
    "sgd_generate",
]
