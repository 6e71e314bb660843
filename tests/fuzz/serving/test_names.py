"""Names that may become part of a path, a query or a command line."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numprune.errors import IntegrityError, NumpruneError
from numprune.export import manifest
from numprune.serving.registry.artifacts import LocalArtifacts
from numprune.serving.registry.model_reference import parse
from numprune.serving.rollout.state import Place
from numprune.serving.vllm import needs
from tests.fuzz.strangers import NAMES, fuzz, named, values

words = st.sampled_from([*NAMES, *(f"{name}@a" for name in NAMES), *(f"{name}/1" for name in NAMES)]) | st.text()


@fuzz
@given(words)
@example("a' or name like '%")
@example("a/1\n")
@example("a@production\0")
def test_a_reference_is_never_a_path(text: str) -> None:
    found = named(parse, text)
    if isinstance(found, NumpruneError):
        return
    folder = Path("/workspace/rollouts")
    assert (folder / found.name).parent == folder
    assert found.name not in (".", "..")
    assert not set(found.name) & set("/\\'\"\0\n`;")
    assert str(parse(str(found))) == str(found)


@fuzz
@given(words)
def test_a_model_name_stays_inside_the_workspace(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    workspace = tmp_path_factory.getbasetemp()
    found = named(Place, workspace, text)
    if not isinstance(found, NumpruneError):
        assert found.folder.parent == workspace / "rollouts"


@fuzz
@given(words | st.text("0123456789abcdef", min_size=32, max_size=33))
@example("0" * 32 + "\n")
def test_a_run_id_is_never_a_path(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.getbasetemp() / "artifacts"
    assert isinstance(named(LocalArtifacts(root).remove, text), IntegrityError) == (
        not (len(text) == 32 and set(text) <= set("0123456789abcdef"))
    )


@fuzz
@given(
    values
    | st.lists(
        st.sampled_from(["--model-impl", "transformers", "--trust-remote-code", "--load-format", "pt"]), max_size=3
    )
)
@example(["--trust-remote-code"])
@example(["--model-impl", "transformers", "--trust-remote-code"])
@example(["--load-format", "pt"])
@example("--trust-remote-code")
def test_no_untrusted_option_reaches_vllm(asked: object) -> None:
    found = named(needs.checked, asked, "manifest.json")
    assert isinstance(found, IntegrityError) or list(found) == asked in ([], ["--model-impl", "transformers"])


def test_no_server_starts_for_a_checkpoint_that_needs_its_own_code(tmp_path: Path) -> None:
    from numprune.serving.vllm import server

    with manifest.creating(tmp_path / "m", kind="vllm", facts={"needs": ["--trust-remote-code"]}) as out:
        (out / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="--trust-remote-code"):
        server._needs(tmp_path / "m")
