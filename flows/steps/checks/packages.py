"""The packages that a recipe needs and a plain installation does not have."""

import importlib
from collections.abc import Sequence

from numprune.flows.recipe import Recipe
from numprune.flows.steps import harness

_MODULES = {
    "distill": ("accelerate",),
    "lora": ("peft",),
    "tasks": ("lm_eval",),
    "onnx": ("onnx", "onnxscript"),
    "onnxruntime": ("onnxruntime",),
}
_INSTALL = {
    **dict.fromkeys(("distill", "lora"), 'pip install "numprune[learn]"'),
    "tasks": harness.INSTALL,
    "onnx": "pip install onnx onnxscript",
    "onnxruntime": 'pip install "numprune[cpu]" or, for a GPU, "numprune[gpu]"',
}


def needed(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the fields that need packages, each with the name in `missing` of what it needs."""
    asked: list[tuple[str, Sequence[str]]] = [
        ("recover.method", [recipe.recover.method]),
        ("recover.train", [recipe.recover.train] if recipe.recover.method != "none" else []),
        ("evaluate.tasks", ["tasks"] if recipe.evaluate.tasks else []),
        ("export.targets", recipe.export.targets),
        ("benchmark.runtimes", recipe.benchmark.runtimes),
    ]
    names = [(field, name) for field, given in asked for name in given if name in _MODULES]
    if "onnx" in recipe.export.targets:
        names.append(("export.targets", "onnxruntime"))  # parity runs the exports
    return list(dict.fromkeys(names))


def missing(name: str) -> list[str]:
    """Return why `name` cannot be used here, one problem per package; empty if it can."""
    problems = []
    for module in _MODULES[name]:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # a missing shared library sometimes raises OSError
            problems.append(
                f"{name} needs the package {module}, which cannot be imported ({error}): {_INSTALL[module]}"
            )
    return problems
