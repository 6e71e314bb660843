"""The schema of report.json.

Units are in the names or beside the value. A *metric* of a policy is a dotted path into this JSON that ends at a number
or an estimate. NaN, infinite and missing numbers are null, so that every gate on them fails. Unknown fields are refused
except in free-form facts (a load's parameters, a runtime's description, the result of a parity check), which their
writers define.
"""

from numprune.serving.report.models.fields import CORPUS_NAME, ModelName, ReportedEstimate
from numprune.serving.report.models.generation import MAXIMUM_PROMPTS, Generation, Output
from numprune.serving.report.models.images import MAXIMUM_SAMPLES, ClassLoss, FeatureNetwork, ImageMetric, Images
from numprune.serving.report.models.quality import (
    CAUSAL,
    MAXIMUM_CHANGED,
    MAXIMUM_DOCUMENTS,
    MAXIMUM_WORST,
    ONCE,
    UNITS,
    ChangedImage,
    DocumentDelta,
    DocumentDeltas,
    LossDelta,
    Quality,
    QualitySide,
    Sides,
    Task,
)
from numprune.serving.report.models.report import SCHEMA, Report
from numprune.serving.report.models.run import (
    Attention,
    AttentionMaps,
    Dtypes,
    Environment,
    Gpu,
    Identity,
    LatencyBudget,
    Learning,
    Milliseconds,
    Pruning,
    Quantization,
    RatioRemoved,
    Recovery,
    SizePair,
    Sizes,
)
from numprune.serving.report.models.schema1 import SCHEMA_1, path_of, upgraded
from numprune.serving.report.models.speed import (
    MemorySide,
    NoiseFloor,
    Percentiles,
    Ratio,
    RuntimeMemory,
    RuntimeSpeed,
    SpeedSide,
)
from numprune.serving.report.models.tasks import TaskAccuracy
from numprune.serving.report.models.verdict import GateResult, Outcome, Verdict, overall

__all__ = [
    "CAUSAL",
    "CORPUS_NAME",
    "MAXIMUM_CHANGED",
    "MAXIMUM_DOCUMENTS",
    "MAXIMUM_PROMPTS",
    "MAXIMUM_SAMPLES",
    "MAXIMUM_WORST",
    "ONCE",
    "SCHEMA",
    "SCHEMA_1",
    "UNITS",
    "Attention",
    "AttentionMaps",
    "ChangedImage",
    "ClassLoss",
    "DocumentDelta",
    "DocumentDeltas",
    "Dtypes",
    "Environment",
    "FeatureNetwork",
    "GateResult",
    "Generation",
    "Gpu",
    "Identity",
    "ImageMetric",
    "Images",
    "LatencyBudget",
    "Learning",
    "LossDelta",
    "MemorySide",
    "Milliseconds",
    "ModelName",
    "NoiseFloor",
    "Outcome",
    "Output",
    "Percentiles",
    "Pruning",
    "Quality",
    "QualitySide",
    "Quantization",
    "Ratio",
    "RatioRemoved",
    "Recovery",
    "Report",
    "ReportedEstimate",
    "RuntimeMemory",
    "RuntimeSpeed",
    "Sides",
    "SizePair",
    "Sizes",
    "SpeedSide",
    "Task",
    "TaskAccuracy",
    "Verdict",
    "overall",
    "path_of",
    "upgraded",
]
