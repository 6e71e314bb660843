"""What the runtimes are given to do: which prompts, how long, how many at a time, how often."""

from dataclasses import asdict, dataclass, fields

import numpy as np

from numprune.errors import InputError

_MINIMA = {"prompts": 1, "prompt_length": 1, "output_length": 2, "batch_size": 1, "repeats": 4, "warmup": 1, "seed": 0}


@dataclass(frozen=True)
class Load:
    """A fixed amount of work; every repeat does all of it, on both sides, with the same prompts.

    Raises InputError naming every field that is out of range.
    """

    prompts: int = 4  # different prompts in one repeat
    prompt_length: int = 128  # tokens
    output_length: int = (
        32  # tokens per prompt, always all of them: the first comes from the prefill, the rest from decoding
    )
    batch_size: int = 1  # prompts that run together (static concurrency)
    repeats: int = 10  # measured, per side; even, so that each side goes first equally often
    warmup: int = 1  # repeats per side that come before, and are left out of every result
    seed: int = 0  # of the prompts' token ids

    def __post_init__(self) -> None:
        problems = [
            f"load.{field.name} = {getattr(self, field.name)!r}: must be an integer of at least {_MINIMA[field.name]}"
            for field in fields(self)
            if type(getattr(self, field.name)) is not int or getattr(self, field.name) < _MINIMA[field.name]
        ]
        if not problems:
            if self.repeats % 2:
                problems.append(
                    f"load.repeats = {self.repeats}: must be even, so that each side goes first equally often"
                )
            if self.prompts % self.batch_size:
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


def interleaving(repeats: int) -> str:
    """The order of the sides, A = baseline, B = candidate: "ABBAABBA…", two letters a repeat.

    A drift of the machine that is linear in time, and whatever it costs to go second, cancel over each "ABBA".
    """
    return "".join("AB" if index % 2 == 0 else "BA" for index in range(repeats))
