"""`python -m benchmarks.gpu` without a GPU: its processes, their time limits, what it prints and writes."""

import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, parts, report, sanitizer, tests, train
from benchmarks.gpu.parts import PARTS, ROOT, Outcome, Part, one_line, run_in_process
from benchmarks.gpu.record import Context, Record, Skipped

FAKES = {
    "good": """
        def run(context):
            context.line("a line")
            context.table("T", ["a"], [["1"]])
            context.fact(pair_share=0.9)
        """,
    "raises": """
        def run(context):
            context.line("before")
            raise ValueError("first line\\nsecond line")
        """,
    "crashes": """
        import os
        def run(context):
            print("last words", flush=True)
            os.abort()
        """,
    "hangs": """
        import subprocess, sys, time
        def run(context):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            context.fact(child=child.pid)
            context.line("so far")
            print("waiting", flush=True)
            time.sleep(300)
        """,
    "deaf": """
        import signal, time
        def run(context):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(300)
        """,
    "has_nothing": """
        from benchmarks.gpu.record import Skipped
        def run(context):
            raise Skipped("no data: none")
        """,
    "leaves_a_process": """
        import subprocess, sys
        def run(context):
            context.fact(child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]).pid)
        """,
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, seconds): a part whose module is one of FAKES."""
    for name, text in FAKES.items():
        (tmp_path / f"part_{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, seconds=30.0: Part(name, seconds, "a fake", f"part_{name}")


@pytest.fixture
def context(tmp_path):
    return Context("part", tmp_path, 30.0)


def is_running(pid: int) -> bool:
    """Not so for a zombie that waits for its new parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(pid: int) -> None:
    end = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_part_that_works(fake, tmp_path):
    outcome = run_in_process(fake("good"), tmp_path)
    assert (outcome.status, outcome.why) == ("ok", "")
    assert outcome.record.lines == ["a line"]
    assert outcome.record.tables[0].rows == [["1"]]
    assert outcome.record.facts == {"pair_share": 0.9}


def test_a_part_that_raises(fake, tmp_path):
    outcome = run_in_process(fake("raises"), tmp_path)
    assert (outcome.status, outcome.why) == ("failed", "ValueError: first line")
    assert outcome.record.lines == ["before"]
    assert "Traceback" in (tmp_path / "raises.log").read_text()


def test_a_part_that_crashes(fake, tmp_path):
    outcome = run_in_process(fake("crashes"), tmp_path)
    assert outcome.status == "failed"
    assert outcome.why.startswith("killed by SIGABRT: ") and "last words" in outcome.why


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_what_it_had(fake, tmp_path):
    start = time.monotonic()
    outcome = run_in_process(fake("hangs", 4.0), tmp_path)
    assert time.monotonic() - start < 20
    assert outcome.status == "timeout"
    assert outcome.why == "stopped after its 4 s; last: waiting"
    assert outcome.record.lines == ["so far"]
    assert_ends(outcome.record.facts["child"])


def test_a_part_that_ignores_being_asked_is_killed(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "end_group", functools.partial(parts.end_group, patience=0.5))
    start = time.monotonic()
    assert run_in_process(fake("deaf", 1.0), tmp_path).status == "timeout"
    assert time.monotonic() - start < 20


def test_a_part_with_nothing_to_do(fake, tmp_path):
    outcome = run_in_process(fake("has_nothing"), tmp_path)
    assert (outcome.status, outcome.why) == ("skipped", "no data: none")


def test_processes_that_a_part_leaves_are_ended(fake, tmp_path):
    outcome = run_in_process(fake("leaves_a_process"), tmp_path)
    assert outcome.status == "ok"
    assert_ends(outcome.record.facts["child"])


def test_an_old_record_is_not_taken_for_a_new_one(fake, tmp_path):
    run_in_process(fake("good"), tmp_path)
    assert run_in_process(Part("good", 30.0, "", "no_such_module"), tmp_path).record.lines == []


