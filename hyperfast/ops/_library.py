"""The torch.library namespace `hyperfast`, the native modules, and the one place that chooses a backend.

`import torch` comes first: the kernels share its OpenMP runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    from hyperfast import _cpu
except ImportError:  # `python -m hyperfast.info` must still work and say why
    _cpu = None
try:
    from hyperfast import _cuda
except ImportError:
    _cuda = None

library = torch.library.Library("hyperfast", "DEF")

BACKENDS = ("auto", "reference")
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MAX_K = 512  # of the kernels


def check_backend(backend: str) -> str:
    """Returns `backend`; ValueError unless it is "auto" (kernels where there are any) or "reference" (plain
    PyTorch)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def native_dtype(tensor: Tensor) -> str | None:
    """The dtype for the kernels of this tensor's device, None where there are none and the reference runs
    instead: another dtype, float16 on the CPU, no CUDA module. ImportError without CPU kernels."""
    on_cpu = tensor.device.type == "cpu"
    if on_cpu and _cpu is None:
        from hyperfast.info import why_missing  # not at the top: `python -m hyperfast.info` runs that module

        raise ImportError(why_missing("cpu"))
    dtype = _DTYPES.get(tensor.dtype)
    return None if (dtype == "float16" if on_cpu else _cuda is None) else dtype


def kernel_dtype(weights: Sequence[Tensor]) -> str | None:
    """`native_dtype` for the kernels over generators [N, K]; None also where K is over 512 or 0."""
    dtype = native_dtype(weights[0])
    return dtype if all(1 <= weight.shape[1] <= MAX_K for weight in weights) else None


def no_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager:
    """Inside an op its dtypes hold: autocast must not change those of the reference expressions it runs."""
    device = tensors[0].device.type if tensors else "cpu"
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def check_generators(weights: Sequence[Tensor], **vectors: tuple[Sequence[Tensor | None], str]) -> None:
    """Checks generators before native code sees them: weight [N, K] floating point, of one dtype and device.

    vectors: name -> (one tensor for each layer, its shape "N", "K" or "NK"; "N?" admits None). Raises
    ValueError or TypeError naming the argument, what it is and what it should be.
    """
    for name, (tensors, _) in vectors.items():
        if len(tensors) != len(weights):
            raise ValueError(f"{len(weights)} weights but {len(tensors)} of {name}")
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight {i} must be a tensor, got {type(weight).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"weight {i} must be [N, K], got shape {list(weight.shape)}")
        if not weight.dtype.is_floating_point:
            raise TypeError(f"weight {i} must be floating point, got {weight.dtype}")
        sizes = dict(zip("NK", weight.shape, strict=True))
        for name, (tensors, letters) in vectors.items():
            if tensors[i] is None and letters.endswith("?"):
                continue
            if not isinstance(tensors[i], Tensor):
                raise TypeError(f"{name} {i} must be a tensor, got {type(tensors[i]).__name__}")
            check_like(f"{name} {i}", tensors[i], weight, [sizes[letter] for letter in letters.rstrip("?")])
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        kinds = sorted({f"{weight.dtype} on {weight.device}" for weight in weights})
        raise TypeError(f"all weights must have one dtype and device, got {', '.join(kinds)}")


def check_like(name: str, tensor: Tensor, weight: Tensor, shape: Sequence[int]) -> None:
    """ValueError or TypeError unless `tensor` has `shape` and the dtype and device of `weight`."""
    if list(tensor.shape) != list(shape):
        of = f"for a weight of shape {list(weight.shape)}"
        raise ValueError(f"{name} must be {list(shape)} {of}, got {list(tensor.shape)}")
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must be {weight.dtype} like its weight, got {tensor.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like its weight, got {tensor.device}")
