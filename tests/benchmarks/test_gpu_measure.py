"""What `python -m benchmarks.gpu` measures, on the CPU at tiny sizes."""

import dataclasses
from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bench_per_sample import Case
from benchmarks.gpu import generators, layers, lstm, machine, smoke, step, step_ways, timing, units
from benchmarks.gpu.generators import ADAMW, BACKWARD, COMPILED, PASSES
from benchmarks.gpu.record import Context
from benchmarks.gpu.step_worker import StepRunner
from benchmarks.machine import median
from hyperfast import ops
from hyperfast.ops import _library

CPU = torch.device("cpu")
SHAPES = [(40, 16), (7, 16)]
COPIED = 1 << 16
NATIVE = "cpu"


@pytest.fixture
def context(tmp_path):
    return Context("part", tmp_path, 1000.0)


@pytest.fixture(autouse=True)
def settings():
    """What the ways set for the whole process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.backends.cudnn.allow_tf32 = tf32


# ---- timing ----


def test_calls_take_turns_and_two_rounds_do_not_count():
    made = []
    times = timing.in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, CPU, 3)
    assert made == ["a", "b"] * 5
    assert all(len(found) == 3 and min(found) >= 0 for found in times.values())


def test_enough_sets_to_leave_the_cache():
    cache = timing.l2_bytes(CPU)
    assert timing.sets_beyond_cache(cache // 2, CPU) == 6
    assert timing.sets_beyond_cache(10 * cache, CPU) == 1
    assert timing.sets_beyond_cache(1, CPU) == 64


def test_the_machine(context):
    machine.measure(context, CPU, COPIED, size=16, rounds=3)
    facts = context.record.facts
    assert set(facts["operations_per_second"]) == {"bfloat16", "TF32", "float32"}
    assert facts["copy_bytes_per_second"] > 0 and facts["seconds_of_a_graph_node"] > 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert machine.describe(CPU)["GPU"] == "none"


# ---- generators ----


@pytest.mark.parametrize("passes", [(ADAMW, BACKWARD), pytest.param(PASSES, marks=pytest.mark.slow)], ids=len)
def test_passes(context, monkeypatch, passes):
    monkeypatch.setattr(generators, "PASSES", passes)
    timed = generators.time_passes(context, CPU, SHAPES, (NATIVE,), 2, "eager", COPIED)
    assert context.record.failures == []
    assert [t.title for t in timed] == [one.title for one in passes]
    for t in timed:
        assert set(t.seconds) == {NATIVE, COMPILED}
        assert t.moved[COMPILED] < t.moved[NATIVE]  # one layer of two
    assert context.record.facts["pair_share"] == context.record.facts["pair_shares"][NATIVE]
    pair = [t for t in timed if t.title in (ADAMW.title, BACKWARD.title)]
    at_bandwidth = sum(t.moved[NATIVE] / t.bandwidth for t in pair)
    wanted = at_bandwidth / sum(t.seconds[NATIVE] for t in pair)
    assert context.record.facts["pair_share"] == pytest.approx(wanted)
    assert context.record.facts["goal_words"] == {"pair_share": "by cpu"}
    assert len(context.record.lines) == len(passes)


def test_bytes_of_the_passes():
    """28 a weight for the backward and the update with float32 states, and a K-th of what a weight and its
    states take for the bias."""
    g = generators.generators([(1600, 16)], CPU)
    weights = 1600 * 16
    assert BACKWARD.moved(g) == 4 * weights + 4 * 1600
    assert ADAMW.moved(g) == 24 * weights + (24 + 8) * 1600
    low = generators.generators([(1600, 16)], CPU, storage="8bit")
    assert 12 * weights < ADAMW.moved(low) < 14 * weights


def test_a_kernel_that_is_wrong_is_said_and_not_timed(context, monkeypatch):
    right = ops.generate_backward

    def wrong(weights, dws):
        dzs, squared = right(weights, dws)
        return [dz * 1.001 for dz in dzs], squared

    monkeypatch.setattr(ops, "generate_backward", wrong)
    monkeypatch.setattr(generators, "PASSES", (ADAMW, BACKWARD))
    context.end -= 990  # no time to compile
    timed = generators.time_passes(context, CPU, SHAPES, (NATIVE,), 2, "eager", COPIED)
    assert (
        "generate_backward by cpu: ArithmeticError: differs from the reference by 1.0e-03"
        in (context.record.failures[0])
    )
    assert set(timed[0].seconds) == {NATIVE} and timed[1].seconds == {}
    assert "pair_share" not in context.record.facts
    assert "generate_backward by cpu: " in context.record.facts["goal_words"]["pair_share"]


def test_wrong_states_are_noticed(monkeypatch):
    one = next(p for p in PASSES if p.storage == "8bit")
    wanted = generators.expected(one, generators.generators(SHAPES, CPU, storage="8bit"))
    g = generators.generators(SHAPES, CPU, storage="8bit")

    def call():
        generators.by_engine(one, NATIVE, g)()
        g.states[1][0].codes.sub_(1)

    with pytest.raises(ArithmeticError, match="its states by"):
        generators.check(one, call, g, wanted)


def test_sums_are_held_against_float64():
    """Float32's own error over so many rows that cancel is larger than what a kernel may have."""
    g = generators.generators([(1 << 20, 1)], CPU)
    wanted = generators.expected(BACKWARD, g)
    assert all(t.dtype == torch.float64 for t in wanted.outputs)
    exact = (g.weights[0].double().T @ g.dws[0].double()).item()
    assert wanted.outputs[0].item() == pytest.approx(exact, rel=1e-12)
    assert generators.expected(ADAMW, g).outputs[0] is g.weights[0]  # written in place, float32


