"""How fast a candidate is, and how much memory it takes, against its baseline.

`run` drives two workers, one process each, over the same prompts in turn; `worker` is what such a process runs,
`session` and `generation` what it does, `client` the parent's end. `load` is what they are asked to do; `samples`,
`estimators` and `sections` make the report's sections of what came out; `memory`, `scheduler` and `contention` look at
process and machine. Of encoders, `shapes` is the load, `encoding` the work and `passes` what came out.
"""

from numprune.serving.benchmark.client import WorkerError
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.run import load_of, pool, run_benchmark
from numprune.serving.benchmark.shapes import EncoderLoad

__all__ = ["EncoderLoad", "Load", "WorkerError", "load_of", "pool", "run_benchmark"]
