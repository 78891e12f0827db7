"""The ops: library registration, autograd and the public functions with their checks, one file each."""

from hyperfast.ops.adamw_generate import adamw_generate
from hyperfast.ops.generate import generate
from hyperfast.ops.generate_backward import generate_backward
from hyperfast.ops.hyper_layers import hyper_conv2d, hyper_linear
from hyperfast.reference import AdamWCoefficients

__all__ = [
    "AdamWCoefficients",
    "adamw_generate",
    "generate",
    "generate_backward",
    "hyper_conv2d",
    "hyper_linear",
]
