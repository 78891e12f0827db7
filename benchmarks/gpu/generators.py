"""The passes over the generators of `full`: generate, its backward, and the update with the next weights.

Each by Triton and by CUDA C++ over all layers, and by torch.compile of the reference over the largest layer
alone, which spares the compiler eight copies of one expression and its kernel all launches but one: what is
compared is the share of copy bandwidth. All in turns with a copy, as CUDA graphs. The bytes are those of the
tensors a pass must read and write once. Generators are larger than any cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.parts import one_line
from benchmarks.gpu.record import Context
from benchmarks.gpu.timing import COPIED, Calls, Copy, graphs_in_turns
from benchmarks.machine import median
from benchmarks.plain import SHAPES
from hyperfast import ops, reference, states
from hyperfast.ops import _library
from hyperfast.states import EightBit, State

FULL = [(math.prod(shape), 16) for shape in SHAPES.values()]  # N, K of each layer
ENGINES = ("triton", "cuda")  # the first is what `auto` takes where both are there
COMPILED = "torch.compile"
COEFFICIENTS = {
    "adam": ops.AdamWCoefficients(1 - 1e-7, 1e-3, 0.9, 0.999, 0.5, 1e-8),
    "sgd": ops.SGDCoefficients(1e-3, 1e-4, 0.9, 1.0, 0.0, 1.0),
}
TOLERANCE = 1e-5  # of our kernels, |error| / |wanted|
PLAIN_TOLERANCE = 1e-4  # of PyTorch's, which may sum in float32 in whatever order
COMPILE_SECONDS = 25.0  # without so much time left, nothing more is compiled


@dataclass
class Generators:
    """Everything an update of L layers reads and writes; lists with one entry for each layer, states and
    bias_states one list for each state."""

    weights: list[Tensor]
    states: list[list[State]]
    biases: list[Tensor]
    bias_states: list[list[State]]
    dws: list[Tensor]
    zs: list[Tensor]
    new_zs: list[Tensor]
    next_weights: list[Tensor]
    numbers: tuple[Tensor, ...]  # coefficients, bias_coefficients, grad_scale, seeds

    def arguments(self) -> tuple[Any, ...]:
        """Of `adamw_generate` and `sgd_generate`."""
        return (
            self.weights, *self.states, self.biases, *self.bias_states, self.dws, self.zs, self.new_zs,
            self.next_weights, *self.numbers,
        )  # fmt: skip

    def all_states(self) -> list[State]:
        return [state for column in (*self.states, *self.bias_states) for state in column]


def generators(
    shapes: Sequence[tuple[int, int]], device: torch.device, rule: str = "adam", storage: str = "plain"
) -> Generators:
    """Random float32 ones of (N, K); the same for the same arguments. storage: of the states."""
    random = torch.Generator(device).manual_seed(0)

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device) * scale

    def stored(second: bool, like: Tensor) -> State:
        values = normal(1e-3, *like.shape)
        return states.converted(values.square() if second else values, like, storage, signed=not second)

    Ns, Ks = [N for N, _ in shapes], [K for _, K in shapes]
    weights, biases = [normal(0.01, N, K) for N, K in shapes], [normal(0.05, N) for N in Ns]
    seconds = (False, True) if rule == "adam" else (False,)
    rows = torch.tensor([COEFFICIENTS[rule]] * len(shapes), dtype=torch.float64, device=device)
    scale = torch.ones((), dtype=torch.float64, device=device)
    seeds = torch.arange(1, len(shapes) + 1, device=device)
    return Generators(
        weights, [[stored(second, weight) for weight in weights] for second in seconds],
        biases, [[stored(second, bias) for bias in biases] for second in seconds],
        [normal(1e-3, N) for N in Ns], [normal(0.3, K) for K in Ks], [normal(0.3, K) for K in Ks],
        [torch.full((N,), math.nan, device=device) for N in Ns], (rows, rows, scale, seeds),
    )  # fmt: skip


def nbytes(stored: Sequence[State]) -> int:
    return sum(t.nbytes for state in stored for t in (state if isinstance(state, EightBit) else (state,)))


class Pass(NamedTuple):
    """call(library, generators): library is `hyperfast.ops` or, the same names and arguments, the reference.
    function: of the library, what is compiled. moved: bytes read and written."""

    title: str
    op: str
    function: str
    call: Callable[[Callable, Generators], Any]
    moved: Callable[[Generators], int]
    rule: str = "adam"
    storage: str = "plain"


def _update(title: str, rule: str, storage: str) -> Pass:
    def moved(g: Generators) -> int:
        both_ways = nbytes(g.weights) + nbytes(g.biases) + nbytes(g.all_states())
        return 2 * both_ways + nbytes(g.dws) + nbytes(g.next_weights)

    function = "adamw_generate" if rule == "adam" else "sgd_generate"
    return Pass(title, "update_generate", function, lambda f, g: f(*g.arguments()), moved, rule, storage)


ADAMW = _update("adamw_generate, float32 states", "adam", "plain")
BACKWARD = Pass(
    "generate_backward", "generate_backward", "generate_backward", lambda f, g: f(g.weights, g.dws),
    lambda g: nbytes(g.weights) + nbytes(g.dws),
)  # fmt: skip
PASSES = (
    ADAMW,
    BACKWARD,
    _update("adamw_generate, 8-bit states", "adam", "8bit"),
    _update("adamw_generate, bfloat16 states", "adam", "bfloat16"),
    _update("sgd_generate, momentum", "sgd", "plain"),
    Pass(
        "generate", "generate", "generate", lambda f, g: f(g.weights, g.biases, g.zs),
        lambda g: nbytes(g.weights) + nbytes(g.biases) + nbytes(g.next_weights),
    ),
)  # fmt: skip


def has_engine(engine: str, weight: Tensor, op: str) -> bool:
    """Whether `engine` has kernels of `op` for `weight` here."""
    with _library.use_engine(engine):
        return _library.generator_engine([weight], cuda=op) == engine


def by_engine(one: Pass, engine: str, g: Generators, library: ModuleType = ops) -> Callable[[], Any]:
    """The pass by an engine, which is chosen when it is called or captured."""

    def call() -> Any:
        with _library.use_engine(engine), torch.no_grad():
            return one.call(getattr(library, one.function), g)

    return call


def outputs(one: Pass, returned: Any, g: Generators) -> list[Tensor]:
    """What a pass made: what it returned, or what it wrote."""
    if one.op == "generate":
        return list(returned)
    if one.op == "generate_backward":
        return [*returned[0], returned[1]]
    return [*g.weights, *g.biases, *g.next_weights]


def written_states(g: Generators) -> list[Tensor]:
    return [
        states.decode(state, signed=i == 0)
        for columns in (g.states, g.bias_states)
        for i, column in enumerate(columns)
        for state in column
    ]


def error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest |got - wanted| / |wanted| of the pairs; infinite where something is not finite."""
    found = [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, wanted, strict=True)
    ]
    return max((e if math.isfinite(e) else math.inf) for e in found)


