"""Training on several processes, GPUs or machines at the communication cost of the generated network.

Every rank runs the same program (`torchrun`). Between ranks travels dw, N numbers for a generator of N K.
"""

from hyperfast.distributed.checkpoint import load, save
from hyperfast.distributed.rows import ShardedRows, whole

__all__ = [
    "ShardedRows",
    "load",
    "save",
    "whole",
]
