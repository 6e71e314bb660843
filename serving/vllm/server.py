"""A vLLM server for one checkpoint: its process, its address, and its last words if it dies."""

import getpass
import json
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from numprune.errors import InputError, MissingRuntime, NumpruneError
from numprune.export import disk, manifest
from numprune.serving import loopback
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm import memory, needs, process
from numprune.serving.vllm.environment import INSTALL, Environment
from numprune.serving.vllm.options import split_names
from numprune.serving.vllm.process import GRACE_S, Process

logger = logging.getLogger(__name__)

STARTUP_S = 600.0
SETTLE_S = 5.0
_POLL_S = 0.5
_ABANDON_S = 3.0
_REPORT_S = 10.0
_MAXIMUM_CONFIG_BYTES = 16 << 20  # longer content would be truncated, and then not valid JSON
_PER_LAYER = "numprune_"  # model types that need the plug-in
_SERVES = "NUMPRUNE_SERVES"  # in the environment of a server and its children: the checkpoint

# None of these overrides user settings.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # a release is a complete local folder
}
# vLLM still compiles the function behind `logprobs`, and our check, the first request that needs it, would wait.
_EAGER = {"TORCH_COMPILE_DISABLE": "1"}
# The plug-in's loader, which compares weights with the configuration, also when they are reloaded.
_AUDITED = ("--load-format", "numprune")


class ServerError(NumpruneError):
    """A server did not start, died or does not respond; the message has vLLM's last lines."""


