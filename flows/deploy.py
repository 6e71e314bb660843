"""Rolls releases out and back, from the registry to the router."""

from functools import partial
from pathlib import Path
from typing import Any

from numprune.flows import children
from numprune.flows.steps import deploy as steps
from numprune.serving import registry, rollout
from numprune.serving.deployment import Deployment
from numprune.serving.rollout import Settings


def roll_out(workspace: Path, uri: str | None, reference: str, settings: Settings) -> dict[str, Any]:
    """Make a release serve its name: see `rollout.roll_out`, also for the result. A bare name means production.

    Raises InputError (not a reference), RolloutBusy, RolloutFailed.
    """
    name = registry.parse(reference).name
    prepare = partial(children.call, steps.prepare, workspace, uri, reference)
    return rollout.roll_out(name, prepare, workspace, settings)


def roll_back(workspace: Path, uri: str | None, name: str, settings: Settings) -> dict[str, Any]:
    """Make the previous production version serve; once it does, move the alias `production` back to it.

    Raises InputError (not a name), RolloutBusy, RolloutFailed.
    """
    chosen: list[Deployment] = []

    def prepare() -> Deployment:
        release = children.call(steps.prepare_previous, workspace, uri, name)
        chosen.append(release)
        return release

    def move_alias() -> None:
        children.call(steps.move_back, workspace, uri, chosen[0].reference)

    return rollout.roll_out(name, prepare, workspace, settings, then=move_alias)
