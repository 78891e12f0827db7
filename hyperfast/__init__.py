"""hyperfast: fused kernels for hypernetworks, networks that generate the weights of other networks."""

from hyperfast import analysis, nn, ops, optim, reference
from hyperfast.nn.generator import factored_, invalidate
from hyperfast.nn.hyperize import hyperize
from hyperfast.nn.weights import freeze
from hyperfast.optim import param_groups

__version__ = "0.1.0"
__all__ = [
    "analysis",
    "factored_",
    "freeze",
    "hyperize",
    "invalidate",
    "nn",
    "ops",
    "optim",
    "param_groups",
    "reference",
]
