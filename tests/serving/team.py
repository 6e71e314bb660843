"""A team's registry as it is run: MLflow's server with users, PostgreSQL, and OpenStack Swift's S3 interface.

Swift is the object store that installs from PyPI in seconds and is one: it keeps what it is given on disk, checks
signatures, and compares digests itself when a file is read.
"""

import http.client
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "NUMPRUNE_TEAM"  # names the environment, and says that it must be there
USER, PASSWORD = "admin", "correct horse battery staple"

_SWIFT = ("account", "container", "object", "proxy")
_STARTING_S = 240.0  # on a machine that is busy with other tests
_BUCKET = "releases"
_KEY, _SECRET = "team:mlflow", "swift-secret"


def _environment() -> Path:
    """The environment of `make env-team`; the test is skipped where none is meant to be."""
    folder = Path(os.environ.get(VARIABLE, ROOT / ".venv-team"))
    if not (folder / "bin" / "mlflow").exists():
        if VARIABLE in os.environ:
            pytest.fail(f"{folder}: no environment with MLflow's server; make env-team")
        pytest.skip(f"{folder}: no environment with MLflow's server; make env-team")
    return folder / "bin"


def postgresql() -> Path:
    """The folder of PostgreSQL's programs; the test is skipped where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


@dataclass
class Service:
    """A program that listens on a port, and that can be killed and started again."""

    command: Sequence[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        assert self.process is not None
        deadline = time.monotonic() + _STARTING_S
        while not self._answers():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail(f"{self.command[0]} {'ended' if ended else 'does not answer'}:\n{self.log.read_text()}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9, with all that it started; return when nothing of it is left."""
        if self.process is None:
            return
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        for member in family:
            member.kill()
        self.process.wait()
        self.process = None
        psutil.wait_procs(family, timeout=60)


class Lost(Exception):
    """The client is to get no answer, as when the server has died."""


@dataclass
class _Plan:
    request: str
    action: Callable[[], object]
    nth: int
    answered: bool
    met: int = 0  # requests so far


class Relay:
    """Between the client and the server: what a test does to either, it does at a request, a step that is known."""

    def __init__(self, upstream: int) -> None:
        self.seen: list[str] = []
        self._plans: list[_Plan] = []
        self._cut = False
        self._lock = threading.Lock()
        self._upstream = upstream
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                try:
                    super().handle()
                except (ConnectionError, Lost):  # the client was killed, or is to believe that the server was
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

            def _pass_on(self) -> None:
                relay._pass_on(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def at(self, request: str, action: Callable[[], object], *, nth: int = 0, answered: bool = False) -> None:
        """Do `action` when the nth request that begins with `request` has come; or when it is answered.

        Whoever sent it waits meanwhile, and gets no answer when the action raises Lost.
        """
        with self._lock:
            self._plans.append(_Plan(request, action, nth, answered))

    def cut(self, request: str, *, answered: bool = False) -> None:
        """Lose the connection at this request, or just before its answer, for all requests to come."""
        self.at(request, self._lose, answered=answered)

    def reset(self) -> None:
        with self._lock:
            self.seen.clear()
            self._plans.clear()
            self._cut = False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _lose(self) -> None:
        self._cut = True
        raise Lost

    def _met(self, asked: str, *, answered: bool) -> None:
        with self._lock:
            plans = [plan for plan in self._plans if asked.startswith(plan.request) and plan.answered == answered]
            due = [plan for plan in plans if plan.nth == plan.met]
            for plan in plans:
                plan.met += 1
        for plan in due:
            plan.action()

    def _pass_on(self, client: BaseHTTPRequestHandler) -> None:
        asked = f"{client.command} {client.path.partition('?')[0]}"
        content = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        if self._cut:
            raise Lost
        self.seen.append(asked)
        self._met(asked, answered=False)
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        try:
            upstream.request(client.command, client.path, content, dict(client.headers))
            answer = upstream.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            raise Lost from None
        finally:
            upstream.close()
        self._met(asked, answered=True)
        client.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                client.send_header(name, value)
        client.send_header("Content-Length", str(len(body)))
        client.end_headers()
        client.wfile.write(body)


@dataclass
class Team:
    """The running services, and where the object store keeps its files."""

    database: Service
    server: Service
    relay: Relay
    objects: Path
    _programs: Path

    def restart_database(self) -> None:
        """Until it lets clients in, which is later than that it listens."""
        self.database.start()
        _psql(self._programs, self.database.port, "SELECT 1")

    @property
    def uri(self) -> str:
        return self.relay.uri

    def stored(self, content: bytes) -> list[Path]:
        """The files of the object store that hold exactly this."""
        files = (path for path in self.objects.rglob("*.data") if path.stat().st_size == len(content))
        return [path for path in files if path.read_bytes() == content]


@contextmanager
def running(folder: Path) -> Iterator[Team]:
    """Everything, from nothing. `folder` must be on a file system with extended attributes: Swift keeps its there."""
    programs, postgres = _environment(), postgresql()
    _require_attributes(folder)
    with ExitStack() as stack:
        store = _swift(programs, folder / "swift")
        for service in store:
            stack.callback(service.kill)
            service.start()
        database = stack.enter_context(databases(postgres, "mlflow", "users"))
        server = _server(programs, folder, database.port, store[-1].port)
        stack.callback(server.kill)
        server.start()
        for service in store:
            service.wait()
        _make_bucket(programs, server.environment)
        server.wait()
        relay = Relay(server.port)
        stack.callback(relay.close)
        yield Team(database, server, relay, folder / "swift" / "devices", postgres)


def _server(programs: Path, folder: Path, database: int, store: int) -> Service:
    port = _free_port()
    users = folder / "users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = postgresql://mlflow@127.0.0.1:{database}/users\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # a password is made slow to check, and each request brings it along
    )
    environment = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{store}",
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of cookies, which nobody uses here",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "basic-auth"]
    metadata = ["--backend-store-uri", f"postgresql://mlflow@127.0.0.1:{database}/mlflow"]
    files = ["--artifacts-destination", f"s3://{_BUCKET}/mlflow"]
    return Service(
        [str(programs / "mlflow"), "server", *where, *metadata, *files], port, folder / "mlflow.log", environment
    )


