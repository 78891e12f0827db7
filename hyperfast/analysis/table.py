"""Markdown tables, and rows of CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def records(columns: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Rows by column name, of columns that are as long as each other; tensors [n] as numbers."""
    plain = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]


def counted(batches: int) -> str:
    """ "1 batch" or "2 batches"."""
    return "1 batch" if batches == 1 else f"{batches} batches"


def shown(name: str) -> str:
    """A name in the model without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
