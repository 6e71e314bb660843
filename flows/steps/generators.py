"""Checks of a recipe for image generators, and their files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from numprune.decoding import Decoder
from numprune.errors import InputError, NumpruneError
from numprune.export.decoders import load_decoder
from numprune.export.feature_networks import features_of, load_network
from numprune.export.manifest import sha256_file
from numprune.flows.names import BUILT_IN, EMBEDDED
from numprune.flows.recipe import Recipe, to_text
from numprune.flows.sections import NO_FILE, Evaluate
from numprune.flows.stages import Text
from numprune.flows.steps.fid import sized
from numprune.frechet import SAMPLES_PER_FEATURE
from numprune.inception_score import SPLITS
from numprune.pictures import read_pictures
from numprune.serving.report import path_of
from numprune.tasks.codes import ImageCodes

_ONLY = ("samples", "guidance", "decoder", "fid_network", "fid_images", "fid_samples")  # of the section `evaluate`
_FID = ("fid", "kid", "inception_score")


def identified_at(file: str) -> Text | None:
    """A recipe's file by its content; None if the recipe names no file. Raises InputError."""
    return None if file == NO_FILE else identified(Path(file))


def others(recipe: Recipe) -> list[str]:
    """Settings that apply only to image generators, where the model is not one."""
    found = [
        f"evaluate.{field} = {to_text(asked)}"
        for field in _ONLY
        if (asked := getattr(recipe.evaluate, field)) != Evaluate.model_fields[field].default
    ]
    found += [where for where, _ in _gated(recipe)]
    return [f"{one}: the model is not an image generator; omit it" for one in found]


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
    file = None if recipe.evaluate.decoder == NO_FILE else Path(recipe.evaluate.decoder)
    try:
        decoder = load_decoder(base, config, file, torch.device("meta"))
    except InputError as error:
        return [*found, f"{'evaluate.decoder' if file else 'model.path'}: {error}"]
    return [*found, *_fid(recipe, decoder)]


def _fid(recipe: Recipe, decoder: Decoder | None) -> Iterator[str]:
    """Why FID cannot be measured as asked."""
    asked, gated = recipe.evaluate, [*_gated(recipe)]
    if asked.fid_network == NO_FILE:
        for field in ("fid_images", "fid_samples"):
            if getattr(asked, field) != Evaluate.model_fields[field].default:
                yield f"evaluate.{field}: there is no evaluate.fid_network; name its file, or omit it"
        for where, _ in gated:
            yield f'{where}: evaluate.fid_network = "none" measures nothing; name its file and evaluate.fid_images'
        return
    if decoder is None:
        yield "evaluate.fid_network: nothing turns the model's codes into pictures; name evaluate.decoder"
        return
    try:
        network = load_network(Path(asked.fid_network), torch.device("cpu"))
        probe = features_of(network, torch.zeros(2, 3, decoder.side, decoder.side, dtype=torch.uint8))
    except NumpruneError as error:
        yield f"evaluate.fid_network: {error}"
        return
    needed = SAMPLES_PER_FEATURE * probe.features.shape[1]
    many = f"at least {needed:,}, {SAMPLES_PER_FEATURE} for each of the network's {probe.features.shape[1]:,} features"
    if asked.fid_samples < needed:
        yield f"evaluate.fid_samples = {asked.fid_samples}: must be {many}"
    elif asked.fid_samples < 2 * SPLITS and probe.probabilities is not None:
        yield f"evaluate.fid_samples = {asked.fid_samples}: must be at least {2 * SPLITS} for the Inception Score"
    try:
        images = read_pictures(asked.fid_images)
        if images:
            sized(images[0], decoder.side)
        if len(images) < needed:
            yield f"evaluate.fid_images: there are {len(images):,}; there must be {many}"
    except InputError as error:
        yield f"evaluate.fid_images: {error}"
    for where, name in gated:
        if name == "inception_score" and probe.probabilities is None:
            yield f"{where}: the network has no classes; use quality.images.fid.delta"


def _gated(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The gates on figures of `_FID`, and which."""
    for index, gate in enumerate(recipe.gates):
        match path_of(gate.metric).split("."):
            case ["quality", "images", name, *_] if name in _FID:
                yield f"gates.{index}.metric = {gate.metric!r}", name


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
