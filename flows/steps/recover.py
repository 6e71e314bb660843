"""Train a pruned checkpoint towards the dense model."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numprune.anatomy import layers_path, read_anatomy, task_name
from numprune.corpus import Frame, TokenRows
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import card_changes, checkpoint, compressed_tensors, manifest
from numprune.export.tasks import load_task, load_text_task
from numprune.export.weights import dtypes_of
from numprune.flows.sections import Recover
from numprune.flows.stages import code_version
from numprune.flows.steps import text as texts
from numprune.flows.steps.prune import check_budget, describe, plan_facts
from numprune.flows.steps.quantize import dropped_layers
from numprune.flows.steps.results import RecoveredCheckpoint
from numprune.flows.steps.training import resumable, unmasked_rows
from numprune.plans import Plan
from numprune.recovery import Recovered, RecoveryOptions, RecoveryRows, check_training, distill, draw_rows
from numprune.recovery.state import TrainingState
from numprune.renumber import renumber_tensors
from numprune.tasks import CAUSAL, Task
from numprune.tensors import tensor_table


def options_of(asked: Recover) -> RecoveryOptions:
    """Return the options of a recipe."""
    given = asked.model_dump(exclude={"method", "prompts", "generated_share"})
    given["learning_rate"] = None if asked.learning_rate == "auto" else asked.learning_rate
    given["top_k"] = None if asked.top_k == "all" else asked.top_k
    return RecoveryOptions(**given)


def check_request(source: Path, dense: Path, options: RecoveryOptions) -> None:
    """Refuse a request that `recover_checkpoint` does not support. Raises InputError."""
    compressed_tensors.refuse_quantized(source, "training")
    compressed_tensors.refuse_quantized(dense, "--dense")
    load_text_task(source, "training")
    ours, theirs = ((checkpoint.read_config(folder), checkpoint.load_tokenizer(folder)) for folder in (source, dense))
    check_pair(ours, theirs, (str(source), str(dense)))
    check_training(options, read_anatomy(ours[0]), read_anatomy(theirs[0]), dropped_layers(source))


Side = tuple[Any, PreTrainedTokenizerBase]  # a configuration and a tokenizer


def check_pair(model: Side, dense: Side, names: tuple[str, str]) -> None:
    """Raise InputError, naming both models, if one cannot be trained towards the other."""
    both, remedy = " and ".join(names), "the dense model must be the one that was pruned"
    if model[1].get_vocab() != dense[1].get_vocab():
        raise InputError(f"{both}: their tokenizers differ; {remedy}")
    tasks = [task_name(config) for config, _ in (model, dense)]
    if tasks[0] != tasks[1]:
        raise InputError(f"{both}: their tasks are {tasks[0]} and {tasks[1]}; {remedy}")
    sizes = [int(config.vocab_size) for config, _ in (model, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{both}: vocab_size is {sizes[0]} and {sizes[1]}; {remedy}")


def training_rows(
    text: texts.Text | None,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    options: RecoveryOptions,
    reading: Reading,
    option: str,
    judged: Sequence[TokenRows] = (),
    generated: TokenRows | None = None,
    task: Task = CAUSAL,
) -> RecoveryRows:
    """Return the rows of a text (None: only generated text), without those of the held-out text.

    `option`: the user's name of the number of selection rows. Raises InputError.
    """
    sources = [] if generated is None else [generated]
    frame: Frame | None = None
    if text is not None:
        tokens = (options.steps(length) * options.batch_size + options.selection_rows) * length
        rows, frame = unmasked_rows(text, tokenizer, length, reading, tokens, task)
        sources.append(rows)
    with texts.named(option):
        return draw_rows(sources, length, options, judged, task, frame)


def recover_checkpoint(
    source: Path,
    dense: Path,
    rows: RecoveryRows,
    options: RecoveryOptions,
    out: Path,
    device: torch.device,
    scratch: Path,
) -> RecoveredCheckpoint:
    """Write `source`, trained towards the model it was pruned from, to the new folder `out`; return the figures.

    It is trained in float32 and stored as `source` is.

    Args:
        scratch: a folder for the state of a killed training; the same request resumes there.

    Raises:
        InputError: `out` exists, the models or options cannot be used, or another process is running the same training.
        IntegrityError: a file is damaged, or the training diverged.
    """
    check_request(source, dense, options)
    parents = {"base": manifest.folder_digest(source), "dense": manifest.folder_digest(dense)}
    asked = _asked(options, rows.digest)
    processes = shared_by(device)
    where = {"device": device.type, "processes": processes.num_processes, "code": {**code_version("export")}}
    # One process saves and writes for all.
    with resumable(scratch, {**parents, **asked, **where}, writes=processes.is_main_process) as state:
        processes.wait_for_everyone()
        model, found = _trained(source, dense, rows, options, device, state)
        if processes.is_main_process:
            write_recovered(model, facts_of(options, found, rows.digest), None, source, out, parents)
    processes.wait_for_everyone()
    return RecoveredCheckpoint(digest=manifest.read(out).digest, **dataclasses.asdict(found))


def _trained(
    source: Path,
    dense: Path,
    rows: RecoveryRows,
    options: RecoveryOptions,
    device: torch.device,
    state: TrainingState,
) -> tuple[PreTrainedModel, Recovered]:
    """Train the model in `source`; return it and the result. Raises InputError, IntegrityError."""
    model, _ = checkpoint.load(source)
    stored, dropped = stored_dtypes(source, model), dropped_layers(source)
    teacher, _ = checkpoint.load(dense)
    return model, distill(
        model, teacher, rows, options, device, stored=stored, dropped=dropped, state=state, task=load_task(source)
    )


def shared_by(device: torch.device) -> Any:
    """Return accelerate's view of the processes that share the training: one, or those of `accelerate launch`."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu")


