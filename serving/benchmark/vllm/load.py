"""The load of server benchmarks: which prompts, how long, how many at a time, how often."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from numprune.errors import InputError
from numprune.serving.benchmark.load import out_of_range

_MINIMA = {
    "prompts": 1,
    "prompt_length": 1,
    "output_length": 2,
    "warmup": 1,
    "seed": 0,
    "goodput_ttft_ms": 1,
    "goodput_tpot_ms": 1,
    "kv_cache_mib": 1,
    "maximum_failed": 0,
}


@dataclass(frozen=True)
class ServedLoad:
    """A fixed amount of work for every server, at several concurrencies.

    Raises InputError naming every field that is out of range.
    """

    prompts: int = 4  # sequential, in each of `concurrency` parallel streams
    prompt_length: int = 128  # tokens
    output_length: int = 32  # tokens, never fewer
    concurrency: tuple[int, ...] = (1, 4)  # requests in flight; each value is measured separately
    repeats: int = 10  # measured, per side and concurrency
    warmup: int = 1  # repeats per side and concurrency that run first and are excluded from all results
    seed: int = 0  # of the prompts
    goodput_ttft_ms: int = 200  # a request is good if it exceeds neither
    goodput_tpot_ms: int = 50
    kv_cache_mib: int = 256  # memory for the KV cache, the same on every server
    maximum_failed: int = 0  # failed requests, of all sides together; more end the benchmark

    def __post_init__(self) -> None:
        problems = out_of_range(self, _MINIMA)
        levels = self.concurrency
        whole = isinstance(levels, tuple) and bool(levels) and all(type(n) is int and n > 0 for n in levels)
        if not whole or len(set(levels)) != len(levels):
            problems.append(f"load.concurrency = {levels!r}: must be distinct positive integers")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def positions(self) -> int:
        """Positions of one request in the KV cache."""
        return self.prompt_length + self.output_length

    @property
    def kv_cache_bytes(self) -> int:
        return self.kv_cache_mib << 20

    def requests(self, concurrency: int) -> int:
        """Requests in one repeat."""
        return self.prompts * concurrency

    def trace(self) -> str:
        """The requests as a trace for vLLM's benchmark, one per line: those of the highest concurrency.

        It turns each number in `hash_ids` into a prompt of token ids, always the same one for the same number (given
        the same tokenizer and PYTHONHASHSEED); no two prompts here share a number.
        """
        count = self.requests(max(self.concurrency))
        lines = [
            {
                "timestamp": 0,
                "input_length": self.prompt_length,
                "output_length": self.output_length,
                "hash_ids": [self.seed * count + index],
            }
            for index in range(count)
        ]
        return "".join(json.dumps(line) + "\n" for line in lines)

    def describe(self) -> dict[str, Any]:
        """All fields, for the report."""
        return {**asdict(self), "concurrency": list(self.concurrency)}
