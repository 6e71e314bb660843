"""Prefect's server: runs without one, and messages if a configured one cannot be reached."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.flows.faults import command, wait_until

PROGRAM = """
import json
from numprune.flows import server

try:
    url = server.configured()
    if url:
        with server.reaching(url):
            server.check(url)
except server.ServerError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps(url))
"""


# For the world outside; httpx refuses to work with any of them.
PROXIES = {"ALL_PROXY": "socks://proxy:1080", "NO_PROXY": "fd00::/8", "SSL_CERT_FILE": "/no/such/file.pem"}


def start(environment: dict[str, str], folder: Path) -> object:
    """The output of `PROGRAM` in a process with only these Prefect variables."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**others, "PYTHONPATH": path, "PREFECT_LOGGING_LEVEL": "CRITICAL", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("where", ["environment", "profile", "prefect.toml"])
def test_an_unreachable_configured_server_is_named(tmp_path: Path, where: str) -> None:
    """The message names the source of the address: "unset it" does not help those who never set a variable."""
    url = "http://127.0.0.1:9/api"
    environment = {"PREFECT_HOME": str(tmp_path), **PROXIES}
    if where == "environment":
        environment["PREFECT_API_URL"] = url
        named, remedy = "$PREFECT_API_URL", "unset PREFECT_API_URL"
    elif where == "profile":
        profiles = tmp_path / "profiles.toml"
        profiles.write_text(f'active = "team"\n[profiles.team]\nPREFECT_API_URL = "{url}"\n')
        named = f"from Prefect's profile 'team' in {profiles}"
        remedy = "`prefect --profile team config unset PREFECT_API_URL`"
    else:
        (tmp_path / "prefect.toml").write_text(f'[api]\nurl = "{url}"\n')
        named, remedy = "from prefect.toml, pyproject.toml or .env in the current folder", "remove it there"
    assert start(environment, tmp_path) == (
        f"the Prefect server at {url} ({named}) cannot be used: [Errno 111] Connection refused; start it or correct "
        f"its address, or {remedy} to run without it"
    )


PLACE = "prefect.toml, pyproject.toml or .env in the current folder, or Prefect's profiles.toml"
NUMBER = "Input should be a valid number, unable to parse string as a number"


@pytest.mark.parametrize(
    ("where", "content", "said"),
    [
        (None, "", f"$PREFECT_API_REQUEST_TIMEOUT: {NUMBER}; correct or unset PREFECT_API_REQUEST_TIMEOUT"),
        (".env", "PREFECT_API_REQUEST_TIMEOUT=abc", f"request_timeout: {NUMBER}; correct or remove it in {PLACE}"),
        (
            "prefect.toml",
            "[api\n",
            "Failed to load Prefect settings from prefect.toml: invalid TOML (Expected ']' at the end of a table "
            f"declaration (at line 1, column 5)); correct {PLACE}",
        ),
        (
            "profiles.toml",
            "[profiles\n",
            f"Expected ']' at the end of a table declaration (at line 1, column 10); correct {PLACE}",
        ),
    ],
)
def test_settings_that_prefect_cannot_read_are_named(
    tmp_path: Path, where: str | None, content: str, said: str
) -> None:
    environment = {"PREFECT_HOME": str(tmp_path)}
    if where is None:
        environment["PREFECT_API_REQUEST_TIMEOUT"] = "abc"
    else:
        (tmp_path / where).write_text(content)
    assert start(environment, tmp_path) == f"Prefect's settings cannot be read: {said}"


@pytest.mark.slow
def test_ctrl_c_ends_a_run(tiny: Path, tmp_path: Path) -> None:
    """A terminal sends it to the whole process group. Without a configured server nothing of Prefect's is touched."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    (home / "prefect.db").write_text("of another version")
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "numprune.flows.cli", *command(tiny / "recipe.toml", tmp_path / "w")],
        env={**others, **PROXIES, "PREFECT_HOME": str(home), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: list((tmp_path / "w").glob("stages/.*.partial")) or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)) == (130, {"error": "interrupted", "exit_code": 130})
    assert err.splitlines()[-1] == "numprune: interrupted"
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert [(path.name, path.read_text()) for path in home.iterdir()] == [("prefect.db", "of another version")]
    assert {path.name for path in scratch.iterdir()} <= {".ses"}  # which ONNX Runtime writes when it is imported