# --- PostgreSQL -----------------------------------------------------------------------------------


@contextmanager
def databases(programs: Path, *names: str) -> Iterator[Service]:
    """A server with empty databases of these names, all of the user mlflow."""
    with ExitStack() as stack:
        server = _database(programs, stack)
        stack.callback(server.kill)
        server.start()
        for name in names:
            _psql(programs, server.port, f"CREATE DATABASE {name}")
        yield server


def _database(programs: Path, stack: ExitStack) -> Service:
    """It refuses to run as root, whose temporary folders nobody else may enter: hence a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="numprune-postgres-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    user: list[str] = []
    if os.getuid() == 0:
        user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    data, port = folder / "data", _free_port()
    initialize = [programs / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--locale", "C.UTF-8", "--no-sync"]
    subprocess.run([*user, *map(str, initialize)], check=True, capture_output=True, cwd=folder)
    listening = ["-p", str(port), "-h", "127.0.0.1", "-k", ""]
    return Service([*user, str(programs / "postgres"), "-D", str(data), *listening], port, folder / "log")


def _psql(programs: Path, port: int, statement: str) -> None:
    where = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", "postgres"]
    early = ("refused", "starting up", "not yet accepting")
    deadline = time.monotonic() + _STARTING_S
    while True:
        done = subprocess.run([programs / "psql", *where, "-c", statement], capture_output=True, text=True)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline or not any(sign in done.stderr for sign in early):
            pytest.fail(done.stderr)
        time.sleep(0.05)


# --- Swift ----------------------------------------------------------------------------------------

_RINGS = """
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    address = {"ip": "127.0.0.1", "port": int(port)}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "disk", **address})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""

_PROXY = f"""
[pipeline:main]
pipeline = catch_errors s3api tempauth bulk slo proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_{_KEY.replace(":", "_")} = {_SECRET} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""


def _swift(programs: Path, folder: Path) -> list[Service]:
    """One disk, one copy; the proxy, which is what S3's clients talk to, comes last."""
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = x\n[storage-policy:0]\nname = one\n")
    ports = {kind: _free_port() for kind in _SWIFT}
    rings = [str(ports[kind]) for kind in _SWIFT[:3]]
    subprocess.run([programs / "python", "-c", _RINGS, folder, *rings], check=True, capture_output=True)
    for kind, port in ports.items():
        pipeline = f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        (folder / f"{kind}.conf").write_text(
            f"[DEFAULT]\nswift_dir = {folder}\ndevices = {folder / 'devices'}\nmount_check = false\nworkers = 0\n"
            f"bind_ip = 127.0.0.1\nbind_port = {port}\nuser = {pwd.getpwuid(os.getuid()).pw_name}\n"
            f"{_PROXY if kind == 'proxy' else pipeline}"
        )
    return [
        Service(
            [str(programs / f"swift-{kind}-server"), str(folder / f"{kind}.conf")], ports[kind], folder / f"{kind}.log"
        )
        for kind in _SWIFT
    ]


def _make_bucket(programs: Path, environment: dict[str, str]) -> None:
    script = "import os, sys, boto3; boto3.client('s3').create_bucket(Bucket=sys.argv[1])"
    environment = {**os.environ, **environment, "AWS_ENDPOINT_URL": environment["MLFLOW_S3_ENDPOINT_URL"]}
    subprocess.run([programs / "python", "-c", script, _BUCKET], check=True, capture_output=True, env=environment)


def _require_attributes(folder: Path) -> None:
    try:
        os.setxattr(folder, "user.numprune", b"1")
    except OSError as error:
        pytest.skip(f"{folder}: {error.strerror}; Swift needs a file system with extended attributes, see TMPDIR")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- commands in processes that can be killed ---------------------------------------------------------


class Actors:
    """Processes that do one thing with a registry each, forked from one that has imported MLflow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._origin = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.actor"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, do: str, *arguments: object, **options: Any) -> "Actor":
        """Begin `do(registry, *arguments)` of the registry's functions; `options` as in `actor.act`."""
        self._count += 1
        out = self._folder / f"actor {self._count}"
        task = {"do": do, "arguments": [str(one) for one in arguments], "out": str(out), **options}
        return Actor(self, int(self._tell(task)), out)

    def run(self, do: str, *arguments: object, **options: Any) -> "Ended":
        return self.start(do, *arguments, **options).wait()

    def close(self) -> None:
        assert self._origin.stdin is not None
        self._origin.stdin.close()
        self._origin.wait(60)

    def _tell(self, message: Any) -> str:
        assert self._origin.stdin is not None
        assert self._origin.stdout is not None
        self._origin.stdin.write(json.dumps(message, default=str) + "\n")
        self._origin.stdin.flush()
        return self._origin.stdout.readline()


@dataclass(frozen=True)
class Actor:
    actors: Actors
    pid: int
    out: Path

    def wait(self) -> "Ended":
        code = int(self.actors._tell({"wait": self.pid}))
        return Ended(code, json.loads(self.out.read_text()) if code in (0, 1) else None)


@dataclass(frozen=True)
class Ended:
    """`code`: 0, 1 with an error of ours, or minus the signal; `said`: what was returned, or the error's message."""

    code: int
    said: Any