def test_the_command(fake, tmp_path, monkeypatch, capsys):
    three = tuple(fake(name) for name in ("good", "raises", "has_nothing"))
    monkeypatch.setattr(command, "PARTS", three)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    lines = report.terminal_lines
    monkeypatch.setattr(report, "terminal_lines", lambda *a: asked.append(a[-1]) or lines(*a))
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    assert asked == [report.MOST_LINES - len(three)]
    said = capsys.readouterr()
    printed = said.out.splitlines()
    assert said.err.splitlines() == [f"{part.name} ..." for part in three]
    assert [line.split()[:2] for line in printed if line.split()[0] in FAKES] == [
        ["good", "ok"], ["raises", "failed"], ["has_nothing", "skipped"],
    ]  # fmt: skip
    assert [entry["status"] for entry in json.loads((tmp_path / "out/gpu.json").read_text())] == [
        "ok", "failed", "skipped",
    ]  # fmt: skip
    assert "ValueError: first line" in (tmp_path / "out/gpu.md").read_text()
    assert command.main(["--out", str(tmp_path / "out"), "--parts", "has_nothing,good"]) == 0
    assert [e["part"] for e in json.loads((tmp_path / "out/gpu.json").read_text())] == ["good", "has_nothing"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "GPU" in said.err


def test_bad_options(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--parts", "step,dance"])
    assert "there is no part dance; there are build, tests" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path / "file" / "out")])


