"""Prefect's server: the temporary one, what it is kept from, and how a configured one is named when it is not there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.flows.faults import command, wait_until

PROGRAM = """
import json, os
from numprune.flows import server

with server.reaching():
    try:
        server.start()
    except server.ServerError as error:
        print(json.dumps(str(error)))
    else:
        from prefect.client.orchestration import get_client
        from prefect.server.api.server import SubprocessASGIServer

        with get_client(sync_client=True) as client:
            print(json.dumps([SubprocessASGIServer().server_process.pid, client.read_flow_runs()]))
"""


def start(environment: dict[str, str], folder: Path) -> object:
    """What `PROGRAM` prints, in a process with only these variables of Prefect's."""
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


def test_the_temporary_server_has_its_own_home(tmp_path: Path) -> None:
    """Neither the user's database, which may be another version's, nor settings and proxies for other servers."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    (home / "prefect.db").write_text("of another version")
    (home / "profiles.toml").write_text('active = "mine"\n[profiles.mine]\nPREFECT_LOGGING_LEVEL = "WARNING"\n')
    found = start(
        {
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://nobody@127.0.0.1:9/prefect",
            "TMPDIR": str(scratch),
            "HTTP_PROXY": "http://127.0.0.1:9",
            "ALL_PROXY": "socks://proxy:1080",
            "NO_PROXY": "fd00::/8",
            "SSL_CERT_FILE": "/no/such/file.pem",
        },
        tmp_path,
    )
    assert isinstance(found, list)
    pid, runs = found
    assert runs == []
    assert (home / "prefect.db").read_text() == "of another version"
    wait_until(lambda: not psutil.pid_exists(pid) and list(scratch.iterdir()) == [])


def test_a_disallowed_temporary_server(tmp_path: Path) -> None:
    said = start({"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}, tmp_path)
    assert said == (
        "PREFECT_SERVER_EPHEMERAL_ENABLED is false and no Prefect server is configured; unset it, or set "
        "PREFECT_API_URL"
    )


@pytest.mark.parametrize("where", ["environment", "profile", "prefect.toml"])
def test_an_unreachable_configured_server_is_named(tmp_path: Path, where: str) -> None:
    """With where Prefect has its address from: who never set a variable is not helped by "unset" it."""
    url = "http://127.0.0.1:9/api"
    environment = {"PREFECT_HOME": str(tmp_path)}
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
        f"its address, or {remedy} to do without"
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_run(tiny: Path, tmp_path: Path) -> None:
    """A terminal sends it to the whole process group, and the run still reports to its server when it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "numprune.flows.cli", *command(tiny / "recipe.toml", tmp_path / "w")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: list((tmp_path / "w").glob("stages/.*.partial")) or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 60  # 75 s were Prefect's attempts to reach a server that had died
    assert (process.returncode, json.loads(out)) == (130, {"error": "interrupted", "exit_code": 130})
    assert err.splitlines()[-1] == "numprune: interrupted"
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
