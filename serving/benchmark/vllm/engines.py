"""The parent's side of `engine`: starts it, and says with which options an engine loads a model."""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from numprune.export import precision, vllm
from numprune.export.checkpoint import read_config
from numprune.serving.benchmark.client import Worker, start_worker
from numprune.serving.benchmark.load import Load
from numprune.serving.benchmark.vllm.run import threads_of
from numprune.serving.vllm.environment import Environment

_SCRIPT = Path(__file__).with_name("engine.py")
_SCHEDULED = 2048  # the fewest tokens to which a server's scheduler limits a step by default
_PAGE = 128  # the most tokens in a block of the KV cache by default
_SPARE_BYTES = 64 << 20  # for what vLLM keeps beside the sequences


def start_engine(environment: Environment, name: str, timeout_s: float) -> AbstractContextManager[Worker]:
    """Start the process; `name` and `timeout_s` are those of a worker."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables |= {**threads_of(environment), **({"TORCH_COMPILE_DISABLE": "1"} if environment.cpu else {})}
    return start_worker(name, timeout_s, [environment.python, "-P", _SCRIPT], variables)


def ahead(load: Load) -> int:
    """Return the positions that a row may need besides those of the load.

    A long batch is read in several steps, and its first rows run ahead meanwhile, each with a token of every step.
    """
    return math.ceil(load.batch_size * load.prompt_length / max(_SCHEDULED - load.batch_size, 1))


def engine_options(
    environment: Environment, folder: Path, loads: Sequence[Load], dtype: str, tensor_parallel: int = 1
) -> dict[str, Any]:
    """Return vLLM's options for the checkpoint in `folder` and all loads; others are those of a server by default.

    With `tensor_parallel`, each device has a process.

    Raises:
        InputError: vLLM cannot load it.
    """
    facts: dict[str, Any] = vllm.preflight(read_config(folder))
    of_token = 2 * sum(facts["kv_heads"]) * facts["head_size"]
    positions = max(load.positions + ahead(load) for load in loads)
    tokens = max(load.batch_size for load in loads) * _PAGE * (1 + math.ceil(positions / _PAGE))
    needs = facts["needs"]
    shared = {"tensor_parallel_size": tensor_parallel, "distributed_executor_backend": "mp"}
    return {
        "dtype": dtype,
        "max_model_len": positions,
        # Twice, because kinds of layers can share pages of one size.
        "kv_cache_memory_bytes": 2 * tokens * of_token * precision.DTYPES[dtype].itemsize + _SPARE_BYTES,
        "enable_prefix_caching": False,
        "enforce_eager": environment.cpu,
        **(shared if tensor_parallel > 1 else {}),
        **{key.removeprefix("--").replace("-", "_"): value for key, value in zip(needs[::2], needs[1::2], strict=True)},
    }