def stored_dtypes(source: Path, model: PreTrainedModel, dropped: Collection[int] = ()) -> dict[str, torch.dtype]:
    """Return the stored data types of the model's weights, by name in the model.

    `dropped`: layers of the checkpoint `source` that the model does not have.
    """
    before = dtypes_of(checkpoint.audit(source), tensor_table(checkpoint.read_config(source)).tied)
    dtypes = renumber_tensors(before, layers_path(model.config), dropped)
    names = {name: parts[0] for name, parts in tensor_table(model.config).parts.items()}
    return {name: dtypes[stored] for name, stored in names.items() if stored in dtypes}


def facts_of(options: RecoveryOptions, found: Recovered, rows_digest: str) -> dict[str, Any]:
    """Return the manifest's facts about a training, those that are reproducible."""
    lasting = {name: value for name, value in dataclasses.asdict(found).items() if name != "seconds"}
    return {**_asked(options, rows_digest), **lasting}


def _asked(options: RecoveryOptions, rows_digest: str) -> dict[str, Any]:
    return {"method": "distill", **dataclasses.asdict(options), "rows": rows_digest}


def write_recovered(
    model: PreTrainedModel,
    recovery: Mapping[str, Any],
    plan: Plan | None,
    base: Path,
    out: Path,
    parents: Mapping[str, str] | None = None,
) -> None:
    """Write a trained model to the new folder `out`.

    Args:
        recovery: from `facts_of`.
        plan: by which the model was pruned from `base`; None: `base` is the pruned model.
        parents: digests of its inputs; None: of `base`.

    Raises InputError, IntegrityError.
    """
    facts = {"recovery": recovery, **(plan_facts(plan) if plan else {})}
    parents = parents or {"base": manifest.folder_digest(base)}
    with manifest.creating(out, kind="checkpoint", parents=parents, facts=facts) as folder:
        if plan is None:
            checkpoint.save_trained(model, base, folder)
        else:
            checkpoint.save(model, base, folder, dropped=plan.dropped_layers())
            describe(folder, base, plan)
            check_budget(plan, folder)
        card_changes.set_training(folder, card_changes.distilled(recovery))
