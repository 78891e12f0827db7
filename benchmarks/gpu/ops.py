"""Every op by its engines and by torch.compile, each checked before it is timed."""

from __future__ import annotations

import torch

from benchmarks.gpu.generators import ENGINES, FULL, time_passes
from benchmarks.gpu.layers import (
    LAYERS,
    PER_SAMPLE,
    ROWS,
    time_batch_norm,
    time_merged,
    time_per_sample,
)
from benchmarks.gpu.record import Context
from benchmarks.gpu.units import time_units


def run(context: Context) -> None:
    device = torch.device("cuda")
    time_passes(context, device, FULL, ENGINES, rounds=30)
    time_batch_norm(context, device, rounds=50)
    time_merged(context, device, LAYERS, ROWS, ENGINES, rounds=30)
    time_units(context, device, ENGINES, rounds=50)
    time_per_sample(context, device, PER_SAMPLE, rounds=20)
