"""The examples: all recipes and policies are valid, and the notebook runs."""

from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from numprune.flows import recipe
from numprune.serving import gates

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
POLICY = EXAMPLES / "policy.toml"
RECIPES = sorted(set(EXAMPLES.glob("*.toml")) - {POLICY})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example_recipes_are_valid(path: Path) -> None:
    found = recipe.load(path)
    heldout = {
        "digits-vit": EXAMPLES / "digits" / "heldout",
        "digits-swin": EXAMPLES / "digits-swin" / "heldout",
        "image-generator": EXAMPLES / "images" / "heldout.safetensors",
    }
    assert found.data.heldout == [str(heldout.get(path.stem, EXAMPLES / "text" / "heldout.jsonl"))]
    assert found.registry.name.startswith(path.stem)


def test_the_example_policy_is_valid() -> None:
    assert len(gates.read_policy(POLICY).gates) == 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.stem)
def test_example_pipelines_optimize_then_promote(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "release" in yaml.safe_load(text).get("jobs", yaml.safe_load(text))
    assert text.index("numprune optimize") < text.index("registry promote")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "notebook-output" / "pruned" / "README.md").is_file()
    assert (tmp_path / "notebook-output" / "pruned-onnx" / "model.onnx").is_file()
    stored = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    produced, shown = (
        [
            {output.output_type for output in cell.get("outputs", []) if output.get("name") != "stderr"}
            for cell in book.cells
        ]
        for book in (notebook, stored)
    )
    assert produced == shown  # every cell shows what it gives
