"""What is printed in the end, gpu.md and gpu.json."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import ROOT, Outcome

MOST_LINES = 60  # of stdout and stderr together
WIDTH = 160


@dataclass(frozen=True)
class Goal:
    """fact: its name among the facts of `part`. sign: >= or <=. unit: x, % or s."""

    what: str
    part: str
    fact: str
    sign: str
    wanted: float
    unit: str
    note: str = ""

    def number(self, value: float) -> str:
        return {"x": f"{value:.2f}x", "%": f"{100 * value:.1f} %", "s": f"{value:.1f} s"}[self.unit]

    def reached(self, value: float) -> bool:
        return value >= self.wanted if self.sign == ">=" else value <= self.wanted


NOT_REACHED = "not reached"
PAIR = "generate_backward + adamw_generate of `full`: share of copy bandwidth"
EIGHT_BIT = "the same with 8-bit states (different mathematics)"
GOALS = (
    Goal(PAIR, "ops", "pair_share", ">=", 0.85, "%"),
    Goal("whole step, bfloat16 compute, against eager (TF32 on)", "step", "against_eager", ">=", 4.0, "x"),
    Goal("whole step against the best of PyTorch", "step", "against_best", ">=", 1.4, "x"),
    Goal(EIGHT_BIT, "step", "against_best_8bit", ">=", 2.0, "x"),
    Goal("peak memory of a step, of eager's with fused AdamW", "step", "memory", "<=", 0.78, "%"),
    Goal(EIGHT_BIT, "step", "memory_8bit", "<=", 0.45, "%"),
    Goal("`full` to 54.16 %, training", "train", "seconds_to_target", "<=", 30.0, "s", "10 wanted"),
)


def facts(outcomes: Sequence[Outcome], part: str) -> dict[str, Any]:
    return next((o.record.facts for o in outcomes if o.part.name == part), {})


def goal_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """what, measured, goal, whether it is reached. A part's fact `goal_words` says more by the name of a
    goal's fact: of the number, or why there is none."""
    rows = []
    for goal in GOALS:
        found = facts(outcomes, goal.part)
        value, said = found.get(goal.fact), found.get("goal_words", {}).get(goal.fact, "")
        wanted = f"{goal.sign} {goal.number(goal.wanted)}" + (f" ({goal.note})" if goal.note else "")
        if value is not None:
            verdict = "reached" if goal.reached(value) else NOT_REACHED
            measured = goal.number(value) + (f", {said}" if said else "")
        elif said.startswith(NOT_REACHED):
            verdict, measured = NOT_REACHED, said
        else:
            verdict, measured = "-", ": ".join(["not measured", *why_not(outcomes, goal.part, said)])
        rows.append([goal.what, measured, wanted, verdict])
    return rows


def why_not(outcomes: Sequence[Outcome], part: str, said: str) -> list[str]:
    """In words, why a part has no number for a goal; nothing where the part was not asked for."""
    why = said or next((f"{o.status}: {o.why}" for o in outcomes if o.part.name == part and o.why), "")
    return [clipped(why, 80)] if why else []


def machine_line(outcomes: Sequence[Outcome]) -> str:
    names = facts(outcomes, "machine").get("machine", {})
    said = ", ".join(value if name == "GPU" else f"{name} {value}" for name, value in names.items())
    return f"{said or 'machine not described (the part `machine` did not run)'}, {datetime.date.today()}"


def source() -> str:
    """The commit, where there is a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def clipped(text: str, width: int = WIDTH) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def part_lines(outcome: Outcome) -> list[str]:
    """What a part says on the terminal, its status first."""
    reasons = outcome.record.failures if outcome.status == "failed" else []
    said = outcome.why if not reasons else f"{len(reasons)} did not work"
    head = f"{outcome.part.name:<9} {outcome.status:<7} {outcome.seconds:4.0f} s  {said}"
    return [head, *(f"  {line}" for line in [*reasons, *outcome.record.lines])]


def terminal_lines(outcomes: Sequence[Outcome], out: Path, most: int = MOST_LINES) -> list[str]:
    """At most `most` lines: the longest parts are cut first."""
    goals = [
        f"  {verdict:<11} {what}: {value} ({wanted})" for what, value, wanted, verdict in goal_rows(outcomes)
    ]
    where = f"all tables: {out / 'gpu.md'}; logs: {out}/PART.log"
    ends = [machine_line(outcomes)], ["goals:", *goals, where]
    blocks = [part_lines(outcome) for outcome in outcomes]
    room = most - sum(map(len, ends))
    while sum(map(len, blocks)) > room:
        longest = max(blocks, key=len)
        if len(longest) <= 2:
            break
        longest[-2:] = ["  (more in gpu.md and the log)"]
    lines = [*ends[0], *(line for block in blocks for line in block), *ends[1]]
    return [clipped(line) for line in lines][:most]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def cells(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return [cells(header), "|" + " --- |" * len(header), *map(cells, rows)]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """gpu.md, for benchmarks/results/."""
    parts = [[o.part.name, o.part.what, o.status, f"{o.seconds:.0f}", clipped(o.why, 400)] for o in outcomes]
    lines = ["# `python -m benchmarks.gpu`", "", f"{machine_line(outcomes)}, commit {source()}."]
    lines += ["", "## Goals", "", *table_lines(["goal", "measured", "wanted", ""], goal_rows(outcomes))]
    lines += ["", "## Parts", "", *table_lines(["part", "what", "status", "seconds", "why"], parts)]
    for outcome in outcomes:
        record = outcome.record
        if record.tables or record.lines:
            lines += ["", f"## {outcome.part.name}"]
        if record.lines and not record.tables:
            lines += ["", *(f"- {line}" for line in record.lines)]
        for table in record.tables:
            lines += ["", f"### {table.title}", "", *table_lines(table.header, table.rows)]
    return "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """gpu.md and gpu.json, each whole or not at all."""
    values = [
        {"part": o.part.name, "status": o.status, "seconds": o.seconds, "why": o.why, **asdict(o.record)}
        for o in outcomes
    ]
    texts = {"gpu.md": markdown(outcomes), "gpu.json": json.dumps(values, indent=1) + "\n"}
    for name, text in texts.items():
        new = out / f"{name}.new"
        new.write_text(text)
        os.replace(new, out / name)
