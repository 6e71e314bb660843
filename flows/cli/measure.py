"""numprune benchmark and gate: measure, then judge."""

import argparse
from pathlib import Path
from typing import get_args

from numprune.flows import names
from numprune.flows.cli.parser import Answer, Subcommands, at_least, command


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "benchmark",
        benchmark,
        "time a model against its baseline, and compare its memory and, with --text, its quality",
        "numprune benchmark ./pruned --baseline ./my-model --runtime torch --text heldout.txt --json > report.json",
    )
    parser.add_argument("candidate", metavar="CANDIDATE", help="a checkpoint")
    parser.add_argument("--baseline", required=True, metavar="BASELINE", help="a checkpoint")
    parser.add_argument("--runtime", required=True, choices=get_args(names.Runtime), help="in which both are run")
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="held-out text: adds quality to the report"
    )
    parser.add_argument(
        "--sequence-length", type=at_least(2), metavar="L", help="of the text's windows (default: 512, or the context)"
    )

    parser = command(
        commands,
        "gate",
        gate,
        "judge a report by a policy; the exit code is the verdict",
        "numprune gate report.json --policy policy.toml",
    )
    parser.add_argument("report", metavar="REPORT", type=Path, help="a report.json")
    parser.add_argument("--policy", required=True, metavar="POLICY", type=Path, help="a TOML file of [[gates]]")


def benchmark(args: argparse.Namespace) -> Answer:
    from numprune.flows import children, summary
    from numprune.serving.report import Report

    report: Report = children.work(
        "benchmark.measure", args.candidate, args.baseline, args.runtime, args.text, args.sequence_length
    )
    return Answer(report.to_json(), "\n".join([report.run_id, *summary.of_report(report)]))


def gate(args: argparse.Namespace) -> Answer:
    from numprune.flows import summary
    from numprune.serving import gates, report

    policy = gates.read_policy(args.policy)
    verdict = gates.judge(report.read(args.report), policy)
    data = verdict.model_dump(mode="json")
    lines = [f"{args.report}: {verdict.outcome}", *summary.gate_lines(data["gates"])]
    return Answer({"report": str(args.report), **data}, "\n".join(lines), gates.exit_code(verdict))
