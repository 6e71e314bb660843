"""The bodies of the stages that evaluate and time: the base's scores, quality, answers to tasks, benchmarks."""

from pathlib import Path
from typing import Any

from numprune.errors import InputError
from numprune.flows.names import TaskRuntime, TorchMode
from numprune.flows.stages import Artifact, Text, read_facts
from numprune.flows.steps.results import BaselineScores, TaskAnswers, Timings
from numprune.flows.values import FewShot, Limit
from numprune.serving.report import Quality


def make_baseline(
    out: Path, *, model: Artifact, rows: Artifact, rows_digest: str, prompts: str | list[str], device: str
) -> BaselineScores:
    """Score the base on the held-out rows and the prompts: shared by all ratios and methods."""
    import torch

    from numprune.export.checkpoint import load_model, text_tokenizer
    from numprune.export.tasks import load_task
    from numprune.flows.steps.baseline import prompts_of, score
    from numprune.flows.steps.text import load_heldout
    from numprune.placement import place

    loaded, tokenizer = place(load_model(model.path), torch.device(device)), text_tokenizer(model.path)
    held_out = load_heldout(rows.path, rows_digest)
    return score(out, loaded, tokenizer, held_out, prompts_of(prompts), load_task(model.path))


def make_quality(
    out: Path,
    *,
    candidate: Artifact,
    unquantized: Artifact | None,
    pruned: Artifact | None,
    trained: Artifact | None,
    baseline: Artifact,
    scores: Artifact,
    rows: Artifact,
    rows_digest: str,
    prompts: str | list[str],
    device: str,
    samples: int = 0,
    guidance: float = 1.0,
    decoder: Text | None = None,
) -> Quality:
    """Compare the candidate with the baseline; `scores` is the stage that scored the baseline on the same rows and
    prompts.

    A quantized candidate is also compared with the `unquantized` one, and the `trained` model with the `pruned` one.
    From image generators, `samples` images are drawn with classifier-free guidance of the scale `guidance`; `decoder`
    turns their codes into pictures.
    """
    import torch

    from numprune.export.tasks import load_task
    from numprune.flows.steps.baseline import prompts_of
    from numprune.flows.steps.evaluate import compare_with_scores
    from numprune.flows.steps.generators import same_file
    from numprune.flows.steps.images import compare_images
    from numprune.flows.steps.text import load_heldout
    from numprune.tasks.codes import ImageCodes

    held_out, where = load_heldout(rows.path, rows_digest), torch.device(device)
    found = compare_with_scores(
        candidate.path,
        baseline.path,
        scores.path,
        read_facts(scores.path, BaselineScores).generations,
        held_out,
        prompts_of(prompts),
        where,
        unquantized=unquantized.path if unquantized else None,
        pruned=pruned.path if pruned else None,
        trained=trained.path if trained else None,
    )
    if samples and isinstance(load_task(baseline.path), ImageCodes):
        drawn_by = same_file(decoder, "evaluate.decoder") if decoder else None
        found["images"] = compare_images(candidate.path, baseline.path, held_out, samples, guidance, drawn_by, where)
    return Quality.model_validate(found)


def make_task_answers(
    out: Path,
    *,
    model: Artifact,
    tasks: Text,
    num_fewshot: FewShot,
    limit: Limit,
    runtime: TaskRuntime,
    server: str | None,
    device: str,
) -> TaskAnswers:
    """Have a model answer the tasks; the base's answers are shared by all ratios and methods.

    Killed, it goes on after the last task that was answered. `server` is part of the key: what vLLM's environment has.
    """
    import torch

    from numprune.flows.stages import code_version, kept_beside
    from numprune.flows.steps.answers import answer
    from numprune.flows.steps.harness import load_tasks
    from numprune.flows.steps.training import kept_until_done

    loaded = load_tasks(list(tasks.source), num_fewshot, limit)
    if loaded.digest() != tasks.digest:
        raise InputError("evaluate.tasks: their items changed after the run began; run the command again")
    asked = [model.digest, tasks.digest, runtime, server, device, code_version("serving")]
    with kept_until_done(kept_beside(out), asked, "tasks") as (folder, _):
        return answer(out, loaded, model.path, runtime, torch.device(device), folder)


def make_benchmark(
    out: Path,
    *,
    candidate: Artifact,
    baseline: Artifact,
    runtime: str,
    device: str,
    dtype: str,
    torch_mode: TorchMode,
    load: dict[str, Any],
    machine: dict[str, str],
    look: int,
) -> Timings:
    """Benchmark both, in `dtype`.

    `machine` and `look` are part of the key: another machine, or another look at the same load, is another stage.
    """
    from numprune.flows.steps.benchmark import time_both

    return time_both(candidate.path, baseline.path, runtime, device, dtype, torch_mode, load)
