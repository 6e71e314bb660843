"""Quality on held-out text, in the format of report.json."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.anatomy import read_anatomy
from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.export.checkpoint import load_model, load_tokenizer, read_config, text_tokenizer
from numprune.export.tasks import load_task
from numprune.flows.names import CAUSAL_LM
from numprune.flows.steps.baseline import keep_states, score, scored, side
from numprune.flows.steps.changed import changed_images
from numprune.generation import MAXIMUM_TOKENS, generate
from numprune.placement import place
from numprune.quality import compare_predictions, compare_with, evaluate
from numprune.serving.report import MAXIMUM_DOCUMENTS, MAXIMUM_WORST
from numprune.tasks import CAUSAL, Comparison, Predictions, Quality, Task, TaskName
from numprune.tasks.image_classification import ImageClassification
from numprune.tasks.task import compared

_NLL = {
    "masked-lm": "nll_nats_per_masked_token",
    "classification": "nll_nats_per_text",
    "image-classification": "nll_nats_per_image",
}
_CLASSES = ("classification", "image-classification")
_ACCURACIES = ("accuracy", "top5_accuracy")


def compare_with_scores(
    candidate: Path,
    baseline: Path,
    scores: Path,
    generations: Sequence[dict[str, Any]],
    rows: TokenRows,
    prompts: Sequence[str],
    device: torch.device,
    unquantized: Path | None = None,
    pruned: Path | None = None,
    trained: Path | None = None,
) -> dict[str, Any]:
    """The section `quality`; `scores`: where `score` stored the baseline's on the same rows; `generations`: its result.

    For a quantized candidate, `unquantized` is the model before quantization. For a trained one, `pruned` and `trained`
    are the models before and after training, in one precision. Each model reads the rows once.

    Raises InputError, IntegrityError.
    """
    task = load_task(baseline)
    known = _scored(scores, rows, place(load_model(baseline), device), task)
    if unquantized is None and pruned is None:
        return _compare(candidate, known, generations, rows, prompts, device, task)
    with tempfile.TemporaryDirectory(prefix="numprune-") as scratch:
        earlier = {
            folder: _run_once(Path(scratch, str(number)), place(load_model(folder), device), rows, task)
            for number, folder in enumerate(dict.fromkeys((pruned, unquantized, trained)))
            if folder is not None and folder != candidate
        }
        model = place(load_model(candidate), device)
        ours = _run_once(Path(scratch, "candidate"), model, rows, task)

        to_base = compare_predictions(ours, known, rows, task)
        found = section(to_base, rows, task)
        if unquantized is not None:
            beside = compare_predictions(ours, earlier[unquantized], rows, task)
            found["quantization_loss_delta"] = _loss_delta(beside)
        if pruned is not None and trained is not None:
            before = compare_predictions(earlier[pruned], known, rows, task)
            after = to_base if trained == candidate else compare_predictions(earlier[trained], known, rows, task)
            # Of losses against the base, because some tasks have no other.
            gained = compared(task, rows, after.difference - before.difference, {}, seed=0)
            found["recovery_loss_delta"] = _loss_delta(gained)
            found["pruned"] = {"loss_delta": _loss_delta(before)}
            if task.name == CAUSAL_LM:
                found["pruned"] |= side(before.candidate)
    if prompts and task.prompted:
        found["generation"] = generation(model, load_tokenizer(candidate), prompts, generations)
    return found


def compare_checkpoints(
    candidates: Sequence[Path], baseline: Path, rows: TokenRows, device: torch.device, prompts: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The section `quality` of each candidate. The baseline is scored once, and one model is in memory at a time.

    Raises InputError, IntegrityError.
    """
    task = load_task(baseline)
    vocabulary = read_anatomy(read_config(baseline)).vocabulary
    for candidate in candidates:
        if (other := read_anatomy(read_config(candidate)).vocabulary) != vocabulary:
            raise InputError(f"vocabularies differ: {candidate} has {other} tokens, {baseline} has {vocabulary}")
    with tempfile.TemporaryDirectory(prefix="numprune-") as scratch:
        dense = place(load_model(baseline), device)
        found = score(Path(scratch), dense, text_tokenizer(baseline), rows, prompts, task)
        known = _scored(Path(scratch), rows, dense, task)
        del dense  # but its head
        return [_compare(candidate, known, found.generations, rows, prompts, device, task) for candidate in candidates]


