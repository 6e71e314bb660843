"""Switches from one version to the next without losing requests."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numprune.errors import InputError, IntegrityError, NumpruneError
from numprune.serving.deployment import Deployment, remove_copies
from numprune.serving.rollout import backend, router
from numprune.serving.rollout.recovery import recover
from numprune.serving.rollout.settings import PORT, Settings
from numprune.serving.rollout.state import Backend, Place, RolloutFailed, State
from numprune.serving.vllm import api_key, server

logger = logging.getLogger(__name__)


def roll_out(
    name: str,
    prepare: Callable[[], Deployment],
    workspace: Path,
    settings: Settings,
    then: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make the release from `prepare` serve `name`; the previous server is drained and stopped.

    Leftovers of an interrupted rollout are cleaned up first. A release that already serves with the same settings is
    left alone.

    Args:
        prepare: called with the lock held, before anything is started.
        then: called once the release serves, still under the lock.

    Returns:
        Plain JSON: reference, digest, url (of the router), changed, previous (reference or null), cut_off (requests of
            the previous server that outlasted the drain), server_check (the result of `reference_answers.check`; null
            if nothing changed),
        the server's address, process and log, seconds.

    Raises:
        RolloutBusy: another rollout of the name is in progress; nothing was done.
        RolloutFailed: any other error; the previous version still serves, and nothing of the new one runs.
    """
    started = time.monotonic()
    place = Place(workspace, name)
    with place.exclusive():
        try:
            router.require_installed(settings.environment)
            state = recover(place, settings)
            _require_same_address(state, settings)
            _require_key(state, settings)
            release = prepare()
            result = _deploy(place, settings, state, release)
            then()
        except NumpruneError as error:
            raise RolloutFailed(f"{name}: {error}; {_who_serves(place)}") from error
    return {**result, "seconds": round(time.monotonic() - started, 3)}


def _deploy(place: Place, settings: Settings, state: State, release: Deployment) -> dict[str, Any]:
    before = state.current
    dtype = settings.dtype or (before.dtype if before else "auto")
    options = list(settings.options if settings.options is not None else before.options if before else [])
    if before and state.router and backend.is_healthy(before):
        same = (before.digest, before.dtype, before.options) == (release.digest, dtype, options)
        if same and backend.takes_key(before, settings.api_key):
            logger.info("%s: serves already", release.reference)
            return _result(state, changed=False, previous=before, cut_off=0, server_check=None)
    if state.router is None:
        server.require_free(settings.host or "127.0.0.1", settings.port or PORT)  # and not after the start
    green, server_check = backend.start(place, settings, release, dtype, options)
    try:
        state = _switch(place, settings, state, green)
    except BaseException:
        green.started.process.stop()
        raise
    cut_off = backend.retire(before, settings.drain_timeout_s) if before else 0
    state = place.write(state.model_copy(update={"retiring": None}))
    remove_copies(place.workspace, place.name, keep={green.digest, *([before.digest] if before else [])})
    return _result(state, changed=True, previous=before, cut_off=cut_off, server_check=server_check)


def _switch(place: Place, settings: Settings, state: State, green: Backend) -> State:
    """Switch the router to `green`; on failure everything is restored."""
    changes = {"current": green, "retiring": state.current, "guarded": settings.api_key is not None}
    if state.router is None:
        first = router.start(place, settings, settings.host or "127.0.0.1", settings.port or PORT, green.url)
        try:
            router.require_answer(first, backend.serves_as(green, place.name), settings.api_key)
            return place.write(state.model_copy(update={"router": first, **changes}))
        except BaseException:
            first.started.process.stop()
            raise
    # If killed from here on, the state leads to green, which has passed its check.
    switched = place.write(state.model_copy(update=changes))
    try:
        router.serve_only(state.router, green.url)
        router.require_answer(state.router, backend.serves_as(green, place.name), settings.api_key)
    except BaseException:
        place.write(_back(place, settings, state))
        raise
    logger.info("%s: serves at %s", green.reference, state.router.url)
    return switched


def _back(place: Place, settings: Settings, state: State) -> State:
    """Restore the state and the router from before a failed switch."""
    if state.router is None or state.current is None:
        return state
    try:
        return state.model_copy(update={"router": router.ensure(place, settings, state.router, state.current.url)})
    except NumpruneError as error:  # the cause of the failed switch is what is reported
        logger.error("%s: the router cannot be restored: %s", place.name, error)
        return state


def _who_serves(place: Place) -> str:
    try:
        current = place.read().current
    except IntegrityError:
        return "it is unknown which version serves"
    return f"{current.reference} keeps serving" if current and backend.is_alive(current) else "nothing serves"


def _require_same_address(state: State, settings: Settings) -> None:
    if state.router is None:
        return
    for option, asked, found in (
        ("--host", settings.host, state.router.host),
        ("--port", settings.port, state.router.port),
    ):
        if asked is not None and asked != found:
            raise InputError(
                f"{option} {asked}: {state.name} is served at {state.router.url}, and its address cannot change while "
                f"it runs; omit the option, or stop everything with `numprune rollout {state.name} --stop`"
            )


def _require_key(state: State, settings: Settings) -> None:
    """A forgotten key is not dropped, even if the server has died meanwhile."""
    if state.guarded and settings.api_key is None:
        raise InputError(
            f"{state.name} is served with an API key; give one with ${api_key.VARIABLE} or {api_key.OPTION}, or stop "
            f"everything with `numprune rollout {state.name} --stop`"
        )


def _result(
    state: State, *, changed: bool, previous: Backend | None, cut_off: int, server_check: dict[str, Any] | None
) -> dict[str, Any]:
    assert state.current is not None
    assert state.router is not None
    return {
        "name": state.name,
        "reference": state.current.reference,
        "digest": state.current.digest,
        "url": state.router.url,
        "server": state.current.url,
        "pid": state.current.started.pid,
        "log": state.current.started.log,
        "changed": changed,
        "previous": previous.reference if previous else None,
        "cut_off": cut_off,
        "server_check": server_check,
    }
