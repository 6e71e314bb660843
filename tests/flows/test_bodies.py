"""The bodies of stages are typed functions, called without strings and dictionaries."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_type_hints

import pytest

from numprune.flows import stages
from numprune.flows.stages import Stage
from numprune.flows.steps import bodies
from numprune.flows.steps.bodies.exports import make_onnx

FLOWS = Path(stages.__file__).parent
MODULES = [import_module(f"{bodies.__name__}.{module.name}") for module in iter_modules(bodies.__path__)]
BODIES = {
    name: function
    for module in MODULES
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", BODIES)
def test_a_checker_sees_every_argument_of_a_body(name: str) -> None:
    out, *arguments = inspect.signature(BODIES[name]).parameters.values()
    assert out.name == "out"
    assert all(argument.kind is argument.KEYWORD_ONLY for argument in arguments)
    hints = get_type_hints(BODIES[name])
    assert set(hints) == {"out", "return", *(argument.name for argument in arguments)}
    assert hints["return"] not in (Any, None, dict)


def test_arguments_are_bound_before_any_work() -> None:
    body: Callable[..., Any] = make_onnx
    with pytest.raises(TypeError, match="missing a required argument: 'opset'"):
        Stage.of("export-onnx", "export", body, source=stages.Artifact(Path(), ""))


def named(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if re.fullmatch(r"(steps|studies|chain)(\.\w+)+", text):
                yield f"line {node.lineno}: {text!r}"


def test_no_stage_function_is_named_by_a_string() -> None:
    found = {path: [*named(path.read_text(encoding="utf-8"))] for path in FLOWS.rglob("*.py")}
    assert len(found) > 50
    assert {path.name: names for path, names in found.items() if names} == {}
    assert [*named('run("steps.prune.make_pruned")')] == ["line 1: 'steps.prune.make_pruned'"]


def test_importing_the_bodies_does_not_import_tensor_libraries() -> None:
    program = "import sys, numprune.flows.optimize; print({'torch', 'transformers', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
