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

from benchmarks import bench_per_sample
from benchmarks.bench_lstm import Case as SequenceCase
from benchmarks.bench_merged import Case, eager, ours
from benchmarks.gpu import lstm
from benchmarks.gpu.generators import (
    ENGINES,
    PASSES,
    by_engine,
    check,
    error,
    expected,
    generators,
    has_engine,
)
from benchmarks.gpu.layers import per_sample_calls, serves
from hyperfast import nn as hyper_nn
from hyperfast.ops._library import _cuda, dtype_name, generator_engine, triton_kernels, use_engine

PLANTED = "planted"
SHAPES = [(5, 16), (257, 16), (1023, 16), (63, 3)]
LAYERS = [Case(5, 33, 17, 16), Case(5, 33, 17, 16, torch.bfloat16), Case(9, 16, 19, 16, kernel=3)]

SEQUENCES = [SequenceCase(3, 2, 5, 17, 7, 3, layer_norm) for layer_norm in (False, True)]
PER_SAMPLE = [bench_per_sample.Case(5, 0, 33, 17), bench_per_sample.Case(3, 5, 6, 7, kernel=3)]


def passes(device: torch.device, engines: Sequence[str]) -> Iterator[str]:
    """Names what ran."""
    weight = torch.empty(1, 16, device=device)
    for one in PASSES:
        wanted = expected(one, generators(SHAPES, device, one.rule, one.storage))
        for engine in engines:
            if has_engine(engine, weight, one.op):
                g = generators(SHAPES, device, one.rule, one.storage)
                check(one, by_engine(one, engine, g), g, wanted)
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


def per_sample_layers(device: torch.device, engines: Sequence[str]) -> Iterator[str]:
    def fail(what: str) -> None:
        raise ArithmeticError(what)

    for case in PER_SAMPLE:
        for engine in engines:
            with use_engine(engine):
                there = generator_engine([torch.empty(1, case.K, device=device)]) == engine
            if there:
                per_sample_calls(case, torch.float32, device, engine, None, fail)
                yield f"{' '.join(case.label())}, weights for each sample, by {engine}"


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


def sequences(device: torch.device, engines: Sequence[str]) -> Iterator[str]:
    def fail(what: str) -> None:
        raise ArithmeticError(what)

    for case in SEQUENCES:
        trains = lstm.trains(case, torch.float32, device, engines, None)
        for way in lstm.checked(case, trains, torch.float32, device, 1e-4, fail):
            if way in engines:
                yield f"HyperLSTM{', layer norm' * case.layer_norm} by {way}"


def run_all(device: torch.device, engines: Sequence[str]) -> list[str]:
    """Names of what ran; raises ArithmeticError where a result is wrong. Products and convolutions of plain
    PyTorch are in float32 from here on: its own default has TF32 in cuDNN."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    ran = []
    layers = merged_layers(device, engines), per_sample_layers(device, engines)
    for group in (passes(device, engines), *layers, batch_norm(device), sequences(device, engines)):
        for name in group:
            print(name, flush=True)
            ran.append(name)
    return ran


def plant(device: torch.device, engine: str) -> None:
    """An error for memcheck to find: `generate` is told of twice the rows that there are."""
    N, K = 64, 16
    weight, z, out = (torch.ones(*shape, device=device) for shape in ((N, K), (K,), (N,)))
    table = [(weight.data_ptr(), 0, z.data_ptr(), out.data_ptr(), 2 * N, K)]
    if engine == "cuda":
        _cuda.generate(table, dtype_name(weight), torch.cuda.current_stream(device).cuda_stream)
    else:
        triton_kernels("generate").run(table, weight.dtype, device)
    torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> None:
    """[PLANTED] ENGINE..."""
    device = torch.device("cuda")
    if arguments[:1] == [PLANTED]:
        for engine in arguments[1:]:
            plant(device, engine)
        return
    ran = run_all(device, arguments or ENGINES)
    torch.cuda.synchronize()
    print(f"{len(ran)} kernels ran")


if __name__ == "__main__":
    main(sys.argv[1:])
