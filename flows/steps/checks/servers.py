"""Whether vLLM can serve what a recipe makes."""

from collections.abc import Iterator

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.export import vllm_pooling
from numprune.export.vllm import CPU_HEAD_SIZES
from numprune.flows.recipe import Recipe
from numprune.serving.vllm.environment import TESTED
from numprune.tasks import Task


def servers(recipe: Recipe, anatomy: Anatomy, task: Task | None) -> list[str]:
    """Problems that keep the servers from running the result, regardless of its sizes."""
    if "vllm" not in recipe.export.targets:
        return []
    problems = []
    if task is not None:
        try:
            vllm_pooling.options(anatomy, task)
        except InputError as error:
            problems.append(f"export.targets: {error}")
    if recipe.target.vllm not in TESTED:
        problems.append(f"target.vllm = {recipe.target.vllm!r}: the tested versions are {', '.join(TESTED)}")
    if recipe.target.device == "cpu":
        problems += [f"target.device = 'cpu': {problem}" for problem in kernels(anatomy)]
    return problems


def served_in(recipe: Recipe) -> Iterator[str]:
    """Fields that ask for a vLLM server."""
    if "vllm" in recipe.benchmark.runtimes:
        yield "benchmark.runtimes"
    if recipe.evaluate.tasks and recipe.evaluate.task_runtime == "vllm":
        yield "evaluate.task_runtime"


def kernels(anatomy: Anatomy) -> list[str]:
    """Problems that keep vLLM from running the result on CPUs."""
    if anatomy.head_dim in CPU_HEAD_SIZES:
        return []
    return [
        f"vLLM's CPU kernels support head sizes {', '.join(map(str, CPU_HEAD_SIZES))}, but the model's is "
        f"{anatomy.head_dim}; serve it on GPUs, or omit vllm from export.targets and benchmark.runtimes"
    ]
