"""What a part found out. It lies in DIR/PART.json and is written anew at every addition, so a part that is
killed leaves what it had."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A part that has nothing to do here; the message says why."""


@dataclass
class Table:
    """For gpu.md."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Record:
    """lines: for the terminal, few and short. facts: plain values by name, which goals are held against.
    failures: what did not work, one line each; a part with any has failed."""

    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    @classmethod
    def load(cls, path: Path) -> Record:
        """What `path` holds; an empty record where there is no such file."""
        if not path.exists():
            return cls()
        values = json.loads(path.read_text())
        return cls(**values | {"tables": [Table(**table) for table in values["tables"]]})


class Context:
    """What a part works with: `out`, the folder of results; the seconds it has; and its record.

    Raises OSError where `out` cannot be written.
    """

    def __init__(self, name: str, out: Path, seconds: float, data: Path | None = None):
        self.path, self.out, self.data = out / f"{name}.json", out, data
        self.record = Record()
        self.end = time.monotonic() + seconds
        self.save()

    def remaining(self) -> float:
        """Seconds until the part is stopped."""
        return self.end - time.monotonic()

    def line(self, text: str) -> None:
        """One more line for the terminal."""
        self.record.lines.append(text)
        self.save()

    def fact(self, **values: Any) -> None:
        """Numbers and words for gpu.json and the goals."""
        self.record.facts |= values
        self.save()

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for gpu.md; takes the place of an earlier one of this title."""
        made = Table(title, list(header), [list(row) for row in rows])
        self.record.tables = [table for table in self.record.tables if table.title != title] + [made]
        self.save()

    def fail(self, what: str) -> None:
        """Something did not work; the part goes on and has failed in the end."""
        print(f"FAILED: {what}", flush=True)
        self.record.failures.append(what)
        self.save()

    def skip(self, why: str) -> None:
        """Nothing of this part can be done here."""
        self.record.skipped = why
        self.save()

    def save(self) -> None:
        """Whole or not at all: the reader may come at any moment."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self.record), indent=1))
        os.replace(new, self.path)
