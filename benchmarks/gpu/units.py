"""All kernels of Hyper Wide ResNet from their embeddings by the two-layer generator, and their gradients.

By our kernels; by torch.compile of the same products batched in PyTorch, which it may fuse with the copies
into the layers; by that without a compiler; and by a loop over the layers. All start from the same five
parameters and end with the same gradients, as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.bench_units import UNIT, C, D, K, batched, reassociated, shapes_of, tiles, with_gradients
from benchmarks.gpu.generators import COMPILE_SECONDS, COMPILED, error
from benchmarks.gpu.parts import one_line
from benchmarks.gpu.record import Context
from benchmarks.gpu.timing import Calls, graphs_in_turns
from benchmarks.machine import median
from hyperfast.ops._library import use_engine
from hyperfast.ops.generate_units import _engine, two_layer

CASES = {  # dtype, torch.set_float32_matmul_precision, tolerance
    "float32": (torch.float32, "highest", 1e-4),
    "bfloat16": (torch.bfloat16, "highest", 3e-2),
    "TF32": (torch.float32, "high", 5e-3),
}
WITH_COMPILER = ("float32", "bfloat16")  # compiling takes longer than measuring
BATCHED, LOOP = "batched", "loop over layers"


def over_layers(shapes: list[tuple[int, ...]], z: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each layer by products of its own."""
    counts = [rows * across for rows, across in map(tiles, shapes)]
    return [batched([shape], part, *tensors)[0] for shape, part in zip(shapes, z.split(counts), strict=True)]


def parameters(E: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """z, w2, b2, w1, b1"""
    random = torch.Generator(device).manual_seed(0)
    sizes = (E, K), (K, UNIT[1] * D), (UNIT[1] * D,), (D, C), (C,)
    made = [torch.randn(size, generator=random, device=device) / 8 for size in sizes]
    return [t.to(dtype).requires_grad_() for t in made]


def serves(engine: str, z: Tensor) -> bool:
    """Whether `engine` has kernels of the op for tensors like z."""
    with use_engine(engine):
        return _engine(z, z, z.dtype) == engine


def functions(engines: Sequence[str], z: Tensor, compiler: str | None) -> dict[str, Callable]:
    def ours(shapes: list[tuple[int, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return two_layer(*tensors, shapes, UNIT)

    made: dict[str, Callable] = {engine: ours for engine in engines if serves(engine, z)}
    if compiler:
        torch._dynamo.reset()
        made[COMPILED] = torch.compile(reassociated, dynamic=False, backend=compiler)
    return made | {BATCHED: reassociated, LOOP: over_layers}


def calls(
    name: str, device: torch.device, widening: int, engines: Sequence[str], compiler: str | None,
    fail: Callable[[str], None],
) -> Calls:  # fmt: skip
    """The ways that make what float64 makes."""
    dtype, _, tolerance = CASES[name]
    shapes = shapes_of(widening)
    given = parameters(sum(rows * across for rows, across in map(tiles, shapes)), device, dtype)
    random = torch.Generator(device).manual_seed(1)
    dws = [torch.randn(shape, generator=random, device=device).to(dtype) for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in given]
    wanted = with_gradients(batched, shapes, wide, [dw.double() for dw in dws])()
    made: Calls = {}
    for way, function in functions(engines, given[0], compiler).items():
        call = with_gradients(function, shapes, given, dws)
        if way in engines:
            call = use_engine(way)(call)
        try:
            if (found := error(call(), wanted)) > tolerance:
                raise ArithmeticError(f"differs from float64 by {found:.1e}")
            made[way] = call
        except Exception as problem:  # of a compiler, a launch, or the result: the other ways go on
            fail(f"units of Hyper WRN-40-{widening}, {name}, {way}: {one_line(problem)}")
    return made


def time_units(
    context: Context, device: torch.device, engines: Sequence[str], rounds: int,
    names: Sequence[str] = tuple(CASES), widening: int = 2, compiler: str = "inductor",
) -> None:  # fmt: skip
    """A row for each precision; the first engine's time against each other way's."""
    rows, ratios = [], {}
    ways = (*engines, COMPILED, BATCHED, LOOP)
    before = torch.get_float32_matmul_precision()
    for name in names:
        with_compiler = name in WITH_COMPILER and context.remaining() > COMPILE_SECONDS
        torch.set_float32_matmul_precision(CASES[name][1])
        try:
            made = calls(name, device, widening, engines, compiler if with_compiler else None, context.fail)
            times = graphs_in_turns(made, device, rounds)
        finally:
            torch.set_float32_matmul_precision(before)
        seconds = {way: median(found) for way, found in times.items()}
        rows.append([name, *(f"{1e6 * seconds[w]:.1f} us" if w in seconds else "-" for w in ways)])
        title = f"Kernels of Hyper WRN-40-{widening} from their embeddings, forward + backward"
        context.table(title, ["precision", *ways], rows)
        if taken := next((engine for engine in engines if engine in seconds), None):
            ratios[name] = {way: s / seconds[taken] for way, s in seconds.items() if way != taken}
            said = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in ratios[name].items())
            context.line(
                f"units, {name}: {taken} {1e6 * seconds[taken]:.1f} us; of that time {said or 'no other'}"
            )
        else:
            context.fail(f"units, {name}: no kernel of ours ran")
        context.fact(units_against=ratios)
