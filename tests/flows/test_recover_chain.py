"""The whole pipeline with training after pruning: a killed training, a published release, and refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import checkpoint, manifest
from numprune.flows.candidate import generate, read_heldout, recover, sample_recovery
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import Artifact, find, place_of, read_facts
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.recover import options_of, recover_checkpoint
from numprune.flows.steps.results import GeneratedText, PrunedCheckpoint, RecoveredCheckpoint
from numprune.flows.steps.text import heldout_rows
from numprune.flows.steps.training import load_rows
from numprune.serving import report as reports
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, Answered, write_inputs
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
prompts = ["prompts.jsonl"]
generated_share = 0.25
"""


def gate(metric: str) -> str:
    return f"gates=[{{metric='{metric}', bound='point', max=1.0}}]"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a run whose training was killed half-way; not to be written to."""
    folder = tmp_path_factory.mktemp("recovered")
    recipe = RECIPE.replace('"onnxruntime"', '"torch"').replace("ratio = 0.25", 'ratio = 0.5\ncompensation = "none"')
    recipe = recipe.replace('"heldout.jsonl"', '{ prose = "heldout.jsonl", numbers = "numbers.txt" }')
    recipe_path = write_inputs(folder, build_tiny().bfloat16(), recipe + RECOVER) / "recipe.toml"
    (folder / "prompts.jsonl").write_text('{"text": "The quick"}\n{"text": "A lazy dog"}\n')
    (folder / "numbers.txt").write_text("".join(f"{number} {number**2}\n" for number in range(60)))
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
    assert recovery.learning_rate == 1e-3
    assert recovery.best_step > 0
    assert recovery.selection_kl_nats_per_token.ratio is not None
    assert recovery.selection_kl_nats_per_token.ratio < 1
    pruned, recovered = (stage(stages, name) / "checkpoint" for name in ("prune", "recover"))
    assert report.identity.pruned == manifest.read(pruned).digest
    assert report.identity.recovered == manifest.read(recovered).digest
    assert manifest.read(recovered).parents["base"] == manifest.read(pruned).digest
    made = read_facts(stage(stages, "generated"), GeneratedText)
    assert made.rows == 41  # a quarter of 160 to train on and 4 to choose by
    assert recovery.generated is not None
    assert (recovery.generated.answers, recovery.generated.tokens) == (made.answers, made.tokens)
    assert report.identity.generated_rows == made.digest
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
        text = (published / page).read_text()
        assert "trained towards the dense model (distill) on 10,240 tokens" in text
        assert f"in part its own {made.answers} answers of {made.tokens:,} tokens" in text


def test_every_corpus_is_judged_before_and_after_training(published: Path, numprune: Callable[..., Answered]) -> None:
    stages, inputs = published.parents[1], published.parents[2]
    report = reports.read(published / "report.json")
    quality = report.quality
    assert quality is not None
    assert (quality.corpus, [*quality.corpora], [*report.identity.corpora_rows]) == ("prose", ["numbers"], ["numbers"])
    folders = [stage(stages, "prune") / "checkpoint", published / "checkpoint"]
    for found, file in ((quality, "heldout.jsonl"), (quality.corpora["numbers"], "numbers.txt")):
        rows = heldout_rows([inputs / file], 64, [folders[0]], Reading())
        expected = compare_checkpoints(folders, inputs / "base", rows, torch.device("cpu"))
        [gained] = compare_checkpoints(folders[1:], folders[0], rows, torch.device("cpu"))
        assert found.pruned is not None
        assert found.recovery_loss_delta is not None
        deltas = [one["loss_delta"]["value"] for one in (*expected, gained)]
        assert [
            found.pruned.loss_delta.value,
            found.loss_delta.value,
            found.recovery_loss_delta.value,
        ] == pytest.approx(deltas, abs=1e-6)
        assert found.recovery_loss_delta.value < 0
    for page in ("report.md", "report.html"):
        text = (published / page).read_text()
        assert "before training" in text
        assert "beside prose above" in text
    for metric, code in (("quality.corpora.numbers.recovery_loss_delta", 0), ("quality.corpora.code.loss_delta", 2)):
        policy = inputs / "policy.toml"
        policy.write_text(f'[[gates]]\nmetric = "{metric}"\nbound = "point"\nmax = 0.0\n')
        assert numprune("gate", published / "report.json", "--policy", policy).code == code


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


def test_prompts_in_another_folder_are_the_same_prompts(published: Path, tmp_path: Path) -> None:
    workspace, inputs = published.parents[1], published.parents[2]
    moved = shutil.copy(inputs / "prompts.jsonl", tmp_path)
    run = prepare(load(inputs / "recipe.toml", [f"recover.prompts=['{moved}']"]), workspace)
    heldout = [find(workspace, read_heldout(run, name)) for name in run.heldout]
    generated = find(workspace, generate(run))
    assert generated is not None
    rows = find(workspace, sample_recovery(run, filter(None, heldout), generated))
    assert rows is not None
    pruned = stage(workspace, "prune")
    source = Artifact(pruned / "checkpoint", read_facts(pruned, PrunedCheckpoint).digest)
    assert place_of(workspace, recover(run, source, rows)).path == stage(workspace, "recover")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.heldout=['train.txt']"], r"data\.heldout: 1 of its documents is in the training text \(train\.txt\)"),
        (
            ["data.heldout={a='heldout.jsonl', b='train.txt'}"],
            r"data\.heldout\.b: 1 of its documents is in the training text",
        ),
        (
            ["data.heldout={a='heldout.jsonl'}", gate("quality.corpora.a.loss_delta")],
            "'a' is the first corpus, which quality itself is of; use quality.loss_delta",
        ),
        ([gate("quality.corpora.a.loss_delta")], r"data\.heldout is one text without a name"),
        (
            ["data.heldout={a='heldout.jsonl', b='heldout.jsonl'}", gate("quality.corpora.c.loss_delta")],
            "data.heldout has no such corpus; beside the first, 'a', there are: b",
        ),
        (
            ["recover.prompts=['heldout.jsonl']"],
            r"data\.heldout: 24 of its documents are in the training text \(heldout\.jsonl:1, ",
        ),
        (
            ["data.heldout={a='heldout.jsonl', b='heldout.jsonl'}", gate("quality.corpora.b.loss_dleta")],
            "the report has no such figure; did you mean 'loss_delta'",
        ),
        (
            ["data.heldout={a='heldout.jsonl', b='heldout.jsonl'}", gate("quality.corpora.b.generation.degraded")],
            "the report has no such figure",
        ),
        (["recover.method=none", gate("quality.pruned.loss_delta")], r"recover\.method = 'none' has no such figure"),
        (["recover.prompts=['missing.txt']"], r"recover\.prompts: .*missing\.txt"),
        (["recover.batch_size=0"], r"recover\.batch_size"),
        (
            ["recover.method=none", gate("recovery.tokens")],
            r"recover\.method = 'none' has no such figure",
        ),
        (
            ["recover.method=none", gate("quality.recovery_loss_delta")],
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