@dataclass(frozen=True)
class Server:
    """A server, starting or ready.

    Attributes:
        url: of its root, without a trailing slash; the API is at `/v1`.
        name: of the model it serves, as used in requests.
        api_key: that clients must send.
    """

    url: str
    name: str
    process: Process
    api_key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of requests to it."""
        return keys.headers(self.api_key)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self, timeout_s: float = STARTUP_S) -> None:
        """Wait for /health and log progress. Raises ServerError if it dies or is not ready in time."""
        started = time.monotonic()
        told = started
        while not self._is_healthy():
            self.require_alive()
            now = time.monotonic()
            if now - started > timeout_s:
                raise ServerError(f"{self.name}: vLLM is not ready after {timeout_s:g} s; {self.process.last_words()}")
            if now - told > _REPORT_S:
                told = now
                logger.info("%s: vLLM is starting, %.0f s", self.name, now - started)
            time.sleep(_POLL_S)
        self._require_ours()
        logger.info("%s: vLLM answers at %s after %.0f s", self.name, self.url, time.monotonic() - started)

    def require_alive(self, settle_s: float = 0.0) -> None:
        """Raises ServerError, with vLLM's last lines, if the process has ended.

        `settle_s`: time that it may take to end, for callers that lost their connection, which breaks first.
        """
        deadline = time.monotonic() + settle_s
        while self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)
        if not self.process.is_alive():
            raise ServerError(f"{self.name}: vLLM {self.process.how_it_ended()}; {self.process.last_words()}")

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Stop the server and all of its processes, by force after `grace_s`; not an error if it has already ended."""
        self.process.stop(grace_s)

    def abandon(self) -> None:
        """Like `stop`, for a server that is still starting and may miss its SIGTERM."""
        self.stop(grace_s=_ABANDON_S)

    def _is_healthy(self) -> bool:
        try:
            return loopback.get(f"{self.url}/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _require_ours(self) -> None:
        """Check that the response is from our model: another server may have taken the port meanwhile."""
        self.require_alive()
        answer = loopback.get(f"{self.url}/v1/models", headers=self.headers, timeout=30.0)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise ServerError(f"{self.url}: {keys.refused(self.api_key)}; another server uses this port")
        served = [model.get("id") for model in answer.json().get("data", [])] if answer.is_success else []
        if self.name not in served:
            raise ServerError(f"{self.url}: serves {served}, not {self.name}; another server uses this port")


@contextmanager
def serving(
    environment: Environment,
    checkpoint: Path,
    *,
    name: str,
    port: int = 0,
    host: str = "127.0.0.1",
    options: Sequence[str] = (),
    dtype: str = "auto",
    api_key: str | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    startup_timeout_s: float = STARTUP_S,
) -> Iterator[Server]:
    """A ready server, which is stopped when the block exits or when this process ends for whatever reason.

    Args:
        name: of the model in requests, unless `options` has --served-model-name.
        port: 0 picks a free one.
        options: for vLLM, after those that the checkpoint needs.
        api_key: that clients must send; None requires none, whatever is set in the environment.
        env: environment variables for it.
        log: for its output; by default a temporary file that is removed with the server.

    Raises:
        InputError: the port is in use.
        MissingRuntime: the checkpoint needs the plug-in, which is not installed.
        ServerError: vLLM did not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="numprune-vllm-") as scratch:
        server = start(
            environment,
            checkpoint,
            name=name,
            port=port,
            host=host,
            options=options,
            dtype=dtype,
            api_key=api_key,
            env=env,
            tag=f"server-{secrets.token_hex(8)}",
            log=log or Path(scratch) / "vllm.log",
            detached=False,
        )
        try:
            server.wait_until_ready(startup_timeout_s)
        except BaseException:
            server.abandon()
            raise
        try:
            yield server
        finally:
            server.stop()


def start(
    environment: Environment,
    checkpoint: Path,
    *,
    name: str,
    port: int,
    host: str,
    options: Sequence[str],
    dtype: str,
    tag: str,
    log: Path,
    detached: bool,
    api_key: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Server:
    """Start a server and return at once. Raises as `serving` does, but for ServerError."""
    config = _config(checkpoint)
    _require_plugin(environment, checkpoint, str(config.get("model_type")))
    if api_key and not _is_decoder(config):
        logger.warning(
            "%s: vLLM requires the API key only under /v1; /classify and /pooling respond without it, so keep them "
            "behind a gateway",
            name,
        )
    names, others = split_names(options, name)
    needs_memory = environment.cpu and not memory.is_set(others, {**os.environ, **(env or {})})
    port = port or free_port(host)
    require_free(host, port)
    command: list[str | Path] = [
        environment.python,
        "-m",
        "vllm.entrypoints.openai.api_server",  # `vllm serve` requires a distribution named vllm, unlike the CPU build's
        *("--model", str(checkpoint.absolute())),
        *("--served-model-name", *names),
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype),
        *_needs(checkpoint),
        *(_AUDITED if environment.plugin and _is_decoder(config) else ()),
        *(_memory(checkpoint, name) if needs_memory else ()),
        *others,
    ]
    defaults = {
        **_ENVIRONMENT,
        "TORCHINDUCTOR_CACHE_DIR": _compiled(),
        **(_EAGER if "--enforce-eager" in options else {}),
    }
    variables = {key: value for key, value in defaults.items() if key not in os.environ}
    running = process.start(
        command,
        tag=tag,
        log=log,
        detached=detached,
        env={**variables, **(env or {}), keys.VARIABLE: api_key or "", _SERVES: str(checkpoint.absolute())},
    )
    logger.info("%s: starting vLLM %s, process %d, log %s", name, environment.version, running.pid, log)
    return Server(f"http://{reachable(host)}:{port}", names[0], running, api_key)


def _compiled() -> str:
    """The cache of compiled code, shared with later servers: torch's default, outside the temporary folder."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # as in a container with an arbitrary user id
        user = f"uid_{os.getuid()}"
    return str(Path(disk.temporary_folder(), f"torchinductor_{user}"))


def served_checkpoints() -> set[Path]:
    """Checkpoints of all our servers on this machine."""
    found = set()
    for running, _ in process.tagged(""):
        with suppress(psutil.Error):
            found.add(running.environ().get(_SERVES))
    return {Path(path) for path in found if path}


def require_free(host: str, port: int) -> None:
    """Raises InputError if the port is in use; vLLM itself would notice only after its imports."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used on {host} ({error.strerror}); choose another") from None


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _needs(checkpoint: Path) -> tuple[str, ...]:
    """Options that vLLM needs to load it, recorded by the exporter."""
    if not (checkpoint / manifest.FILE_NAME).is_file():
        return ()
    return needs.checked(manifest.read(checkpoint).facts.get("needs", []), checkpoint / manifest.FILE_NAME)


def _memory(checkpoint: Path, name: str) -> tuple[str, ...]:
    """The option for a server on CPUs without a configured memory size."""
    found = memory.of_machine()
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    share = memory.share(found, weights)
    logger.info(
        "%s: vLLM gets %.1f %% of the memory, %.1f GiB, leaving half of the free memory; change it with -- %s",
        name,
        100 * share,
        share * found.total / (1 << 30),
        memory.OPTION,
    )
    return (memory.OPTION, str(share))


def _config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    try:
        with path.open("rb") as file:
            return dict(json.loads(file.read(_MAXIMUM_CONFIG_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); a model must be a folder with config.json") from None


def _is_decoder(config: dict[str, Any]) -> bool:
    """Whether the plug-in's loader applies: encoders are audited when they are fetched."""
    named = config.get("architectures")
    return not isinstance(named, list) or str((named or [""])[0]).endswith(("CausalLM", "LMHeadModel"))


def _require_plugin(environment: Environment, checkpoint: Path, model_type: str) -> None:
    if model_type.startswith(_PER_LAYER) and environment.plugin is None:
        raise MissingRuntime(
            f"{checkpoint}: its layers differ in size ({model_type}), and {environment.python.parent.parent} lacks the "
            f"plug-in numprune-vllm; {INSTALL}"
        )


def reachable(host: str) -> str:
    """The address from which this machine reaches a server listening on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not listened on
    return f"[{host}]" if ":" in host else host
