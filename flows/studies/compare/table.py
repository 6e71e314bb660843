"""The comparison's table as CSV and Markdown: one row for each ratio, calibration size and method."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from numprune.axes import DEFAULT_AXES


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        ratio: requested.
        samples: calibration rows.
        nll_increase: over the dense model on held-out text or labelled images; `ci95_lower` and `ci95_upper` are its
            one-sided 95 % bounds (None for a single sample) over documents or windows, see `sampling_unit`.
        nll, kl: of the model, and of its predictions from the dense model's, in the unit of the task.
        perplexity: of a language model.
        accuracy: top-1, of an image classifier.
        seconds: to prune, including calibration, without loading and evaluation.
        forward_passes: number of passes of the dense model over the calibration rows that take as long.
        peak_bytes: highest memory while pruning, beyond interpreter and libraries.
    """

    ratio: float
    samples: int
    method: str
    prunable_ratio_removed: float
    nll_increase: float
    ci95_lower: float | None
    ci95_upper: float | None
    sampling_unit: str
    nll: float
    perplexity: float | None
    accuracy: float | None
    kl: float
    top1_agreement: float
    parameters: int
    seconds: float
    forward_passes: float
    peak_bytes: int


@dataclass(frozen=True)
class Conditions:
    """The conditions shared by all rows, which must match for two tables to be comparable."""

    model: str
    model_digest: str
    sequence_length: int
    align: int
    axes: tuple[str, ...]
    seed: int
    device: str
    calibration: dict[int, str]  # rows -> digest
    heldout_digest: str
    heldout_tokens: int
    heldout_documents: int
    dense_nll: float
    dense_perplexity: float | None
    dense_accuracy: float | None
    unit: str  # of losses, like "nats/token"
    dense_parameters: int
    version: str


@dataclass(frozen=True)
class Table:
    conditions: Conditions
    rows: Sequence[Row]

    def in_order(self) -> list[Row]:
        """Sort rows by ratio, then by calibration rows; methods keep their requested order."""
        return sorted(self.rows, key=lambda row: (row.ratio, row.samples))


def as_csv(table: Table) -> str:
    """Return every row with all its conditions, so that rows of several tables can be merged."""
    per = table.conditions.unit.replace("/", "_per_")
    renamed = {"nll": f"nll_{per}", "kl": f"kl_{per}"}
    unknown = "accuracy" if table.conditions.dense_accuracy is None else "perplexity"
    common = {
        "model_digest": table.conditions.model_digest,
        "heldout_digest": table.conditions.heldout_digest,
        f"dense_nll_{per}": table.conditions.dense_nll,
        "sequence_length": table.conditions.sequence_length,
        "align": table.conditions.align,
        "axes": " ".join(table.conditions.axes),
        "seed": table.conditions.seed,
        "device": table.conditions.device,
        "version": table.conditions.version,
    }
    text = io.StringIO()
    own = {field.name: renamed.get(field.name, field.name) for field in fields(Row) if field.name != unknown}
    columns = [*own.values(), "calibration_digest", *common]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in table.in_order():
        calibration = table.conditions.calibration[row.samples]
        values = asdict(row)
        found = {column: values[name] for name, column in own.items()}
        writer.writerow({**found, "calibration_digest": calibration, **common})
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Return the table for readers, with its conditions below."""
    conditions, rows = table.conditions, table.in_order()
    several, images = len(conditions.calibration) > 1, conditions.dense_accuracy is not None
    heading = [
        "removed",
        "method",
        *(["calibration rows"] if several else []),
        f"NLL increase, {conditions.unit} (one-sided 95 % bounds)",
        "NLL",
        "accuracy" if images else "perplexity",
        "KL",
        "top-1",
        "parameters",
        "seconds",
        "forward passes",
        "memory, MiB",
    ]
    dense = [
        "0",
        "dense",
        *([""] if several else []),
        "0",
        f"{conditions.dense_nll:.4f}",
        _quality(conditions.dense_accuracy, conditions.dense_perplexity),
        "0",
        "100 %",
        f"{conditions.dense_parameters:,}",
        "",
        "",
        "",
    ]
    lines = [heading, ["---"] * len(heading), dense, *(_cells(row, several) for row in rows)]
    unit = f" Bounds by bootstrap over {'images' if images else f'{rows[0].sampling_unit}s'}." if rows else ""
    sizes = ", ".join(str(size) for size in conditions.calibration)
    if images:
        rows_of, judged = "images", f"{conditions.heldout_documents} held-out images"
        predicted = "class distribution, `top-1` the agreement on the most probable class"
    else:
        rows_of = f"rows of {conditions.sequence_length} tokens"
        judged = f"{conditions.heldout_tokens:,} tokens of {conditions.heldout_documents} held-out documents"
        predicted = "next-token distribution, `top-1` the agreement on the most probable token"
    if set(conditions.axes) != set(DEFAULT_AXES):
        judged += f". Only {', '.join(conditions.axes)} may be pruned"
    if any(row.method == "dimap-weights" for row in rows):
        judged += ". `dimap-weights` sets single weights to zero, which count as removed; nothing becomes smaller"
    notes = (
        f"{conditions.model}: calibrated on {sizes} {rows_of} (seed {conditions.seed}), evaluated on {judged}.{unit} "
        "`removed` is the share of the attention and MLP projections that was removed, less any parameters that a "
        f"method adds; `KL` is from the dense model's {predicted}. Seconds are for calibration and pruning; `forward "
        "passes` is the number of passes of the dense model over the calibration rows that take as long; memory is the "
        f"peak of the process, without interpreter and libraries ({conditions.device})."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes}\n"


def _quality(accuracy: float | None, perplexity: float | None) -> str:
    return f"{perplexity:.2f}" if accuracy is None else f"{accuracy:.1%}".replace("%", " %")


def _cells(row: Row, several: bool) -> list[str]:
    bounds = "no bounds" if row.ci95_lower is None else f"{row.ci95_lower:.4f} to {row.ci95_upper:.4f}"
    return [
        f"{row.prunable_ratio_removed:.1%}".replace("%", " %"),
        row.method.replace("/", " / "),
        *([str(row.samples)] if several else []),
        f"{row.nll_increase:.4f} ({bounds})",
        f"{row.nll:.4f}",
        _quality(row.accuracy, row.perplexity),
        f"{row.kl:.4f}",
        f"{row.top1_agreement:.1%}".replace("%", " %"),
        f"{row.parameters:,}",
        f"{row.seconds:.1f}",
        f"{row.forward_passes:.1f}",
        f"{row.peak_bytes / 2**20:,.0f}",
    ]
