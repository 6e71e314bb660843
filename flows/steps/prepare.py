"""The run of a recipe, with its inputs identified."""

import platform
from pathlib import Path

import torch

from numprune.anatomy import family_of, read_anatomy
from numprune.blocks import Anatomy
from numprune.export import processors
from numprune.export.checkpoint import read_config
from numprune.export.manifest import folder_digest
from numprune.flows.names import ROOFLINE
from numprune.flows.recipe import Recipe
from numprune.flows.run import Run
from numprune.flows.stages import Artifact, Text
from numprune.flows.steps import generators
from numprune.flows.steps.checks.pruning import pruning_options
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.checks.servers import served_in
from numprune.flows.steps.estimates import estimate_key
from numprune.flows.steps.export import precisions
from numprune.flows.steps.models import model_folder
from numprune.flows.steps.text import text_digest
from numprune.flows.steps.timings import key_of
from numprune.hidden import Width
from numprune.options import widths_timed
from numprune.serving.vllm import environment
from numprune.timings import anatomy_at, shape_of


def prepare(recipe: Recipe, workspace: Path) -> Run:
    """Return the run of a recipe with its inputs identified. Raises InputError as `check` does."""
    tasks = check(recipe, workspace)
    base, data = model_folder(recipe.model.path), recipe.data
    config = read_config(base)
    anatomy = read_anatomy(config)
    available = torch.cuda.is_available()
    return Run(
        recipe=recipe,
        workspace=workspace,
        base=Artifact(base, folder_digest(base)),
        task=anatomy.task,
        served=anatomy.task not in ("masked-lm", "image-classification") and family_of(config).vllm.runs,
        image_tokens=anatomy.context if anatomy.image else None,
        calibration=Text(data.calibration, text_digest(data.calibration, "train")),
        heldout={name: Text(text, text_digest(text, "heldout")) for name, text in data.corpora.items()},
        prompts=Text(recipe.recover.prompts, text_digest(recipe.recover.prompts, "train"))
        if recipe.recover.prompts
        else None,
        tasks=Text(recipe.evaluate.tasks, tasks.digest()) if tasks else None,
        decoder=generators.identified_at(recipe.evaluate.decoder),
        fid_network=generators.identified_at(recipe.evaluate.fid_network),
        fid_images=Text(recipe.evaluate.fid_images, text_digest(recipe.evaluate.fid_images, "heldout"))
        if recipe.evaluate.fid_images
        else None,
        device="cuda" if available and recipe.model.device != "cpu" else "cpu",
        uses_gpu=available and (recipe.model.device, recipe.benchmark.device) != ("cpu", "cpu"),
        precision=precisions(recipe, base),
        machine={
            "node": platform.node(),
            "cores": str(processors.count()),
            "gpu": torch.cuda.get_device_name() if available else "",
            **({"vllm": str(environment.find())} if [*served_in(recipe)] else {}),
        },
        timing_keys=_timing_keys(recipe, base, anatomy) if recipe.prune.allowed.time else {},
    )


def _timing_keys(recipe: Recipe, base: Path, anatomy: Anatomy) -> dict[Width | None, str]:
    asked, served, options = recipe.timings, recipe.served(), pruning_options(recipe, base)
    estimated = asked.runtime == ROOFLINE
    key = estimate_key(base, asked.peaks().name, served) if estimated else key_of(base, asked.runtime, served)
    shapes = {width: shape_of(anatomy_at(anatomy, width, options.target)) for width in widths_timed(anatomy, options)}
    return {width: key.model_copy(update={"shape": shape}).model_dump_json() for width, shape in shapes.items()}
