"""Training on several processes, GPUs or machines at the communication cost of the generated network.

Every rank runs the same program (`torchrun`). Between ranks travels dw, N numbers for a generator of N K.
"""

from hyperfast.distributed.data_parallel import data_parallel
from hyperfast.distributed.sharding import gather_weights, shard_, unshard_

__all__ = [
    "data_parallel",
    "gather_weights",
    "shard_",
    "unshard_",
]
