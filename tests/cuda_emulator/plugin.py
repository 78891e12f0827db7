"""`pytest -p tests.cuda_emulator.plugin`: the ops run the CUDA kernels, on the emulator, for tensors on the CPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch

import hyperfast.ops
from hyperfast.ops import _library
from tests.cuda_emulator import build


def pytest_configure(config) -> None:
    emulated, native_engine = build.module(), _library.engine
    for name, module in list(sys.modules.items()):
        if name.startswith(hyperfast.ops.__name__) and hasattr(module, "_cuda"):
            module._cuda = emulated

    def engine(tensor: torch.Tensor, cuda: str = "") -> str:
        served = native_engine(tensor, cuda) == "cpu" or tensor.dtype == torch.float16
        return "cuda" if cuda and hasattr(emulated, cuda) and served else "reference"

    _library.engine = engine
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
