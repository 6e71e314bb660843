"""Candidates against one baseline, and the generated text of both."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.corpus import TokenRows
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export.checkpoint import load
from numprune.flows import recipe
from numprune.flows.candidate import read_heldout
from numprune.flows.evaluation import score_baseline
from numprune.flows.steps import baseline, evaluate
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.flows.steps.text import heldout_rows
from numprune.generation import PROMPTS
from numprune.quality import compare
from numprune.quantization import Scheme
from numprune.serving import gates
from numprune.serving.report import Quality, Report
from tests.conftest import build_tiny, byte_tokenizer
from tests.serving.conftest import COMPLETE

CPU = torch.device("cpu")


def written(folder: Path, model: Any, template: str | None = None) -> Path:
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two candidates."""
    folder = tmp_path_factory.mktemp("candidates")
    return [written(folder / str(seed), build_tiny(seed=seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def rows(tiny: Path) -> TokenRows:
    return heldout_rows([tiny / "heldout.jsonl"], 32, [tiny / "base"], Reading())


def test_figures_match_both_models_evaluated_side_by_side(tiny: Path, others: list[Path], rows: TokenRows) -> None:
    (found,) = compare_checkpoints(others[:1], tiny / "base", rows, CPU)
    assert found == evaluate.section(compare(load(others[0])[0], load(tiny / "base")[0], rows), rows)


def test_a_quantized_candidate_is_run_once(
    tiny: Path, rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the base and with the unquantized checkpoint; each figure is paired."""
    pruned, quantized = written(tmp_path / "pruned", build_tiny(seed=1)), tmp_path / "quantized"
    quantize_checkpoint(pruned, Scheme("w8a8"), quantized, CPU)
    [to_base] = compare_checkpoints([quantized], tiny / "base", rows, CPU, PROMPTS[:1])
    [to_pruned] = compare_checkpoints([quantized], pruned, rows, CPU)
    scores = tmp_path / "scores"
    scores.mkdir()
    generations = baseline.score(scores, *load(tiny / "base"), rows, PROMPTS[:1]).generations
    batches: dict[str, int] = {}

    def counting(folder: Path) -> Any:
        model, _ = load(folder)
        batches[folder.name] = 0

        def count(_module: Any, _inputs: Any, options: dict[str, Any], _output: Any) -> None:
            batches[folder.name] += not options.get("use_cache")  # what is generated is not counted

        model.base_model.register_forward_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(evaluate, "load_model", counting)
    found = evaluate.compare_with_scores(
        quantized, tiny / "base", scores, generations, rows, PROMPTS[:1], CPU, unquantized=pruned
    )
    assert "generation" in found
    assert found == {**to_base, "quantization_loss_delta": to_pruned["loss_delta"]}
    assert batches["base"] == 0
    assert batches["quantized"] == batches["pruned"] > 0


def test_a_trained_candidate_is_also_compared_with_what_training_began_with(
    tiny: Path, rows: TokenRows, tmp_path: Path
) -> None:
    pruned, trained = (written(tmp_path / name, build_tiny(seed=seed)) for name, seed in (("p", 1), ("t", 2)))
    quantize_checkpoint(trained, Scheme("w8a8"), tmp_path / "q", CPU)
    cast = written(tmp_path / "cast", build_tiny(seed=2).bfloat16().float())
    of_pruned, _ = compare_checkpoints([pruned, trained], tiny / "base", rows, CPU)
    [gained] = compare_checkpoints([trained], pruned, rows, CPU)
    baseline.score(tmp_path, *load(tiny / "base"), rows)
    for candidate, unquantized in ((trained, None), (tmp_path / "q", trained), (cast, None)):
        found = evaluate.compare_with_scores(
            *(candidate, tiny / "base", tmp_path, [], rows, [], CPU),
            unquantized=unquantized,
            pruned=pruned,
            trained=trained,
        )
        assert found["pruned"] == {"loss_delta": of_pruned["loss_delta"], **of_pruned["candidate"]}
        for name in ("value", "ci95_lower", "ci95_upper", "samples"):
            assert found["recovery_loss_delta"][name] == pytest.approx(gained["loss_delta"][name], rel=1e-6)
        assert ("quantization_loss_delta" in found) == (unquantized is not None)
        assert Quality.model_validate(found).recovery_loss_delta is not None


def test_several_candidates_share_one_scoring_of_the_baseline(
    tiny: Path, others: list[Path], numprune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Path] = []

    def counted(folder: Path, *arguments: Any) -> Any:
        scored.append(folder)
        return baseline.score(folder, *arguments)

    monkeypatch.setattr(evaluate, "score", counted)
    text = ["--text", tiny / "heldout.jsonl", "--sequence-length", 32]
    common = ["--baseline", tiny / "base", *text]
    together = numprune("evaluate", *others, *common, "--json").json
    assert len(scored) == 1
    assert not scored[0].exists()
    assert together == {"candidates": [numprune("evaluate", one, *common, "--json").json for one in others]}
    lines = numprune("evaluate", *others, *common).out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        *(str(tiny / "base"), str(others[0]), "difference", str(others[1]), "difference")
    ]
    alone = numprune("evaluate", *others, *text, "--json").json["candidates"]
    assert [one["nll_nats_per_token"] for one in alone] == pytest.approx(
        [one["nll_nats_per_token"] for one in together["candidates"]], rel=1e-6
    )


def test_a_candidate_with_another_vocabulary_is_refused_before_any_scoring(
    tiny: Path, others: list[Path], rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", None)
    larger = written(tmp_path / "larger", build_tiny(vocab_size=300))
    with pytest.raises(InputError, match=r"larger has 300 tokens, .*base has 259"):
        compare_checkpoints([*others, larger], tiny / "base", rows, CPU)


def test_the_baseline_is_scored_again_for_other_prompts_but_not_for_another_ratio(tiny: Path, tmp_path: Path) -> None:
    found = []
    for changes in ([], ["prune.ratio=0.4"], ["evaluate.prompts=['Say something.']"]):
        run = prepare(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")
        found.append(run.make(score_baseline(run, "", run.make(read_heldout(run, "")))))
    assert [stage.reused for stage in found] == [False, True, False]
    assert found[0].digest == found[1].digest
    assert [len(stage.facts.generations) for stage in found] == [len(PROMPTS), len(PROMPTS), 1]


def test_unusable_prompts_are_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    gate = "gates=[{metric='quality.generation.degraded', bound='point', max=0}]"
    for changes, said in [
        ([f"evaluate.prompts=['{'x' * 256}']"], "evaluate.prompts: prompt 'x{40}…': 256 tokens; .* context of 256"),
        (["evaluate.prompts=[]", gate], r"gates.0.metric = 'quality.generation.degraded': evaluate.prompts = \[\] "),
    ]:
        with pytest.raises(InputError, match=said):
            check(recipe.load(tiny / "recipe.toml", changes), tmp_path / "w")


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A chat model, and the same one except for a token that only its template uses: the end follows it."""
    folder = tmp_path_factory.mktemp("chat")
    template = "{{ messages[0].content }}<s>"
    dense = build_tiny(seed=5)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned.model.embed_tokens.weight[256] = 1e3 * pruned.lm_head.weight[257] / pruned.model.norm.weight
    return written(folder / "dense", dense, template), written(folder / "pruned", pruned, template)


def test_a_gate_on_generation_fails_a_model_that_passes_on_nll(silent: tuple[Path, Path], rows: TokenRows) -> None:
    dense, pruned = silent
    (section,) = compare_checkpoints([pruned], dense, rows, CPU, PROMPTS)
    report = Report.model_validate(json.loads(json.dumps({**copy.deepcopy(COMPLETE), "quality": section})))
    policy = [
        {"metric": "quality.loss_delta", "bound": "ci95_upper", "max": 0.0},
        {"metric": "quality.generation.candidate.empty_share", "bound": "point", "max": 0.0},
        {"metric": "quality.generation.baseline.empty_share", "bound": "point", "max": 0.0},
        {"metric": "quality.generation.degraded", "bound": "point", "max": 0},
        {"metric": "quality.generation.degraded", "bound": "point", "max": len(PROMPTS)},
        {"metric": "quality.generation.degraded_share", "bound": "ci95_upper", "max": 1.0},  # it has no interval
    ]
    verdict = gates.judge(report, gates.Policy.model_validate({"gates": policy}))
    assert [gate.outcome for gate in verdict.gates] == ["pass", "fail", "pass", "fail", "pass", "fail"]
    assert report.quality is not None
    assert report.quality.generation is not None
    found = report.quality.generation
    assert found.chat_template
    assert (found.candidate.empty, found.baseline.empty) == (len(PROMPTS), 0)
    assert found.degraded == sum(not pair.baseline.repeating for pair in found.outputs) > 0
