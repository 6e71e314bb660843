"""Raw measurements, before any statistics."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Generation:
    """One batch. A request is one prompt; it has failed if any of its logits is NaN or infinite."""

    size: int  # requests
    prompt_length: int  # tokens of each
    ttft_ms: float  # prefill, until the first token has been chosen
    itl_ms: list[float]  # (output_length - 1,) each decode step, until its token has been chosen
    failed: int  # requests

    @property
    def e2e_ms(self) -> float:
        """From the prompt to the last token."""
        return self.ttft_ms + sum(self.itl_ms)


@dataclass(frozen=True)
class Repeat:
    """The whole load, done once by one side; the seconds its threads ran, and waited for a CPU.

    `joules`: energy of the GPU during it; None if it was not measured.
    """

    batches: tuple[Generation, ...]
    ran_s: float
    waited_s: float
    joules: float | None = None

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> "Repeat":
        batches = tuple(Generation(**batch) for batch in answer["batches"])
        return cls(batches, **answer["threads"], joules=answer.get("joules"))  # missing in looks of earlier versions

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads and a worker sends: every step, so that looks can be pooled later."""
        return {
            "batches": [asdict(batch) for batch in self.batches],
            "threads": {"ran_s": self.ran_s, "waited_s": self.waited_s},
            "joules": self.joules,
        }

    @property
    def failed(self) -> int:
        """Requests."""
        return sum(batch.failed for batch in self.batches)

    def metrics(self) -> dict[str, float]:
        """One number per metric: the median for latencies, in ms; total tokens divided by total time for rates.

        So a single stalled step affects the rate and the end-to-end latency, as it does for a user, but not the ITL.
        """
        prefill_s = sum(batch.ttft_ms for batch in self.batches) / 1e3
        decode_s = sum(sum(batch.itl_ms) for batch in self.batches) / 1e3
        generated = sum(batch.size * (1 + len(batch.itl_ms)) for batch in self.batches)
        return {
            "ttft": statistics.median(batch.ttft_ms for batch in self.batches),
            "itl": statistics.median(step for batch in self.batches for step in batch.itl_ms),
            "e2e": statistics.median(batch.e2e_ms for batch in self.batches),
            "decode_tokens_per_s": sum(batch.size * len(batch.itl_ms) for batch in self.batches) / decode_s,
            "prefill_tokens_per_s": sum(batch.size * batch.prompt_length for batch in self.batches) / prefill_s,
            **({} if self.joules is None else {ENERGY: self.joules / generated}),
        }


METRICS = ("ttft", "itl", "e2e", "decode_tokens_per_s", "prefill_tokens_per_s")
ENERGY = "joules_per_token"  # per output token; only if it was measured
