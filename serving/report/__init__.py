"""The report of one run: what was measured, on what, and the verdict.

`models` is the schema of report.json, `files` reads and writes it, `environment` looks at the machine, `markdown` is
the page for a terminal or a pull request.
"""

from numprune.serving.report.environment import capture, combine, package_versions
from numprune.serving.report.files import read, write
from numprune.serving.report.markdown import markdown
from numprune.serving.report.models import (
    MAXIMUM_DOCUMENTS,
    MAXIMUM_WORST,
    SCHEMA,
    DocumentDelta,
    DocumentDeltas,
    Environment,
    Estimate,
    GateResult,
    Gpu,
    Identity,
    MemorySide,
    NoiseFloor,
    Outcome,
    Percentiles,
    Pruning,
    Quality,
    QualitySide,
    Ratio,
    RatioRemoved,
    Report,
    RuntimeMemory,
    RuntimeSpeed,
    SizePair,
    Sizes,
    SpeedSide,
    Verdict,
    overall,
)

__all__ = [
    "MAXIMUM_DOCUMENTS",
    "MAXIMUM_WORST",
    "SCHEMA",
    "DocumentDelta",
    "DocumentDeltas",
    "Environment",
    "Estimate",
    "GateResult",
    "Gpu",
    "Identity",
    "MemorySide",
    "NoiseFloor",
    "Outcome",
    "Percentiles",
    "Pruning",
    "Quality",
    "QualitySide",
    "Ratio",
    "RatioRemoved",
    "Report",
    "RuntimeMemory",
    "RuntimeSpeed",
    "SizePair",
    "Sizes",
    "SpeedSide",
    "Verdict",
    "capture",
    "combine",
    "markdown",
    "overall",
    "package_versions",
    "read",
    "write",
]
