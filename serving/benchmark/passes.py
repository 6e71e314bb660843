"""Forward passes of an encoder: the measurements, and their section of the report."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numprune.serving.benchmark.estimators import percentiles
from numprune.serving.benchmark.sections import Look, Section, by_repeat, measured
from numprune.serving.benchmark.shapes import EncoderLoad

METRICS = ("latency", "samples_per_s")


@dataclass(frozen=True)
class Pass:
    """One forward pass of a batch. A text or image has failed if any of its outputs is NaN or infinite."""

    size: int  # texts or images
    length: int  # tokens of each
    latency_ms: float
    failed: int  # texts or images


@dataclass(frozen=True)
class Passes:
    """The whole load, or one shape of it, run once by one side, with the seconds that its threads ran and waited."""

    passes: tuple[Pass, ...]
    ran_s: float
    waited_s: float

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> "Passes":
        return cls(tuple(Pass(**found) for found in answer["batches"]), **answer["threads"])

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads and a worker sends."""
        return {
            "batches": [asdict(found) for found in self.passes],
            "threads": {"ran_s": self.ran_s, "waited_s": self.waited_s},
        }

    def at(self, shape: tuple[int, int]) -> "Passes":
        found = tuple(one for one in self.passes if (one.size, one.length) == shape)
        return Passes(found, self.ran_s, self.waited_s)

    @property
    def failed(self) -> int:
        """Texts."""
        return sum(found.failed for found in self.passes)

    def metrics(self) -> dict[str, float]:
        """The median batch latency in ms, and all texts divided by their total time."""
        seconds = sum(found.latency_ms for found in self.passes) / 1e3
        return {
            "latency": statistics.median(found.latency_ms for found in self.passes),
            "samples_per_s": sum(found.size for found in self.passes) / seconds,
        }


def passes_section(load: EncoderLoad, looks: Sequence[Look[Passes]], descriptions: Mapping[str, Any]) -> Section:
    """`speed.<runtime>` over all looks: every shape under `shapes`, and the first shape's figures beside them."""
    shared = {"load": load.describe(), "runtime": dict(descriptions), "warmup": load.warmup}
    shapes = {}
    for shape in load.shapes:
        of_shape = [
            Look(*([one.at(shape) for one in side] for side in (look.baseline, look.candidate))) for look in looks
        ]
        shapes["{}x{}".format(*shape)] = {**shared, **measured(of_shape, _side, METRICS)}
    first = next(iter(shapes.values()))
    failed = sum(section["failed_requests"] for section in shapes.values())
    return {**first, "failed_requests": failed, "shapes": shapes}


def _side(repeats: Sequence[Passes]) -> Section:
    """Figures over all passes in which every text succeeded."""
    sound = tuple(found for repeat in repeats for found in repeat.passes if not found.failed)
    return {
        "latency_ms": percentiles([found.latency_ms for found in sound]),
        "samples_per_s": Passes(sound, 0.0, 0.0).metrics()["samples_per_s"] if sound else None,
        "by_repeat": by_repeat(repeats, METRICS),
    }
