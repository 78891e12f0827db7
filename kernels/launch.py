"""Launches of Triton kernels: on a GPU, under Triton's interpreter, or only compiled.

Launchers return `Launch`es and run nothing, so what tests and `python -m hyperfast.kernels.resources` compile
for a GPU that is not there is what a GPU runs.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
SHARED_LIMITS = {80: 166_912, 90: 232_448}  # bytes for a block by compute capability, 10 x major + minor

TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What kernels over `dtype` compute in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores take factors of `dtype` in float32: as torch's matrix products do."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What tl.dot takes factors of `dtype` in."""
    replaced = INTERPRETED and dtype == torch.bfloat16  # which the interpreter cannot multiply
    return TRITON_TYPES[torch.float32 if replaced else dtype]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within it the GPU of `tensor`, if it is on one, is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Resources(NamedTuple):
    """What a compiled kernel takes: registers of a thread, bytes of stack a thread (spilled registers), bytes
    of shared memory a block; threads of a block; the assembly, and Triton's last own form of the kernel, that
    shows how its arrays lie over threads."""

    registers: int
    stack: int
    shared: int
    threads: int
    ptx: str
    ttgir: str


@dataclass(frozen=True)
class Launch:
    """`kernel` on `grid` with `arguments` by parameter name: tensors, numbers, and compile-time constants
    where the kernel says tl.constexpr. fp_fusion: whether a * b + c may be rounded once; without, a kernel
    gives bit for bit what the interpreter gives where sums have the same order."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True

    def options(self) -> dict[str, Any]:
        """What Triton compiles with; all said, since its defaults change."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }

    def run(self) -> None:
        """Queues the kernel on the current stream of the tensors' device; under the interpreter runs it."""
        if not all(self.grid):
            return
        with on_device(next(a for a in self.arguments.values() if isinstance(a, Tensor))):
            self.kernel[self.grid](**self.arguments, **self.options())

    def repeated(self, *names: str) -> Callable[..., None]:
        """A function of a grid (three numbers) and of values for the integers `names`, which the kernel does
        not specialise: this launch with them instead, in about 3 us of Python instead of 20. Everything else
        is settled here, the stream too: to be made and called with the tensors' device current."""
        if INTERPRETED:
            return lambda grid, *values: replace(
                self, grid=grid, arguments=self.arguments | dict(zip(names, values, strict=True))
            ).run()
        compiled = self.kernel.warmup(**self.arguments, **self.options(), grid=self.grid)
        stream = torch.cuda.current_stream().cuda_stream
        arguments = [self.arguments[name] for name in self.kernel.arg_names]
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        places = [self.kernel.arg_names.index(name) for name in names]

        def call(grid: tuple[int, int, int], *values: int) -> None:
            for place, value in zip(places, values, strict=True):
                arguments[place] = value
            compiled[grid](*arguments, stream=stream)

        return call

    def compile(self, capability: int) -> Resources:
        """Compiles for a GPU of this compute capability (80, 90), with or without one at hand."""
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(self._source(), target=target, options=self.options())
        registers, stack = _usage(compiled.asm["cubin"])
        shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
        return Resources(registers, stack, shared, 32 * self.num_warps, ptx, compiled.asm["ttgir"])

    def _source(self) -> ASTSource:
        """Specialised as a launch would be: divisibility by 16, and integers that are 1."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            kind, is_constant, divisible = _specialise(value, parameter)
            signature[parameter.name] = kind
            if is_constant:
                constants[parameter.name] = value
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


def _specialise(value: Any, parameter: Any) -> tuple[str, bool, bool]:
    """Type of an argument, whether it is a constant, and whether it divides by 16."""
    if parameter.is_constexpr or value is None:
        return "constexpr", True, False
    special = not parameter.do_not_specialize
    if isinstance(value, Tensor):
        return "*" + _NAMES[value.dtype], False, special and value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False, False
    if isinstance(value, int):
        if special and value == 1:
            return "constexpr", True, False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, False, special and value % 16 == 0
    return parameter.annotation_type or "fp32", False, False


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the toolkit that comes with Triton reads them."""
    cuobjdump = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text}")
    return int(found[1]), int(found[2])
