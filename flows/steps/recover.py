"""A pruned checkpoint to one that was trained towards the dense model."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from numprune.anatomy import task_name
from numprune.corpus import TokenRows
from numprune.documents import Reading
from numprune.errors import InputError
from numprune.export import card, checkpoint, compressed_tensors, manifest
from numprune.export.weights import DTYPES
from numprune.flows.names import CAUSAL_LM
from numprune.flows.recipe import Recover
from numprune.flows.stages import code_version
from numprune.flows.steps import text as texts
from numprune.flows.steps.quantize import dropped_layers
from numprune.flows.steps.results import RecoveredCheckpoint
from numprune.flows.steps.training import named, resumable
from numprune.recovery import Recovered, RecoveryOptions, RecoveryRows, distill, draw_rows
from numprune.recovery.state import TrainingState


def options_of(asked: Recover) -> RecoveryOptions:
    """Return the options that a recipe asks for."""
    return RecoveryOptions(**asked.model_dump(exclude={"method"}))


def check_request(source: Path, dense: Path) -> None:
    """Refuse what `recover_checkpoint` could not do. Raises InputError."""
    compressed_tensors.refuse_quantized(source, "training")
    compressed_tensors.refuse_quantized(dense, "--dense")
    for folder in (source, dense):
        if (task := task_name(checkpoint.read_config(folder))) != CAUSAL_LM:
            raise InputError(f"{folder}: task {task}; only causal language models can be trained after pruning")
    ours, theirs = (checkpoint.load_tokenizer(folder).get_vocab() for folder in (source, dense))
    if ours != theirs:
        raise InputError(f"{source} and {dense}: their tokenizers differ; --dense is the model that was pruned")
    sizes = [int(checkpoint.read_config(folder).vocab_size) for folder in (source, dense)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{source} and {dense}: vocab_size is {sizes[0]} and {sizes[1]}; --dense is the model that was pruned"
        )


def training_rows(
    text: texts.Text,
    model: Path,
    length: int,
    options: RecoveryOptions,
    reading: Reading,
    option: str,
    judged: TokenRows | None = None,
) -> RecoveryRows:
    """Return the rows of a text, none of those that the result is judged on.

    `option`: the user's name of the number of selection rows. Raises InputError.
    """
    tokens = (options.steps(length) * options.batch_size + options.selection_rows) * length
    rows = texts.text_rows(text, "train", checkpoint.load_tokenizer(model), length, reading, tokens)
    with named(option):
        return draw_rows(rows, length, options, judged)


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
        scratch: a folder in which a killed training leaves its state; the same request resumes there.

    Raises:
        InputError: `out` exists, the models or options cannot be used, or another process is running the same training.
        IntegrityError: a file is not what it should be, or the training diverged.
    """
    check_request(source, dense)
    parents = {"base": manifest.folder_digest(source), "dense": manifest.folder_digest(dense)}
    asked = {"method": "distill", **dataclasses.asdict(options), "rows": rows.digest}
    processes = shared_by(device)
    where = {"device": device.type, "processes": processes.num_processes, "code": {**code_version("export")}}
    # One process saves and writes for all.
    with resumable(scratch, {**parents, **asked, **where}, writes=processes.is_main_process) as state:
        processes.wait_for_everyone()
        model, found = _trained(source, dense, rows, options, device, state)
        if processes.is_main_process:
            facts = {"recovery": {**asked, **_lasting(found)}}
            with manifest.creating(out, kind="checkpoint", parents=parents, facts=facts) as folder:
                checkpoint.save_trained(model, source, folder)
                card.set_training(folder, training_of(found))
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
    """Return the model in `source`, trained, and how. Raises InputError, IntegrityError."""
    model, _ = checkpoint.load(source)
    stored, dropped = _stored(source, model), dropped_layers(source)
    teacher, _ = checkpoint.load(dense)
    return model, distill(model, teacher, rows, options, device, stored=stored, dropped=dropped, state=state)


def shared_by(device: torch.device) -> Any:
    """Return accelerate's view of the processes that share the training: one, or those of `accelerate launch`."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu")


def _stored(source: Path, model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the data types that the model's weights are stored in, by their names in the model."""
    headers = checkpoint.audit(source)
    found = {name: headers.get(parts[0]) for name, parts in checkpoint.stored_names(model).items()}
    return {name: DTYPES[header.dtype] for name, header in found.items() if header is not None}


def _lasting(found: Recovered) -> dict[str, Any]:
    """What of a training is the same each time."""
    return {name: value for name, value in dataclasses.asdict(found).items() if name != "seconds"}


def training_of(found: Recovered) -> str:
    """Return the sentence for the model card."""
    kept = f"the weights after step {found.best_step} of {found.steps}"
    if not found.best_step:
        kept = "no step improved on the pruned weights, which were kept"
    return f"distillation from the base model on {found.tokens:,} tokens; {kept}"
