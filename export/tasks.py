"""The task of a checkpoint, from its configuration, its tokenizer and the files of sentence-transformers."""

import dataclasses
from pathlib import Path

from numprune.anatomy import task_name
from numprune.export.config import read_config
from numprune.export.declared import classes_of, pooling_in
from numprune.export.tokenizer import load_tokenizer
from numprune.tasks import CAUSAL, Task
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.masked import masked_lm


def load_task(folder: Path) -> Task:
    """Return the task of the checkpoint in `folder`.

    Raises:
        InputError: a file is missing or malformed, or the task is not supported.
    """
    config = read_config(folder)
    name = task_name(config)
    if name == "causal-lm":
        return CAUSAL
    if name == "masked-lm":
        return masked_lm(load_tokenizer(folder))
    if name == "classification":
        return Classification(classes_of(config))
    return Embedding(**dataclasses.asdict(pooling_in(folder)))
