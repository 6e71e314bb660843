"""The load of a benchmark: which prompts, how long, how many at a time, how often."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from numprune.errors import InputError

# Even, so that each side goes first equally often; fewer give no interval.
REPEATS_RULE = "must be an even number, at least 4"

_MINIMA = {"prompts": 1, "prompt_length": 1, "output_length": 2, "batch_size": 1, "warmup": 1, "seed": 0}


@dataclass(frozen=True)
class Load:
    """A fixed amount of work; every repeat runs all of it, on both sides, with the same prompts.

    Raises InputError naming every field that is out of range.
    """

    prepares: ClassVar[str] = "prepare"  # the worker's operation that accepts it

    prompts: int = 4  # different prompts in one repeat
    prompt_length: int = 128  # tokens
    output_length: int = 32  # tokens per prompt, never fewer: the first from the prefill, the rest from decoding
    batch_size: int = 1  # prompts per batch (static concurrency)
    repeats: int = 10  # measured, per side
    warmup: int = 1  # repeats per side that run first and are excluded from all results
    seed: int = 0  # of the prompts' token ids

    def __post_init__(self) -> None:
        problems = out_of_range(self, _MINIMA)
        if not problems and self.prompts % self.batch_size:
            problems.append(
                f"load.prompts = {self.prompts}: must be a multiple of load.batch_size = {self.batch_size}, "
                "so that all batches have the same size"
            )
        if problems:
            raise InputError("; ".join(problems))

    @property
    def positions(self) -> int:
        """Positions of a sequence in the KV cache: the last token is returned but never fed back."""
        return self.prompt_length + self.output_length - 1

    @property
    def asked(self) -> str:
        """The fields that determine `positions`, for messages."""
        return f"load.prompt_length = {self.prompt_length} and load.output_length = {self.output_length}"

    def work(self, vocabulary: int) -> dict[str, Any]:
        """The request that a worker receives."""
        return {
            "token_ids": self.token_ids(vocabulary),
            "batch_size": self.batch_size,
            "output_length": self.output_length,
        }

    def token_ids(self, vocabulary: int) -> list[list[int]]:
        """(prompts, prompt_length) ids, drawn evenly from the whole vocabulary.

        The choice of tokens does not change the work of a dense decoder, and an end-of-sequence token does not stop
        generation here; what matters is that both sides get the same tokens.
        """
        generator = np.random.default_rng(self.seed)
        ids: list[list[int]] = generator.integers(vocabulary, size=(self.prompts, self.prompt_length)).tolist()
        return ids

    def describe(self) -> dict[str, int]:
        """All fields, for the report."""
        return asdict(self)


def are_repeats(value: int) -> bool:
    """Whether this is a valid number of repeats per side: see REPEATS_RULE."""
    return value >= 4 and value % 2 == 0


def out_of_range(load: Any, minima: Mapping[str, int]) -> list[str]:
    """One line for each field of a load that is below its minimum or not an integer, and for invalid `repeats`."""
    problems = [
        f"load.{name} = {getattr(load, name)!r}: must be an integer of at least {least}"
        for name, least in minima.items()
        if type(getattr(load, name)) is not int or getattr(load, name) < least
    ]
    if type(load.repeats) is not int or not are_repeats(load.repeats):
        problems.append(f"load.repeats = {load.repeats!r}: {REPEATS_RULE}")
    return problems


def interleaving(repeats: int) -> str:
    """The order of the sides, A = baseline, B = candidate: "ABBAABBA…", two letters per repeat.

    A linear drift of the machine, and any cost of running second, cancel over each "ABBA".
    """
    return "".join("AB" if index % 2 == 0 else "BA" for index in range(repeats))
