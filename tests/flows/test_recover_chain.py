"""The whole chain with a recipe that trains after pruning: through a killed training to a published release."""

from pathlib import Path

import pytest
import torch

from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.flows.recipe import load
from numprune.flows.stages import read_facts
from numprune.flows.steps.checks import check
from numprune.flows.steps.recover import options_of, recover_checkpoint
from numprune.flows.steps.results import RecoveredCheckpoint
from numprune.flows.steps.training import load_rows
from numprune.serving import report as reports
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, write_inputs
from tests.flows.faults import command, finish, kill_in, stage

pytestmark = pytest.mark.slow

RECOVER = """
[export]
targets = ["vllm"]
[recover]
method = "distill"
tokens = 10240
learning_rate = 1e-3
batch_size = 4
selection_rows = 4
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a run whose training was killed half-way; not to be written to."""
    folder = tmp_path_factory.mktemp("recovered")
    recipe = RECIPE.replace('"onnxruntime"', '"torch"').replace("ratio = 0.25", 'ratio = 0.5\ncompensation = "none"')
    recipe_path = write_inputs(folder, build_tiny().bfloat16(), recipe + RECOVER) / "recipe.toml"
    workspace = folder / "w"
    kill_in(folder / "control", "training", "remove", command(recipe_path, workspace))
    assert list((workspace / "stages").glob(".training-*/state.json"))
    found = finish(recipe_path, workspace)
    assert {one["name"]: one["reused"] for one in found["stages"]}["prune"]
    assert not list(workspace.rglob(".training-*"))
    assert not list(workspace.rglob(".*.partial"))
    return Path(found["release"])


def test_the_release_holds_the_trained_checkpoint_and_says_so(published: Path) -> None:
    manifest.verify(published)
    stages, report = published.parents[1], reports.read(published / "report.json")
    recovery = report.recovery
    assert recovery is not None
    assert (recovery.method, recovery.tokens, recovery.steps, recovery.seed) == ("distill", 10240, 40, 0)
    assert recovery.best_step > 0
    assert recovery.selection_kl_nats_per_token.ratio is not None
    assert recovery.selection_kl_nats_per_token.ratio < 1
    pruned, recovered = (stage(stages, name) / "checkpoint" for name in ("prune", "recover"))
    assert report.identity.pruned == manifest.read(pruned).digest
    assert report.identity.recovered == manifest.read(recovered).digest
    assert manifest.read(recovered).parents["base"] == manifest.read(pruned).digest
    assert report.quality is not None
    for file in ("config.json", "numprune_plan.json"):
        assert (recovered / file).read_bytes() == (pruned / file).read_bytes()
    headers = [checkpoint.audit(folder) for folder in (pruned, recovered)]
    assert {name: (one.shape, one.dtype) for name, one in headers[0].items()} == {
        name: (one.shape, one.dtype) for name, one in headers[1].items()
    }
    row = f"distillation from the base model on 10,240 tokens; the weights after step {recovery.best_step} of 40 |"
    assert row in (published / "checkpoint" / "README.md").read_text()
    for page in ("report.md", "report.html"):
        assert "trained towards the dense model (distill) on 10,240 tokens" in (published / page).read_text()


def test_a_killed_training_ends_like_an_undisturbed_one(published: Path, tmp_path: Path) -> None:
    stages, inputs = published.parents[1], published.parents[2]
    asked = load(inputs / "recipe.toml").recover
    found = recover_checkpoint(
        stage(stages, "prune") / "checkpoint",
        inputs / "base",
        load_rows(stage(stages, "recovery-rows")),
        options_of(asked),
        tmp_path / "undisturbed",
        torch.device("cpu"),
        tmp_path,
    )
    assert found.digest == read_facts(stage(stages, "recover"), RecoveredCheckpoint).digest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.heldout=['train.txt']"], r"data\.heldout: 1 of its documents is in the training text \(train\.txt\)"),
        (["recover.batch_size=0"], r"recover\.batch_size"),
        (
            ["recover.method=none", "gates=[{metric='recovery.tokens', bound='point', max=1.0}]"],
            r"recover\.method = 'none' has no such figure",
        ),
    ],
)
def test_impossible_trainings_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(InputError, match=message):
        check(load(tiny / "recipe.toml", ["recover.method=distill", *overrides]), tmp_path)
