"""Folded sections: what was measured, and on which machine."""

from numprune.counted import counted
from numprune.serving.report import words
from numprune.serving.report.models import Environment, Gpu, Identity, Report
from numprune.serving.report.page.blocks import Block, Cell, Facts, Folded, Section, Text

_MAXIMUM = 300


def section(report: Report) -> Section:
    environment = report.environment
    blocks: list[Block] = [
        Text(f"Not fit for measurements: {reason}", "fail") for reason in environment.reasons[:_MAXIMUM]
    ]
    blocks += [
        Folded("Identity: digests of inputs and outputs", [_identity(report)]),
        Folded("Environment: the machine", [_machine(environment)]),
        Folded(f"Packages: {counted(len(report.identity.packages), 'version')}", [_packages(report.identity)]),
    ]
    return Section("origin", "Identity and environment", blocks)


def digests(identity: Identity) -> dict[str, str | None]:
    """All digests, by readable name."""
    return {
        "Base weights": identity.base,
        "Candidate": identity.candidate,
        "Recipe": identity.recipe,
        "Calibration rows": identity.calibration_rows,
        "Held-out rows": identity.heldout_rows,
        **{f"Held-out rows, {name}": digest for name, digest in list(identity.corpora_rows.items())[:_MAXIMUM]},
        "Plan": identity.plan,
        "Pruned checkpoint": identity.pruned,
        "Rows of mask training": identity.learning_rows,
        "Checkpoint trained with masks": identity.learned,
        "Rows of training": identity.recovery_rows,
        "Generated rows": identity.generated_rows,
        "Trained checkpoint": identity.recovered,
        "Task items": identity.tasks,
        "Decoder of images": identity.decoder,
        "Network of FID": identity.fid_network,
        "Real images of FID": identity.fid_images,
        **{f"Export, {name}": digest for name, digest in list(identity.exports.items())[:_MAXIMUM]},
    }


def machine(environment: Environment) -> str:
    """The machine in one line, without transient values."""
    gpu = f", {environment.gpu.name}" if environment.gpu else ""
    return f"{environment.cpu}, {counted(environment.cores, 'core')}{gpu}"


def _identity(report: Report) -> Facts:
    found = [(name, Cell(digest, tone="code")) for name, digest in digests(report.identity).items() if digest]
    return Facts([("Run", report.run_id), ("Created", f"{report.created:%Y-%m-%d %H:%M:%S %Z}"), *found])


def _machine(environment: Environment) -> Facts:
    load = environment.load_average
    return Facts(
        [
            ("CPU", environment.cpu),
            ("Cores", f"{environment.cores:,}"),
            ("Memory", words.size(environment.memory_bytes)),
            ("Platform", environment.platform),
            ("GPU", _gpu(environment.gpu)),
            ("Load average", words.ABSENT if load is None else ", ".join(words.number(one, 3) for one in load)),
            ("Fit for measurements", "yes" if environment.valid else "no"),
        ]
    )


def _gpu(gpu: Gpu | None) -> Cell:
    if gpu is None:
        return Cell("none was used")
    clock = f"{words.number(gpu.sm_clock_mhz)} of {words.number(gpu.max_sm_clock_mhz)} MHz"
    limit = f"limit {words.number(gpu.power_limit_watts)} W, {words.number(gpu.temperature_celsius)} °C"
    return Cell(f"{gpu.name}, {words.size(gpu.memory_bytes)}, driver {gpu.driver}", f"{clock}, {limit}, {gpu.uuid}")


def _packages(identity: Identity) -> Facts:
    return Facts(list(identity.packages.items())[:_MAXIMUM])
