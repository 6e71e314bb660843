"""The tests named in the table of faults exist."""

import ast
import re
from functools import cache
from pathlib import Path

import numprune

TESTS = Path(__file__).parents[1]
TABLE = Path(numprune.__file__).parent / "flows" / "FAULTS.md"


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_its_test() -> None:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith(("| fault |", "| --- |"))]
    assert len(rows) > 30
    missing = []
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`", row)
        assert named, f"no test: {row}"
        for file, name in named:
            path = TESTS.parent / file
            if not path.exists() or (name and name not in functions(path)):
                missing.append(f"{file}::{name}")
    assert not missing
