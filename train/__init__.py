"""Training commands: data, augmentation, models, loop, checkpoints and reports."""

import os

# torch's CPU allocator then asks for pages of 2 MiB for large tensors: fewer misses in the page tables, 5 to
# 10 % of a step of `full`. torch reads it at its first allocation, so it stands before any import of torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