def test_without_time_nothing_is_compiled(context):
    context.end -= 990
    timed = generators.time_passes(context, CPU, SHAPES, (NATIVE,), 1, "no such compiler", COPIED)
    assert context.record.failures == []
    assert all(COMPILED not in t.seconds for t in timed)


def test_the_engine_is_chosen_for_a_while():
    weight = torch.empty(3, 4)
    with _library.use_engine("reference"):
        assert _library.generator_engine([weight]) == "reference"
    assert _library.generator_engine([weight]) == "cpu"
    assert generators.has_engine(NATIVE, weight, "generate")
    assert not generators.has_engine("cuda", weight, "generate")


# ---- layers ----


def test_merged_layers(context):
    chosen = {"linear": (9, 11, 0, torch.float32), "conv": (3, 5, 3, torch.float32)}
    layers.time_merged(context, CPU, chosen, (1, 4), (NATIVE,), 2, "eager", K=4)
    assert context.record.failures == []
    (table,) = context.record.tables
    assert [row[:2] for row in table.rows] == [[n, r] for n in chosen for r in ("1", "4")]
    assert [row[-1] == "-" for row in table.rows] == [False, True] * 2  # compiled at one row only
    found = context.record.facts["merging_wins_up_to_rows"]["linear"]
    assert found["rule"] == 4 and found["measured"][NATIVE] in (0, 1, 4)


def test_where_merging_stops_to_win():
    assert layers.limit((1, 4, 16), lambda m: m < 10) == 4
    assert layers.limit((1, 4, 16), lambda m: m != 1) == 0
    seconds = {1: {"merged, x": 1.0, layers.SEPARATE: 2.0}, 4: {layers.SEPARATE: 2.0}}
    assert layers.merging_wins(seconds, "merged, x", 1)
    assert not layers.merging_wins(seconds, "merged, x", 4)


def test_weights_for_each_sample(context):
    cases = [(Case(3, 0, 9, 11, K=4), torch.float32), (Case(2, 5, 3, 4, kernel=3), torch.bfloat16)]
    layers.time_per_sample(context, CPU, cases, 2, NATIVE, "eager")
    assert context.record.failures == []
    (table,) = context.record.tables
    assert [[cell == "-" for cell in row[4:]] for row in table.rows] == [
        [False] * 4,
        [False, False, True, False],
    ]
    assert len(context.record.facts["per_sample_seconds"]) == len(context.record.lines) == 2
    context.end -= context.remaining()
    layers.time_per_sample(context, CPU, cases[:1], 2, NATIVE, "no such compiler")
    assert context.record.failures == [] and context.record.lines[-1].endswith("no time left")


