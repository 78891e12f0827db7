"""Whether batch norm's effect comes out as it was reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyperfast.analysis import table
from train.studies.study import NORMED, PLAIN

STATES = {"initial": "at initialisation", "trained": "trained"}
MARKS = {  # in the table
    "as reported": "yes",
    "not as reported": "**no**",
    "no difference": "no difference",
    "not comparable": "-",
}
Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # by state, model, quantity


@dataclass(frozen=True)
class Quantity:
    """A figure that batch norm is said to make smaller (larger: larger).

    key: its name in CSV and JSON. words: what it is. effect: what the report says. report, notebook: without
    and with batch norm, None where only the direction is said. unit: "%" or none.
    """

    key: str
    words: str
    effect: str
    report: tuple[float, float] | None = None
    notebook: tuple[float, float] | None = None
    larger: bool = False
    unit: str = ""

    def text(self, value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value:.2f} %" if self.unit else f"{value:.4g}"

    def pair(self, values: Sequence[float | None] | None) -> str:
        return "" if values is None else " → ".join(map(self.text, values))

    def verdict(self, plain: float | None, normed: float | None) -> str:
        """Whether it is as reported; numbers that read the same are no difference."""
        if plain is None or normed is None or not (math.isfinite(plain) and math.isfinite(normed)):
            return "not comparable"
        if self.text(plain) == self.text(normed):
            return "no difference"
        return "as reported" if (normed > plain) == self.larger else "not as reported"


def pairs(quantity: Quantity, values: Values) -> dict[str, tuple[float | None, float | None]]:
    """By state: without and with batch norm, of the states that have both networks."""
    return {
        state: (by_model[PLAIN].get(quantity.key), by_model[NORMED].get(quantity.key))
        for state in STATES
        if PLAIN in (by_model := values.get(state, {})) and NORMED in by_model
    }


def sentences(quantities: Sequence[Quantity], values: Values) -> list[str]:
    """For each quantity whether batch norm's effect is the reported one, with the numbers."""
    lines = []
    for q in quantities:
        found = pairs(q, values)
        if not found:
            continue
        sources = [
            f"{name} {q.pair(own)}" for name, own in (("report", q.report), ("notebook", q.notebook)) if own
        ]
        said = f" ({', '.join(sources)})" if sources else ""
        here = "; ".join(
            f"{STATES[state]} here {q.pair(pair)}, **{q.verdict(*pair)}**" for state, pair in found.items()
        )
        lines.append(f"- {q.effect[0].upper()}{q.effect[1:]}, {q.words}{said}: {here}.")
    return lines


def summary(found: Sequence[tuple[Sequence[Quantity], Values]]) -> str:
    """One table of all quantities of all analyses; empty where there are none."""
    rows = []
    for quantities, values in found:
        for q in quantities:
            if here := pairs(q, values):
                ours = [
                    cell
                    for state in STATES
                    for cell in (
                        (q.pair(here[state]), MARKS[q.verdict(*here[state])]) if state in here else ("", "")
                    )
                ]
                rows.append([f"{q.effect}: {q.words}", q.pair(q.report), q.pair(q.notebook), *ours])
    header = [f"{PLAIN} → {NORMED}", "report", "notebook"]
    header += [cell for words in STATES.values() for cell in (f"here, {words}", "as reported")]
    return table(header, rows) if rows else ""
