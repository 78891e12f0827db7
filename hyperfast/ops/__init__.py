"""The ops: library registration, autograd and the public functions with their checks, one file each."""

from hyperfast.ops.adamw_generate import adamw_generate
from hyperfast.ops.generate import generate
from hyperfast.ops.generate_backward import generate_backward
from hyperfast.ops.sgd_generate import sgd_generate
from hyperfast.reference import AdamWCoefficients, SGDCoefficients

__all__ = [
    "AdamWCoefficients",
    "SGDCoefficients",
    "adamw_generate",
    "generate",
    "generate_backward",
    "sgd_generate",
]
