"""What encoders are given to do: texts of which lengths, how many at a time, how often."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from numprune.errors import InputError
from numprune.serving.benchmark.load import out_of_range

_MINIMA = {"passes": 1, "warmup": 1, "seed": 0}


@dataclass(frozen=True)
class EncoderLoad:
    """A fixed amount of work: forward passes at every batch size and every length, none of which is padded.

    Raises InputError naming every field that is out of range.
    """

    prepares: ClassVar[str] = "prepare_passes"  # the worker's operation that takes it in

    batch_sizes: tuple[int, ...] = (1, 8)  # texts in a batch
    lengths: tuple[int, ...] = (32, 128)  # tokens of each text
    passes: int = 4  # of each shape in one repeat
    repeats: int = 10  # measured, per side
    warmup: int = 1  # repeats per side that come before, and are left out of every result
    seed: int = 0  # of the texts' token ids

    def __post_init__(self) -> None:
        problems = out_of_range(self, _MINIMA)
        for name in ("batch_sizes", "lengths"):
            sizes = getattr(self, name)
            whole = isinstance(sizes, tuple) and bool(sizes) and all(type(size) is int and size > 0 for size in sizes)
            if not whole or len(set(sizes)) != len(sizes):
                problems.append(f"load.{name} = {sizes!r}: must be different whole numbers above zero")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def positions(self) -> int:
        """Of the longest text."""
        return max(self.lengths)

    @property
    def asked(self) -> str:
        """What it is that needs them."""
        return f"load.lengths = {list(self.lengths)}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(texts in a batch, tokens of each); those of one length together."""
        return [(size, length) for length, size in product(self.lengths, self.batch_sizes)]

    def work(self, vocabulary: int) -> dict[str, Any]:
        """What a worker is given: for each shape a batch of ids, drawn evenly from the whole vocabulary.

        Which tokens they are does not change the work: what matters is that both sides get the same ones.
        """
        generator = np.random.default_rng(self.seed)
        batches = [generator.integers(vocabulary, size=shape).tolist() for shape in self.shapes]
        return {"batches": batches, "passes": self.passes}

    def describe(self) -> dict[str, Any]:
        """All fields, for the report."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes), "lengths": list(self.lengths)}
