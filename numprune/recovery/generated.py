"""Text to train on that the dense model generates: samples of its answers to the user's prompts."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from numprune.corpus import TokenRows
from numprune.errors import InputError
from numprune.generation import continuations
from numprune.progress import Progress
from numprune.recovery.state import replace_file

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # answers at a time; the draw depends on it


@dataclass(frozen=True)
class Prompts:
    """What the dense model answers.

    Attributes:
        tokens: of each prompt.
        ends: tokens that end an answer.
        separator: that joins the answers: the tokenizer's EOS, or None where it has none.
    """

    tokens: Sequence[Sequence[int]]
    ends: Sequence[int]
    separator: int | None


@dataclass(frozen=True)
class GeneratedRows:
    """Prompts with their answers, joined and cut into full windows.

    Attributes:
        rows: of S tokens each.
        answers: how many were sampled, to the prompts in turn.
        tokens: of these answers; the others are of prompts.
    """

    rows: TokenRows
    answers: int
    tokens: int


def generate_rows(
    model: PreTrainedModel,
    prompts: Prompts,
    windows: int,
    length: int,
    seed: int,
    kept: "KeptAnswers | None" = None,
) -> GeneratedRows:
    """Sample answers of `model` at temperature 1 until prompts and answers fill `windows` rows of `length` tokens.

    Each prompt is answered once before any is answered again. An answer ends with an end token, or where prompt and
    answer fill a row. On a CPU the same arguments give the same rows, whether or not a process was killed and resumed
    from `kept`.

    Raises:
        InputError: there is no prompt, or one leaves no room in a row.
        IntegrityError: the model's logits are not finite.
    """
    if not prompts.tokens:
        raise InputError("there are no prompts to answer")
    longest = max(map(len, prompts.tokens))
    if longest >= length:
        raise InputError(f"a prompt has {longest} tokens, which leaves no room in rows of {length}; shorten it")
    needed, joined, answers, generated = windows * length, list[int](), 0, 0
    with Progress(needed, "generate", "token") as bar:
        for batch in count():
            asked = [prompts.tokens[(batch * BATCH_SIZE + place) % len(prompts.tokens)] for place in range(BATCH_SIZE)]
            found = kept.read(batch) if kept else None
            if found is None:
                found = continuations(model, asked, prompts.ends, _sampler(seed, batch), maximum=length, length=length)
                if kept:
                    kept.add(batch, found)
            before = len(joined)
            for prompt, answer in zip(asked, found, strict=True):
                joined += [*prompt, *answer, *([] if prompts.separator is None else [prompts.separator])]
            answers, generated = answers + len(asked), generated + sum(map(len, found))
            bar.update(min(len(joined), needed) - before)
            if len(joined) >= needed:
                break
    rows = list(torch.tensor(joined[:needed]).split(length))
    digest = hashlib.sha256(json.dumps(joined[:needed]).encode()).hexdigest()
    return GeneratedRows(TokenRows(rows, [0] * len(rows), ["generated text"], digest), answers, generated)


def _sampler(seed: int, batch: int) -> "_Sampler":
    digest = hashlib.sha256(f"{seed} {batch}".encode()).digest()  # torch takes no more than 32 bits of a seed
    return _Sampler(torch.Generator().manual_seed(int.from_bytes(digest[:4], "little")))


@dataclass(frozen=True)
class _Sampler:
    """Draws each next token from the model's distribution. The generator is on the CPU, as it is on every machine."""

    draw: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        chances = torch.rand(len(logits), 1, generator=self.draw, dtype=torch.float64).to(logits.device)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        return (cumulative < chances * cumulative[:, -1:]).sum(-1)


@dataclass(frozen=True)
class KeptAnswers:
    """A folder with the answers of finished batches, from which a killed process resumes.

    `identity`: digest of all that decides the answers.
    """

    folder: Path
    identity: str

    def read(self, batch: int) -> list[list[int]] | None:
        """Return a batch's answers; None where there are none, or they are damaged or others."""
        path = self._path(batch)
        try:
            digest, _, text = path.read_text(encoding="utf-8").partition(" ")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            digest = text = ""
        if digest != self._digest(text):
            logger.warning("%s: the saved answers are damaged; generating them again", path)
            return None
        found: list[list[int]] = json.loads(text)
        return found

    def add(self, batch: int, answers: Sequence[Sequence[int]]) -> None:
        """Put a batch's answers on the disk."""
        text = json.dumps(answers)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(batch), lambda path: path.write_text(f"{self._digest(text)} {text}", encoding="utf-8"))

    def _path(self, batch: int) -> Path:
        return self.folder / f"answers-{batch}"

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.identity} {text}".encode()).hexdigest()
