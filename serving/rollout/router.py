"""vLLM's router, the stable address; its servers can be changed while it runs."""

import logging
import secrets
import time
from pathlib import Path
from typing import Any

import httpx

from numprune.errors import MissingRuntime, NumpruneError
from numprune.serving import loopback
from numprune.serving.deployment import log_file
from numprune.serving.rollout.settings import Settings
from numprune.serving.rollout.state import Place, Router, Started
from numprune.serving.vllm import api_key as keys
from numprune.serving.vllm import process, server
from numprune.serving.vllm.environment import INSTALL, Environment

logger = logging.getLogger(__name__)

_STARTUP_S = 120.0
_POLL_S = 0.3
_WORKER_S = 30  # the router's wait for an added server; ours has responded already
_TIMEOUT_S = 2 * _WORKER_S


class RouterError(NumpruneError):
    """The router did not start, died, or did not follow a request."""


def require_installed(environment: Environment) -> None:
    """Raises MissingRuntime."""
    if environment.router is None:
        raise MissingRuntime(f"{environment.python.parent.parent}: vllm-router is not installed there; {INSTALL}")


def start(place: Place, settings: Settings, host: str, port: int, worker: str) -> Router:
    """Start a router in front of `worker`, and wait until it answers. Raises InputError (the port), RouterError."""
    require_installed(settings.environment)
    server.require_free(host, port)
    command: list[str | Path] = [
        settings.environment.python,
        *("-m", "vllm_router.launch_router"),
        *("--host", host, "--port", str(port)),
        *("--worker-urls", worker),
        *("--policy", "round_robin"),
        *("--worker-startup-timeout-secs", str(_WORKER_S), "--worker-startup-check-interval", "1"),
        *("--prometheus-port", str(server.free_port())),  # its fixed default would allow only one router per machine
    ]
    running = process.start(
        command,
        tag=f"{place.tag_prefix}router-{secrets.token_hex(8)}",
        log=log_file(place.workspace, f"rollout-{place.name}-router"),
        detached=True,
    )
    url = f"http://{server.reachable(host)}:{port}"
    router = Router(host=host, port=port, url=url, started=Started.of(running))
    deadline = time.monotonic() + _STARTUP_S
    try:
        while workers(router) != {worker}:
            if not running.is_alive():
                raise RouterError(f"{place.name}: the router {running.how_it_ended()}; {running.last_words()}")
            if time.monotonic() > deadline:
                raise RouterError(
                    f"{place.name}: the router is not ready after {_STARTUP_S:g} s; {running.last_words()}"
                )
            time.sleep(_POLL_S)
    except BaseException:
        running.stop()
        raise
    logger.info("%s: router at %s, process %d, log %s", place.name, url, running.pid, running.log)
    return router


def ensure(place: Place, settings: Settings, router: Router, worker: str) -> Router:
    """A router at the same address that sends everything to `worker`: this one, or a new one if it is dead.

    Raises RouterError, InputError (the port is in use).
    """
    if router.started.process.is_alive() and workers(router) is not None:
        serve_only(router, worker)
        return router
    logger.warning("%s: the router no longer runs", place.name)
    router.started.process.stop()
    return start(place, settings, router.host, router.port, worker)


def workers(router: Router) -> set[str] | None:
    """Its servers; None if it does not respond."""
    try:
        answer = loopback.get(f"{router.url}/list_workers", timeout=10.0)
        return set(answer.json()["urls"]) if answer.is_success else None
    except (httpx.TransportError, ValueError, KeyError, TypeError):
        return None


def serve_only(router: Router, worker: str) -> None:
    """Send all new requests to `worker`, which is added before others are removed. Raises RouterError."""
    before = _require_workers(router)
    if worker not in before:
        _ask(router, "add_worker", worker)
        if worker not in _require_workers(router):
            raise RouterError(f"{router.url}: does not list {worker} although it was added")
    for other in sorted(before - {worker}):
        _ask(router, "remove_worker", other)
    after = _require_workers(router)
    if after != {worker}:
        raise RouterError(f"{router.url}: sends requests to {sorted(after)}, not only to {worker}")


def require_answer(router: Router, model: str, api_key: str | None) -> None:
    """Raises RouterError unless a server of `model` responds through it."""
    try:
        answer = loopback.get(f"{router.url}/v1/models", headers=keys.headers(api_key), timeout=_TIMEOUT_S)
        served = [item["id"] for item in answer.json()["data"]] if answer.is_success else []
    except (httpx.TransportError, ValueError, KeyError, TypeError) as error:
        raise RouterError(f"{router.url}: no response to /v1/models ({error or type(error).__name__})") from None
    if model not in served:
        raise RouterError(f"{router.url}: serves {served}, not {model} (status {answer.status_code})")


def _require_workers(router: Router) -> set[str]:
    found = workers(router)
    if found is None:
        raise RouterError(f"{router.url}: the router does not respond; {router.started.process.last_words()}")
    return found


def _ask(router: Router, what: str, worker: str) -> None:
    parameters: dict[str, Any] = {"url": worker}
    try:
        answer = loopback.post(f"{router.url}/{what}", params=parameters, timeout=_TIMEOUT_S)
    except httpx.TransportError as error:
        raise RouterError(f"{router.url}: {what} {worker}: {error or type(error).__name__}") from None
    if not answer.is_success:
        raise RouterError(f"{router.url}: {what} {worker}: {answer.text[:200]}")
