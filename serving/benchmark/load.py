"""What the runtimes are given to do: which prompts, how long, how many at a time, how often."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from numprune.errors import InputError

# Even, so that each side goes first equally often; with fewer there is no interval.
REPEATS_RULE = "must be an even number, at least 4"

_MINIMA = {"prompts": 1, "prompt_length": 1, "output_length": 2, "batch_size": 1, "warmup": 1, "seed": 0}


@dataclass(frozen=True)
class Load:
    """A fixed amount of work; every repeat does all of it, on both sides, with the same prompts.

    Raises InputError naming every field that is out of range.
    """

    prepares: ClassVar[str] = "prepare"  # the worker's operation that takes it in

    prompts: int = 4  # different prompts in one repeat
    prompt_length: int = 128  # tokens
    output_length: int = (
        32  # tokens per prompt, always all of them: the first comes from the prefill, the rest from decoding
    )
    batch_size: int = 1  # prompts that run together (static concurrency)
    repeats: int = 10  # measured, per side
    warmup: int = 1  # repeats per side that come before, and are left out of every result
    seed: int = 0  # of the prompts' token ids

    def __post_init__(self) -> None:
        problems = out_of_range(self, _MINIMA)
        if not problems and self.prompts % self.batch_size:
            problems.append(
                f"load.prompts = {self.prompts}: must be a multiple of load.batch_size = {self.batch_size}, "
                "so that every batch is of the same size"
            )
        if problems:
            raise InputError("; ".join(problems))

    @property
    def positions(self) -> int:
        """Positions a sequence takes in the KV cache: the last token is only given out, never fed back."""
        return self.prompt_length + self.output_length - 1

    @property
    def asked(self) -> str:
        """What it is that needs them."""
        return f"load.prompt_length = {self.prompt_length} and load.output_length = {self.output_length}"

    def work(self, vocabulary: int) -> dict[str, Any]:
        """What a worker is given."""
        return {
            "token_ids": self.token_ids(vocabulary),
            "batch_size": self.batch_size,
            "output_length": self.output_length,
        }

    def token_ids(self, vocabulary: int) -> list[list[int]]:
        """(prompts, prompt_length) ids, drawn evenly from the whole vocabulary.

        Which tokens they are does not change the work of a dense decoder, and an end-of-sequence token ends nothing
        here: what matters is that both sides get the same ones.
        """
        generator = np.random.default_rng(self.seed)
        ids: list[list[int]] = generator.integers(vocabulary, size=(self.prompts, self.prompt_length)).tolist()
        return ids

    def describe(self) -> dict[str, int]:
        """All fields, for the report."""
        return asdict(self)


def are_repeats(value: int) -> bool:
    """Whether a benchmark can have so many repeats of each side: see REPEATS_RULE."""
    return value >= 4 and value % 2 == 0


def out_of_range(load: Any, minima: Mapping[str, int]) -> list[str]:
    """A line for each field of a load that is under its minimum, or no whole number, and for unfit `repeats`."""
    problems = [
        f"load.{name} = {getattr(load, name)!r}: must be an integer of at least {least}"
        for name, least in minima.items()
        if type(getattr(load, name)) is not int or getattr(load, name) < least
    ]
    if type(load.repeats) is not int or not are_repeats(load.repeats):
        problems.append(f"load.repeats = {load.repeats!r}: {REPEATS_RULE}")
    return problems


def interleaving(repeats: int) -> str:
    """The order of the sides, A = baseline, B = candidate: "ABBAABBA…", two letters a repeat.

    A drift of the machine that is linear in time, and whatever it costs to go second, cancel over each "ABBA".
    """
    return "".join("AB" if index % 2 == 0 else "BA" for index in range(repeats))
