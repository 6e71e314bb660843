"""Benchmarks of served models: baseline and candidates, each on its own vLLM server, under `vllm bench serve`.

`run` starts the servers and drives them in turn; `load` describes the work; `bench` runs in vLLM's environment and is
the benchmark itself, `requests` its results; `metrics` reads the size of a server's KV cache; `sections` builds the
report's sections. `engine` also runs in vLLM's environment, and times single models in an engine of its own, which
`engines` starts.
"""

from numprune.serving.benchmark.vllm.load import ServedLoad
from numprune.serving.benchmark.vllm.run import BenchmarkFailed, pool, run_served

__all__ = ["BenchmarkFailed", "ServedLoad", "pool", "run_served"]