def evaluate_checkpoint(model: Path, rows: TokenRows, device: torch.device) -> dict[str, Any]:
    """The figures of one model. Raises InputError (the task has no loss without a baseline), IntegrityError."""
    task = load_task(model)
    if not task.has_loss(rows):
        what, these = ("images", "these images") if task.name == "image-classification" else ("text", "this text")
        remedy = f"give labelled {what} or --baseline" if task.name in _CLASSES else "give --baseline"
        raise InputError(f"{model}: the model has no loss of its own on {these} ({task.name}); {remedy}")
    found = evaluate(place(load_model(model), device), rows, task)
    assert found is not None
    facts = {"documents": rows.documents, "packed": rows.packed}
    if task.name == "causal-lm":
        return {**side(found), "tokens": found.count, **facts}
    metrics = {_NLL[task.name]: found.mean_nll, **_accuracies(found)}
    return {"task": task.name, "metrics": metrics, "tokens": _tokens(task.name, rows, found.scored), **facts}


def _accuracies(found: Quality) -> dict[str, float]:
    return {name: value for name in _ACCURACIES if (value := getattr(found, name)) is not None}


def _tokens(task: TaskName, rows: TokenRows, scored: np.ndarray) -> int:
    """What a task counts: the predicted tokens, all tokens of the texts, or the images."""
    return sum(map(len, rows.rows)) if task in ("classification", "embedding") else int(scored.sum())


def _run_once(folder: Path, model: PreTrainedModel, rows: TokenRows, task: Task) -> Predictions:
    """Run the model on the rows; return its predictions, kept in the new `folder`. Of the model its head is kept."""
    folder.mkdir()
    keep_states(folder, model, rows, task)
    return _scored(folder, rows, model, task)


def _scored(folder: Path, rows: TokenRows, dense: PreTrainedModel, task: Task) -> Predictions:
    found = task.predictions(dense)
    return scored(folder, rows, found.head, found.size, dense.device, task)


def _compare(
    candidate: Path,
    baseline: Predictions,
    generations: Sequence[dict[str, Any]],
    rows: TokenRows,
    prompts: Sequence[str],
    device: torch.device,
    task: Task,
) -> dict[str, Any]:
    pruned = place(load_model(candidate), device)
    found = section(compare_with(pruned, baseline, rows, task), rows, task)
    if prompts and task.prompted:
        found["generation"] = generation(pruned, load_tokenizer(candidate), prompts, generations)
    return found