class Wanted(NamedTuple):
    """What the reference makes, with the states it leaves."""

    outputs: list[Tensor]
    states: list[Tensor]


def expected(one: Pass, g: Generators) -> Wanted:
    """Of the reference, which changes `g`: in float64 where nothing is written in place, since sums over
    millions of rows have errors of their own in float32."""
    if one.op != "update_generate":
        wide = {name: [t.double() for t in getattr(g, name)] for name in ("weights", "biases", "dws", "zs")}
        g = replace(g, **wide)
    return Wanted(outputs(one, by_engine(one, "auto", g, reference)(), g), written_states(g))


def check(
    one: Pass, call: Callable[[], Any], g: Generators, wanted: Wanted, tolerance: float = TOLERANCE
) -> None:
    """ArithmeticError unless the first call, from fresh generators, makes what the reference makes."""
    found = error(outputs(one, call(), g), wanted.outputs)
    # states of few bits round by chance where the last bit of what is rounded differs
    rounding = tolerance if one.storage == "plain" else 2e-3
    of_states = error(written_states(g), wanted.states) if one.op == "update_generate" else 0.0
    if found > tolerance or of_states > rounding:
        raise ArithmeticError(f"differs from the reference by {found:.1e}, its states by {of_states:.1e}")


@dataclass
class Timed:
    """Medians: seconds and bytes by way; bytes a second of the copy in the same rounds."""

    title: str
    seconds: dict[str, float]
    moved: dict[str, int]
    bandwidth: float

    def share(self, way: str) -> float:
        """Of the copy's bandwidth."""
        return self.moved[way] / self.seconds[way] / self.bandwidth

    def words(self, way: str) -> str:
        return (
            f"{1e6 * self.seconds[way]:.0f} us, {100 * self.share(way):.0f} %" if way in self.seconds else "-"
        )


