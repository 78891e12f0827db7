"""Layers on generated weights, merged with generation or not, weights for each sample, and batch norm with
ReLU and pool."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import bench_per_sample, ways
from benchmarks.bench_merged import Case, eager, ours
from benchmarks.gpu.generators import COMPILE_SECONDS, COMPILED, error
from benchmarks.gpu.parts import one_line
from benchmarks.gpu.record import Context
from benchmarks.gpu.timing import (
    COPIED,
    Calls,
    Copy,
    graphs_in_turns,
    one_after_the_other,
    sets_beyond_cache,
)
from benchmarks.machine import median
from hyperfast.ops import merged
from hyperfast.ops._library import use_engine
from hyperfast.ops.hyper_layers import geometry_of, merged_wins
from hyperfast.ops.merged import LINEAR

ROWS = (1, 4, 16, 64, 256, 1024)
LAYERS = {  # in, out, kernel (0: linear), dtype
    "fc1, float32": (512, 1024, 0, torch.float32),
    "fc1, bfloat16": (512, 1024, 0, torch.bfloat16),
    "conv3, bfloat16": (128, 256, 3, torch.bfloat16),
}
PER_SAMPLE = [
    (bench_per_sample.Case(64, 0, 512, 512), torch.float32),
    (bench_per_sample.Case(128, 16, 64, 64, kernel=3), torch.float32),
    (bench_per_sample.Case(64, 0, 512, 512), torch.bfloat16),
    (bench_per_sample.Case(128, 16, 64, 64, kernel=3), torch.bfloat16),
]
CASE_SECONDS = 6.0  # without so much time left, no more such layers
SEPARATE = "generate first"
COMPILED_ROWS = (1, 64, 1024)  # compiling takes longer than measuring
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def serves(case: Case, engine: str, x: Tensor, weight: Tensor) -> bool:
    """Whether `engine` has a kernel that merges generation with this layer."""
    images = x if case.kernel else x.reshape(-1, x.shape[-1], 1, 1)
    geometry = LINEAR
    if case.kernel:
        geometry = geometry_of(x, case.kernel, 1, case.kernel // 2, 1, 1)
    with use_engine(engine):
        return merged._engine(images, weight, list(geometry.flat()), cuda="hyper_linear") == engine


def merged_calls(
    case: Case,
    device: torch.device,
    engines: Sequence[str],
    compiler: str | None,
    fail: Callable[[str], None],
) -> tuple[Calls, int]:
    """The ways to do one layer in evaluation, each over several sets of tensors, and how many sets."""
    with torch.device(device):
        size = case.weights * case.K * case.dtype.itemsize
        sets = [case.tensors() for _ in range(sets_beyond_cache(size, device))]
    x, weight = sets[0][0], sets[0][2]
    functions: dict[str, Callable] = {SEPARATE: ours("separate", case)}
    for engine in engines:
        if serves(case, engine, x, weight):
            functions[f"merged, {engine}"] = use_engine(engine)(ours("merged", case))
    functions["eager"] = lambda *tensors: eager(*tensors, case.kernel)
    if compiler:
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False, backend=compiler)
        functions[COMPILED] = lambda *tensors: compiled(*tensors, case.kernel)
    with torch.no_grad():
        wanted = eager(*(t.double() for t in sets[0]), case.kernel)

    def works(way: str, function: Callable) -> bool:
        try:
            with torch.no_grad():
                found = error([function(*sets[0])], [wanted])
            if found > TOLERANCE[case.dtype]:
                raise ArithmeticError(f"differs from float64 by {found:.1e}")
        except Exception as problem:
            fail(f"{' '.join(case.label())}, {way}: {one_line(problem)}")
            return False
        return True

    def over_sets(function: Callable) -> Callable[[], None]:
        return torch.no_grad()(one_after_the_other([lambda t=t: function(*t) for t in sets]))

    return {way: over_sets(f) for way, f in functions.items() if works(way, f)}, len(sets)


def limit(rows: Sequence[int], wins: Callable[[int], bool]) -> int:
    """The largest of the rows up to which all win; 0 for none."""
    return max(itertools.takewhile(wins, rows), default=0)


def time_merged(
    context: Context, device: torch.device, layers: dict[str, tuple], rows: Sequence[int],
    engines: Sequence[str], rounds: int, compiler: str = "inductor", K: int = 16,
) -> None:  # fmt: skip
    """Over how many rows merging wins, measured and by the rule."""
    ways = [f"merged, {engine}" for engine in engines] + [SEPARATE, "eager", COMPILED]
    table, limits = [], {}
    for name, (inputs, outputs, kernel, dtype) in layers.items():
        seconds: dict[int, dict[str, float]] = {}
        for m in rows:
            case = Case(m, inputs, outputs, K, dtype, kernel=kernel)
            with_compiler = m in COMPILED_ROWS and context.remaining() > COMPILE_SECONDS
            torch.manual_seed(0)
            calls, sets = merged_calls(
                case, device, engines, compiler if with_compiler else None, context.fail
            )
            times = graphs_in_turns(calls, device, rounds)
            seconds[m] = {way: median(found) / sets for way, found in times.items()}
            cells = [f"{1e6 * seconds[m][w]:.1f} us" if w in seconds[m] else "-" for w in ways]
            table.append([name, str(m), *cells])
            title = "Generation merged with the layer, evaluation, generators not in cache"
            context.table(title, ["layer", "rows", *ways], table)
        weight = torch.empty(1, K, dtype=dtype, device=device)
        measured = {
            engine: limit(rows, functools.partial(merging_wins, seconds, f"merged, {engine}"))
            for engine in engines
        }
        rule = limit(rows, lambda m, w=weight, k=kernel: merged_wins(m, w, False, k > 0))
        limits[name] = {"measured": measured, "rule": rule}
        context.fact(merging_wins_up_to_rows=limits)
        found = ", ".join(f"{engine} {most}" for engine, most in measured.items())
        context.line(f"{name}: merging wins up to this many rows: {found}; the rule says {rule}")


def merging_wins(seconds: dict[int, dict[str, float]], way: str, rows: int) -> bool:
    found = seconds[rows]
    return way in found and SEPARATE in found and found[way] < found[SEPARATE]


def per_sample_calls(
    case: bench_per_sample.Case,
    dtype: torch.dtype,
    device: torch.device,
    engine: str,
    compiler: str | None,
    fail: Callable[[str], None],
) -> Calls:
    """Forward and backward of one layer with weights for each sample, all gradients, by every way that agrees
    with float64."""
    with torch.device(device):
        tensors = [t.detach().to(dtype).requires_grad_() for t in case.tensors()]
    functions = {"einsum, bmm": bench_per_sample.eager}
    if compiler:
        torch._dynamo.reset()
        for way, function in (("einsum, bmm", bench_per_sample.eager), ("expand", bench_per_sample.expand)):
            if way != "expand" or not case.kernel:
                functions[f"{way}, compiled"] = torch.compile(function, dynamic=False, backend=compiler)
    functions["hyperfast"] = use_engine(engine)(bench_per_sample.ours)

    def call(function: Callable, tensors: Sequence[Tensor]) -> list[Tensor]:
        y = function(*tensors, case.kernel)
        return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    wanted = call(bench_per_sample.eager, [t.detach().double().requires_grad_() for t in tensors])
    calls: Calls = {}
    for way, function in functions.items():
        try:
            found = error(call(function, tensors), wanted)
            if found > TOLERANCE[dtype]:
                raise ArithmeticError(f"differs from float64 by {found:.1e}")
            calls[way] = functools.partial(call, function, tensors)
        except Exception as problem:
            fail(f"{' '.join(case.label())}, {way}: {one_line(problem)}")
    return calls


def time_per_sample(
    context: Context, device: torch.device, cases: Sequence[tuple[bench_per_sample.Case, torch.dtype]],
    rounds: int, engine: str = "triton", compiler: str = "inductor",
) -> None:  # fmt: skip
    """Weights for each sample, by the time that is left: compiling takes longer than measuring."""
    ways = ["einsum, bmm", "einsum, bmm, compiled", "expand, compiled", "hyperfast"]
    table, seconds = [], {}
    for case, dtype in cases:
        name = " ".join([*case.label(), str(dtype).removeprefix("torch.")])
        if context.remaining() < CASE_SECONDS:
            context.line(f"weights for each sample, {name}: no time left")
            continue
        torch.manual_seed(0)
        with_compiler = compiler if context.remaining() > COMPILE_SECONDS else None
        calls = per_sample_calls(case, dtype, device, engine, with_compiler, context.fail)
        seconds[name] = {w: median(found) for w, found in graphs_in_turns(calls, device, rounds).items()}
        cells = [f"{1e6 * seconds[name][w]:.0f} us" if w in seconds[name] else "-" for w in ways]
        table.append([*case.label(), str(dtype).removeprefix("torch."), *cells])
        header = ["layer", "rows a sample", "samples", "dtype", *ways]
        context.table("Weights for each sample, forward + backward with all gradients", header, table)
        context.fact(per_sample_seconds=seconds)
        own = seconds[name].get("hyperfast")
        rest = [s for way, s in seconds[name].items() if way != "hyperfast"]
        if own and rest:
            context.line(
                f"weights for each sample, {name}: {1e6 * own:.0f} us, best other {min(rest) / own:.1f}x"
            )


def pooled_call(layers: Sequence[torch.nn.Module], tensors: Sequence[tuple[Tensor, Tensor]]) -> Callable:
    """Forward of all layers, then backward of all; returns the gradients."""
    parameters = [list(layer.parameters()) for layer in layers]

    def call() -> list[Tensor]:
        made = [layer(x) for layer, (x, _) in zip(layers, tensors, strict=True)]
        gradients = []
        for i in reversed(range(len(made))):
            x, dy = tensors[i]
            gradients += torch.autograd.grad(made[i], [x, *parameters[i]], dy)
        return gradients

    return call


def time_batch_norm(
    context: Context, device: torch.device, rounds: int, batch: int = ways.BATCH,
    dtype: torch.dtype = torch.bfloat16, compiler: str = "inductor", copied: int = COPIED,
) -> None:  # fmt: skip
    """The five of `full`. They fit the cache together, as they do in a step, so the share may pass 100 %."""
    tensors = ways.pooled_tensors(batch, device=device, dtype=dtype)
    layers = {way: [layer.to(device) for layer in ways.pooled_layers(way)] for way in ("hyperfast", "eager")}
    if context.remaining() > COMPILE_SECONDS:
        torch._dynamo.reset()
        made = [layer.to(device) for layer in ways.pooled_layers("compiled")]
        layers["compiled"] = [torch.compile(layer, dynamic=False, backend=compiler) for layer in made]
    calls: Calls = {way: pooled_call(own, tensors) for way, own in layers.items()}
    # ours compares the values of a window before they are rounded: its winners are those of float32
    wide = [(x.detach().float().requires_grad_(), dy.float()) for x, dy in tensors]
    wanted = pooled_call(layers["eager"], wide)()
    for way in list(calls):
        try:
            found = error(calls[way](), wanted)
            if way == "hyperfast" and found > TOLERANCE[dtype]:
                raise ArithmeticError(f"gradients differ from float32's by {found:.1e}")
        except Exception as problem:
            context.fail(f"batch norm + ReLU + pool, {way}: {one_line(problem)}")
            del calls[way]
    copy = Copy(device, copied)
    times = graphs_in_turns({**calls, "copy": copy}, device, rounds)
    seconds = {way: median(found) for way, found in times.items()}
    bandwidth, moved = copy.moved / seconds.pop("copy"), ways.pooled_bytes(tensors)
    rows = [[way, f"{1e6 * s:.0f} us", f"{100 * moved / s / bandwidth:.0f} %"] for way, s in seconds.items()]
    header = ["way", "forward + backward", "floor's bytes at copy bandwidth"]
    name = str(dtype).removeprefix("torch.")
    context.table(f"Batch norm + ReLU + pool, the five of `full`, batch {batch}, {name}", header, rows)
    context.fact(batch_norm_seconds=seconds)
    context.line(
        "batch norm + ReLU + pool: " + ", ".join(f"{way} {1e6 * s:.0f} us" for way, s in seconds.items())
    )