def generation(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    baseline: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The part `generation` of the section; `baseline`: the baseline's outputs for the same prompts."""
    candidate = [dataclasses.asdict(one) for one in generate(pruned, tokenizer, prompts)]
    degraded = sum(_failed(ours) and not _failed(theirs) for ours, theirs in zip(candidate, baseline, strict=True))
    return {
        "prompts": len(prompts),
        "chat_template": bool(tokenizer.chat_template),
        "maximum_tokens": MAXIMUM_TOKENS,
        "baseline": _counted(baseline),
        "candidate": _counted(candidate),
        "degraded": degraded,
        "degraded_share": degraded / len(prompts),
        "outputs": [
            {"prompt": prompt, "baseline": theirs, "candidate": ours}
            for prompt, theirs, ours in zip(prompts, baseline, candidate, strict=True)
        ],
    }


def _failed(output: dict[str, Any]) -> bool:
    return bool(output["empty"] or output["repeating"])


def _counted(outputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    counts = {name: sum(output[name] for output in outputs) for name in ("empty", "repeating")}
    return {**counts, **{f"{name}_share": count / len(outputs) for name, count in counts.items()}}


def section(found: Comparison, rows: TokenRows, task: Task = CAUSAL) -> dict[str, Any]:
    """The section without `generation`."""
    facts: dict[str, Any] = {
        "task": found.task,
        "tokens": _tokens(found.task, rows, found.scored),
        "documents": found.documents,
        "packed": rows.packed,
        "loss_delta": _loss_delta(found),
        "document_deltas": document_deltas(found, rows),
        **({"classes": class_losses(found, rows)} if found.task == CAUSAL_LM and rows.labels is not None else {}),
    }
    if found.task == "causal-lm":
        facts |= {"baseline": side(found.baseline), "candidate": side(found.candidate), **found.metrics}
        facts["perplexity_ratio"] = dataclasses.asdict(found.loss_delta.exponential)
    else:
        facts["metrics"] = _metrics(found)
        if found.accuracy is not None:
            facts["accuracy_delta"] = dataclasses.asdict(found.accuracy.accuracy_delta)
            flips = ("right_to_wrong", "wrong_to_right")
            facts["metrics"] |= {name: getattr(found.accuracy, name) for name in flips}
        if isinstance(task, ImageClassification):
            facts["changed"] = changed_images(found, rows, task)
    return finite(facts)


def _loss_delta(found: Comparison) -> dict[str, Any]:
    return {**finite(dataclasses.asdict(found.loss_delta)), "unit": found.unit}


def _metrics(found: Comparison) -> dict[str, Any]:
    """The metrics of tasks other than causal-lm; metrics of a single model for both sides."""
    metrics: dict[str, Any] = dict(found.metrics)
    sides = {"baseline": found.baseline, "candidate": found.candidate}
    of_each = {name: quality for name, quality in sides.items() if quality is not None}
    if of_each:
        metrics[_NLL[found.task]] = {name: quality.mean_nll for name, quality in of_each.items()}
    for accuracy in _ACCURACIES:
        values = {name: getattr(quality, accuracy) for name, quality in of_each.items()}
        if values and None not in values.values():
            metrics[accuracy] = values
    return metrics


def document_deltas(found: Comparison, rows: TokenRows) -> dict[str, Any]:
    """Each document's difference in nats per token, or quantiles if there are many; and the worst documents by name."""
    sums = np.bincount(rows.document, found.difference)
    tokens = np.bincount(rows.document, found.scored)
    scored = np.flatnonzero(tokens)
    deltas = sums[scored] / tokens[scored]
    few = len(deltas) <= MAXIMUM_DOCUMENTS
    values = np.sort(deltas if few else np.quantile(deltas, np.linspace(0, 1, MAXIMUM_DOCUMENTS)))
    return {
        "values": values.tolist(),
        "worst": [
            {
                "name": rows.names[scored[index]],
                "tokens": int(tokens[scored[index]]),
                "loss_delta": float(deltas[index]),
            }
            for index in np.argsort(-deltas, kind="stable")[:MAXIMUM_WORST]
        ],
    }


def class_losses(found: Comparison, rows: TokenRows) -> list[dict[str, Any]]:
    """The NLL of both models by the class of the images, ascending."""
    assert found.candidate is not None
    assert found.baseline is not None
    labels = np.array(rows.labels)[rows.document]
    losses = []
    for label in np.unique(labels):
        of_class = labels == label
        codes = found.scored[of_class].sum()
        losses.append(
            {
                "label": int(label),
                "images": int(of_class.sum()),
                "baseline": float(found.baseline.nll[of_class].sum() / codes),
                "candidate": float(found.candidate.nll[of_class].sum() / codes),
            }
        )
    return losses


def finite(value: Any) -> Any:
    """`value` with non-finite numbers (the bounds of a single sample) as null, which never passes a gate."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
