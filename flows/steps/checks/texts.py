"""Whether the text and the images of a recipe can be read, and do not overlap."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from numprune.blocks import Anatomy
from numprune.chat import renderer
from numprune.documents import Document, read_documents
from numprune.flows.recipe import Recipe
from numprune.flows.steps.baseline import prompts_of
from numprune.flows.steps.generate import encoded, read_prompts
from numprune.flows.steps.text import read_images, require_held_out
from numprune.generation import encode
from numprune.pictures import Picture
from numprune.recovery.rows import require_others
from numprune.tasks import Task
from numprune.tasks.image_classification import ImageClassification

Collect = Callable[..., Any]  # a field, a function and its arguments: the result, or None where it is a problem


def judged_items(
    recipe: Recipe,
    anatomy: Anatomy | None,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task | None,
    collect: Collect,
) -> Mapping[str, list[Document] | list[Picture] | None]:
    """Return the held-out documents or images by field; None where they cannot be read.

    Args:
        anatomy, tokenizer, task: of the model, as far as it could be read.
        collect: takes the problems.
    """
    data = recipe.data
    fields = {"data.calibration": data.calibration, **data.heldout_fields}
    if anatomy is not None and anatomy.image is not None:
        images = {field: collect(field, read_images, text, data.reading()) for field, text in fields.items()}
        _held_out(recipe, images, collect)
        images.pop("data.calibration")  # needs no labels
        for field, found in images.items():
            if found and isinstance(task, ImageClassification):
                collect(field, task.labels, found)
        return images
    if tokenizer is None and data.chat:
        return {}
    render = renderer(tokenizer) if data.chat else None
    texts = {field: text for field, text in fields.items() if isinstance(text, list)}
    read = {field: collect(field, read_documents, files, data.split, render) for field, files in texts.items()}
    _held_out(recipe, read, collect)
    trained = read.pop("data.calibration", None) or []
    if recipe.recover.method != "none":
        trained = [*trained, *_prompts(recipe, tokenizer, collect)]
    if {recipe.learn.method, recipe.recover.method} != {"none"}:
        for field, judged in read.items():
            collect(field, require_others, trained, judged or [])
    return read


def _held_out(recipe: Recipe, read: Mapping[str, object], collect: Collect) -> None:
    """Refuse held-out files that are also calibrated on; `read`: what could be read, by field."""
    for field, text in recipe.data.heldout_fields.items():
        if read.get(field) and read.get("data.calibration"):
            collect(field, require_held_out, text, recipe.data.calibration, "data.calibration")


def _prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, collect: Collect) -> list[Document]:
    """The prompts that the dense model is to answer."""
    files, length = recipe.recover.prompts, recipe.data.sequence_length
    found: list[Document] = collect("recover.prompts", read_prompts, files) if files else []
    if found and tokenizer is not None:
        collect("recover.prompts", encoded, found, tokenizer, length)
    return found or []


def check_prompts(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, context: int) -> None:
    """Raises InputError for the first prompt that the model cannot take."""
    for prompt in prompts_of(recipe.evaluate.prompts):
        encode(tokenizer, prompt, context)
