"""The examples: every recipe and policy in them is one."""

from pathlib import Path

import pytest
import yaml

from numprune.flows import recipe
from numprune.serving import gates

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
POLICY = EXAMPLES / "policy.toml"
RECIPES = sorted(set(EXAMPLES.glob("*.toml")) - {POLICY})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_examples_is_valid(path: Path) -> None:
    found = recipe.load(path)
    assert found.data.heldout == [str(EXAMPLES / "text" / "heldout.jsonl")]
    assert found.registry.name.startswith(path.stem)


def test_the_policy_of_the_examples_is_valid() -> None:
    assert len(gates.read_policy(POLICY).gates) == 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.stem)
def test_a_pipeline_of_the_examples_optimizes_and_then_promotes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "release" in yaml.safe_load(text).get("jobs", yaml.safe_load(text))
    assert text.index("numprune optimize") < text.index("registry promote")
