"""The torch.library namespace `hyperfast`, the CPU module, and the one place that chooses a backend.

`import torch` comes first: the kernels share its OpenMP runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from hyperfast import _cpu
except ImportError as error:
    raise ImportError(
        f"hyperfast's CPU kernels are not built ({error}); run `pip install -e .` in the project's root, "
        "`python -m hyperfast.info` says what was built"
    ) from error

library = torch.library.Library("hyperfast", "DEF")

BACKENDS = ("auto", "reference")
_CPU_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def check_backend(backend: str) -> str:
    """Returns `backend`; ValueError unless it is "auto" (kernels where there are any) or "reference" (plain
    PyTorch)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def cpu_dtype(weights: Sequence[Tensor]) -> str | None:
    """The dtype for the CPU kernels, None where they do not serve these generators (float16, K over 512, K =
    0)."""
    dtype = _CPU_DTYPES.get(weights[0].dtype)
    if all(weight.dtype == weights[0].dtype and 1 <= weight.shape[1] <= _cpu.MAX_K for weight in weights):
        return dtype
    return None


def check_generators(weights: Sequence[Tensor], **vectors: tuple[Sequence[Tensor | None], str]) -> None:
    """Checks generators before native code sees them: weight [N, K] floating point, and every named vector
    [N] or [K].

    vectors: name -> (one tensor or None for each layer, "N" or "K"). Raises ValueError or TypeError naming
    the argument, what it is and what it should be.
    """
    for i, weight in enumerate(weights):
        if weight.dim() != 2:
            raise ValueError(f"weight {i} must be [N, K], got shape {list(weight.shape)}")
        if not weight.dtype.is_floating_point:
            raise TypeError(f"weight {i} must be floating point, got {weight.dtype}")
        size = dict(zip("NK", weight.shape, strict=True))
        for name, (tensors, letter) in vectors.items():
            if len(tensors) != len(weights):
                raise ValueError(f"{len(weights)} weights but {len(tensors)} of {name}")
            tensor = tensors[i]
            if tensor is None:
                continue
            if tensor.shape != (size[letter],):
                raise ValueError(
                    f"{name} {i} must be [{letter}] = [{size[letter]}] for a weight of shape "
                    f"{list(weight.shape)}, got {list(tensor.shape)}"
                )
            if tensor.dtype != weight.dtype:
                raise TypeError(f"{name} {i} must be {weight.dtype} like its weight, got {tensor.dtype}")
            if tensor.device != weight.device:
                raise ValueError(
                    f"{name} {i} must be on {weight.device} like its weight, got {tensor.device}"
                )
