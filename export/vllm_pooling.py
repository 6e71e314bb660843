"""How vLLM serves encoders: its pooling runner returns embeddings or class probabilities."""

import json

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.tasks import Task
from numprune.tasks.embedding import Embedding

# The encoders that vLLM 0.32 serves, by family and task, and the options that the server needs.
_SERVED: dict[tuple[str, str], tuple[str, ...]] = {
    ("bert", "embedding"): (),
    ("bert", "classification"): (),
    ("roberta", "embedding"): (),
    ("roberta", "classification"): (),
    ("electra", "classification"): ("--model-impl", "transformers"),
}

# vLLM's names of poolings.
_POOLING = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}


def options(anatomy: Anatomy, task: Task) -> tuple[str, ...]:
    """Return the options with which vLLM serves a model for its task; none for decoders.

    The pooling is always stated: if no file declares one, vLLM takes the first token's state, but numprune the mean.

    Raises InputError if vLLM does not serve it.
    """
    if task.name == "causal-lm":
        return ()
    if task.name == "masked-lm":
        raise InputError("vLLM does not serve masked language models; leave vllm out")
    if task.name == "image-classification":
        raise InputError("vLLM does not serve image classifiers; leave vllm out")
    served = _SERVED.get((anatomy.family, task.name))
    if served is None:
        able = sorted({family for family, name in _SERVED if name == task.name})
        raise InputError(
            f"vLLM does not serve {anatomy.family} for {task.name}; it serves {', '.join(able)}. Leave vllm out"
        )
    if not isinstance(task, Embedding):
        return served
    if task.pooling not in _POOLING:
        raise InputError(f"vLLM has no {task.pooling} pooling; it has {', '.join(_POOLING)}. Leave vllm out")
    pooler = {"pooling_type": _POOLING[task.pooling], "use_activation": task.normalized}
    return (*served, "--pooler-config", json.dumps(pooler))
