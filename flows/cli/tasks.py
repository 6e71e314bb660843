"""numprune tasks: accuracy on tasks, of one model or against a baseline."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.counted import counted
from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.cli.parser import MODEL, Answer, Subcommands, at_least, check_out, command
from numprune.serving.vllm import api_key

if TYPE_CHECKING:
    from numprune.flows.steps.results import TaskAnswers


def add(commands: Subcommands) -> None:
    parser = command(
        commands,
        "tasks",
        tasks,
        "measure accuracy on tasks of the lm-evaluation-harness, optionally against a baseline",
        "numprune tasks ./pruned --baseline ./my-model --tasks arc_easy my_task.yaml --limit 500",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", required=True, help="names in the harness, or YAML files of your own"
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="compare item by item with this model, which answers in PyTorch (default: none)",
    )
    parser.add_argument(
        "--num-fewshot",
        metavar="N",
        type=at_least(0),
        help="examples before each item (default: the task's own number)",
    )
    parser.add_argument("--limit", metavar="N", type=at_least(1), help="items of each task (default: all)")
    parser.add_argument(
        "--url", help="a server of MODEL that answers in its place, without /v1 (default: none, PyTorch answers)"
    )
    parser.add_argument(
        api_key.OPTION,
        type=Path,
        metavar="FILE",
        help="file with the server's API key (default: $VLLM_API_KEY, if set)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep every answer in this new folder (default: none)")


def tasks(args: argparse.Namespace) -> Answer:
    from numprune.export import checkpoint
    from numprune.export.tasks import load_task
    from numprune.flows import summary
    from numprune.flows.steps.answers import answer, answer_served, compare_answers, find_endpoint
    from numprune.flows.steps.harness import load_tasks
    from numprune.flows.steps.prune import device_of

    if args.api_key_file and not args.url:
        raise InputError(f"{api_key.OPTION}: has no effect without --url; give both or none")
    if args.out:
        check_out(args.out)
    folders = {"candidate": checkpoint.resolve(args.model)}
    if args.baseline:
        folders["baseline"] = checkpoint.resolve(args.baseline)
    for folder in folders.values():
        if (task := load_task(folder).name) != names.CAUSAL_LM:
            raise InputError(f"{folder}: only causal language models answer tasks, and this one is for {task}")
    num_fewshot = names.TASKS_OWN if args.num_fewshot is None else args.num_fewshot
    loaded = load_tasks(args.tasks, num_fewshot, args.limit or names.ALL_ITEMS)
    endpoint = find_endpoint(args.url, api_key.read(args.api_key_file)) if args.url else None
    found: dict[str, TaskAnswers] = {}
    with _kept(args.out) as content:
        kept = {side: content / side for side in folders}
        for side, folder in folders.items():
            kept[side].mkdir()
            if endpoint and side == "candidate":
                found[side] = answer_served(kept[side], loaded, folder, endpoint)
            else:
                found[side] = answer(kept[side], loaded, folder, "torch", device_of("auto"))
        data: dict[str, Any] = {"model": str(folders["candidate"]), "items": loaded.digest()}
        if not args.baseline:
            data |= asdict(found["candidate"])
            return Answer(data, "\n".join(_lines(folders["candidate"], found["candidate"])))
        compared = compare_answers(kept["candidate"], kept["baseline"], found["candidate"])
    runtimes = {side: one.runtime for side, one in found.items()}
    data |= {"baseline": str(folders["baseline"]), "runtimes": runtimes, "tasks": compared}
    lines = [
        f"{folders['candidate']}: {summary.of_accuracy(name, metric, one)}"
        for name, of_task in compared.items()
        for metric, one in of_task.items()
    ]
    for one in (one for of_task in compared.values() for one in of_task.values()):
        del one["runtime"]  # with a server, each side has its own
    if endpoint:
        lines.append(
            f"the candidate answered in {runtimes['candidate']} and the baseline in {runtimes['baseline']}; the change "
            "includes their rounding"
        )
    return Answer(data, "\n".join(lines))


@contextmanager
def _kept(out: Path | None) -> Iterator[Path]:
    """A folder for the answers, which becomes `out` when all have been given."""
    from numprune.export import temporary

    if out is None:
        with tempfile.TemporaryDirectory(prefix="numprune-") as scratch:
            yield Path(scratch)
    else:
        with temporary.beside(out) as content:
            yield content
            temporary.move(content, out)


def _lines(model: Path, found: "TaskAnswers") -> list[str]:
    return [
        f"{model}: {name} {metric} {accuracy:.1%}, of {counted(task.items, 'item')}"
        for name, task in found.tasks.items()
        for metric, accuracy in task.accuracy.items()
    ]
