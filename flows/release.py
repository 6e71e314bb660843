"""A Prefect flow that takes a candidate to production: verify, approve, promote, roll out, announce.

Deploy it as `flows/release.py:release`. No process runs while it waits for approval; after an answer, the run starts
again from the top, so every task is repeatable.
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
    """The answer of the person who resumes the run."""

    approved: bool = Field(description="whether the release goes into production")
    by: str = Field(min_length=1, description="name of the approver")
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
        workspace: of the registry and the servers; by default `numprune-workspace`.
        registry_uri: an MLflow server; by default the workspace's own registry.
        approval: wait until a person resumes the run with a yes, unless the version is already in production. Needs a
            deployment.
        approval_hours: time limit, after which the run fails.
        rollout: also serve it on this host (`numprune rollout`), with the API key from the environment. Otherwise only
            the alias moves.
        port: of the router; by default unchanged, or 8000.
        vllm: the environment with vLLM; by default found as by `numprune serve`.

    Returns:
        Completed, or Failed if it was refused or could not be rolled out; production is then unchanged.
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
    # By digest, not by alias, so that exactly the approved release goes into production.
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
    """Verify all files and the verdict; return what a person needs to decide."""
    found = children.call(steps.verify, workspace, uri, reference)
    create_markdown_artifact(
        markdown=found["page"], key="numprune-candidate", description=f"The report of {found['reference']}"
    )
    return found


@task(cache_policy=NO_CACHE, persist_result=False)
def promote(workspace: Path, uri: str | None, reference: str, digest: str, to_serve: bool) -> str | None:
    """Move the alias `production`; return the version to go back to if this one does not serve."""
    return children.call(steps.promote, workspace, uri, reference, digest, to_serve)


@task(cache_policy=NO_CACHE, persist_result=False)
def roll_out(workspace: Path, uri: str | None, reference: str, settings: Settings) -> dict[str, Any]:
    """Roll it out, blue/green."""
    served = deploy.roll_out(workspace, uri, reference, settings)
    children.call(steps.serves, workspace, reference)
    return served


@task(cache_policy=NO_CACHE, persist_result=False)
def take_back(workspace: Path, uri: str | None, reference: str, previous: str | None) -> None:
    """Move the alias back to the version that serves."""
    children.call(steps.take_back, workspace, uri, reference, previous)


# --- details --------------------------------------------------------------------------------------


def _ask(found: dict[str, Any], hours: float) -> Approval:
    """Suspend the run until somebody resumes it with an answer."""
    if deployment.id is None:
        raise InputError(
            "approval: only runs of a deployment can wait for approval (see prefect.yaml); deploy "
            "flows/release.py:release, or set approval=false"
        )
    question = Approval.with_initial_data(description=f"{found['summary']}\n\nPut it into production?")
    # The key contains the digest: if the candidate moves while the run waits, it asks again.
    return suspend_flow_run(wait_for_input=question, timeout=round(hours * 3600), key=f"approve-{found['digest'][:16]}")


def _announce(event: str, found: dict[str, Any], data: dict[str, Any]) -> None:
    """Emit an event for Prefect's automations: webhooks, notifications, further deployments."""
    resource = {"prefect.resource.id": f"numprune.model.{found['name']}", "prefect.resource.name": found["reference"]}
    emit_event(event, resource=resource, payload=data)
    logger.info("%s: %s", event, found["reference"])
