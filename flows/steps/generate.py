"""Text to train on that the dense model generates from the user's prompts."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from numprune.corpus import TokenRows
from numprune.documents import Document, is_plain, read_documents
from numprune.errors import InputError
from numprune.export import checkpoint, locks, manifest
from numprune.flows.names import TRAINING, TRAINING_LOCK
from numprune.flows.stages import code_version
from numprune.flows.steps.recover import shared_by
from numprune.flows.steps.results import GeneratedText
from numprune.generation import encode, end_tokens
from numprune.recovery import RecoveryOptions
from numprune.recovery.generated import GeneratedRows, KeptAnswers, Prompts, generate_rows

_FILE = "rows.safetensors"


def read_prompts(files: Sequence[str | Path]) -> list[Document]:
    """Return the prompts in files: the field "text" of each record, or each line of a plain text. Raises InputError."""
    plain = [file for file in files if is_plain(Path(file))]
    records = [file for file in files if file not in plain]
    found = read_documents(records) if records else []
    for whole in read_documents(plain) if plain else []:
        found += [Document(f"{whole.name}:{at}", line) for at, line in enumerate(whole.text.splitlines(), start=1)]
    return [document for document in found if document.text.strip()]


def encoded(prompts: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens of prompts, through the chat template where there is one.

    Raises InputError that names a prompt that leaves no room in a row of `length` tokens.
    """
    found = []
    for prompt in prompts:
        try:
            found.append(encode(tokenizer, prompt.text.strip(), length))
        except InputError as error:
            raise InputError(f"{prompt.name}: {error}") from None
    return found


def generated_windows(options: RecoveryOptions, length: int, share: float) -> int:
    """Return how many rows are that share of those to train on and to choose by."""
    return math.ceil(share * (options.steps(length) * options.batch_size + options.selection_rows))


@contextmanager
def generated_text(
    dense: Path,
    files: Sequence[str | Path],
    windows: int,
    length: int,
    seed: int,
    device: torch.device,
    scratch: Path,
) -> Iterator[GeneratedRows]:
    """Yield rows that the model in `dense` generated from the prompts in `files`.

    Until the block ends without an error, finished answers are kept in `scratch`, from where the same request resumes.
    Of the processes that share a training, one generates and the others read.

    Raises:
        InputError: a file or a prompt cannot be used, or another process generates the same text.
        IntegrityError: the model's logits are not finite.
    """
    model, tokenizer = checkpoint.load(dense)
    prompts = Prompts(
        encoded(read_prompts(files), tokenizer, length), sorted(end_tokens(model, tokenizer)), tokenizer.eos_token_id
    )
    asked = [manifest.folder_digest(dense), prompts.tokens, length, seed, device.type, code_version("export")]
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    folder = scratch / f"{TRAINING}{identity[:16]}"
    processes = shared_by(device)
    try:
        with locks.held(folder / TRAINING_LOCK, timeout_s=0) if processes.is_main_process else nullcontext():
            with processes.main_process_first():
                kept = KeptAnswers(folder, identity)
                made = generate_rows(model.to(processes.device), prompts, windows, length, seed, kept)
            del model
            yield made
            processes.wait_for_everyone()
            if processes.is_main_process:
                shutil.rmtree(folder)
    except locks.Held:
        raise InputError(f"{folder}: another process generates the same text; wait for it or stop it") from None


def save_generated(stage: Path, made: GeneratedRows) -> GeneratedText:
    """Write rows for `load_generated`."""
    save_file({"rows": torch.stack(list(made.rows.rows))}, stage / _FILE)
    return GeneratedText(made.rows.digest, len(made.rows.rows), made.answers, made.tokens)


def load_generated(stage: Path, digest: str) -> TokenRows:
    """Read what `save_generated` wrote; `digest` is from its result."""
    rows = list(load_file(stage / _FILE)["rows"])
    return TokenRows(rows, [0] * len(rows), ["generated text"], digest)