class Race:
    """The ways to do one pass; those that fail are left out and said."""

    def __init__(self, one: Pass, device: torch.device, fail: Callable[[str], None]):
        self.one, self.device, self.fail = one, device, fail
        self.calls: Calls = {}
        self.moved: dict[str, int] = {}

    def add(
        self, way: str, shapes: Sequence[tuple[int, int]], make: Callable[[Generators], Callable],
        tolerance: float = TOLERANCE,
    ) -> None:  # fmt: skip
        """make(generators) is the call; it must do what the reference does."""
        one = self.one
        try:
            wanted = expected(one, generators(shapes, self.device, one.rule, one.storage))
            g = generators(shapes, self.device, one.rule, one.storage)
            call = make(g)
            check(one, call, g, wanted, tolerance)
        except Exception as problem:  # of a compiler, a launch, or the result: the other ways go on
            self.fail(f"{one.title} by {way}: {one_line(problem)}")
            return
        self.calls[way], self.moved[way] = call, one.moved(g)

    def run(self, copy: Copy, rounds: int) -> Timed:
        times = graphs_in_turns({**self.calls, "copy": copy}, self.device, rounds)
        seconds = {way: median(found) for way, found in times.items()}
        return Timed(self.one.title, seconds, self.moved, copy.moved / seconds.pop("copy"))


def time_passes(
    context: Context, device: torch.device, shapes: Sequence[tuple[int, int]], engines: Sequence[str],
    rounds: int, compiler: str = "inductor", copied: int = COPIED,
) -> list[Timed]:  # fmt: skip
    """All passes, the most telling first."""
    copy, timed = Copy(device, copied), []
    weight = torch.empty(1, shapes[0][1], device=device)
    for one in PASSES:
        race = Race(one, device, context.fail)
        for engine in engines:
            if has_engine(engine, weight, one.op):
                race.add(engine, shapes, functools.partial(by_engine, one, engine))
        if not race.calls:
            context.fail(f"{one.title}: no kernel of ours ran")
        if context.remaining() > COMPILE_SECONDS:
            torch._dynamo.reset()
            function = getattr(reference, one.function)
            compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
            race.add(
                COMPILED, [max(shapes)], lambda g, c=compiled, o=one: torch.no_grad()(lambda: o.call(c, g)),
                PLAIN_TOLERANCE,
            )  # fmt: skip
        timed.append(t := race.run(copy, rounds))
        size = max(t.moved.values(), default=0) / 1e6
        context.line(f"{t.title}, {size:.0f} MB: " + ", ".join(f"{way} {t.words(way)}" for way in t.seconds))
        report(context, timed, engines)
    return timed


def report(context: Context, timed: Sequence[Timed], engines: Sequence[str]) -> None:
    """The table so far, and what the goals need."""
    ways = (*engines, COMPILED)
    rows = [
        [t.title, f"{max(t.moved.values(), default=0) / 1e6:.0f}", *(t.words(way) for way in ways)]
        for t in timed
    ]
    header = ["pass over all layers", "MB", *(f"{way}: time, share of copy bandwidth" for way in ways)]
    context.table("Generators of `full`, float32", header, rows)
    context.fact(passes=[asdict(t) for t in timed])
    pair = [t for t in timed if t.title in (ADAMW.title, BACKWARD.title)]
    if len(pair) == 2:
        shares = {}
        for way in ways:
            if all(way in t.seconds for t in pair):
                at_bandwidth = sum(t.moved[way] / t.bandwidth for t in pair)
                shares[way] = at_bandwidth / sum(t.seconds[way] for t in pair)
        context.fact(pair_shares=shares)
        if taken := next((way for way in engines if way in shares), None):
            context.fact(pair_share=shares[taken], goal_words={"pair_share": f"by {taken}"})
        else:
            context.fact(goal_words={"pair_share": "; ".join(context.record.failures)})
