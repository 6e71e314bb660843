"""The load of encoder benchmarks: text lengths or images, batch sizes, repeats."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from numprune.errors import InputError
from numprune.serving.benchmark.load import out_of_range

_MINIMA = {"passes": 1, "warmup": 1, "seed": 0}


@dataclass(frozen=True)
class EncoderLoad:
    """A fixed amount of work: unpadded forward passes at every batch size and every length.

    Images have a single length: the tokens that the model makes of one.

    Raises InputError naming every field that is out of range.
    """

    prepares: ClassVar[str] = "prepare_passes"  # the worker's operation that accepts it

    batch_sizes: tuple[int, ...] = (1, 8)  # texts or images in a batch
    lengths: tuple[int, ...] = (32, 128)  # tokens of each
    passes: int = 4  # of each shape in one repeat
    repeats: int = 10  # measured, per side
    warmup: int = 1  # repeats per side that run first and are excluded from all results
    seed: int = 0  # of the texts' token ids, or of the pixel values

    def __post_init__(self) -> None:
        problems = out_of_range(self, _MINIMA)
        for name in ("batch_sizes", "lengths"):
            sizes = getattr(self, name)
            whole = isinstance(sizes, tuple) and bool(sizes) and all(type(size) is int and size > 0 for size in sizes)
            if not whole or len(set(sizes)) != len(sizes):
                problems.append(f"load.{name} = {sizes!r}: must be distinct positive integers")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def positions(self) -> int:
        """Positions of the longest text."""
        return max(self.lengths)

    @property
    def asked(self) -> str:
        """The field that determines `positions`, for messages."""
        return f"load.lengths = {list(self.lengths)}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(inputs per batch, tokens per input), grouped by length."""
        return [(size, length) for length, size in product(self.lengths, self.batch_sizes)]

    def work(self, vocabulary: int) -> dict[str, Any]:
        """The request that a worker receives: for each shape a batch of ids, drawn uniformly from the whole vocabulary.

        For a model of images, which has none, the worker itself draws the pixels, normally distributed. The choice
        does not change the work; what matters is that both sides get the same inputs.
        """
        if not vocabulary:
            return {"batches": [], "passes": self.passes, "images": list(self.batch_sizes), "seed": self.seed}
        generator = np.random.default_rng(self.seed)
        batches = [generator.integers(vocabulary, size=shape).tolist() for shape in self.shapes]
        return {"batches": batches, "passes": self.passes}

    def describe(self) -> dict[str, Any]:
        """All fields, for the report."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes), "lengths": list(self.lengths)}
