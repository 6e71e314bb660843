"""Checks of a recipe for image generators, and their files."""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from numprune.errors import InputError
from numprune.export.decoders import load_decoder
from numprune.export.manifest import sha256_file
from numprune.flows.names import BUILT_IN, EMBEDDED
from numprune.flows.recipe import Recipe, to_text
from numprune.flows.sections import NO_FILE, Evaluate
from numprune.flows.stages import Text
from numprune.tasks.codes import ImageCodes


def decoder(recipe: Recipe) -> Text | None:
    """The recipe's decoder, by its content. Raises InputError."""
    file = _file(recipe)
    return identified(file) if file else None


def _file(recipe: Recipe) -> Path | None:
    return None if recipe.evaluate.decoder == NO_FILE else Path(recipe.evaluate.decoder)


def others(recipe: Recipe) -> list[str]:
    """Settings that apply only to image generators, where the model is none."""
    return [
        f"evaluate.{field} = {to_text(asked)}: the model is not an image generator; omit it"
        for field in ("samples", "guidance", "decoder")
        if (asked := getattr(recipe.evaluate, field)) != Evaluate.model_fields[field].default
    ]


def problems(recipe: Recipe, task: ImageCodes, base: Path, config: PretrainedConfig) -> list[str]:
    """Settings that do not apply to the image generator in `base`, and files that do not fit it."""
    text = {"data.calibration": recipe.data.calibration, **recipe.data.heldout_fields}
    found = [
        f'{field} = "{EMBEDDED}": the model generates images; give files of codes'
        for field, given in text.items()
        if given == EMBEDDED
    ]
    if recipe.evaluate.prompts not in (BUILT_IN, []):
        found.append("evaluate.prompts: the model generates images; omit it")
    if recipe.recover.prompts:
        found.append("recover.prompts: the model generates images; omit it")
    if recipe.evaluate.tasks:
        found.append("evaluate.tasks: the model generates images; omit it")
    if recipe.evaluate.guidance != 1 and not task.vocabulary.classes:
        found.append(f"evaluate.guidance = {recipe.evaluate.guidance:g}: the model has no classes; omit it")
    if "tensorrt" in recipe.export.targets:
        found.append("export.targets: engines are built only for language models; omit tensorrt")
    file = _file(recipe)
    try:
        load_decoder(base, config, file, torch.device("meta"))
    except InputError as error:
        found.append(f"{'evaluate.decoder' if file else 'model.path'}: {error}")
    return found


def identified(path: Path) -> Text:
    """A file by its content. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return Text([str(path)], sha256_file(path))


def same_file(asked: Text, field: str) -> Path:
    """Return the path of an identified file. Raises InputError if its content has changed."""
    path = Path(asked.source[0])
    if identified(path).digest != asked.digest:
        raise InputError(f"{field}: {path} changed after the run began; run the command again")
    return path
