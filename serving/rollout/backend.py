"""One server behind the router: started, checked, monitored and drained."""

import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from numprune.serving import loopback, reference_answers
from numprune.serving.deployment import Deployment, choose_dtype, log_file, prove
from numprune.serving.rollout.settings import Settings
from numprune.serving.rollout.state import Backend, Place, Started
from numprune.serving.vllm import api_key, server
from numprune.serving.vllm.options import split_names
from numprune.serving.vllm.server import Server, ServerError

logger = logging.getLogger(__name__)

# By default vLLM pins a server to cores by number: green to those that blue is using.
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_LOAD_REQUESTS = 16
_LOAD_CONCURRENCY = 4
_LOAD_TOKENS = 16
_POLL_S = 0.3
_QUIET_POLLS = 4  # a request that the router has accepted may still be on its way
_PENDING = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


def start(
    place: Place, settings: Settings, release: Deployment, dtype: str, options: list[str]
) -> tuple[Backend, dict[str, Any]]:
    """Start a server of the release on a free local port; return it and its check result once it is ready for traffic.

    On any error nothing is left behind. Raises what `server.start` and `prove` raise, ServerError.
    """
    precision = choose_dtype(release, dtype)
    running = server.start(
        settings.environment,
        release.checkpoint,
        name=release.name,
        port=0,
        host="127.0.0.1",
        options=options,
        dtype=precision,
        api_key=settings.api_key,
        tag=f"{place.tag_prefix}server-{secrets.token_hex(8)}",
        log=log_file(place.workspace, f"rollout-{release.name}"),
        detached=True,
        env={} if _BIND in os.environ or not settings.environment.cpu else {_BIND: "nobind"},
    )
    try:
        running.wait_until_ready(settings.startup_timeout_s)
        found = prove(running, release, precision)
        _load(running, reference_answers.read(release.folder))
    except BaseException:
        running.abandon()
        raise
    made = Backend(
        reference=release.reference,
        digest=release.digest,
        url=running.url,
        dtype=dtype,
        options=options,
        started=Started.of(running.process),
    )
    return made, found


def _request(answers: reference_answers.ReferenceAnswers, number: int) -> tuple[str, dict[str, Any]]:
    """Endpoint and body of a request for one of the reference answers."""
    if isinstance(answers, reference_answers.PooledAnswers):
        tokens = answers.inputs[number % len(answers.inputs)].tokens
        return reference_answers.PATHS[answers.task][0], {"input": [tokens]}
    prompt = answers.prompts[number % len(answers.prompts)].tokens
    return "/v1/completions", {"prompt": prompt, "max_tokens": _LOAD_TOKENS, "ignore_eos": True}


def _is_whole(answer: dict[str, Any], answers: reference_answers.ReferenceAnswers) -> bool:
    if isinstance(answers, reference_answers.PooledAnswers):
        return len(answer["data"]) == 1
    return bool(answer["usage"]["completion_tokens"] == _LOAD_TOKENS)


def _load(running: Server, answers: reference_answers.ReferenceAnswers) -> None:
    """Send a few concurrent requests. Raises ServerError if any of them fails."""

    def complete(number: int) -> None:
        path, body = _request(answers, number)
        body["model"] = running.name
        try:
            answer = loopback.post(f"{running.url}{path}", json=body, headers=running.headers, timeout=300.0)
        except httpx.TransportError as error:
            running.require_alive(server.SETTLE_S)
            raise ServerError(
                f"{running.name}: a request under load failed ({error or type(error).__name__})"
            ) from None
        if not answer.is_success or not _is_whole(answer.json(), answers):
            raise ServerError(f"{running.name}: a request under load failed: {answer.status_code} {answer.text[:200]}")

    with ThreadPoolExecutor(_LOAD_CONCURRENCY) as pool:
        for result in [pool.submit(complete, number) for number in range(_LOAD_REQUESTS)]:
            result.result()
    running.require_alive()
    logger.info("%s: %d requests, %d at a time, none failed", running.name, _LOAD_REQUESTS, _LOAD_CONCURRENCY)


def serves_as(backend: Backend, name: str) -> str:
    """The model name in its responses; `name` unless its options set another."""
    return split_names(backend.options, name)[0][0]


def takes_key(backend: Backend, key: str | None) -> bool:
    """Whether it requires exactly this key or, for None, no key."""
    codes = [_status(f"{backend.url}/v1/models", api_key.headers(sent)) for sent in {key, None}]
    return sorted(codes) == ([httpx.codes.OK] if key is None else [httpx.codes.OK, httpx.codes.UNAUTHORIZED])


def is_alive(backend: Backend | None) -> bool:
    return backend is not None and backend.started.process.is_alive()


def is_healthy(backend: Backend | None) -> bool:
    """Alive and healthy according to /health."""
    return backend is not None and is_alive(backend) and _status(f"{backend.url}/health", {}) == httpx.codes.OK


def retire(backend: Backend, timeout_s: float) -> int:
    """Stop a server that gets no new requests once its requests are done; return how many were cut off."""
    left = _drain(backend, timeout_s)
    if left:
        logger.warning("%s: %d requests were cut off after %g s", backend.reference, left, timeout_s)
    backend.started.process.stop()
    logger.info("%s: stopped", backend.reference)
    return left


def _status(url: str, headers: Mapping[str, str]) -> int:
    """HTTP status; 0 without a response."""
    try:
        return loopback.get(url, headers=headers, timeout=10.0).status_code
    except httpx.TransportError:
        return 0


def _drain(backend: Backend, timeout_s: float) -> int:
    """Wait until a server has no requests; return how many it still has after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    quiet = 0
    while is_alive(backend):
        left = _pending(backend)
        quiet = quiet + 1 if left == 0 else 0
        if quiet == _QUIET_POLLS:
            return 0
        if time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)
    return 0


def _pending(backend: Backend) -> int:
    """Running and waiting requests; 1 if the server is too busy to respond."""
    try:
        answer: Any = loopback.get(f"{backend.url}/metrics", timeout=10.0)
    except httpx.TransportError:
        return 1
    counts = _PENDING.findall(answer.text)
    return int(sum(map(float, counts))) if answer.is_success and counts else 1
