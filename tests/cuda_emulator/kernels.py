"""The fixture through which the tests of csrc/cuda run everywhere: on the emulator, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hyperfast.info import why_missing
from tests.cuda_emulator import build

SCHEDULES = (0, 1, 2, 3)  # of the emulator: see emulator.h


@dataclass(frozen=True)
class Kernels:
    """module: `hyperfast._cuda`, or the same on the emulator, for tensors on `device`."""

    module: ModuleType
    device: torch.device

    @property
    def emulated(self) -> bool:
        return self.device.type == "cpu"

    def schedules(self) -> tuple[int, ...]:
        """What to repeat a launch for: on a GPU once."""
        return SCHEDULES if self.emulated else SCHEDULES[:1]

    def set_schedule(self, number: int) -> None:
        if self.emulated:
            ctypes.CDLL(self.module.__file__).emulator_set_schedule(number)

    def stream(self) -> int:
        return 0 if self.emulated else torch.cuda.current_stream().cuda_stream

    def randn(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Contiguous, beginning `offset` elements into its memory."""
        numbers = torch.randn(offset + torch.Size(shape).numel()).to(self.device, dtype)
        return numbers[offset:].view(shape)

    def poison(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=self.device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


gpu = pytest.param(
    "gpu",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


@pytest.fixture(params=["emulator", gpu])
def cuda_kernels(request) -> Kernels:
    if request.param == "gpu":
        module = pytest.importorskip("hyperfast._cuda", reason=why_missing("cuda"))
        return Kernels(module, torch.device("cuda"))
    return Kernels(build.module(), torch.device("cpu"))
