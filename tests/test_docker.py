"""The Dockerfile, linted, and its steps run in a folder, without a container engine.

What differs from an image: nothing is installed with apt, the base is this machine's Python, and pip finds everything
in this environment, checks it against requirements and constraints, and downloads nothing.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DOCKERFILE.exists(), reason="an unpacked sdist has no Dockerfile"),
]


# --- reading --------------------------------------------------------------------------------------


def steps() -> list[list[tuple[str, str]]]:
    """(instruction, arguments) of each stage; what stands before the first FROM is not for us."""
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    stages: list[list[tuple[str, str]]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            stages.append([])
        stages[-1].append((instruction, arguments.strip()))
    return stages


def in_context(path: PurePosixPath, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves the file in: the last pattern decides that matches it or a folder it is in."""
    kept = True
    for line in patterns:
        regex = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(regex, part.as_posix()) for part in (path, *path.parents)):
            kept = line.startswith("!")
    return kept


def copy_context(to: Path) -> None:
    """What `COPY . .` copies of a checkout: what git has or would take, without what .dockerignore leaves out."""
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(["git", *listed], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    patterns = (ROOT / ".dockerignore").read_text().split()
    for name in filter(None, names):
        if in_context(PurePosixPath(name), patterns) and os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


# --- building -------------------------------------------------------------------------------------

# A Python that makes environments which see the packages of this one, below their own.
PYTHON = """#!/bin/sh
{python} "$@" || exit
if [ "$1 $2" = "-m venv" ]; then
    for folder; do :; done
    "$folder/bin/python" -m pip uninstall -q -y setuptools  # older than the constraints', and would hide the newer
    echo {packages} > "$folder/lib/python{version}/site-packages/shared.pth"
fi
"""


@dataclass(frozen=True)
class Image:
    """The folders that stand for the image's / and for /tmp, and what the Dockerfile says of its last stage."""

    root: Path
    home: Path
    user: str
    workdir: Path
    command: list[str]
    log: str

    def run(self, *arguments: object, as_user: list[str]) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        return subprocess.run(
            [*as_user, *self.command, *map(str, arguments)],
            cwd=self.workdir,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    root = Path(tempfile.mkdtemp(prefix="numprune-image-"))  # pytest's own folders are closed to other users
    root.chmod(0o755)
    try:
        yield build(root)
    finally:
        shutil.rmtree(root)


def build(root: Path) -> Image:
    """Run the steps: RUN through the shell, with the folder in place of /."""
    python = root / "python"
    version = sysconfig.get_python_version()
    packages = shlex.quote(sysconfig.get_path("purelib"))
    base = str(Path(sys.executable).resolve())  # of which this environment was made
    python.write_text(PYTHON.format(python=shlex.quote(base), packages=packages, version=version))
    python.chmod(0o755)

    def placed(text: str) -> str:
        return re.sub(r"(?<![\w/.:-])/(?=(numprune|workspace|tmp)\b)", f"{root}/", text)

    arguments: dict[str, str] = {}
    workdir, user, entrypoint, command, log = root, "", "", "", ""
    for instruction, value in (step for stage in steps() for step in stage):
        if instruction == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default.strip('"')
        elif instruction == "WORKDIR":
            workdir = Path(placed(value))
            workdir.mkdir(exist_ok=True)
        elif (instruction, value) == ("COPY", ". ."):
            copy_context(workdir)
        elif instruction == "RUN" and "apt-get" not in value:
            own = {"PATH": os.environ["PATH"], "PYTHON": str(python), "PIP_NO_INDEX": "1", **arguments}
            done = subprocess.run(
                ["/bin/sh", "-c", placed(value)], cwd=workdir, env=own, capture_output=True, text=True, timeout=300
            )
            log += done.stdout + done.stderr
            assert done.returncode == 0, f"{value}: {log}"
        elif instruction == "ENV":
            assert value == "HOME=/tmp"
            (root / "tmp").mkdir()
            (root / "tmp").chmod(0o1777)
        elif instruction == "USER":
            user = value
        elif instruction == "ENTRYPOINT":
            entrypoint = placed(value.strip('[]"'))
        elif instruction == "CMD":
            command = value.strip('[]"')
        else:
            # The second stage begins with nothing; here what the first one made is where it would be copied to.
            assert (
                instruction == "FROM"
                or (instruction, value) == ("COPY", "--from=build /numprune /numprune")
                or (instruction == "RUN")
            ), f"{instruction} {value}: a step that this test does not know"
    assert command == "optimize"
    return Image(root, root / "tmp", user, workdir, [entrypoint], log)


@pytest.fixture
def as_user(image: Image) -> list[str]:
    """What to put before a command so that it runs as the image's user, which has no capability.

    Where only root can reach this machine's Python, the user may also read what is closed to it, and write nothing.
    """
    if os.getuid() != 0:
        return []
    user, group = image.user.split(":")
    plain = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", "--no-new-privs", "--bounding-set"]
    probe = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"  # setpriv starts anything
    reading = ["+dac_read_search", "--inh-caps", "-all,+dac_read_search", "--ambient-caps", "+dac_read_search"]
    for before in ([*plain, "-all"], [*plain, "-all," + reading[0], *reading[1:]]):
        if subprocess.run([*before, sys.executable, "-c", probe], capture_output=True).returncode == 0:
            return before
    pytest.skip("this machine's Python cannot be run by any other user, nor the right to read be given")


# --- tests ----------------------------------------------------------------------------------------


def test_hadolint_reports_nothing() -> None:
    command = [Path(sysconfig.get_path("scripts")) / "hadolint", "--failure-threshold", "style", DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_build_context_holds_nothing_else(image: Image) -> None:
    made = {".venv", "numprune.egg-info"}
    there = {path.name for path in (image.root / "numprune").iterdir()} - made
    files = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"}
    assert there == {"export", "flows", "numprune", "serving", *files}
    assert (image.root / "numprune" / "numprune" / "flows").is_symlink()


def test_everything_is_installed_under_the_constraints(image: Image) -> None:
    """pip resolved all of it: what is missing, or not of the pinned version, it would have had to download."""
    python = image.root / "numprune" / ".venv" / "bin" / "python"
    script = "import numprune.flows as f, numprune.export as e; print(f.__file__, e.__file__)"
    done = subprocess.run([python, "-c", script], cwd=image.root, capture_output=True, text=True, check=True)
    package = image.root / "numprune" / "numprune"
    assert done.stdout.split() == [str(package / name / "__init__.py") for name in ("flows", "export")]
    assert "Successfully installed numprune" in image.log
    assert "onnxruntime" in image.log


def test_the_image_user_can_read_everything_and_write_nothing(image: Image) -> None:
    for path in (image.root / "numprune").rglob("*"):
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o005 == 0o005 if path.is_dir() else mode & 0o004, path
            assert not mode & 0o002, path


def test_the_entrypoint_runs_as_the_images_user(
    image: Image, as_user: list[str], tiny_checkpoint: Callable[..., Path]
) -> None:
    helped = image.run("--help", as_user=as_user)
    assert helped.returncode == 0, helped.stderr
    assert "optimize" in helped.stdout

    model = shutil.copytree(tiny_checkpoint(), image.root / "model")
    (model / "model.safetensors").chmod(0o644)  # transformers writes it for its owner alone
    text = image.root / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    options = ("--ratio", 0.25, "--text", text, "--samples", 4, "--sequence-length", 32)
    pruned = image.run("prune", model, "pruned", *options, as_user=as_user)  # into the image's working directory
    assert pruned.returncode == 0, pruned.stderr
    inspected = image.run("inspect", "pruned", "--json", as_user=as_user)
    assert inspected.returncode == 0, inspected.stderr
    assert '"parameters"' in inspected.stdout

    if as_user:
        assert (image.workdir / "pruned" / "model.safetensors").stat().st_uid == int(image.user.split(":")[0])
        written = subprocess.run([*as_user, "touch", image.root / "numprune" / "new"], capture_output=True, text=True)
        assert "Permission denied" in written.stderr
