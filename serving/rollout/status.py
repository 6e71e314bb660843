"""Status and shutdown of everything that runs for a name."""

from pathlib import Path
from typing import Any

from numprune.errors import IntegrityError
from numprune.serving.rollout import backend, router
from numprune.serving.rollout.recovery import remove_orphans
from numprune.serving.rollout.state import Backend, Place, State


def status(name: str, workspace: Path) -> dict[str, Any]:
    """Plain JSON: name, serving (the router reaches a healthy server), url, router, current and retiring servers."""
    state = Place(workspace, name).read()
    listed = router.workers(state.router) if state.router else None
    current = _described(state.current)
    return {
        "name": name,
        "serving": bool(current and current["healthy"] and listed and current["server"] in listed),
        "url": state.router.url if state.router else None,
        "router": state.router and {"pid": state.router.started.pid, "answers": listed is not None},
        "current": current,
        "retiring": _described(state.retiring),
    }


def serving(name: str, workspace: Path) -> str | None:
    """The version whose server runs; None if no server runs, or the state file cannot be read."""
    try:
        current = Place(workspace, name).read().current
    except IntegrityError:
        return None
    return current.reference if current and backend.is_alive(current) else None


def stop(name: str, workspace: Path) -> dict[str, Any]:
    """Stop the router and servers of a name; ongoing requests are cut off. Raises RolloutBusy.

    Returns the references that ran. An unreadable state file is removed, and every process with our tag is stopped.
    """
    place = Place(workspace, name)
    with place.exclusive():
        try:
            state = place.read()
        except IntegrityError:
            state = State(name=name)
        servers = [found for found in (state.current, state.retiring) if backend.is_alive(found)]
        for part in (state.router, state.current, state.retiring):
            if part is not None:
                part.started.process.stop()
        remove_orphans(place, State(name=name))
        place.forget()
    return {"name": name, "stopped": [found.reference for found in servers if found is not None]}


def _described(found: Backend | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "reference": found.reference,
        "digest": found.digest,
        "server": found.url,
        "pid": found.started.pid,
        "log": found.started.log,
        "alive": backend.is_alive(found),
        "healthy": backend.is_healthy(found),
    }
