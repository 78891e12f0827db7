"""Tables of ratios at the end of `pytest benchmarks --benchmark-only`; `--results FILE` also writes them as
Markdown."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machine import describe_machine

_tables: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write the tables of ratios to this Markdown file")


@pytest.fixture
def report():
    """report(title, header, rows): adds a table to the summary."""

    def add(title: str, header: list[str], rows: list[list[str]]) -> None:
        lines = [f"### {title}", "", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
        _tables.append("\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]))

    return add


def pytest_terminal_summary(terminalreporter, config):
    if not _tables:
        return
    text = "\n\n".join([describe_machine(), *_tables]) + "\n"
    terminalreporter.section("ratios")
    terminalreporter.write(text)
    if path := config.getoption("--results"):
        path.write_text(text)
