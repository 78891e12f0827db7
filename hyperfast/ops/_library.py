"""The torch.library namespace `hyperfast`, the native modules, and the one place that chooses a backend.

`import torch` comes first: the kernels share its OpenMP runtime.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

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
ENGINES = ("auto", "cpu", "triton", "cuda", "reference")
_WANTED = os.environ.get("HYPERFAST_ENGINE", "auto")
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MAX_K = 512  # of the kernels
MAX_ROWS = 2**30  # of a layer, pixels included: the Triton kernels count them in 32 bits


def check_backend(backend: str) -> str:
    """Returns `backend`; ValueError unless it is "auto" (kernels where there are any) or "reference" (plain
    PyTorch)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def engine(tensor: Tensor, cuda: str = "") -> str:
    """Which kernels serve `tensor`, by its device and dtype: "cpu" (C++), "triton", "cuda" (CUDA C++) or
    "reference", plain PyTorch, where there are none.

    cuda: name of the op's function in `hyperfast._cuda`, if it has one. On a GPU Triton comes first. The
    environment variable HYPERFAST_ENGINE asks for one engine; with TRITON_INTERPRET=1 "triton" serves tensors
    on the CPU too. ImportError without CPU kernels, ValueError for an unknown HYPERFAST_ENGINE.
    """
    if _WANTED not in ENGINES:
        raise ValueError(f"HYPERFAST_ENGINE must be one of {', '.join(ENGINES)}, got {_WANTED!r}")
    device = tensor.device.type
    if tensor.dtype not in _DTYPES or device not in ("cpu", "cuda") or _WANTED == "reference":
        return "reference"
    if device == "cuda":
        possible = [name for name, there in (("triton", _TRITON), ("cuda", hasattr(_cuda, cuda))) if there]
        return next((name for name in possible if _WANTED in ("auto", name)), "reference")
    if _WANTED == "triton" and _INTERPRETED:
        return "triton"
    if _cpu is None:
        from hyperfast.info import why_missing  # not at the top: `python -m hyperfast.info` runs that module

        raise ImportError(why_missing("cpu"))
    return "reference" if tensor.dtype == torch.float16 else "cpu"


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Within it HYPERFAST_ENGINE is `name`, so that one process can compare engines."""
    global _WANTED
    before, _WANTED = _WANTED, name
    try:
        yield
    finally:
        _WANTED = before


def to_device(numbers: float | Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `numbers`, copied to `device` without waiting for it."""
    pinned = device.type == "cuda" and torch.cuda.is_initialized()
    host = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned)
    return host.to(device, non_blocking=True)


def triton_kernels(op: str) -> ModuleType:
    """The module of `hyperfast.kernels` for `op`; imported when first needed, since triton takes a second."""
    return importlib.import_module(f"hyperfast.kernels.{op}")


def dtype_name(tensor: Tensor) -> str:
    """The dtype as the native modules name it."""
    return _DTYPES[tensor.dtype]


def address(tensor: Tensor | None) -> int:
    """Where `tensor` lies, as the native modules take it; 0 for None and for an empty one."""
    return 0 if tensor is None else tensor.data_ptr()


def generator_engine(weights: Sequence[Tensor], cuda: str = "") -> str:
    """`engine` for the kernels over generators [N, K]: those take K from 1 to 512."""
    fits = all(1 <= weight.shape[1] <= MAX_K for weight in weights)
    return engine(weights[0], cuda) if fits else "reference"


def no_autocast(tensors: Sequence[Tensor]) -> AbstractContextManager:
    """Inside an op its dtypes hold: autocast must not change those of the reference expressions it runs."""
    device = tensors[0].device.type if tensors else "cpu"
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, whose tensors have no memory of their own."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of `tensors` is a dual tensor of forward-mode differentiation."""
    if forward_ad._current_level < 0:  # the usual case: no level is open
        return False
    if torch.compiler.is_compiling():  # torch 2.11 shows no tangents here
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def needs_function(*tensors: Tensor | None) -> bool:
    """Whether an op on `tensors` must go through its autograd Function, which costs 20 to 40 us: a gradient
    is needed, a transform of torch.func is at work, or one of them has a tangent, which an op would lose and
    a Function without a forward mode refuses. ValueError for inference tensors beside others that
    need a gradient. (And dynamo of torch 2.11 shifts the arguments of a Function with *tensors where no
    gradient is needed.)"""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if not torch.compiler.is_compiling() and any(t is not None and t.is_inference() for t in tensors):
            raise ValueError("a tensor made under inference_mode cannot be part of a graph: clone() it")
        return True
    return is_transformed() or has_tangent(*tensors)


