from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given

from numprune.plans import Plan, read_plan
from tests.fuzz.strangers import documents, fuzz, named

GOOD: dict[str, Any] = {
    "version": 3,
    "family": "llama",
    "criterion": "obs",
    "allocation": "uniform",
    "compensation": "joint",
    "ratio": 0.3,
    "target": {"align": 8, "tensor_parallel": 1, "quantization_group": 1},
    "skips": False,
    "damping": 0.001,
    "seed": 0,
    "calibration": {"digest": "0" * 64, "rows": 4, "sequence_length": 8, "draw": {"text": ["a.txt"], "seed": 0}},
    "blocks": {
        "layers.0.mlp": {"units": 4, "kept": [0, 2]},
        "layers.0.attention": {"units": 2, "members": 2, "kept": [1], "kept_members": [[0]]},
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan") / "numprune_plan.json"


@fuzz
@given(documents(GOOD))
@example(b"\xff")
@example(b"[" * 100_000)
def test_a_plan_is_read_or_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = named(read_plan, path)
    if isinstance(found, Plan):
        for block in found.blocks.values():
            assert all(0 <= unit < block.units for unit in block.kept)
            assert sorted(set(block.kept)) == block.kept
            for members in block.kept_members or ():
                assert all(0 <= member < block.members for member in members)
                assert sorted(set(members)) == members


def test_a_folder_or_an_oversized_plan_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in str(named(read_plan, tmp_path))
    with (tmp_path / "plan").open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(read_plan, tmp_path / "plan"))
