from pathlib import Path

import pytest

from numprune.export import manifest
from numprune.flows.bundle import make_release
from numprune.flows.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "model": {"path": "embedded"},
        "data": {"calibration": "embedded", "heldout": "embedded"},
        "gates": [{"metric": "sizes.parameters.ratio", "bound": "point", "max": 1.0}],
        "registry": {"name": "tiny"},
    }
)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    for name, file in [
        ("checkpoint", "numprune_plan.json"),
        ("onnx", "model.onnx"),
        ("judged", "report.json"),
        ("answers", "reference-answers.json"),
    ]:
        with manifest.creating(tmp_path / name, kind=name) as folder:
            (folder / file).write_text(name)
            (folder / "report.md").write_text("text")
            (folder / "report.html").write_text("page")
    return {"checkpoint": tmp_path / "checkpoint", "onnx": tmp_path / "onnx"}


def test_a_release_holds_complete_parts_and_the_same_content_gives_the_same_release(
    tmp_path: Path, parts: dict[str, Path]
) -> None:
    release = make_release(tmp_path / "w", RECIPE, parts, tmp_path / "judged", tmp_path / "answers")
    whole = manifest.verify(release)
    assert whole.kind == "release"
    for name, part in parts.items():
        assert manifest.verify(release / name).digest == manifest.read(part).digest == whole.parents[name]
    assert (release / "plan.json").read_text() == "checkpoint"
    assert (release / "report.json").read_text() == "judged"
    assert (release / "report.html").read_text() == "page"
    assert (release / "reference-answers.json").read_text() == "answers"
    elsewhere = make_release(tmp_path / "other", RECIPE, parts, tmp_path / "judged", tmp_path / "answers")
    assert manifest.read(elsewhere).digest == whole.digest


def test_a_damaged_release_is_made_again(
    tmp_path: Path, parts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    release = make_release(tmp_path / "w", RECIPE, parts, tmp_path / "judged", tmp_path / "answers")
    digest = manifest.read(release).digest
    (release / "onnx" / "model.onnx").write_text("onnX")
    assert make_release(tmp_path / "w", RECIPE, parts, tmp_path / "judged", tmp_path / "answers") == release
    assert manifest.verify(release).digest == digest
    assert "is damaged" in caplog.text


def test_another_recipe_is_another_release(tmp_path: Path, parts: dict[str, Path]) -> None:
    other = Recipe.model_validate({**RECIPE.model_dump(), "prune": {"ratio": 0.1}})
    first, second = (
        make_release(tmp_path / "w", recipe, parts, tmp_path / "judged", tmp_path / "answers")
        for recipe in (RECIPE, other)
    )
    assert first != second
