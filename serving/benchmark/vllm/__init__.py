"""Baseline and candidates as they are served: each on a vLLM server of its own, under `vllm bench serve`.

`run` starts the servers and drives them in turn; `load` is what they are asked for; `bench` runs in vLLM's environment
and is the benchmark itself, `requests` what it gives; `metrics` is what a server says of its KV cache; `sections` makes
the report's sections.
"""

from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.run import BenchmarkFailed, pool, run_served

__all__ = ["BenchmarkFailed", "ServedLoad", "pool", "run_served"]
