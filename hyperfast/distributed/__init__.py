"""Training on several processes, GPUs or machines at the communication cost of the generated network.

Every rank runs the same program (`torchrun`). Between ranks travels dw, N numbers for a generator of N K.
"""

from hyperfast.distributed.checkpoint import load, save
from hyperfast.distributed.data_parallel import data_parallel
from hyperfast.distributed.rows import ShardedRows, whole
from hyperfast.distributed.sharding import gather_weights, shard_, unshard_

__all__ = [
    "ShardedRows",
    "data_parallel",
    "gather_weights",
    "load",
    "save",
    "shard_",
    "unshard_",
    "whole",
]
