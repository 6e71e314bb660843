"""Whether a model can be exported and timed as a recipe asks."""

from pathlib import Path
from typing import Any

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.export import genai, onnx
from numprune.export.runtimes import device_of
from numprune.export.vllm import check_per_layer, check_settings
from numprune.flows.recipe import Recipe
from numprune.flows.steps.checks.pruning import pruning_options
from numprune.flows.steps.checks.quantization import schemes_asked
from numprune.flows.steps.checks.texts import Collect
from numprune.flows.steps.export import precisions
from numprune.option_checks import beside_windows
from numprune.spans import full_layers
from numprune.windowing import windowed_config


def check_formats(recipe: Recipe, anatomy: Anatomy, config: Any, base: Path, collect: Collect) -> None:
    """Check the model in `base` for every export and runtime; `collect` takes the problems."""
    formats = {*recipe.export.targets, *recipe.benchmark.runtimes}
    for one in (config, *_windowed(recipe, anatomy, config, base)):
        if formats & {"onnx", "onnxruntime", "tensorrt"}:
            collect("export.targets and benchmark.runtimes", onnx.check_config, one)
        if "onnxruntime" in recipe.export.targets:
            collect("export.targets", genai.check_config, one)
        if "vllm" in formats:
            collect("export.targets and benchmark.runtimes", check_settings, one)
    if "vllm" in formats and recipe.prune.allocation != "uniform":
        collect("prune.allocation", check_per_layer, anatomy)
    chosen = collect("export.dtype", precisions, recipe, base)
    if chosen is not None and "onnxruntime" in recipe.export.targets:
        device = device_of("onnxruntime", recipe.benchmark.device)
        collect("export.targets", genai.check_precision, chosen["onnxruntime"], device)
        for scheme in schemes_asked(recipe.quantize):
            collect("quantize.scheme", genai.check_scheme, scheme, chosen["onnxruntime"])


def _windowed(recipe: Recipe, anatomy: Anatomy, config: Any, base: Path) -> list[Any]:
    """Return the configuration of the model with windows, which the runtimes must support, too; none without any."""
    if not recipe.prune.window:
        return []
    try:
        options = pruning_options(recipe, base)
        after, _ = beside_windows(anatomy, options)
    except InputError:  # `check_pruning` reports it
        return []
    return [windowed_config(config, recipe.prune.window, {*full_layers(anatomy)} - {*full_layers(after)})]
