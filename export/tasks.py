"""The task of a checkpoint, from its configuration, its tokenizer and the files of sentence-transformers."""

import dataclasses
from pathlib import Path

from numprune.anatomy import code_vocabulary, codes_per_image, context_of, task_name
from numprune.errors import InputError
from numprune.export.config import read_config
from numprune.export.declared import classes_of, pooling_in
from numprune.export.preprocessing import load_processor
from numprune.export.tokenizer import load_tokenizer
from numprune.tasks import CAUSAL, TextTask
from numprune.tasks.classification import Classification
from numprune.tasks.codes import ImageCodes
from numprune.tasks.embedding import Embedding
from numprune.tasks.image_classification import ImageClassification
from numprune.tasks.masked import masked_lm

AnyTask = TextTask | ImageClassification


def load_task(folder: Path) -> AnyTask:
    """Return the task of the checkpoint in `folder`.

    Raises:
        InputError: a file is missing or malformed, or the task is not supported.
    """
    config = read_config(folder)
    name = task_name(config)
    if name == "causal-lm":
        codes = code_vocabulary(config)
        return CAUSAL if codes is None else ImageCodes(codes, codes_per_image(config), context_of(config))
    if name == "masked-lm":
        return masked_lm(load_tokenizer(folder))
    if name == "classification":
        return Classification(classes_of(config))
    if name == "image-classification":
        return ImageClassification(classes_of(config), load_processor(folder, config))
    return Embedding(**dataclasses.asdict(pooling_in(folder)))


def load_text_task(folder: Path, use: str) -> TextTask:
    """Return the task of a checkpoint that reads text; `use`: what needs it. Raises as `load_task`, and InputError."""
    task = load_task(folder)
    if isinstance(task, ImageClassification):
        raise InputError(f"{folder}: {use} reads text, and this model classifies images")
    return task