def run_first(made: Tensor) -> Tensor:
    """`made`; a backward runs the node that made it before all others that are ready, of which autograd takes
    the one made last otherwise. Compiled code has an order of its own."""
    if not torch.compiler.is_compiling() and made.grad_fn is not None:
        made.grad_fn._set_sequence_nr(2**63 - 1)
    return made


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype autocast wants of a result made with `weight`, None where it leaves it alone."""
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or weight.dtype != torch.float32:
        return None
    return torch.get_autocast_dtype(device)


def check_generators(weights: Sequence[Tensor], **vectors: tuple[Sequence[Tensor | None], str]) -> None:
    """Checks generators before native code sees them: weight [N, K] dense, floating point, of one dtype and
    device.

    vectors: name -> (one tensor for each layer, its shape "N", "K" or "NK"; "N?" admits None). Raises
    ValueError or TypeError naming the argument, what it is and what it should be.
    """
    for name, (tensors, _) in vectors.items():
        if len(tensors) != len(weights):
            raise ValueError(f"{len(weights)} weights but {len(tensors)} of {name}")
    for i, weight in enumerate(weights):
        check_dense(f"weight {i}", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight {i} must be [N, K], got shape {list(weight.shape)}")
        if weight.dtype not in _DTYPES:
            raise TypeError(
                f"weight {i} must be floating point ({', '.join(_DTYPES.values())}), got {weight.dtype}"
            )
        sizes = dict(zip("NK", weight.shape, strict=True))
        for name, (tensors, letters) in vectors.items():
            if tensors[i] is None and letters.endswith("?"):
                continue
            check_dense(f"{name} {i}", tensors[i])
            check_like(f"{name} {i}", tensors[i], weight, [sizes[letter] for letter in letters.rstrip("?")])
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        kinds = sorted({f"{weight.dtype} on {weight.device}" for weight in weights})
        raise TypeError(f"all weights must have one dtype and device, got {', '.join(kinds)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """TypeError unless `tensor` is a tensor, neither sparse nor nested."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}"
        )


def check_like(
    name: str, tensor: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """ValueError or TypeError unless `tensor` has `shape`, and device and dtype (or `dtype`) of `weight`."""
    if list(tensor.shape) != list(shape):
        of = f"for a weight of shape {list(weight.shape)}"
        raise ValueError(f"{name} must be {list(shape)} {of}, got {list(tensor.shape)}")
    if tensor.dtype != (dtype or weight.dtype):
        wanted = dtype or f"{weight.dtype} like its weight"
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like its weight, got {tensor.device}")


def check_memory(written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError unless every tensor (name, tensor) updated in place is contiguous, may be updated and
    overlaps nothing."""
    spans = []  # first byte, end, name, whether it is written
    for tensors, is_written in ((written, True), (read, False)):
        for name, tensor in tensors:
            if is_written:
                _check_writable(name, tensor)
            if tensor.numel() and not tensor.is_meta and not isinstance(tensor, FakeTensor):
                start = tensor.data_ptr()
                spans.append((start, start + _span(tensor) * tensor.itemsize, name, is_written))
    spans.sort()
    reach = {True: (0, ""), False: (0, "")}  # how far written and read tensors reach so far
    for start, end, name, is_written in spans:
        for other_written, (other_end, other) in reach.items():
            if start < other_end and (is_written or other_written):
                raise ValueError(f"{name} shares memory with {other}: one of them is updated in place")
        reach[is_written] = max(reach[is_written], (end, name))


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, those between them counted too."""
    if (
        tensor.is_contiguous()
        or tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor.numel()
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_writable(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is updated in place and must be contiguous, got strides {tensor.stride()}")
    if tensor.is_neg():
        raise ValueError(f"{name} is updated in place and must not be lazily negated: resolve_neg() it")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made under inference_mode and cannot be updated outside of it")
