"""The precision that a runtime computed in, beside the one that the weights are stored in."""

from numprune.serving.report.models import Dtypes, Report


def computed(report: Report, runtime: str) -> str:
    """One sentence, or none where the report does not say it."""
    found = report.speed[runtime].dtype if runtime in report.speed else None
    if found is None:
        return ""
    stored = report.sizes.dtype if report.sizes else None
    if stored is None or stored == found:
        return f"{runtime} computes in {named(found)}."
    return (
        f"{runtime} computes in {named(found)}, while the weights are stored in {named(stored)}: sizes are of the "
        "stored weights, speed and memory are not."
    )


def named(dtypes: Dtypes) -> str:
    if dtypes.baseline == dtypes.candidate:
        return dtypes.candidate
    return f"{dtypes.baseline} (baseline) and {dtypes.candidate} (candidate)"
