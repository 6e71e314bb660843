"""Recovery from an interrupted rollout: finish or remove what it left, and detect dead processes."""

import logging

from numprune.serving.rollout import backend, router
from numprune.serving.rollout.settings import Settings
from numprune.serving.rollout.state import Place, State
from numprune.serving.vllm.process import kill_tagged, tagged, tags_left

logger = logging.getLogger(__name__)


def recover(place: Place, settings: Settings) -> State:
    """Restore a consistent state: the router sends everything to `current`, and nothing else is running.

    A server is in the state only once it has passed its check, so a started switch is finished. Anything not in the
    state was being started, and is stopped. Raises RouterError, IntegrityError.
    """
    state = place.read()
    remove_orphans(place, state)
    servers = [found for found in (state.current, state.retiring) if found]
    candidates = [found for found in servers if backend.is_alive(found)]
    for dead in (found for found in servers if found not in candidates):
        dead.started.process.stop()  # what is left of it: children and its temporary folder
    candidates.sort(key=lambda found: not backend.is_healthy(found))  # stable: the current one first
    current = candidates[0] if candidates else None
    if state.current is not None and current is None:
        logger.warning("%s: %s no longer runs", place.name, state.current.reference)
    kept = state.router
    if kept is not None and current is not None:
        kept = router.ensure(place, settings, kept, current.url)
    elif kept is not None and router.workers(kept) is None:
        kept.started.process.stop()
        kept = None
    state = place.write(state.model_copy(update={"router": kept, "current": current}))
    for other in candidates[1:]:
        logger.info("%s: finishing an interrupted switch from %s", place.name, other.reference)
        backend.retire(other, settings.drain_timeout_s)
    return place.write(state.model_copy(update={"retiring": None}))


def remove_orphans(place: Place, state: State) -> None:
    """Stop processes that were started for this name and are not in its state, and remove their temporary folders."""
    known = state.tags()
    running = {tag for _, tag in tagged(place.tag_prefix)}
    for tag in (running | set(tags_left(place.tag_prefix))) - known:
        logger.info(
            "%s: stopping leftovers of an interrupted rollout (%s)", place.name, tag.removeprefix(place.tag_prefix)
        )
        kill_tagged(tag)
