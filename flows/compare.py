"""Pruning methods side by side on one model, one calibration set and one held-out text, in one run.

    python -m numprune.flows.compare [MODEL] [--calibration FILE …] [--heldout FILE …] [--ratios 0.2,0.3] [--out DIR]

A method is criterion/allocation/compensation. Without arguments: the embedded default and its own text. Prints a
Markdown table; `--out` keeps it, with the same rows as CSV, and lets an interrupted run go on where it stopped.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from numprune.corpus import TokenRows, rows_digest, token_rows
from numprune.errors import InputError, NumpruneError
from numprune.export import checkpoint
from numprune.flows.recipe import EMBEDDED, EMBEDDED_FOLDER
from numprune.flows.work.text import calibration_rows, read_text
from numprune.pruning import PruneOptions, prune
from numprune.quality import compare
from numprune.target import Target

METHODS = (
    "random/uniform/none",
    "magnitude/uniform/none",
    "wanda/uniform/none",
    "flap/global/bias",
    "numerical-newton/global/none",
    "flap/global/oneshot",
    "numerical-newton/uniform/oneshot",
    "numerical/uniform/oneshot",
    "numerical/uniform/sequential",
    "obs/uniform/oneshot",
    "obs/uniform/sequential",
)
COLUMNS = (
    "ratio",
    "method",
    "nll_delta_nats_per_token",
    "ci95_lower",
    "ci95_upper",
    "perplexity",
    "kl_nats_per_token",
    "top1_agreement",
    "prunable_ratio_removed",
    "parameters",
    "seconds",
    "rows",
)


def run_method(
    model_path: Path, baseline: PreTrainedModel, rows: Tensor, heldout: TokenRows, method: str, ratio: float, align: int
) -> dict[str, str]:
    """Return one row of the table, by column. Raises InputError for a method or ratio that cannot work."""
    parts = method.split("/")
    if len(parts) != 3:
        raise InputError(f"method is {method!r}; it must be criterion/allocation/compensation")
    options = PruneOptions(ratio, criterion=parts[0], allocation=parts[1], compensation=parts[2], target=Target(align))
    model, _ = checkpoint.load(model_path)
    start = time.perf_counter()
    pruned = prune(model, rows, options)
    seconds = time.perf_counter() - start
    result = compare(pruned.model, baseline, heldout)
    delta = result.nll_delta_nats_per_token
    return {
        "ratio": f"{ratio:g}",
        "method": method,
        "nll_delta_nats_per_token": f"{delta.value:.4f}",
        "ci95_lower": f"{delta.ci95_lower:.4f}",
        "ci95_upper": f"{delta.ci95_upper:.4f}",
        "perplexity": f"{result.candidate.perplexity:.2f}",
        "kl_nats_per_token": f"{result.kl_nats_per_token:.4f}",
        "top1_agreement": f"{result.top1_agreement:.4f}",
        "prunable_ratio_removed": f"{pruned.prunable_ratio_removed:.4f}",
        "parameters": str(pruned.after.parameters),
        "seconds": f"{seconds:.1f}",
        "rows": _identity(rows, heldout, align),
    }


def markdown(records: Sequence[dict[str, str]], dense_perplexity: float) -> str:
    """Return the table, a ratio at a time, methods in the order they were run."""
    lines = [
        f"Dense perplexity {dense_perplexity:.2f}.",
        "",
        "| removed | criterion / allocation / compensation | NLL increase, nats/token (one-sided 95 % bounds) "
        "| perplexity | KL | top-1 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {float(row['prunable_ratio_removed']):.1%} | {row['method'].replace('/', ' / ')} "
        f"| {row['nll_delta_nats_per_token']} ({row['ci95_lower']} to {row['ci95_upper']}) "
        f"| {row['perplexity']} | {row['kl_nats_per_token']} | {float(row['top1_agreement']):.1%} |"
        for row in sorted(records, key=lambda row: float(row["ratio"]))
    ]
    return "\n".join(lines) + "\n"


def _identity(rows: Tensor, heldout: TokenRows, align: int) -> str:
    return f"{rows_digest(rows)[:16]}-{heldout.digest[:16]}-{align}"


def _read_records(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    if any(tuple(record) != COLUMNS or None in record.values() for record in records):
        raise InputError(
            f"{path} is not a table of this command, or was cut off in its last line; remove it or mend it"
        )
    return records


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, help="a Hugging Face folder (default: the embedded model)"
    )
    parser.add_argument("--calibration", nargs="+", metavar="FILE", help="calibration text (default: embedded)")
    parser.add_argument("--heldout", nargs="+", metavar="FILE", help="text to be judged on (default: embedded)")
    parser.add_argument("--ratios", default="0.3", help="comma-separated (default %(default)s)")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="comma-separated criterion/allocation/compensation"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration rows (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per row (default %(default)s)")
    parser.add_argument(
        "--align", type=int, default=8, help="intermediate sizes are multiples of it (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration rows")
    parser.add_argument("--out", type=Path, help="folder for compare.csv and compare.md; finished rows there are kept")
    args = parser.parse_args(argv)
    try:
        sys.stdout.write(_compare(args))
    except NumpruneError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(args: argparse.Namespace) -> str:
    model_path = EMBEDDED_FOLDER / "model" if args.model == EMBEDDED else checkpoint.resolve(args.model)
    baseline, tokenizer = checkpoint.load(model_path)
    rows = calibration_rows(args.calibration or EMBEDDED, tokenizer, args.samples, args.sequence_length, args.seed)
    heldout = token_rows(read_text(args.heldout or EMBEDDED, "heldout"), tokenizer, args.sequence_length)
    identity = _identity(rows, heldout, args.align)
    table = args.out / "compare.csv" if args.out else None
    done = {}
    if table:
        args.out.mkdir(parents=True, exist_ok=True)
        done = {(r["ratio"], r["method"]): r for r in _read_records(table) if r["rows"] == identity}
    records = []
    for ratio in map(float, args.ratios.split(",")):
        for method in args.methods.split(","):
            record = done.get((f"{ratio:g}", method))
            if record is None:
                record = run_method(model_path, baseline, rows, heldout, method, ratio, args.align)
                print(
                    f"{ratio:g} {method}: +{record['nll_delta_nats_per_token']} nats/token, {record['seconds']} s",
                    file=sys.stderr,
                )
            records.append(record)
            if table:
                with table.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(records)
    text = markdown(records, compare(baseline, baseline, heldout).baseline.perplexity)
    if table:
        (args.out / "compare.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
