"""The built and installed package: everything is below `numprune`, so a user's `flows/` is not shadowed."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("export", "flows", "serving")
NOT_COPIED = (".*", "__pycache__", "dist", "build", "numprune-workspace")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Built:
    tree: Path
    sdist: Path
    wheel: Path  # built from the sdist
    direct: Path  # the wheel built from the checkout


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of `command`; with its output in the failure when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    # Of a copy, so that an edit while the tests run does not come between the two builds.
    tree = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    shutil.copy(ROOT / ".gitignore", tree)
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", out, tree, cwd=out)
    run(*build, "--wheel", "--outdir", out / "direct", tree, cwd=out)
    (sdist,) = out.glob("numprune-*.tar.gz")
    (wheel,) = out.glob("numprune-*.whl")
    return Built(tree, sdist, wheel, out / "direct" / wheel.name)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the wheel's files; what it depends on comes from this environment."""
    site = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", "--target", site, built.wheel, cwd=site)
    return site


def package_files(tree: Path) -> set[str]:
    """Every file that must be installed, as `numprune/flows/…`: modules, the default recipe, the embedded model."""
    roots = [tree / "numprune", *(tree / "numprune" / package for package in PACKAGES)]  # rglob does not follow links
    files = (file for root in roots for file in root.rglob("*") if file.is_file())
    return {file.relative_to(tree).as_posix() for file in files}


def test_the_sdist_holds_every_file_once(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    names = [PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix() for member in members]

    assert all(member.isfile() for member in members)  # no link, no folder
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("numprune/")} == package_files(built.tree)
    assert not [name for name in names if name.split("/")[0] in PACKAGES]


def test_the_wheel_is_the_same_from_sdist_and_checkout(built: Built) -> None:
    assert built.wheel.read_bytes() == built.direct.read_bytes()


def test_the_wheel_holds_only_packages_below_numprune(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert names == package_files(built.tree)
    assert "numprune/flows/embedded/recipe.toml" in names
    assert {name.split("/")[1] for name in names} >= set(PACKAGES)


def test_the_wheel_has_the_command(built: Built) -> None:
    entry_points = configparser.ConfigParser()
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entry_points.read_string(archive.read(name).decode())

    assert entry_points["console_scripts"]["numprune"] == "numprune.flows.cli:main"


IMPORTS = """
import sys
import flows.mine, export, serving
import numprune.flows, numprune.flows.cli, numprune.export, numprune.serving
for name in ("flows", "export", "serving", "numprune.flows", "numprune.export", "numprune.serving"):
    print(sys.modules[name].__file__)
"""


def test_user_folders_do_not_shadow_the_package(installed: Path, tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "flows" / "mine.py").touch()

    files = run(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()

    names = ("flows", "export", "serving")
    assert files[:3] == [str(tmp_path / name / "__init__.py") for name in names]
    assert files[3:] == [str(installed / "numprune" / name / "__init__.py") for name in names]


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    script = "import sys; from numprune.flows.cli import main; sys.exit(main(['--help']))"

    assert "optimize" in run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed))


def test_inside_the_checkout_its_own_files_win_over_an_installed_wheel(installed: Path) -> None:
    script = "import numprune.flows as f, numprune.serving as s; print(f.__file__); print(s.__file__)"

    files = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(installed)).splitlines()

    assert files == [str(ROOT / "numprune" / name / "__init__.py") for name in ("flows", "serving")]


ENTRYPOINT = """
import sys
from prefect.utilities.importtools import import_object
flow = import_object(sys.argv[1])  # unlike loading it as a flow, fails when one of its imports does
from prefect.flows import load_flow_from_entrypoint
print(flow.name, load_flow_from_entrypoint(sys.argv[1]).name)
"""


@pytest.mark.parametrize("entrypoint", ["flows/optimize.py:optimize", "numprune.flows.optimize:optimize"])
def test_prefect_loads_the_flow(entrypoint: str) -> None:
    if not (ROOT / entrypoint.split(":")[0]).exists() and ".py" in entrypoint:
        pytest.skip("an unpacked sdist has its flows below numprune only")

    names = run(sys.executable, "-c", ENTRYPOINT, entrypoint, cwd=ROOT).splitlines()[-1]

    assert names == "numprune-optimize numprune-optimize"
