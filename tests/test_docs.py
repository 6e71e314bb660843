"""The documentation builds without a warning, links included, and the README stays one page."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
CELL = re.compile(r"(?<!\\)\|")
ITEM = re.compile(r" *(?:-|\d+\.) ")
JOINED = re.compile(r"[.;] \d+\. \w")


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of each page, without its code."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        yield page.name, FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "commands" / "index.html").read_text(encoding="utf-8")
    assert "numprune prune ./my-model ./pruned" in commands  # generated from the parsers
    assert "[[gates]]" in (tmp_path / "recipe" / "index.html").read_text(encoding="utf-8")


def test_the_readme_is_one_page_and_its_links_resolve() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    targets = [target for target in LINK.findall(text) if "://" not in target]
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_row_of_a_table_is_one_line_with_as_many_cells_as_its_head() -> None:
    wrong, rows = [], 0
    for page, text in pages():
        for table in TABLE.findall(text):
            cells = [len(CELL.findall(row)) for row in table.splitlines()]
            rows += len(cells)
            wrong += [(page, row) for row, n in zip(table.splitlines(), cells, strict=True) if n != cells[0]]
    assert rows > 300
    assert wrong == []


def test_the_lines_of_a_list_item_are_indented_and_hold_no_other_item() -> None:
    wrong, items = [], 0
    for page, text in pages():
        indent = ""
        for line in text.splitlines():
            if start := ITEM.match(line):
                indent = " " * len(start[0])
                items += 1
            elif not line.strip():
                indent = ""
            if indent and (JOINED.search(line) or not (start or line.startswith(indent))):
                wrong.append((page, line))
    assert items > 100
    assert wrong == []


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in contents] == []
