"""HyperLSTM over a sequence: ours by every engine, the time loop of plain PyTorch, the same with
torch.compile of its step, and cuDNN's LSTM without a hyper LSTM.

Forward and backward to the input, the first state and all weights. Each way is first held against the loop
in float64; in half precision it may be off by twice what the loop is at that precision. Then it is timed
twice: launched from Python, which is what a training loop gets, and as a CUDA graph, which leaves only what
the GPU does. The floor is the products alone, at the rate of a large one measured in the same rounds; the
bytes of the weights that every step reads, forward and backward, are among the facts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.bench_lstm import CASES, Case, Way, hoisted, loop, whole
from benchmarks.gpu.generators import COMPILE_SECONDS, ENGINES, error
from benchmarks.gpu.parts import one_line
from benchmarks.gpu.record import Context
from benchmarks.gpu.timing import Calls, graph_of, in_turns
from benchmarks.machine import median
from benchmarks.plain_lstm import PlainHyperLSTMCell
from hyperfast import reference
from hyperfast.nn import HyperLSTM
from hyperfast.ops._library import use_engine
from hyperfast.ops.lstm import _engine

PRECISIONS = {  # dtype, torch.set_float32_matmul_precision, tolerance
    "float32": (torch.float32, "highest", 1e-3),
    "TF32": (torch.float32, "high", 2e-2),
    "bfloat16": (torch.bfloat16, "highest", 2e-2),
}
LOOP, COMPILED, CUDNN, PRODUCT = "loop", "loop, compiled step", "nn.LSTM", "product"
WITH_COMPILER = ("plain", "float32")  # the one case: compiling takes longer than measuring
CASE_SECONDS = 6.0  # without so much time left, no more cases
PRODUCT_SIZE = 4096


def serves(engine: str, case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `engine` has the kernels for this case, forward and backward."""
    sizes = case.T, case.T * case.B, case.B, case.H, case.M, case.Z
    x, steps = torch.empty(1, case.I, dtype=dtype, device=device), torch.full((case.T,), case.B)
    with use_engine(engine):
        return all(_engine(x, sizes, steps, backward) == engine for backward in (False, True))


def model_of(case: Case, dtype: torch.dtype, device: torch.device) -> HyperLSTM:
    """As after some training: every gradient counts."""
    torch.manual_seed(0)
    model = HyperLSTM(case.I, case.H, 1, case.M, case.Z, case.layer_norm)
    nn.init.normal_(model.layers[0].d_weight, 0.1 / case.Z, 0.02)
    nn.init.normal_(model.layers[0].z_weight, std=0.05)
    return model.to(device, dtype)


