"""`python -m benchmarks.gpu.smoke`: every kernel once, on small odd sizes, against the reference; for
compute-sanitizer, which makes everything slow.

Under it torch's caching allocator must be off (PYTORCH_NO_CUDA_MEMORY_CACHING=1), or tensors lie in blocks so
large that nothing is out of bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.bench_merged import Case, eager, ours
from benchmarks.gpu.generators import (
    ENGINES,
    PASSES,
    by_engine,
    check,
    error,
    generators,
    has_engine,
    outputs,
    written_states,
)
from benchmarks.gpu.layers import serves
from hyperfast import nn as hyper_nn
from hyperfast import reference
from hyperfast.ops._library import use_engine

SHAPES = [(5, 16), (257, 16), (1023, 16), (63, 3)]
LAYERS = [Case(5, 33, 17, 16), Case(5, 33, 17, 16, torch.bfloat16), Case(9, 16, 19, 16, kernel=3)]


def passes(device: torch.device, engines: Sequence[str]) -> Iterator[str]:
    """Names what ran."""
    weight = torch.empty(1, 16, device=device)
    for one in PASSES:
        expected = generators(SHAPES, device, one.rule, one.storage)
        wanted = outputs(one, by_engine(one, "auto", expected, reference)(), expected)
        for engine in engines:
            if has_engine(engine, weight, one.op):
                g = generators(SHAPES, device, one.rule, one.storage)
                check(one, by_engine(one, engine, g), g, wanted, written_states(expected))
                yield f"{one.title} by {engine}"


def merged_layers(device: torch.device, engines: Sequence[str]) -> Iterator[str]:
    for case in LAYERS:
        with torch.device(device):
            tensors = case._replace(backward=True).tensors()
        wanted = _with_gradients(lambda *t, k=case.kernel: eager(*t, k), [t.double() for t in tensors])
        for engine in engines:
            if serves(case, engine, tensors[0], tensors[2]):
                with use_engine(engine):
                    got = _with_gradients(ours("merged", case), tensors)
                tolerance = 3e-2 if case.dtype == torch.bfloat16 else 1e-4
                if (found := error(got, wanted)) > tolerance:
                    raise ArithmeticError(f"{case.label()} by {engine} differs by {found:.1e}")
                yield f"{' '.join(case.label())} by {engine}"


def _with_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), tensors[:2])]


def batch_norm(device: torch.device) -> Iterator[str]:
    for dtype, pool in ((torch.float32, 2), (torch.bfloat16, 1)):
        x = torch.randn(3, 10, 7, 5, device=device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        results = []
        for backend in ("auto", "reference"):
            layer = hyper_nn.BatchNormReLUMaxPool2d(10, pool, backend=backend, device=device)
            y = layer(x)
            torch.manual_seed(0)
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
            results.append([y.detach(), *gradients])
        if (found := error(*results)) > (5e-2 if dtype == torch.bfloat16 else 1e-4):
            raise ArithmeticError(f"batch norm in {dtype} differs by {found:.1e}")
        yield f"batch norm, {dtype}"


def run_all(device: torch.device, engines: Sequence[str]) -> list[str]:
    """Names of what ran; raises ArithmeticError where a result is wrong."""
    torch.manual_seed(0)
    ran = []
    for group in (passes(device, engines), merged_layers(device, engines), batch_norm(device)):
        for name in group:
            print(name, flush=True)
            ran.append(name)
    return ran


if __name__ == "__main__":
    chosen = sys.argv[1:] or ENGINES
    ran = run_all(torch.device("cuda"), chosen)
    torch.cuda.synchronize()
    print(f"{len(ran)} kernels ran")
