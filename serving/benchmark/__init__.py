"""How fast a candidate is, and how much memory it takes, against its baseline.

`run` drives two workers, one process each, over the same prompts in turn. `worker` is that process's entry point,
`session` and `generation` do its work, and `client` is the parent's side. `load` describes the work; `samples`,
`estimators` and `sections` turn results into sections of the report; `memory`, `scheduler` and `contention` observe the
process and the machine. For encoders, `shapes` describes the load, `encoding` does the work and `passes` holds the
results.
"""

from numprune.serving.benchmark.client import WorkerError
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.run import load_of, pool, run_benchmark
from numprune.serving.benchmark.shapes import EncoderLoad

__all__ = ["EncoderLoad", "Load", "WorkerError", "load_of", "pool", "run_benchmark"]
