"""Every ```python block of docs/*.md and the README runs, a page's blocks in order in one namespace."""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TORCHRUN = "# torchrun"  # a block that begins so is a program for two processes


def blocks(page: Path) -> list[tuple[int, str]]:
    """(number of the line before it, code) of every ```python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start()) + 1, m.group(1)) for m in found]


def program(page: Path, line: int, code: str):
    """The block, compiled so that errors name the page and its own line numbers."""
    return compile("\n" * line + code, str(page), "exec")


def run(page: Path) -> None:
    """Runs the page's blocks; an error carries the place in the page."""
    namespace: dict = {}
    for line, code in blocks(page):
        if code.startswith(TORCHRUN):
            continue
        try:
            exec(program(page, line, code), namespace)
        except BaseException as error:
            places = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
            at = places[0] if places else getattr(error, "lineno", line)
            error.add_note(f"{page.name}, line {at}")
            raise


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Pages may write files where they run, and leave compiled code behind."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch._dynamo.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, workplace):
    assert blocks(page)
    run(page)


PROGRAMS = [(page, *block) for page in PAGES for block in blocks(page) if block[1].startswith(TORCHRUN)]


@pytest.mark.parametrize(
    ("page", "line", "code"), PROGRAMS, ids=[f"{page.stem}-{line}" for page, line, _ in PROGRAMS]
)
def test_program_for_two_processes(page, line, code, workplace):
    (workplace / "program.py").write_text("\n" * line + code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{page.name}, block after line {line}:\n{done.stderr}"


def test_an_error_names_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 1\n```\n\ntext\n\n```python\nb = a + 1\nassert b == 3\n```\n")
    with pytest.raises(AssertionError) as caught:
        run(page)
    assert caught.value.__notes__ == ["page.md, line 11"]
    page.write_text("```python\n1\n```\n\n```python\nx = = 2\n```\n")
    with pytest.raises(SyntaxError) as caught:
        run(page)
    assert caught.value.__notes__ == ["page.md, line 6"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_code_is_one_that_runs(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh"} and set(fences[1::2]) == {""}


def anchors(page: Path) -> set[str]:
    """The headings as links name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists() and (not anchor or anchor in anchors(target)), link