def test_a_wrong_way_is_not_timed(context, monkeypatch):
    case = Case(3, 0, 9, 11, K=4)
    monkeypatch.setattr(layers.bench_per_sample, "ours", lambda *t: layers.bench_per_sample.eager(*t) + 1)
    calls = layers.per_sample_calls(case, torch.float32, CPU, NATIVE, None, context.fail)
    assert list(calls) == ["einsum, bmm"] and "hyperfast: ArithmeticError" in context.record.failures[0]


def test_batch_norm(context):
    layers.time_batch_norm(context, CPU, 1, batch=2, dtype=torch.float32, compiler="eager", copied=COPIED)
    assert context.record.failures == []
    assert set(context.record.facts["batch_norm_seconds"]) == {"hyperfast", "eager", "compiled"}


@pytest.mark.parametrize(
    "names", [("float32",), pytest.param(tuple(units.CASES), marks=pytest.mark.slow)], ids=len
)
def test_units(context, names):
    units.time_units(context, CPU, (NATIVE,), 1, names, widening=1, compiler="eager")
    assert context.record.failures == []
    (table,) = context.record.tables
    assert [row[0] for row in table.rows] == list(names)
    assert "-" not in table.rows[0]
    ratios = context.record.facts["units_against"]["float32"]
    assert set(ratios) == {COMPILED, units.BATCHED, units.LOOP} and min(ratios.values()) > 0
    assert len(context.record.lines) == len(names)
    assert torch.get_float32_matmul_precision() == "highest"


def test_units_that_are_wrong_are_not_timed(monkeypatch):
    right = units.two_layer
    monkeypatch.setattr(units, "two_layer", lambda *given: [1.001 * w for w in right(*given)])
    said = []
    made = units.calls("float32", CPU, 1, (NATIVE,), None, said.append)
    assert set(made) == {units.BATCHED, units.LOOP}
    assert len(said) == 1 and "cpu: ArithmeticError: differs from float64 by 1.0e-03" in said[0]


