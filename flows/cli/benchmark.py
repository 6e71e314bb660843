"""numprune benchmark and gate: measure, then judge."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from numprune.documents import Reading
from numprune.errors import InputError, NumpruneError
from numprune.flows import names
from numprune.flows.cli.parser import Answer, Subcommands, add_choice, add_reading, at_least, command, reading

if TYPE_CHECKING:
    from numprune.serving.report import Report

_SERVED = {  # fields of ServedLoad
    "prompts": "requests in each stream of a repeat, one after the other (default: 4)",
    "prompt-length": "tokens of each prompt (default: 128)",
    "output-length": "tokens of each output (default: 32)",
    "repeats": "repeats of each side at each concurrency, an even number, at least 4 (default: 10)",
    "kv-cache-mib": "MiB of memory for the KV cache of each server (default: 256)",
}


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "benchmark",
        benchmark,
        "benchmark speed and memory of a model against its baseline, with --text also quality",
        "numprune benchmark ./pruned --baseline ./my-model --runtime torch --text heldout.txt --json > report.json",
    )
    parser.add_argument(
        "candidate",
        metavar="CANDIDATE",
        help="a checkpoint: a Hugging Face folder, or a hub id if a hub can be reached",
    )
    parser.add_argument(
        "--baseline",
        required=True,
        metavar="BASELINE",
        help="a checkpoint: a Hugging Face folder, or a hub id if a hub can be reached",
    )
    add_choice(parser, "--runtime", get_args(names.Runtime), None, "runtime for both")
    add_choice(
        parser,
        "--dtype",
        get_args(names.Dtype),
        "auto",
        "precision of both; auto: the candidate's stored one, but float32 in torch and ONNX Runtime on a CPU",
    )
    add_choice(
        parser,
        "--torch-mode",
        get_args(names.TorchMode),
        "auto",
        "decoding mode of torch; auto: compiled on a GPU, which takes a minute or more, eager on a CPU",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="held-out text: adds quality to the report; may be repeated (default: none)",
    )
    parser.add_argument(
        "--sequence-length",
        type=at_least(2),
        metavar="L",
        help="tokens per window of the text (default: 512, or the model's context if shorter)",
    )
    add_reading(parser)
    served = parser.add_argument_group("runtime vllm", "each side on its own server, under `vllm bench serve`")
    served.add_argument(
        "--concurrency",
        nargs="+",
        action="extend",
        type=at_least(1),
        metavar="N",
        help="requests in flight, measured separately for each number (default: 1 4)",
    )
    for option, help_text in _SERVED.items():
        served.add_argument(f"--{option}", type=int, metavar="N", help=help_text)
    served.add_argument(
        "--vllm", metavar="ENV", help="virtual environment with vLLM (default: $NUMPRUNE_VLLM, then .venv-vllm)"
    )
    served.add_argument(
        "--untested-vllm",
        action="store_true",
        help="accept a vLLM version that numprune was not tested with (default: refuse it)",
    )

    encoders = parser.add_argument_group("encoders", "a forward pass at every batch size and length")
    encoders.add_argument(
        "--batch-sizes",
        nargs="+",
        action="extend",
        type=at_least(1),
        metavar="N",
        help="texts in a batch (default: 1 8)",
    )
    encoders.add_argument(
        "--lengths",
        nargs="+",
        action="extend",
        type=at_least(1),
        metavar="N",
        help="tokens of each text (default: 32 128)",
    )
    encoders.add_argument(
        "--passes", type=at_least(1), metavar="N", help="forward passes of each shape per repeat (default: 4)"
    )

    parser = command(
        commands,
        "gate",
        gate,
        "judge a report by a policy; the exit code is the verdict",
        "numprune gate report.json --policy policy.toml --junit gates.xml --markdown summary.md",
    )
    parser.add_argument("report", metavar="REPORT", type=Path, help="a report.json")
    parser.add_argument("--policy", required=True, metavar="POLICY", type=Path, help="a TOML file of [[gates]]")
    parser.add_argument(
        "--junit",
        metavar="FILE",
        type=Path,
        help="write the verdict as JUnit XML, one test per gate (default: none)",
    )
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        help="write the report with its verdict as Markdown; $GITHUB_STEP_SUMMARY is appended to, within its 1 MiB "
        "(default: none)",
    )


def benchmark(args: argparse.Namespace) -> Answer:
    from numprune.flows import children, summary

    more: dict[str, Any] = {}
    fields = {option.replace("-", "_") for option in _SERVED}
    given = {name: value for name in fields if (value := getattr(args, name)) is not None}
    given |= {"concurrency": tuple(args.concurrency)} if args.concurrency else {}
    if args.runtime == "vllm":
        from numprune.serving.benchmark.vllm import ServedLoad
        from numprune.serving.vllm import environment

        more = {"vllm": environment.find(args.vllm, untested=args.untested_vllm), "served": ServedLoad(**given)}
    elif given or args.vllm or args.untested_vllm:
        raise InputError(f"--runtime {args.runtime}: the options for runtime vllm do not apply")
    shapes = {name: tuple(value) for name in ("batch_sizes", "lengths") if (value := getattr(args, name))}
    if args.passes or shapes:
        more["shapes"] = {**shapes, **({"passes": args.passes} if args.passes else {})}
    if args.torch_mode != "auto" and args.runtime != "torch":
        raise InputError(f"--torch-mode {args.torch_mode}: does not apply to {args.runtime}; omit it")
    how = reading(args, args.text or [])
    if not args.text and how != Reading():
        raise InputError("--split, --chat and --pack need --text")
    report = children.call(
        _report,
        args.candidate,
        args.baseline,
        args.runtime,
        args.text,
        args.sequence_length,
        how,
        dtype=args.dtype,
        torch_mode=args.torch_mode,
        **more,
    )
    return Answer(report.to_json(), "\n".join([report.run_id, *summary.of_report(report)]))


def _report(
    candidate: str,
    baseline: str,
    runtime: str,
    text: list[Path] | None,
    length: int | None,
    how: Reading,
    *,
    dtype: str,
    **more: Any,
) -> "Report":
    from numprune.flows.steps.benchmark import benchmark_report  # the tensor libraries

    return benchmark_report(candidate, baseline, runtime, text, length, how, dtype=dtype, **more)


def gate(args: argparse.Namespace) -> Answer:
    from numprune.flows import summary
    from numprune.serving import gates, report
    from numprune.serving.junit import junit, junit_error

    _check_outputs(args)
    try:
        policy = gates.read_policy(args.policy)
        found = report.read(args.report)
        if found.verdict is not None:
            gates.confirm(found)
        verdict = gates.judge(found, policy)
    except NumpruneError as error:  # a CI system must not show results of an earlier run
        _write("--junit", args.junit, junit_error(str(error), datetime.now(UTC)), report.replace)
        _write_page(args.markdown, report.not_judged(str(error)))
        raise
    _write("--junit", args.junit, junit(found, verdict), report.replace)
    _write_page(args.markdown, report.markdown(found.judged(verdict)))
    data = verdict.model_dump(mode="json")
    lines = [f"{args.report}: {verdict.outcome}", *summary.gate_lines(data["gates"])]
    return Answer({"report": str(args.report), **data}, "\n".join(lines), gates.exit_code(verdict))


def _check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError if an output is another file of the command, or not a file."""
    taken = {args.report.resolve(): "the report", args.policy.resolve(): "the policy"}
    for option, path in (("--junit", args.junit), ("--markdown", args.markdown)):
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path}: exists and is not a file; give another path")
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise InputError(f"{option} {path}: is {other}, which it would replace; give another file")


def _write_page(path: Path | None, page: str) -> None:
    from numprune.serving.report import replace, step_summary

    shared = path is not None and step_summary.is_summary(path)
    _write("--markdown", path, page, step_summary.append if shared else replace)


def _write(option: str, path: Path | None, text: str, write: Callable[[Path, str], None]) -> None:
    if path is None:
        return
    try:
        write(path.resolve(), text)
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot be written: {error.strerror}; give a file in a writable folder"
        ) from None
