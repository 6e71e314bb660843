"""python -m numprune.flows.studies.error_rates: the command."""

import argparse
import sys
from collections.abc import Iterable, Sequence

from numprune.errors import InputError, NumpruneError
from numprune.flows.studies.error_rates.count import (
    ChoiceRates,
    QualityRates,
    RerunRates,
    Share,
    SpeedRates,
    TaskRates,
    choice_rates,
    quality_rates,
    rerun_rates,
    settled,
    speed_rates,
    task_rates,
)
from numprune.flows.studies.error_rates.worlds import MACHINES, TASKS, TEXTS
from numprune.progress import progress
from numprune.serving.gates import LOOKS

_MOST_TO_CHOOSE_BY = 100  # documents: resampling more, for many candidates, takes hours
_EPILOG = """\
  python -m numprune.flows.studies.error_rates
  python -m numprune.flows.studies.error_rates --worlds 200 --documents 20,50 --repeats 6

Every simulated world is judged by the same code as real reports. With the defaults, it takes a few minutes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 error."""
    parser = argparse.ArgumentParser(
        prog="python -m numprune.flows.studies.error_rates",
        description="Error rates of the gates, counted over simulated worlds with known truth, as Markdown.",
        epilog=f"Examples:\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--worlds",
        type=int,
        default=1000,
        metavar="N",
        help="simulated worlds per row (default: 1000; fewer with over 100 documents)",
    )
    parser.add_argument("--documents", default="20,50,100,400", metavar="N,…", help="of the held-out text")
    parser.add_argument("--items", default="100,500,2000", metavar="N,…", help="of the task")
    parser.add_argument("--repeats", default="6,10,20", metavar="N,…", help="of the benchmark")
    parser.add_argument("--candidates", default="12", metavar="N,…", help="of a sweep, of which the best is chosen")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(argv)
    try:
        documents, repeats = _numbers("--documents", args.documents, 5), _numbers("--repeats", args.repeats, 4)
        items, candidates = _numbers("--items", args.items, 20), _numbers("--candidates", args.candidates, 2)
        if args.worlds < 10:
            raise InputError(f"--worlds is {args.worlds}; it must be at least 10")
    except NumpruneError as error:
        print(f"error_rates: error: {error}", file=sys.stderr)
        return 1
    texts = [(text, n) for n in documents for text in TEXTS]
    tasks = [(task, n) for n in items for task in TASKS]
    machines = [(machine, n) for n in repeats for machine in MACHINES]
    choices = [(text, n, k) for k in candidates for n in documents if n <= _MOST_TO_CHOOSE_BY for text in TEXTS]
    sys.stdout.write(
        quality_table(
            quality_rates(text, n, _fewer(args.worlds, n), args.seed) for text, n in progress(texts, "quality", "text")
        )
    )
    sys.stdout.write(
        choice_table(
            choice_rates(text, n, k, _fewer(args.worlds, 25 * k), args.seed)
            for text, n, k in progress(choices, "choices", "text")
        )
    )
    sys.stdout.write(
        task_table(task_rates(task, n, args.worlds, args.seed) for task, n in progress(tasks, "tasks", "task"))
    )
    sys.stdout.write(
        speed_table(
            speed_rates(machine, n, args.worlds, args.seed) for machine, n in progress(machines, "speed", "machine")
        )
    )
    sys.stdout.write(
        rerun_table(
            rerun_rates(machine, n, args.worlds, args.seed) for machine, n in progress(machines, "reruns", "machine")
        )
    )
    again = settled(TEXTS[1], min(documents), max(10, args.worlds // 10), args.seed)
    print(
        f"Of inconclusive verdicts over {min(documents)} documents as seen, {_cell(again)} % were settled by the "
        "number of documents that they requested (80 are promised)."
    )
    return 0


def quality_table(rates: Iterable[QualityRates]) -> str:
    header = (
        "documents | world | exactly at the limit: passes | fails | passes by the percentile bootstrap | "
        "equal to the baseline: passes | power claimed"
    )
    rows = [
        f"{r.documents} | {r.world} | {_cell(r.worse_passes)} | {_cell(r.better_fails)} | "
        f"{_cell(r.percentile_passes)} | {_cell(r.equal_passes)} | {100 * r.power:.0f}"
        for r in rates
    ]
    return _table("NLL difference, candidate's upper bound against a maximum", header, rows)


def choice_table(rates: Iterable[ChoiceRates]) -> str:
    header = "candidates | documents | world | all exactly at the limit: one passes | without the correction"
    rows = [f"{r.candidates} | {r.documents} | {r.world} | {_cell(r.passes)} | {_cell(r.uncorrected)}" for r in rates]
    return _table("NLL difference of the best of several candidates", header, rows)


def task_table(rates: Iterable[TaskRates]) -> str:
    header = "items | world | exactly at the limit: passes | fails | equal to the baseline: passes | power claimed"
    rows = [
        f"{r.items} | {r.world} | {_cell(r.worse_passes)} | {_cell(r.better_fails)} | {_cell(r.equal_passes)} | "
        f"{100 * r.power:.0f}"
        for r in rates
    ]
    return _table("Accuracy difference, candidate's lower bound against a minimum", header, rows)


def speed_table(rates: Iterable[SpeedRates]) -> str:
    header = (
        "repeats | machine | exactly at the limit: passes a minimum | passes a maximum | "
        "baseline against itself: within its noise floor | passes a minimum of 1 | "
        "equal to the baseline: passes | power claimed"
    )
    rows = [
        f"{r.repeats} | {r.world} | {_cell(r.slower_passes)} | {_cell(r.faster_passes)} | {_cell(r.itself_inside)} | "
        f"{_cell(r.itself_passes)} | {_cell(r.equal_passes)} | {100 * r.power:.0f}"
        for r in rates
    ]
    return _table("Ratio of speeds, interleaved repeats", header, rows)


def rerun_table(rates: Iterable[RerunRates]) -> str:
    by_look = [f"by look {look}" for look in range(1, LOOKS + 1)]
    header = " | ".join(
        [
            *("repeats a look", "machine"),
            *(f"exactly at the limit: passes a minimum {look}" for look in by_look),
            *("passes a maximum", "baseline against itself: passes a minimum of 1"),
            *(f"equal to the baseline: passes {look}" for look in by_look),
        ]
    )
    rows = [
        f"{r.repeats} | {r.world} | {' | '.join(map(_cell, r.slower_passes))} | {_cell(r.faster_passes[-1])} | "
        f"{_cell(r.itself_passes[-1])} | {' | '.join(map(_cell, r.equal_passes))}"
        for r in rates
    ]
    return _table("Ratio of speeds, measured again while inconclusive", header, rows)


def _table(title: str, header: str, rows: Sequence[str]) -> str:
    rule = " | ".join("---" for _ in header.split(" | "))
    lines = [f"{title}; % of worlds, ± standard error of the count", "", header, rule, *rows]
    return "\n".join(f"| {line} |" if " | " in line else line for line in lines) + "\n\n"


def _cell(share: Share) -> str:
    return f"{100 * share.value:.1f} ± {100 * share.error:.1f}"


def _fewer(worlds: int, documents: int) -> int:
    """Return fewer worlds for more documents, because resampling takes time in proportion."""
    return max(10, worlds * 100 // max(documents, 100))


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r}; it must be whole numbers separated by commas") from None
    if min(found) < least:
        raise InputError(f"{option}: {min(found)} is below the minimum of {least}")
    return found
