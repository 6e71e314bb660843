"""A candidate to production as a Prefect flow: verified, approved by a person, promoted, rolled out, announced.

Deploy it as `flows/release.py:release`. While it waits for the approval no process runs; when somebody answers, the run
starts again from its top, which is why each task can be done twice.
"""

import logging
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from prefect.states import Completed, Failed, State
from pydantic import Field

from numprune.errors import InputError
from numprune.flows import children, deploy, server, stages
from numprune.flows.steps import deploy as steps
from numprune.serving.rollout import RolloutBusy, RolloutFailed, Settings
from numprune.serving.vllm import api_key, environment

logger = logging.getLogger(__name__)

IN_PRODUCTION = "numprune.release.in-production"
REFUSED = "numprune.release.refused"
FAILED = "numprune.release.failed"


class Approval(RunInput):
    """What the person says who resumes the run."""

    approved: bool = Field(description="whether the release goes into production")
    by: str = Field(min_length=1, description="who says so")
    comment: str = ""


@flow(name="numprune-release", persist_result=False)
def release(
    reference: str,
    workspace: str | None = None,
    registry_uri: str | None = None,
    approval: bool = True,
    approval_hours: float = 72,
    rollout: bool = True,
    port: int | None = None,
    vllm: str | None = None,
) -> State[dict[str, Any]]:
    """Put a release into production.

    Args:
        reference: NAME (its candidate), NAME@ALIAS or NAME/VERSION.
        workspace: of the registry and of the servers; `numprune-workspace` without it.
        registry_uri: an MLflow server; the workspace's own registry without it.
        approval: wait for somebody to resume the run and to say yes, unless it is in production already. Needs a
            deployment.
        approval_hours: how long; the run fails after that.
        rollout: also let it serve on this host (`numprune rollout`), with the API key of the environment. Without, the
            alias moves and others act on it.
        port: of the router; as it is, or 8000, without it.
        vllm: the environment that has vLLM; found as `numprune serve` finds it without it.

    Returns:
        Completed, or Failed when it was refused or could not be rolled out, and production is then as it was before.
    """
    server.bind_to_this_process()
    folder = stages.workspace_folder(workspace)
    settings = Settings(environment=environment.find(vllm), port=port, api_key=api_key.read()) if rollout else None
    found = verify(folder, registry_uri, reference)
    data: dict[str, Any] = {"release": found["reference"], "digest": found["digest"]}
    if approval and not found["in_production"]:
        answer = _ask(found, approval_hours)
        data["approval"] = answer.model_dump()
        if not answer.approved:
            _announce(REFUSED, found, data)
            return Failed(message=f"{found['reference']}: refused by {answer.by}: {answer.comment}", data=data)
    # By digest, not by alias: what was approved is what goes into production.
    data["previous"] = promote(folder, registry_uri, found["reference"], found["digest"], to_serve=rollout)
    if settings is not None:
        try:
            data["served"] = roll_out(folder, registry_uri, found["reference"], settings)
        except (RolloutBusy, RolloutFailed) as error:
            data["error"] = str(error)
            take_back(folder, registry_uri, found["reference"], data["previous"])
            _announce(FAILED, found, data)
            stands = f"{data['previous']} is in production" if data["previous"] else "nothing is in production"
            return Failed(message=f"{found['reference']}: {error}; {stands}", data=data)
    _announce(IN_PRODUCTION, found, data)
    return Completed(message=f"{found['reference']} is in production", data=data)


# --- tasks ----------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE, persist_result=False)
def verify(workspace: Path, uri: str | None, reference: str) -> dict[str, Any]:
    """Every file is what was published and the verdict is pass; what a person needs to know to decide."""
    found = children.call(steps.verify, workspace, uri, reference)
    create_markdown_artifact(
        markdown=found["page"], key="numprune-candidate", description=f"The report of {found['reference']}"
    )
    return found


@task(cache_policy=NO_CACHE, persist_result=False)
def promote(workspace: Path, uri: str | None, reference: str, digest: str, to_serve: bool) -> str | None:
    """Move the alias `production`; the reference of what it goes back to should this one not serve."""
    return children.call(steps.promote, workspace, uri, reference, digest, to_serve)


@task(cache_policy=NO_CACHE, persist_result=False)
def roll_out(workspace: Path, uri: str | None, reference: str, settings: Settings) -> dict[str, Any]:
    """Let it serve, blue/green."""
    served = deploy.roll_out(workspace, uri, reference, settings)
    children.call(steps.serves, workspace, reference)
    return served


@task(cache_policy=NO_CACHE, persist_result=False)
def take_back(workspace: Path, uri: str | None, reference: str, previous: str | None) -> None:
    """The alias back to what serves."""
    children.call(steps.take_back, workspace, uri, reference, previous)


# --- details --------------------------------------------------------------------------------------


def _ask(found: dict[str, Any], hours: float) -> Approval:
    """Suspend the run until somebody resumes it with an answer."""
    if deployment.id is None:
        raise InputError(
            "approval: a run can wait for one only when it comes from a deployment (see prefect.yaml); deploy "
            "flows/release.py:release, or set approval=false"
        )
    question = Approval.with_initial_data(description=f"{found['summary']}\n\nInto production?")
    # The key holds the digest: when the candidate moved while the run waited, it asks again.
    return suspend_flow_run(wait_for_input=question, timeout=round(hours * 3600), key=f"approve-{found['digest'][:16]}")


def _announce(event: str, found: dict[str, Any], data: dict[str, Any]) -> None:
    """An event for Prefect's automations: webhooks, messages, further deployments."""
    resource = {"prefect.resource.id": f"numprune.model.{found['name']}", "prefect.resource.name": found["reference"]}
    emit_event(event, resource=resource, payload=data)
    logger.info("%s: %s", event, found["reference"])