def test_the_list(capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [p.name for p in PARTS]


def test_all_parts_fit_in_nine_minutes_and_exist():
    """With half a minute for their imports and ends."""
    assert sum(part.seconds for part in PARTS) <= 510
    for part in PARTS:
        path = ROOT / (part.module_name().replace(".", "/") + ".py")
        assert "def run(context: Context) -> None" in path.read_text()


def outcome(name: str, status: str = "ok", lines: int = 1, **facts) -> Outcome:
    record = Record(lines=[f"line {i} " + "x" * 300 for i in range(lines)], facts=facts)
    record.failures = [f"failure {i}" for i in range(lines)] if status == "failed" else []
    part = next(part for part in PARTS if part.name == name)
    return Outcome(part, status, 1.0, "; ".join(record.failures), record)


def test_no_more_than_sixty_lines(tmp_path):
    outcomes = [outcome(part.name, "failed", lines=40) for part in PARTS]
    lines = report.terminal_lines(outcomes, tmp_path, 53)
    assert len(lines) == 53
    assert max(map(len, lines)) <= report.WIDTH
    for part in PARTS:
        assert any(line.startswith(part.name) for line in lines)
    assert sum("not measured: failed: failure 0" in line for line in lines) == len(report.GOALS)
    few = report.terminal_lines(outcomes[:1], tmp_path)
    assert sum("failure" in line for line in few) == 40


def test_goals_are_held_against_what_was_measured_and_nothing_else():
    rows = report.goal_rows([
        outcome("ops", pair_share=0.851), outcome("step", against_eager=3.99, against_best=1.4, memory=0.781),
        outcome("train", train_seconds=200.0),
    ])  # fmt: skip
    assert [(row[1], row[3]) for row in rows] == [
        ("85.1 %", "reached"), ("3.99x", "not reached"), ("1.40x", "reached"), ("not measured", "-"),
        ("78.1 %", "not reached"), ("not measured", "-"), ("not measured", "-"),
    ]  # fmt: skip


def test_goals_say_what_they_are_held_against_and_why_there_is_no_number():
    words = {"against_best": "against graph, without autotuned not ready in time", "memory": "fused it broke"}
    rows = report.goal_rows([
        outcome("ops", "failed"), outcome("step", against_best=1.5, goal_words=words),
        outcome("train", goal_words={"seconds_to_target": "not reached (best 51.20 %)"}),
    ])  # fmt: skip
    assert [(row[1], row[3]) for row in rows] == [
        ("not measured: failed: failure 0", "-"), ("not measured", "-"),
        ("1.50x, against graph, without autotuned not ready in time", "reached"), ("not measured", "-"),
        ("not measured: fused it broke", "-"), ("not measured", "-"),
        ("not reached (best 51.20 %)", "not reached"),
    ]  # fmt: skip


def test_the_markdown(tmp_path):
    made = outcome("ops")
    context = Context("ops", tmp_path, 1.0)
    context.table("Title", ["a|b"], [["1"]])
    context.table("Title", ["a|b"], [["2"]])  # a newer one takes its place
    made.record.tables = context.record.tables
    report.write([made], tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert "### Title\n\n| a\\|b |\n| --- |\n| 2 |\n" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "ops.json"]


def test_one_line_of_an_error():
    assert one_line(ValueError("\n a \n b")) == "ValueError: a"
    assert one_line(KeyError()) == "KeyError"


# ---- build ----


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def tree(tmp_path):
    """A repository with one source, and modules newer than it."""
    for name in ("csrc/cpu/a.cpp", "setup.py", f"hyperfast/_cpu{SUFFIX}", f"hyperfast/_cuda{SUFFIX}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000, 1000))
    return tmp_path


def test_what_is_outdated(tree):
    assert build.outdated(tree) == []
    os.utime(tree / "csrc/cpu/a.cpp", (2000, 2000))
    assert build.outdated(tree) == ["_cpu", "_cuda"]
    os.utime(tree / f"hyperfast/_cpu{SUFFIX}", (2000, 2000))
    assert build.outdated(tree) == ["_cuda"]
    (tree / f"hyperfast/_cuda{SUFFIX}").rename(tree / "hyperfast/_cuda.cpython-27-of-another.so")
    os.utime(tree / "hyperfast/_cuda.cpython-27-of-another.so", (2000, 2000))
    assert build.outdated(tree) == ["_cuda"]


def test_a_build(tree, context):
    build.build(context, tree)
    assert context.record.failures == [] and "newer" in context.record.lines[0]
    (tree / f"hyperfast/_cuda{SUFFIX}").unlink()
    (tree / "setup.py").write_text("print('cc: error: no'); raise SystemExit(3)")
    build.build(context, tree)
    assert context.record.failures == [
        "the build: exit status 3: cc: error: no",
        "there is no hyperfast._cuda after the build",
    ]


# ---- tests ----


def test_which_files_are_run():
    found = dict(tests.files(ROOT))
    assert found["tests/kernels/test_generate.py"] == "not slow"
    for op in ("generate", "generate_backward", "update_generate", "hyper_linear"):
        assert found[f"tests/test_cuda_{op}.py"] == "gpu and not slow"
    assert "tests/test_states.py" not in found


@pytest.mark.slow
def test_no_test_that_needs_a_gpu_is_missed():
    command = ["-m", "pytest", "--collect-only", "-q", "-m", "gpu and not slow", "tests"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    marked = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(marked) > 5 and marked <= set(dict(tests.files(ROOT)))


REPORT = """<testsuites><testsuite><testcase name="test_good"/><testcase name="test_bad"><failure
message="assert 1 == 2&#10;more">long</failure></testcase><testcase name="test_skipped"><skipped/></testcase>
<testcase name="b"><error message="No module"/></testcase></testsuite></testsuites>"""


def test_counts_of_tests(context, tmp_path, monkeypatch):
    def run(command, **options):
        (path,) = (word.partition("=")[2] for word in command if word.startswith("--junitxml="))
        with open(path, "w") as file:
            file.write(REPORT)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(tests.subprocess, "run", run)
    tests.run_files(context, [("a/test_a.py", "gpu"), ("test_b.py", "gpu")], tmp_path, 1)
    assert context.record.facts == {"tests_passed": 2, "tests_failed": 4, "tests_skipped": 2}
    failures = ["a/test_a.py::test_bad: assert 1 == 2", "a/test_a.py::b: No module"]
    assert context.record.failures[:2] == failures


@pytest.mark.slow
def test_results_of_tests(context, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n slow\n")
    (tmp_path / "test_mixed.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    context.end = time.monotonic() + 120
    tests.run_files(
        context, [(name, "not slow") for name in ("test_mixed.py", "test_broken.py")], tmp_path, 2
    )
    failures = context.record.failures
    assert failures[0].startswith("test_mixed.py::test_bad: AssertionError: not equal")
    assert "no_such_module" in failures[1] or "collection failure" in failures[1]
    assert context.record.facts == {"tests_passed": 1, "tests_failed": 2, "tests_skipped": 1}


def test_a_test_that_hangs(tmp_path):
    (tmp_path / "test_hangs.py").write_text("import time\ndef test_it(): time.sleep(100)\n")
    result = tests.run_file("test_hangs.py", "not slow", tmp_path, tmp_path, 1.0)
    assert result.failures[0].startswith("test_hangs.py: not done in time")
    late = tests.run_file("test_hangs.py", "not slow", tmp_path, tmp_path, 0.0)
    assert late.failures == ["test_hangs.py: there was no time left to start it"]


# ---- sanitizer ----

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n7 kernels ran\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= COMPUTE-SANITIZER\n7 kernels ran\n"
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
BAD = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n=========     at f\n"
    "7 kernels ran\n========= ERROR SUMMARY: 12 errors\n"
)


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_clean_run(tool):
    assert sanitizer.judge(tool, "triton", CLEAN[tool], 0).problem == ""


@pytest.mark.parametrize(
    "output, status, said",
    [
        (BAD, 99, "12 errors; first: Invalid __global__ read of size 4 bytes"),
        (CLEAN["memcheck"], None, "not done in time"),
        (CLEAN["memcheck"], 99, "0 errors; first: see the log"),
        ("ImportError: no\n", 1, "the runs ended with status 1: ImportError: no"),
        ("7 kernels ran\n", 0, "no summary"),
    ],
)
def test_a_run_that_is_not_clean(output, status, said):
    assert sanitizer.judge("memcheck", "cuda", output, status).problem.startswith(said)


def test_the_filter_lets_every_kernel_of_ours_through():
    sources = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "csrc/cuda").glob("*.cu*")]
    names = {
        name for path in sources for name in re.findall(r"(?:def|void|\))\s+(\w+_kernel)\(", path.read_text())
    }
    assert {"generate_fwd_kernel", "update_generate_kernel", "hyper_linear_sum_kernel"} <= names
    assert [name for name in names if not any(part in name for part in sanitizer.KERNELS)] == []
    torch_kernels = (
        "batch_norm_collect_statistics_kernel",
        "batch_norm_backward_reduce",
        "gemv",
        "elementwise",
    )
    assert not any(part in name for name in torch_kernels for part in sanitizer.KERNELS)


@pytest.mark.parametrize(
    "output, status, said",
    [
        (BAD, 99, ""),
        (CLEAN["memcheck"], 0, "a planted error was not found, so the filter may leave out everything: exit"),
        (BAD.replace("Invalid", "Valid"), None, "a planted error was not found"),
    ],
)
def test_a_planted_error(output, status, said):
    problem = sanitizer.judge_planted("triton", output, status).problem
    assert problem.startswith(said) and bool(problem) == bool(said)


def test_all_tools_on_all_engines(context, tmp_path):
    program = tmp_path / "sanitizer.py"
    text = {tool: output for tool, output in CLEAN.items()}
    program.write_text(
        f"import sys\ntext = {text!r}\nbad = {BAD!r}\n"
        "tool = sys.argv[sys.argv.index('--tool') + 1]\n"
        "assert 'kns=generate_' in sys.argv\n"
        "planted = sys.argv[-2] == 'planted' and sys.argv[-1] == 'triton'\n"
        "wrong = sys.argv[-2] != 'planted' and (tool, sys.argv[-1]) == ('memcheck', 'cuda')\n"
        "print(bad if planted or wrong else text[tool])\n"
    )
    sanitizer.check(context, [sys.executable, str(program)], ("triton", "cuda"))
    assert context.record.failures == [
        "memcheck, cuda: 12 errors; first: Invalid __global__ read of size 4 bytes",
        "memcheck, cuda: a planted error was not found, so the filter may leave out everything: "
        "exit status 0: 7 kernels ran | ========= ERROR SUMMARY: 0 errors",
    ]
    assert ["memcheck", "triton", "planted", "found, as it must be"] in context.record.tables[0].rows
    assert context.record.lines[0].count("7 runs") == 3


def test_no_sanitizer(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Skipped, match="compute-sanitizer was not found"):
        sanitizer.find_sanitizer()


# ---- training ----

METRICS = """epoch,train_loss,test_accuracy,seconds,evaluation_seconds,startup_seconds
1,4.0,10.0,3.0,0.5,2.0
2,2.0,54.16,1.5,0.5,
3,1.0,60.0,1.5,0.5,
"""


def run_training(context, monkeypatch, metrics: str, status: int = 0) -> Path:
    """Where it ran."""
    places = []

    def run(command, **options):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        places.append(folder)
        (folder / "metrics.csv").write_text(metrics)
        for name in ("best.pt", "last.pt", "report.md"):
            (folder / name).write_text("")
        options["stdout"].write(b"error: it broke\n")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(train.subprocess, "run", run)
    train.train(context, [*train.OPTIONS, "--data", "d"])
    return places[0]


def test_seconds_until_the_target(context, monkeypatch):
    place = run_training(context, monkeypatch, METRICS)
    assert not place.exists()
    assert sorted(p.name for p in (context.out / "run").iterdir()) == ["metrics.csv", "report.md"]
    facts = context.record.facts
    assert (facts["seconds_to_target"], facts["train_epochs"], facts["train_startup_seconds"]) == (4.5, 2, 2)
    assert context.record.failures == []
    assert context.record.lines[0].startswith("54.16 % of test images: 4.5 s of training (2.0 s of them")


def test_a_target_that_is_not_reached(context, monkeypatch):
    run_training(context, monkeypatch, "\n".join(METRICS.splitlines()[:2]) + "\n", status=2)
    assert "seconds_to_target" not in context.record.facts
    assert "54.16 % was not reached" in context.record.lines[0]
    assert context.record.facts["goal_words"] == {"seconds_to_target": "not reached (best 10.00 %)"}
    assert context.record.failures == ["exit status 2: error: it broke"]


def test_the_options_are_those_of_the_training_command():
    from train.cifar100 import parse

    args = parse([*train.OPTIONS, "--data", "d"])
    assert (args.fused, args.precision, args.target_accuracy) == (True, "bf16", 54.16)
    assert args.save_every == 1000


@pytest.mark.parametrize("room, wanted", [(train.CHECKPOINTS, "memory"), (train.CHECKPOINTS - 1, "out")])
def test_checkpoints_go_to_memory_where_there_is_room(monkeypatch, tmp_path, room, wanted):
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(train, "MEMORY", tmp_path / "memory")
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    assert train.workplace(tmp_path / "out") == tmp_path / wanted
    monkeypatch.setattr(train, "MEMORY", tmp_path / "no such folder")
    assert train.workplace(tmp_path / "out") == tmp_path / "out"


def test_no_data(monkeypatch, tmp_path):
    monkeypatch.delenv("HYPERFAST_DATA", raising=False)
    for given in (None, tmp_path / "nowhere"):
        with pytest.raises(Skipped, match="no data"):
            train.find_data(given)
    monkeypatch.setenv("HYPERFAST_DATA", str(tmp_path))
    assert train.find_data(None) == tmp_path.resolve()
