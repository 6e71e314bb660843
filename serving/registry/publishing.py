"""Publishes a release folder as a version with the alias `candidate`, once, and only if its gates passed."""

import os
import socket
from pathlib import Path

import psutil

from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.export.manifest import Manifest
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.registry.connection import Registry
from numprune.serving.registry.errors import RefusedReleaseError, error_code, lost_race
from numprune.serving.registry.model_reference import CANDIDATE, ModelReference, check_name
from numprune.serving.registry.releases import CHECKPOINT, KIND, REPORT, verify_version
from numprune.serving.registry.versions import MARK, RELEASE, VERDICT, Version, find_versions, model, resolve
from numprune.serving.report import Report, Verdict

_PUBLISHER = "numprune.publisher"  # host, process id and start time of the process that writes a run


def publish(registry: Registry, release: Path, name: str) -> Version:
    """Publish a release folder as the next version of `name`, and point `candidate` at it.

    Publishing the same release again returns the existing version and, on the embedded registry, repairs damaged files.
    `candidate` never moves back to an older version. Leftovers of a killed publisher are invisible and removed by the
    next one.

    Raises RefusedReleaseError (the verdict is not `pass`), IntegrityError (the folder contradicts its manifests or its
    report), InputError, RegistryError.
    """
    check_name(name)
    whole, report = check_release(release)
    with registry.exclusive():
        _ensure_model(registry, name)
        _remove_orphans(registry)
        version = _published(registry, name, whole.digest)
        if version is None:
            version = _create(registry, release, name, whole, report)
        else:
            _mend(registry, release, version)
        _point_candidate(registry, version)
        return resolve(registry, ModelReference(name, None, version.version))


def check_release(release: Path) -> tuple[Manifest, Report]:
    """Check a release before any of it leaves the workspace. Raises as `publish` does."""
    whole = manifest.verify(release)
    if whole.kind != KIND:
        raise InputError(f"{release}: contains a {whole.kind}, not a {KIND}")
    if REPORT not in whole.files:
        raise IntegrityError(f"{release / REPORT}: missing; a release must contain its report")
    report = reports.read(release / REPORT)
    if report.verdict is None:
        raise InputError(f"{release / REPORT}: not judged; `numprune gate` gives it a verdict")
    if report.verdict.outcome != "pass":
        raise RefusedReleaseError(_refusal(release, report.verdict, report), report.verdict)
    gates.confirm(report)
    _require_measured(release, whole, report)
    return whole, report


def _refusal(release: Path, verdict: Verdict, report: Report) -> str:
    whys = [*report.environment.reasons]
    whys += [f"{gate.metric}: {gate.outcome}, {gate.reason}" for gate in verdict.gates if gate.outcome != "pass"]
    return f"{release.name}: not published, the verdict is {verdict.outcome}: {'; '.join(whys)}"


def _require_measured(release: Path, whole: Manifest, report: Report) -> None:
    """Check that everything released was measured: the report names each part with its own manifest."""
    measured = {**report.identity.exports, CHECKPOINT: report.identity.candidate}
    parts = {name.partition("/")[0] for name in whole.files if name.count("/") == 1 and name.endswith("/manifest.json")}
    for part in sorted({CHECKPOINT, *parts}):
        found = manifest.read(release / part)
        inside = {f"{part}/{name}": entry for name, entry in found.files.items()}
        stored = {name: entry for name, entry in whole.files.items() if name.startswith(f"{part}/")}
        stored.pop(f"{part}/{manifest.FILE_NAME}", None)
        if inside != stored:
            raise IntegrityError(f"{release / part}: its files differ from its manifest")
        if measured.get(part) != found.digest:
            raise IntegrityError(
                f"{release / part}: its digest is {found.digest}, but the report is about "
                f"{measured.get(part, 'no such part')}; measure again"
            )


# --- the version ----------------------------------------------------------------------------------


def _published(registry: Registry, name: str, digest: str) -> Version | None:
    """The version of this release; the first one if publishers on several machines raced."""
    found = find_versions(registry, name, f"tags.`{RELEASE}` = '{digest}'")
    return found[0] if found else None