def tensors_of(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [T, B, I] and the first state: of h, c, hyper_h, hyper_c."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(case.T, case.B, case.I, generator=random)
    state = [torch.randn(case.B, n, generator=random) * 0.1 for n in (case.H, case.H, case.M, case.M)]
    x, *state = (t.to(device, dtype).requires_grad_() for t in (x, *state))
    return x, tuple(state)


def way_of_loop(model: HyperLSTM, x: Tensor, state: tuple[Tensor, ...]) -> Way:
    """As users write it, with the weights of `model`."""
    cell = model.layers[0]
    plain = PlainHyperLSTMCell(cell).to(x.device)
    parts = plain.parts()
    names = [part for name, _ in cell.named_parameters() for part in parts[name]]
    return Way(loop(plain), [plain.get_parameter(name) for name in names], x, state)


def trains(
    case: Case, dtype: torch.dtype, device: torch.device, engines: Sequence[str], compiler: str | None
) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward by way, the loop first."""
    model = model_of(case, dtype, device)
    x, state = tensors_of(case, dtype, device)
    own = list(model.parameters())
    made = {LOOP: way_of_loop(model, x, state).train}
    if compiler:
        torch._dynamo.reset()
        step = torch.compile(reference.lstm_step, dynamic=False, backend=compiler)
        made[COMPILED] = Way(hoisted(model.layers[0], step), own, x, state).train
    for engine in engines:
        if serves(engine, case, dtype, device):
            made[engine] = use_engine(engine)(Way(whole(model), own, x, state).train)
    return made


def flat(results: list[Tensor]) -> list[Tensor]:
    """Output, last state, gradients of x and the state, and of all weights as one, for the loop has them in
    more parts."""
    return [*results[:10], torch.cat([g.flatten() for g in results[10:]])]


def checked(
    case: Case, made: dict[str, Callable], dtype: torch.dtype, device: torch.device, tolerance: float,
    fail: Callable[[str], None],
) -> dict[str, Callable]:  # fmt: skip
    """Those that give what the loop gives in float64."""
    exact = model_of(case, dtype, device).double()
    x, state = tensors_of(case, dtype, device)
    x, *state = (t.detach().double().requires_grad_() for t in (x, *state))
    wanted = flat(way_of_loop(exact, x, tuple(state)).train())
    right: dict[str, Callable] = {}
    for way, train in made.items():
        try:
            found = error(flat(train()), wanted)
            if way == LOOP and dtype.itemsize == 2:
                tolerance = max(tolerance, 2 * found)
            if found > tolerance:
                raise ArithmeticError(f"differs from float64 by {found:.1e}, more than {tolerance:.1e}")
            right[way] = train
        except Exception as problem:  # of a compiler, a launch, or the result: the other ways go on
            fail(f"{way}: {one_line(problem)}")
    return right


def cudnn(case: Case, dtype: torch.dtype, device: torch.device) -> Callable[[], list[Tensor]]:
    """What an LSTM of this size costs without a hyper LSTM, by the library."""
    x, state = tensors_of(case, dtype, device)
    model = nn.LSTM(case.I, case.H).to(device, dtype)
    return Way(whole(model), list(model.parameters()), x, state[:2]).train


def captured(calls: Calls, device: torch.device, fail: Callable[[str], None]) -> Calls:
    """Those of which there can be a CUDA graph, as graphs."""
    made: Calls = {}
    for way, call in calls.items():
        try:
            made[way] = graph_of(call, device)
        except Exception as problem:
            fail(f"{way}, as a CUDA graph: {one_line(problem)}")
    return made


def recurrent_bytes(case: Case, dtype: torch.dtype) -> int:
    """Of the weights that every step reads, forward and again backward."""
    H, M, Z = case.H, case.M, case.Z
    return 2 * dtype.itemsize * (4 * H * H + 4 * M * (H + M) + 12 * Z * (M + H))


def time_case(
    context: Context, device: torch.device, name: str, case: Case, precision: str, engines: Sequence[str],
    rounds: int, compiler: str | None, product: int,
) -> list[list[str]]:  # fmt: skip
    """Rows of the table; microseconds are of a step. The facts and a line for the terminal, too."""
    dtype, _, tolerance = PRECISIONS[precision]
    said = functools.partial("HyperLSTM {}, {}, {}".format, name, precision)
    made = checked(
        case, trains(case, dtype, device, engines, compiler), dtype, device, tolerance,
        lambda what: context.fail(said(what)),
    )  # fmt: skip
    a, b = torch.randn(2, product, product, device=device).to(dtype)
    calls: Calls = {**made, CUDNN: cudnn(case, dtype, device)}
    launched = in_turns(calls, device, rounds)
    graphs = captured(
        calls | {PRODUCT: lambda: torch.mm(a, b)}, device, lambda what: context.fail(said(what))
    )
    replayed = in_turns(graphs, device, rounds)
    rate = 2 * product**3 / median(replayed.pop(PRODUCT))
    steps = {way: median(seconds) / case.T for way, seconds in launched.items()}
    graph_steps = {way: median(seconds) / case.T for way, seconds in replayed.items()}
    floor = case.flops() / rate
    fact = {"launched": steps, "graph": graph_steps, "floor_of_products": floor}
    fact["recurrent_bytes"] = recurrent_bytes(case, dtype)
    found = context.record.facts.get("lstm_step_seconds", {})
    context.fact(lstm_step_seconds=found | {f"{name}, {precision}": fact})
    best = min((s for way, s in graph_steps.items() if way in engines), default=None)
    replays = {way: f"{1e6 * seconds:.1f}" for way, seconds in graph_steps.items()}
    rows = [[name, precision, w, f"{1e6 * s:.1f}", replays.get(w, "-")] for w, s in steps.items()]
    rows.append([name, precision, "floor of the products", "", f"{1e6 * floor:.1f}"])
    if best is None:
        context.fail(said("no kernel of ours ran"))
    else:
        others = ", ".join(f"{way} {s / best:.1f}x" for way, s in graph_steps.items() if way not in engines)
        context.line(
            f"HyperLSTM {name}, {precision}: {1e6 * best:.1f} us a step in a graph, "
            f"floor {1e6 * floor:.1f}; of that time {others}"
        )
    return rows


def time_lstm(
    context: Context, device: torch.device, cases: dict[str, Case], precisions: Sequence[str],
    engines: Sequence[str], rounds: int, compiler: str = "inductor", product: int = PRODUCT_SIZE,
) -> None:  # fmt: skip
    """Every case in every precision, by the time that is left."""
    table: list[list[str]] = []
    before = torch.get_float32_matmul_precision()
    for name, case in cases.items():
        for precision in precisions:
            if context.remaining() < CASE_SECONDS:
                context.line(f"{name}, {precision}: no time left")
                continue
            with_compiler = (name, precision) == WITH_COMPILER and context.remaining() > COMPILE_SECONDS
            torch.set_float32_matmul_precision(PRECISIONS[precision][1])
            try:
                table += time_case(
                    context, device, name, case, precision, engines, rounds,
                    compiler if with_compiler else None, product,
                )  # fmt: skip
            finally:
                torch.set_float32_matmul_precision(before)
            header = ["case", "precision", "way", "launched, us a step", "graph, us a step"]
            context.table("HyperLSTM, forward + backward", header, table)


def run(context: Context) -> None:
    time_lstm(context, torch.device("cuda"), CASES, tuple(PRECISIONS), ENGINES, rounds=5)
