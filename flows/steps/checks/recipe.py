"""Every check of a recipe, and the list of all problems."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from numprune.anatomy import read_anatomy
from numprune.errors import InputError, NumpruneError
from numprune.export import compressed_tensors, tensorrt
from numprune.export.checkpoint import audit, check_vocabulary, read_config, text_tokenizer
from numprune.export.disk import require_writable
from numprune.export.tasks import load_task
from numprune.export.tokenizer import other_reading
from numprune.flows.names import CAUSAL_LM
from numprune.flows.recipe import Recipe
from numprune.flows.steps import generators, harness
from numprune.flows.steps.checks.formats import check_formats
from numprune.flows.steps.checks.gates import metrics
from numprune.flows.steps.checks.packages import missing, needed
from numprune.flows.steps.checks.pruning import check_pruning
from numprune.flows.steps.checks.quantization import quantization
from numprune.flows.steps.checks.servers import kernels, served_in, servers
from numprune.flows.steps.checks.settings import combinations, encoders, images, lengths
from numprune.flows.steps.checks.texts import check_prompts, judged_items
from numprune.flows.steps.harness import Tasks
from numprune.flows.steps.models import model_folder
from numprune.serving.problems import listed
from numprune.serving.registry import open_registry
from numprune.serving.vllm import environment
from numprune.tasks.codes import ImageCodes


def check(recipe: Recipe, workspace: Path) -> Tasks | None:
    """Refuse a recipe that cannot run here. Return its tasks, if it has some: loading them takes long.

    Raises InputError with every problem: field, value, allowed values.
    """
    problems: list[str] = []

    def collect(field: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NumpruneError as error:
            problems.append(f"{field}: {error}")
            return None

    tokenizer = anatomy = task = None
    collect("--workspace", require_writable, workspace)
    base = collect("model.path", model_folder, recipe.model.path)
    config = collect("model.path", read_config, base) if base else None
    if config is not None:
        collect("model.path", compressed_tensors.refuse_quantized, base, "pruning")
        collect("model.path", audit, base)
        tokenizer = collect("model.path", text_tokenizer, base)
        if tokenizer is not None:
            collect("model.path", check_vocabulary, base, tokenizer, config)
            if "vllm" in recipe.export.targets and (problem := other_reading(base)):
                problems.append(f"model.path: {problem}")
        anatomy, task = read_anatomy(config), collect("model.path", load_task, base)
        if tokenizer is not None and task is not None and task.prompted:
            collect("evaluate.prompts", check_prompts, tokenizer, recipe, anatomy.context)
        collect("prune", check_pruning, recipe, anatomy, base)
        problems += servers(recipe, anatomy, task)
        if recipe.evaluate.tasks and anatomy.task != CAUSAL_LM:
            problems.append(
                f"evaluate.tasks: only causal language models answer tasks; the model is for {anatomy.task}; omit it"
            )
        problems += quantization(recipe, anatomy, config)
        problems += [*encoders(recipe, anatomy), *images(recipe, anatomy)]
        if isinstance(task, ImageCodes):
            problems += generators.problems(recipe, task, base, config)
        elif task is not None:
            problems += generators.others(recipe)
        check_formats(recipe, anatomy, config, base, collect)
        problems += lengths(recipe, anatomy.context, anatomy.task)
    tasks: Tasks | None = None
    if recipe.evaluate.tasks and not missing("tasks"):
        asked = recipe.evaluate
        tasks = collect("evaluate.tasks", harness.load_tasks, asked.tasks, asked.num_fewshot, asked.limit)
    judged_on = judged_items(recipe, anatomy, tokenizer, task, collect)
    problems += combinations(recipe)
    unlabelled: set[str] = set()
    if anatomy is not None and anatomy.task.endswith("classification"):
        unlabelled = {field for field, items in judged_on.items() if items and all(one.label is None for one in items)}
    problems += metrics(recipe, anatomy.task if anatomy else None, tasks, unlabelled)
    for field, name in needed(recipe):
        problems += [f"{field}: {problem}" for problem in missing(name)]
    if "tensorrt" in recipe.export.targets:
        collect("export.targets", tensorrt.require)
    for field in served_in(recipe):
        vllm = collect(field, environment.find)
        if vllm and vllm.cpu and anatomy is not None:
            problems += [f"{field}: {problem}" for problem in kernels(anatomy)]
    if recipe.registry.uri != "workspace":
        collect("registry.uri", open_registry, recipe.registry.uri, workspace)
    if "cuda" in (recipe.model.device, recipe.benchmark.device) and not torch.cuda.is_available():
        problems.append("device = 'cuda': torch sees no CUDA device; use auto or cpu")
    if problems:
        raise InputError(listed("the recipe cannot run here", problems))
    return tasks
