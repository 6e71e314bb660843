"""The recipe's text as token rows, and token rows on the disk."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from numprune.corpus import Document, TokenRows, read_documents, rows_digest, sample_rows, token_rows
from numprune.errors import InputError
from numprune.export.checkpoint import load_tokenizer, read_config
from numprune.export.manifest import sha256_file
from numprune.flows.embedded import corpus
from numprune.flows.names import SEQUENCE_LENGTH
from numprune.flows.recipe import EMBEDDED
from numprune.plan import Draw

_FILE = "rows.safetensors"
_HELDOUT = "heldout.safetensors"
# Of the embedded text no more is read than is needed: about four times the tokens that are drawn.
_CHARACTERS_PER_TOKEN = 12


def text_digest(text: str | list[str], split: corpus.Split) -> str:
    """The identity of a recipe's text: its files', or that of the interpreter that carries it and of our reader."""
    if text == EMBEDDED:
        parts = [sys.version, split, sha256_file(Path(corpus.__file__))]
    else:
        # The names count: they name the documents, and a suffix decides how a file is read.
        parts = [part for file in text for part in (Path(file).name, sha256_file(Path(file)))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_text(text: str | list[str], split: corpus.Split, tokens: int | None = None) -> list[Document]:
    """The documents of a recipe's text; of the embedded one enough for `tokens`, or all. Raises InputError."""
    if text != EMBEDDED:
        return read_documents(text)
    documents: list[Document] = []
    characters = 0
    for name, content in corpus.documents(split):
        documents.append(Document(name, content))
        characters += len(content)
        if tokens is not None and characters >= tokens * _CHARACTERS_PER_TOKEN:
            break
    return documents


def rows_of(files: Sequence[Path], length: int | None, model: Path, baseline: Path | None = None) -> TokenRows:
    """The text as rows for a model and, where there is one, for the baseline that it is compared with.

    Args:
        length: None for `SEQUENCE_LENGTH`, or the model's context where that is shorter.

    Raises InputError: as `read_documents` and `token_rows` do, and when the tokenizers of the two differ on the text.
    """
    context = read_config(model).max_position_embeddings
    length = length or min(SEQUENCE_LENGTH, context)
    if length > context:
        raise InputError(f"--sequence-length {length}: the model takes at most {context} tokens")
    documents = read_documents(files)
    rows = token_rows(documents, load_tokenizer(model), length)
    if baseline is not None and token_rows(documents, load_tokenizer(baseline), length).digest != rows.digest:
        raise InputError(
            f"{model} and {baseline}: their tokenizers make different tokens of the text, so there is nothing to "
            "compare; the baseline must be the model that the other one was made from"
        )
    return rows


def calibration_rows(
    text: str | list[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    """(samples, length) token rows drawn from a recipe's text. Raises InputError."""
    documents = read_text(text, "train", tokens=samples * length)
    return sample_rows(token_rows(documents, tokenizer, length), samples, length, seed)


def draw_of(text: str | Sequence[str | Path], seed: int) -> Draw:
    """What a plan says of the text that its calibration rows were drawn from, and of the draw."""
    return Draw(text=[f"{EMBEDDED}:train"] if text == EMBEDDED else [Path(file).name for file in text], seed=seed)


def make_calibration(
    out: Path, *, model: Path, text: str | list[str], samples: int, sequence_length: int, seed: int
) -> dict[str, Any]:
    """Stage: the rows that pruning is calibrated on."""
    rows = calibration_rows(text, load_tokenizer(model), samples, sequence_length, seed)
    save_file({"rows": rows.contiguous()}, out / _FILE, metadata={"draw": draw_of(text, seed).model_dump_json()})
    return {"digest": rows_digest(rows), "rows": rows.shape[0], "tokens": rows.numel()}


def load_calibration(stage: Path) -> tuple[Tensor, Draw]:
    with safe_open(stage / _FILE, "pt") as file:
        return file.get_tensor("rows"), Draw.model_validate_json(file.metadata()["draw"])


def make_heldout(out: Path, *, model: Path, text: str | list[str], sequence_length: int) -> dict[str, Any]:
    """Stage: the rows that quality is measured on."""
    return save_heldout(out, token_rows(read_text(text, "heldout"), load_tokenizer(model), sequence_length))


def save_heldout(stage: Path, rows: TokenRows) -> dict[str, Any]:
    """Write rows for `load_heldout`; return facts about them."""
    tensors = {
        "tokens": torch.cat(rows.rows),
        "lengths": torch.tensor([len(row) for row in rows.rows]),
        "document": torch.tensor(rows.document),
    }
    save_file(tensors, stage / _HELDOUT)
    (stage / "names.json").write_text(json.dumps(rows.names), encoding="utf-8")
    return {"digest": rows.digest, "rows": len(rows.rows), "tokens": rows.tokens, "documents": len(rows.names)}


def load_heldout(stage: Path, digest: str) -> TokenRows:
    """What `make_heldout` wrote; `digest` is from its facts."""
    with safe_open(stage / _HELDOUT, "pt") as file:
        rows = list(file.get_tensor("tokens").split(file.get_tensor("lengths").tolist()))
        document = file.get_tensor("document").tolist()
    names = json.loads((stage / "names.json").read_text(encoding="utf-8"))
    return TokenRows(rows, document, names, digest)