@pytest.mark.parametrize("layer_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sequences(context, layer_norm):
    cases = {"plain": lstm.Case(2, 3, 4, 5, 3, 2, layer_norm)}
    engines = ("reference",)
    lstm.time_lstm(context, CPU, cases, ("float32", "bfloat16"), engines, 1, "eager", product=16)
    assert context.record.failures == []
    (table,) = context.record.tables
    ways = [lstm.LOOP, "reference", lstm.CUDNN, "floor of the products"]
    assert [row[2] for row in table.rows] == [lstm.LOOP, lstm.COMPILED, *ways[1:], *ways]
    assert all(float(row[4]) > 0 for row in table.rows)
    facts = context.record.facts["lstm_step_seconds"]
    assert set(facts["plain, float32"]["graph"]) == {*ways[:3], lstm.COMPILED}
    assert facts["plain, bfloat16"]["recurrent_bytes"] == 4 * (100 + 96 + 24 * 8)
    assert len(context.record.lines) == 2
    context.end -= context.remaining()
    lstm.time_lstm(context, CPU, cases, ("TF32",), engines, 1)
    assert context.record.lines[-1].endswith("no time left")


def test_sequences_that_are_wrong_are_not_timed(monkeypatch):
    case, said = lstm.Case(2, 3, 4, 5, 3, 2, False), []
    made = lstm.trains(case, torch.float32, CPU, ("reference",), None)
    right = made["reference"]
    made["reference"] = lambda: [1.01 * t for t in right()]
    assert set(lstm.checked(case, made, torch.float32, CPU, 1e-3, said.append)) == {lstm.LOOP}
    assert len(said) == 1 and "reference: ArithmeticError: differs from float64 by 1.0e-02" in said[0]


def test_small_runs_for_the_sanitizer(capsys):
    ran = smoke.run_all(CPU, (NATIVE,))
    sequences = len(smoke.SEQUENCES) * lstm.serves(NATIVE, smoke.SEQUENCES[0], torch.float32, CPU)
    assert len(ran) == len(PASSES) + len(smoke.LAYERS) + len(smoke.PER_SAMPLE) + 2 + sequences
    assert capsys.readouterr().out.count("\n") == len(ran)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


# ---- the step ----


class FakeWorker:
    """Is built and chooses; answers what comes then as it was told; an exception is raised."""

    def __init__(self, *answers):
        self.answers, self.asked, self.killed = list(answers), [], False
        self.waiting = deque()

    def ask(self, request):
        self.asked.append(request)
        self.waiting.append(request)

    def answer(self, seconds):
        if self.waiting[0] in ("build", "choose"):
            self.waiting.popleft()
            return {}
        made = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not isinstance(made, TimeoutError):
            self.waiting.popleft()
        if isinstance(made, Exception):
            raise made
        return made

    def kill(self):
        self.killed = True


def prepared(values=(5.0, 4.0, 3.0), allocated=100.0):
    return {"values": [*values], "allocated_mib": allocated, "reserved_mib": 2 * allocated}


def seconds(value):
    return {"seconds": value, "loss": 1.0}


def test_a_comparison_of_steps(context, monkeypatch):
    workers = {
        "eager": FakeWorker(prepared(), seconds(8.0)),
        "fused": FakeWorker(prepared(allocated=200.0), seconds(4.0)),
        "graph": FakeWorker(prepared(), seconds(3.0)),
        "compiled": FakeWorker(TimeoutError("gave no answer in 5 s")),
        "autotuned": FakeWorker({"error": "RuntimeError: it broke"}),
        "factored_reference": FakeWorker(prepared(values=(5.0, 4.0, 3.1)), seconds(2.0)),
        "hyperfast": FakeWorker(prepared(), seconds(2.0)),
        "hyperfast_8bit": FakeWorker(prepared(allocated=50.0), seconds(1.0)),
        "hyperfast_bf16": FakeWorker(prepared(), seconds(1.0), RuntimeError("ended with exit status 1")),
    }
    monkeypatch.setattr(step, "start", lambda *_: dict(workers))
    step.compare(context, CPU, list(workers), step_ways.Sizes(), rounds=4, steps=20, copied=COPIED)
    facts = context.record.facts
    assert facts["best_plain"] == "graph"
    assert (facts["against_eager"], facts["against_best"], facts["against_best_8bit"]) == (4.0, 1.5, 3.0)
    assert (facts["memory"], facts["memory_8bit"]) == (0.5, 0.25)
    assert facts["against_factored_reference"] is None and facts["rounds"] == 4
    assert context.record.failures == [
        "autotuned: RuntimeError: it broke",
        "compiled: not ready in time",
        "factored_reference: computes something else: losses 5.0000 4.0000 3.1000, "
        "eager's 5.0000 4.0000 3.0000",
        "hyperfast_bf16: in round 1: ended with exit status 1",
    ]
    assert all(worker.killed for worker in workers.values())
    assert workers["autotuned"].asked == ["build", "choose", "prepare"]
    assert workers["eager"].asked == ["build", "choose", "prepare", *[20] * 5]
    rows = context.record.tables[0].rows
    assert rows[2][0].endswith("(the best of PyTorch)")
    missing = {row[0]: row[1] for row in rows[5:]}
    assert missing[step_ways.WAYS["compiled"].label] == "not ready in time" and len(missing) == 4
    assert len(context.record.lines) == len(rows) == 9
    words = facts["goal_words"]
    lost = "compiled not ready in time; autotuned RuntimeError: it broke"
    assert words["against_best"] == words["against_best_8bit"] == f"against graph, without {lost}"


def test_the_one_that_chooses_kernels_by_timing_them_may_be_late(context, monkeypatch):
    """It is prepared last; who was late before it is asked again."""
    asked = []

    class Noting(FakeWorker):
        def answer(self, seconds):
            asked.append((self.waiting[0], next(way for way in workers if workers[way] is self)))
            return super().answer(seconds)

    workers = {
        "eager": Noting(prepared(), seconds(8.0)),
        "compiled": Noting(TimeoutError(), prepared(), seconds(3.0)),
        "autotuned": Noting(TimeoutError()),
        "hyperfast": Noting(prepared(), seconds(2.0)),
    }
    monkeypatch.setattr(step, "start", lambda *_: dict(workers))
    step.compare(context, CPU, list(workers), step_ways.Sizes(), rounds=1, steps=1, copied=COPIED)
    assert context.record.failures == []
    chosen = [way for request, way in asked if request == "choose"]
    assert chosen == ["compiled", "eager", "hyperfast", "autotuned"]
    answered = [way for request, way in asked if request == "prepare"]
    assert answered == ["eager", "compiled", "hyperfast", "autotuned", "compiled"]
    assert context.record.lines[-1].startswith("not ready in time: ")
    words = context.record.facts["goal_words"]["against_best"]
    assert words == "against compiled, without autotuned not ready in time"


def test_nothing_is_compared_with_hyperfast_where_it_failed(context, monkeypatch):
    workers = {"eager": FakeWorker(prepared(), seconds(8.0)), "hyperfast": FakeWorker(RuntimeError("ended"))}
    monkeypatch.setattr(step, "start", lambda *_: dict(workers))
    step.compare(context, CPU, list(workers), step_ways.Sizes(), rounds=1, steps=1, copied=COPIED)
    assert context.record.facts["against_eager"] is None
    assert context.record.failures == ["hyperfast: ended", "hyperfast was not measured"]
    assert context.record.facts["goal_words"]["against_best"] == "hyperfast ended"


def test_bytes_of_a_step():
    """28 a generator weight with float32 states."""
    weights = 16 * step.NUM_GENERATED
    assert 28 * weights < step.bytes_of_generators("hyperfast") < 31 * weights
    assert step.bytes_of_generators("hyperfast_8bit") < 0.65 * step.bytes_of_generators("hyperfast")


@pytest.mark.slow
def test_every_way_computes_the_same():
    sizes = step_ways.Sizes(batch=4, z_dim=2, compiler="")
    values = {}
    for name in step_ways.WAYS:
        runner = StepRunner(name, CPU, sizes)
        assert runner.build() == runner.choose() == {}
        values[name] = runner.prepare()["values"]
    wanted = values["eager"]
    assert wanted[0] > 4 and max(wanted) < 20
    for name, got in values.items():
        assert got == pytest.approx(wanted, rel=step.TOLERANCE), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ways_in_processes(context):
    """The real protocol; one way that cannot work."""
    sizes = dataclasses.replace(step_ways.Sizes(), batch=2, z_dim=1, compiler="no such compiler")
    names = ["eager", "compiled", "hyperfast_no_graph"]
    found = step.compare(context, CPU, names, sizes, rounds=2, steps=1, copied=COPIED)
    assert [len(found.seconds[name]) for name in ("eager", "hyperfast_no_graph")] == [2, 2]
    assert len(context.record.failures) == 2  # the compiler's, and that `hyperfast` is not among the ways
    assert "no such compiler" in context.record.failures[0]
    assert median(found.seconds["eager"]) > 0


def test_plain_ways_generate_in_float32():
    model = step_ways.FloatGeneration(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate("fc3").dtype == torch.float32
        assert model(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16


def test_the_factored_reference_never_waits_for_the_device():
    """On tensors without values, of a GPU that need not be there, whoever asks for a value raises."""
    with FakeTensorMode(), torch.device("cuda"):
        columns = [[torch.empty(*shape) for shape in ((5, 3), (7, 3))] for _ in range(3)]
        vectors = [[torch.empty(N) for N in (5, 7)] for _ in range(5)]
        zs, old = ([torch.empty(3) for _ in range(2)] for _ in range(2))
        dzs, scale = step_ways._gradients(columns[0], vectors[0], zs, [torch.empty(4)])
        assert scale.is_cuda and len(dzs) == 2
        steps = torch.zeros((), dtype=torch.float64)
        step_ways._updated(*columns, *vectors[1:4], vectors[0], old, zs, vectors[4], scale, steps)
