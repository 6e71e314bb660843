"""The whole pipeline with learned masks: a killed training, a published release, and refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from numprune.errors import InputError
from numprune.export import manifest
from numprune.flows.candidate import learn, read_heldout, sample_learning
from numprune.flows.names import LEARNED_LIMITS, LEARNING_TOKENS
from numprune.flows.recipe import load
from numprune.flows.run import prepare
from numprune.flows.stages import find, place_of, read_facts
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.learn import learn_checkpoint, options_of, request_of
from numprune.flows.steps.results import LearnedMasks, LearningText
from numprune.flows.steps.training import load_rows
from numprune.plans import read_plan
from numprune.serving import report as reports
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, write_inputs
from tests.flows.faults import command, finish, kill_in, stage

pytestmark = pytest.mark.slow

LEARN = """
[export]
targets = ["vllm"]
[learn]
method = "vib"
variant = "fast"
tokens = 10240
seed = 1
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a run whose masks were killed half-way; not to be written to."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = RECIPE.replace('"onnxruntime"', '"torch"') + LEARN
    recipe_path = write_inputs(folder, build_tiny().bfloat16(), recipe) / "recipe.toml"
    workspace = folder / "w"
    kill_in(folder / "control", "training", "remove", command(recipe_path, workspace))
    assert list((workspace / "stages").glob(".training-*/state.json"))
    found = finish(recipe_path, workspace)
    assert {one["name"]: one["reused"] for one in found["stages"]}["learning-rows"]
    assert not list(workspace.rglob(".training-*"))
    return Path(found["release"])


def test_the_release_keeps_what_the_masks_chose_and_says_so(published: Path) -> None:
    manifest.verify(published)
    stages, report = published.parents[1], reports.read(published / "report.json")
    learned, rows = stage(stages, "learn") / "learned", stage(stages, "learning-rows")
    assert report.learning is not None
    assert (report.learning.method, report.learning.variant, report.learning.seed) == ("vib", "fast", 1)
    assert (report.learning.tokens, report.learning.steps, report.learning.unit) == (10240, 20, "nats/token")
    assert report.pruning is not None
    assert (report.pruning.criterion, report.pruning.compensation) == ("vib", "joint")
    assert report.identity.learning_rows == read_facts(rows, LearningText).digest
    assert report.identity.learned == manifest.folder_digest(learned / "model")
    asked, followed = read_plan(learned / "plan.json"), read_plan(published / "plan.json")
    assert {name: block.kept for name, block in followed.blocks.items()} == {
        name: block.kept for name, block in asked.blocks.items()
    }
    assert asked.base == followed.base == report.identity.learned
    card = (published / "checkpoint" / "README.md").read_text()
    assert "criterion vib, allocation uniform, compensation joint" in card
    assert "| base model | `base` |" in card
    for page in ("report.md", "report.html"):
        assert "Masks chose the units (vib, fast): trained on 10,240 tokens, seed 1" in (published / page).read_text()


def test_a_killed_learning_ends_like_an_undisturbed_one(published: Path, tmp_path: Path) -> None:
    stages, inputs = published.parents[1], published.parents[2]
    recipe, rows = load(inputs / "recipe.toml"), stage(stages, "learning-rows")
    limits = recipe.prune.model_dump(include={*LEARNED_LIMITS})
    options = options_of(recipe.learn, limits, recipe.sizes(), inputs / "base")
    found = learn_checkpoint(
        inputs / "base",
        load_rows(rows),
        read_facts(rows, LearningText).draw,
        options,
        request_of(recipe.learn, options),
        tmp_path / "undisturbed",
        torch.device("cpu"),
        tmp_path,
    )
    undisturbed = read_facts(stage(stages, "learn"), LearnedMasks)
    assert replace(found, seconds=0.0) == replace(undisturbed, seconds=0.0)


def test_only_what_decides_the_masks_makes_them_others(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, workspace = published.parents[2] / "recipe.toml", published.parents[1]

    run = prepare(load(source), workspace)
    heldout = find(workspace, read_heldout(run, ""))
    assert heldout is not None
    rows = find(workspace, sample_learning(run, [heldout]))
    assert rows is not None

    def place(*overrides: str) -> Path:
        run = prepare(load(source, overrides), workspace)
        return place_of(workspace, learn(run, rows, None)).path

    assert place() == stage(workspace, "learn")
    assert place("prune.compensation=none", "prune.criterion=magnitude", "prune.stream=true") == place()
    for other in ("prune.ratio=0.3", "prune.allocation=error", "learn.seed=2", "learn.variant=faster"):
        assert place(other) != place()
    assert place("prune.allocation=error", "learn.constraint=kv-bytes") != place("prune.allocation=error")
    by_default = place("learn.tokens=0")
    monkeypatch.setitem(LEARNING_TOKENS, "fast", 10240)
    assert by_default != place("learn.tokens=0") == place()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.heldout=['train.txt']"], r"data\.heldout: 1 of its documents is in the training text \(train\.txt\)"),
        (["prune.drop_layers=1"], r"prune: drop_layers: masks learn units, not layers"),
        (["prune.allocation=global"], r"prune: allocation is 'global'; masks are rounded by one of error, uniform"),
        (["prune.ratio=0", "prune.budget=1KB"], r"prune: the budget is 1,000 bytes, but embeddings, norms"),
        (
            ["prune.ratio=0", "prune.budget=100KB", "quantize.scheme=w8a8"],
            r"prune: budget: masks choose sizes for weights that are not quantized; use a ratio, or leave the scheme",
        ),
        (["learn.variant=slow"], r"learn\.variant"),
        (["learn.constraint=flops"], r"allocation is 'uniform', which splits parameters; use error with .* flops"),
        (["learn.constraint=bytes"], r"constraint bytes: they are limited by a budget"),
        (
            ["prune.axes=['hidden-size']", "recover.method=distill", "recover.train=blocks"],
            r"prune: axes: with hidden-size, blocks cannot be priced .* set recover\.train to all or lora",
        ),
        (
            ["prune.axes=['hidden-size']", "recover.method=distill", "recover.hidden_weight=0.5"],
            r"prune: axes: with hidden-size, hidden states cannot be compared .* set recover\.hidden_weight to 0",
        ),
        (
            ["prune.axes=['hidden-size']", "learn.method=none"],
            r"only trained masks choose .* \(in a recipe: learn\.meth",
        ),
        (
            ["learn.method=none", "gates=[{metric='learning.tokens', bound='point', max=1.0}]"],
            r"learn\.method = 'none' has no such figure",
        ),
    ],
)
def test_impossible_trainings_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    with pytest.raises(InputError, match=message):
        check(load(tiny / "recipe.toml", ["learn.method=vib", *overrides]), tmp_path)