def _create(registry: Registry, release: Path, name: str, whole: Manifest, report: Report) -> Version:
    """Store files first, then the version that points at them, so that a version is complete from the start."""
    client = registry.client
    run = client.create_run(registry.experiment, run_name=report.run_id, tags={_PUBLISHER: _this_process()})
    run_id = run.info.run_id
    source = registry.artifacts.put(run_id, release)
    client.create_model_version(name, source=source, run_id=run_id, tags=_tags(whole, report))
    client.set_terminated(run_id)
    first = _published(registry, name, whole.digest)
    assert first is not None  # ours is there
    # One version per release: a publisher on another machine may have been faster, and after a lost response MLflow
    # repeats the request.
    for version in find_versions(registry, name, f"run_id = '{run_id}'"):
        if version.version != first.version:
            client.delete_model_version(name, str(version.version))
    if first.run_id != run_id:
        client.delete_run(run_id)
    return first


def _point_candidate(registry: Registry, version: Version) -> None:
    """Point at the newest version, never back: another machine may be pointing at an older one at this moment."""
    while model(registry, version.name).aliases.get(CANDIDATE, 0) < version.version:
        try:
            registry.client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))
        except Exception as error:
            if not lost_race(error):
                raise
        first_of = {found.digest: found for found in reversed(find_versions(registry, version.name, ""))}
        version = max(first_of.values(), key=lambda found: found.version)  # a duplicate version is about to be removed


def _tags(whole: Manifest, report: Report) -> dict[str, str]:
    assert report.verdict is not None  # check_release
    identity = report.identity
    digests = {
        "numprune.base": identity.base,
        "numprune.checkpoint": identity.candidate,
        "numprune.recipe": identity.recipe,
        "numprune.plan": identity.plan,
        "numprune.report": whole.files[REPORT].sha256,
        **{f"numprune.export.{name}": digest for name, digest in identity.exports.items()},
    }
    return {
        RELEASE: whole.digest,
        VERDICT: report.verdict.outcome,
        "numprune.run": report.run_id,
        **{name: digest for name, digest in digests.items() if digest is not None},
    }


def _ensure_model(registry: Registry, name: str) -> None:
    try:
        registry.client.create_registered_model(name, tags={MARK: "1"})
    except Exception as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise
        registry.client.set_registered_model_tag(name, MARK, "1")


def _mend(registry: Registry, release: Path, version: Version) -> None:
    """Restore the files of a damaged version, which are those of this release byte for byte."""
    if not registry.embedded:
        return  # that would need a download; promotion and fetching verify, and servers have their own backups
    try:
        verify_version(registry, version)
    except IntegrityError:
        registry.artifacts.remove(version.run_id)
        registry.artifacts.put(version.run_id, release)


# --- what killed publishers left ------------------------------------------------------------------


def _remove_orphans(registry: Registry) -> None:
    """Remove runs that no version points at and whose publisher is dead."""
    client = registry.client
    for run in client.search_runs([registry.experiment], "attributes.status = 'RUNNING'"):
        run_id = run.info.run_id
        if client.search_model_versions(f"run_id = '{run_id}'"):
            client.set_terminated(run_id)  # killed between the last two steps: the version is complete
        elif registry.embedded or _is_dead(run.data.tags.get(_PUBLISHER, "")):
            registry.artifacts.remove(run_id)
            client.delete_run(run_id)


def _this_process() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_start(os.getpid())}"


def _is_dead(publisher: str) -> bool:
    """Whether it ran on this machine and has ended; a process elsewhere may still be alive."""
    match publisher.split(" "):
        case [host, pid, started] if host == socket.gethostname() and pid.isdecimal():
            try:
                return _start(int(pid)) != started
            except psutil.NoSuchProcess:
                return True
    return False


def _start(pid: int) -> str:
    """When the process started, independent of clock changes. Raises psutil.NoSuchProcess."""
    started = psutil.Process(pid).create_time()
    if not psutil.LINUX:
        return f"{started:.2f}"
    # psutil adds the boot time, which the kernel derives from the current clock.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return stat.rpartition(")")[2].split()[19]  # starttime, in ticks since boot
