"""Who may import whom: flows → serving, export, numprune; serving → export; export → numprune; numprune → nothing.

vLLM's plug-in is a distribution of its own, which runs without serving and export: it may import numprune only.
"""

import ast
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

import numprune

ROOT = Path(numprune.__file__).parent
LAYERS = ("flows", "serving", "export")  # folders of ROOT; what else is in it is the core, called "numprune"
PLUGIN = ("serving", "vllm_plugin")
MAY_IMPORT = {
    "numprune": {"numprune"},
    "export": {"export", "numprune"},
    "serving": {"serving", "export"},
    "flows": {"flows", "serving", "export", "numprune"},
    "plugin": {"numprune"},
}
FOR_EVERYBODY = ("numprune.counted", "numprune.errors", "numprune.progress")
# `python -m numprune.compare` is an address that others use; the module is nothing but a call of the command in flows.
# So is `import numprune`, whose names are those of flows/api.py, imported when they are used.
NAMES_OF_THE_API = {f"numprune.flows.api.{name}" for name in numprune.__all__} | {"numprune.flows.api"}
EXCEPTIONS = {
    Path("compare.py"): {"numprune.flows.studies.compare.command.main"},
    Path("__init__.py"): NAMES_OF_THE_API,
}
NOT_IN_THE_CORE = {"prefect", "mlflow", "vllm", "argparse", "click", "typer"}


def package_of(parts: tuple[str, ...]) -> str:
    """The package of a module or file, given the parts of its name below `numprune`."""
    if parts[:2] == PLUGIN:
        return "plugin"
    return parts[0] if parts and parts[0] in LAYERS else "numprune"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `tree` imports, wherever in it; a relative import keeps its dots.

    `from a import b` is `a.b`: whether b is a module is not known here and does not matter to the rule.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from ((node.lineno, "." * level + ".".join(filter(None, (module, a.name)))) for a in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(source: str, package: str, excepted: Set[str] = frozenset()) -> list[str]:
    """What `source`, a module of `package`, imports against the rule, but for what is `excepted`: "line 3: …"."""
    found = []
    for line, name in imported(ast.parse(source)):
        top, *below = name.split(".")
        if name in excepted:
            continue
        if not top:
            found.append(f"line {line}: {name} is relative")
        elif top in LAYERS:
            found.append(f"line {line}: {name} is found only inside the checkout; write numprune.{name}")
        elif package == "numprune" and top in NOT_IN_THE_CORE:
            found.append(f"line {line}: {name} does not belong into the core")
        elif top == "numprune" and any(f"{name}.".startswith(f"{shared}.") for shared in FOR_EVERYBODY):
            continue
        elif top == "numprune" and package_of(tuple(below)) not in MAY_IMPORT[package]:
            found.append(f"line {line}: {package} may not import {name}")
    return found


def sources(root: Path) -> dict[Path, str]:
    """Every module below `root`, links followed, with its package."""
    # Path.rglob does not follow links, and three of the four packages are links in a checkout.
    folders = [root, *(folder for layer in LAYERS if (folder := root / layer).is_dir())]
    files = {file for folder in folders for file in folder.rglob("*.py")}
    return {file.relative_to(root): package_of(file.relative_to(root).parts) for file in files}


def broken(root: Path) -> list[str]:
    return [
        f"{file}: {problem}"
        for file, package in sorted(sources(root).items())
        for problem in violations((root / file).read_text(encoding="utf-8"), package, EXCEPTIONS.get(file, set()))
    ]


def test_every_import_keeps_the_rule() -> None:
    assert broken(ROOT) == []


def test_the_exceptions_are_needed_and_only_delegate() -> None:
    for file, excepted in EXCEPTIONS.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        needed = [violation for violation in violations(source, "numprune") if "may not import" in violation]
        assert {violation.rpartition(" ")[2] for violation in needed} == excepted - {"numprune.flows.api.__version__"}
        nodes = ast.walk(ast.parse(source))
        functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert functions == (["__getattr__", "__dir__"] if file == Path("__init__.py") else [])


def test_all_packages_are_checked() -> None:
    assert set(sources(ROOT).values()) == set(MAY_IMPORT)


def test_a_bad_module_is_found_in_a_tree_with_links(tmp_path: Path) -> None:
    root = tmp_path / "numprune"
    root.mkdir()
    (root / "plan.py").write_text("import torch\n")
    for layer in LAYERS:
        (tmp_path / layer / "deep").mkdir(parents=True)
        (root / layer).symlink_to(f"../{layer}")
    (tmp_path / "export" / "deep" / "bad.py").write_text("import torch\n\n\ndef late():\n    import numprune.serving\n")
    (tmp_path / "flows" / "good.py").write_text("import numprune.serving\nimport prefect\n")

    assert broken(root) == ["export/deep/bad.py: line 5: export may not import numprune.serving"]


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("numprune", "import numprune.export"),
        ("numprune", "import torch, numprune.flows.stages as s"),
        ("numprune", "from numprune import serving"),
        ("numprune", "from numprune.export.manifest import read"),
        ("numprune", "if TYPE_CHECKING:\n    from numprune.flows import recipe"),
        ("numprune", "def f():\n    import prefect"),
        ("numprune", "from mlflow.tracking import MlflowClient"),
        ("numprune", "import vllm"),
        ("numprune", "import argparse"),
        ("numprune", "import importlib\nimportlib.import_module('numprune.export')"),
        ("export", "from numprune.serving.report import Report"),
        ("export", "import numprune.flows"),
        ("serving", "import numprune"),
        ("serving", "from numprune import quality"),
        ("serving", "from numprune.errorsome import x"),
        ("serving", "import numprune.flows.cli"),
        ("serving", "import numprune.serving.vllm_plugin.numprune_vllm"),
        ("plugin", "from numprune.export import vllm"),
        ("plugin", "from numprune.serving.vllm import server"),
        ("flows", "import export"),
        ("flows", "from flows.recipe import Recipe"),
        ("flows", "import serving.gates"),
        ("flows", "from . import recipe"),
        ("flows", "from ..export import manifest"),
    ],
)
def test_an_import_against_the_rule_is_reported(package: str, source: str) -> None:
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("numprune", "import exporters, torch\nfrom numprune.criteria.view import View"),
        ("export", "from numprune.export.manifest import read\nfrom numprune import anatomy"),
        ("serving", "from numprune.export import manifest\nfrom numprune.serving import gates\nimport mlflow"),
        ("serving", "from numprune.errors import InputError\nfrom numprune import errors\nimport numprune.errors"),
        ("flows", "import prefect, argparse\nfrom numprune.serving import gates\nfrom numprune.plans import Plan"),
    ],
)
def test_an_import_within_the_rule_passes(package: str, source: str) -> None:
    assert violations(source, package) == []
