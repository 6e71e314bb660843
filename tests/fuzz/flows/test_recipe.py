import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numprune.errors import NumpruneError
from numprune.flows import recipe
from numprune.flows.recipe import EMBEDDED_RECIPE, Recipe
from tests.fuzz.strangers import NAMES, fuzz, named

GOOD = EMBEDDED_RECIPE.read_text()
KEYS = [f"{section}.{key}" for section, keys in tomllib.loads(GOOD).items() if section != "gates" for key in keys]
KEYS += ["gates", "model", "model.path.more", "nothing.at_all", "prune.", ".", "a.b.c", "model.trust_remote_code"]
VALUES = ["0", "-1", "1e999", "nan", "inf", "0x" + "f" * 5000, "9" * 5000, "true", "[]", "{}", "[[]]", "[" * 5000]
VALUES += ["{a=" * 3000, "2026-11-21", "'''", '"\\ud800"', '"\\u0000"', "['a', 1]", "~nobody-of-that-name/x", *NAMES]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "recipe.toml"


def check(found: Any, where: Path) -> None:
    if isinstance(found, NumpruneError):
        return
    assert isinstance(found, Recipe)
    again = recipe.load(rewritten(found, where))
    assert again.digest == found.digest  # whatever was accepted can be written, and is the same when it is read


def rewritten(found: Recipe, where: Path) -> Path:
    where.with_name("again.toml").write_text(found.to_toml(), encoding="utf-8")
    return where.with_name("again.toml")


@fuzz
@given(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.integers().map(str) | st.floats().map(str) | st.text())
@example("benchmark.prompts", "0x" + "f" * 5000)
@example("prune.ratio", "[" * 5000)
@example("prune.ratio", "9" * 5000)
@example("model.path", "~nobody-of-that-name/x")
@example("model.path", "\udcff")
@example("gates", '[{metric="a.b", bound="point", max=0x' + "f" * 5000 + "}]")
def test_any_override_is_accepted_or_refused(path: Path, key: str, value: str) -> None:
    check(named(recipe.load, EMBEDDED_RECIPE, [f"{key}={value}"]), path)


@fuzz
@given(st.data())
@example(None)
def test_any_recipe_is_accepted_or_refused(path: Path, data: st.DataObject | None) -> None:
    if data is None:
        content = ("[model]\npath = " + "[" * 100_000).encode()
    elif data.draw(st.booleans()):
        lines = GOOD.splitlines()
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(lines) - 1))
            name = lines[place].partition("=")[0].strip() or "x"
            lines[place] = data.draw(
                st.sampled_from([f"{name} = {value}" for value in VALUES] + ["", "[[gates]]", "[x]", "x = 1"])
            )
        content = "\n".join(lines).encode(errors="surrogatepass")
    else:
        content = data.draw(st.binary(max_size=100))
    path.write_bytes(content)
    check(named(recipe.load, path), path)


def test_an_oversized_recipe_is_not_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "exceeds the" in str(named(recipe.load, path))
