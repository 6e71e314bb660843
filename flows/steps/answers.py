"""A model's answers to the harness's tasks: given in PyTorch or by a vLLM server, kept item by item, and compared.

`<task>.jsonl` has a row for each item and filter, in the order of the data: the item, its target, what the model gave
for each request, and for each metric 1 (right) or 0 (wrong).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from numprune.anatomy import context_of
from numprune.errors import InputError, IntegrityError, NumpruneError
from numprune.export import precision
from numprune.export.checkpoint import load, read_config
from numprune.flows.names import TaskRuntime
from numprune.flows.steps.harness import SEED, Tasks, metrics_of, show_bars_on_terminals
from numprune.flows.steps.results import AnsweredTask, TaskAnswers
from numprune.paired import paired_accuracy
from numprune.placement import place
from numprune.recovery.state import replace_file
from numprune.serving import loopback
from numprune.serving.vllm import api_key, environment
from numprune.serving.vllm.server import serving

_BATCH = 8
_SERVED_TOKENS = 4096  # the KV cache has room for one request of this length almost everywhere
_PAIRED = ("task", "item", "prompt", "target_hash")  # what two models' rows of one item have in common


class TaskFailed(NumpruneError):
    """A model or server did not answer a task's requests."""


@dataclass(frozen=True)
class Endpoint:
    """A server of OpenAI's API: its root, the served model's name, its context in tokens, headers of requests."""

    url: str
    name: str
    context: int | None  # None: it does not say
    headers: Mapping[str, str]


def find_endpoint(url: str, key: str | None) -> Endpoint:
    """The model that is served at `url`. Raises InputError where no server answers there, or not to this key."""
    headers = api_key.headers(key)
    try:
        found = loopback.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=30.0)
        if found.status_code == httpx.codes.UNAUTHORIZED:
            raise InputError(f"--url {url}: {api_key.refused(key)}")
        served = found.raise_for_status().json()["data"][0]
        return Endpoint(url.rstrip("/"), str(served["id"]), served.get("max_model_len"), headers)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--url {url}: no server of OpenAI's API answers there ({error})") from None


def answer(
    out: Path, tasks: Tasks, model: Path, runtime: TaskRuntime, device: torch.device, kept: Path | None = None
) -> TaskAnswers:
    """Have the model in a folder answer all items, and write its answers into `out`.

    `kept`: a folder for the answers to finished tasks; those that it has are not asked for again.

    Raises:
        InputError: a metric is neither 0 nor 1, or an item does not have it.
        TaskFailed: the task's code, or the server, failed.
        MissingRuntime, ServerError: as of a vLLM server.
    """
    if runtime == "torch":
        return _answered(out, tasks, _in_torch(model, device), runtime, kept)
    where = environment.find()
    context = min(context_of(read_config(model)), _SERVED_TOKENS)
    eager = ["--enforce-eager"] if where.cpu else []  # compiling takes minutes
    options = ["--max-model-len", str(context), *eager]
    # Always passed to vLLM: by default it would convert float32 to half precision.
    dtype = precision.name_of(read_config(model).dtype)
    with serving(where, model, name=model.name, options=options, dtype=dtype) as server:
        endpoint = Endpoint(server.url, server.name, context, server.headers)
        return answer_served(out, tasks, model, endpoint, kept)


def answer_served(out: Path, tasks: Tasks, model: Path, endpoint: Endpoint, kept: Path | None = None) -> TaskAnswers:
    """`answer`, by a running server of the checkpoint `model`, which gives the tokenizer."""
    return _answered(out, tasks, _of_server(model, endpoint), "vllm", kept)


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one task that `answer` wrote."""
    with _file(folder, name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_answers(candidate: Path, baseline: Path, found: TaskAnswers) -> dict[str, Any]:
    """The report's section `tasks`, from both models' rows; `found`: the candidate's result.

    Raises IntegrityError where the rows are not of the same items.
    """
    return {
        name: {
            metric: {"runtime": found.runtime, "num_fewshot": task.num_fewshot, **asdict(paired_accuracy(*sides))}
            for metric, sides in _paired(read_rows(baseline, name), read_rows(candidate, name), name)
        }
        for name, task in found.tasks.items()
    }


def _paired(
    baseline: Sequence[Mapping[str, Any]], candidate: Sequence[Mapping[str, Any]], name: str
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Each metric with both models' answers, (items,) bool."""
    if [[row[key] for key in _PAIRED] for row in baseline] != [[row[key] for key in _PAIRED] for row in candidate]:
        raise IntegrityError(f"task {name}: the two models did not answer the same items; answer it anew with both")
    for metric in dict.fromkeys(metric for row in candidate for metric in row["metrics"]):
        one, other = (
            np.array([row["metrics"][metric] for row in rows if metric in row["metrics"]], bool)
            for rows in (baseline, candidate)
        )
        yield metric, (one, other)


def _answered(out: Path, tasks: Tasks, model: Any, runtime: TaskRuntime, kept: Path | None) -> TaskAnswers:
    answered = {}
    for name, members in tasks.members.items():
        finished = _file(kept or out, name)
        if kept is None or not finished.is_file():
            rows = _asked(tasks, name, model, runtime)
            replace_file(finished, partial(_write, rows=rows))
        if kept is not None:
            shutil.copyfile(finished, _file(out, name))
        rows = read_rows(out, name)
        answered[name] = AnsweredTask(
            len({(row["task"], row["item"]) for row in rows}),
            max(int(tasks.of[member].get_config("num_fewshot")) for member in members),
            {
                metric: float(np.mean([row["metrics"][metric] for row in rows if metric in row["metrics"]]))
                for metric in tasks.metrics(name)
            },
        )
    return TaskAnswers(runtime, answered)


def _asked(tasks: Tasks, name: str, model: Any, runtime: TaskRuntime) -> list[dict[str, Any]]:
    """Return the rows of one task, answered by the harness's model."""
    from lm_eval import evaluator

    members = {member: tasks.of[member] for member in tasks.members[name]}
    tasks.start_over()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)  # of tasks that sample; a server is sent the same seed
            found = evaluator.evaluate(model, {"tasks": members}, limit=tasks.limit, bootstrap_iters=0)["samples"]
    except NumpruneError:
        raise
    except Exception as error:  # of a task's code, or of a server
        raise TaskFailed(f"task {name} in {runtime}: {type(error).__name__}: {error}") from error
    return [row for member in members for row in _rows(member, found[member], tasks.metrics(name))]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _rows(task: str, samples: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    for sample in samples:
        right = {metric: value for metric, value in metrics_of(sample) if metric in metrics}
        for metric, value in right.items():
            if value not in (0, 1):
                given = "missing" if value is None else value
                raise InputError(
                    f"task {task}: {metric} of item {sample['doc_id']} is {given}, neither right nor wrong; its "
                    "process_results must give 1 or 0 for every item"
                )
        yield {
            "task": task,
            "item": sample["doc_id"],
            "doc": sample["doc"],
            "target": sample["target"],
            "answers": sample["filtered_resps"],
            "prompt": sample["prompt_hash"],
            "target_hash": sample["target_hash"],
            "metrics": {metric: int(value) for metric, value in right.items()},
        }


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _in_torch(folder: Path, device: torch.device) -> Any:
    """The harness's model of a checkpoint as we load it: per-layer sizes, quantized weights."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(folder)
    return HFLM(
        pretrained=place(model, device).eval(),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=_BATCH,
        max_length=context_of(model.config),
        softmax_dtype="float32",
    )


def _of_server(folder: Path, endpoint: Endpoint) -> Any:
    """The harness's client of OpenAI's completions API, which asks for the log-probabilities of the prompt."""
    from lm_eval.models import api_models
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    show_bars_on_terminals(api_models)
    return LocalCompletionsAPI(
        base_url=f"{endpoint.url}/v1/completions",
        model=endpoint.name,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        max_length=endpoint.context or context_of(read_config(folder)),
        header=dict(endpoint.headers),
        add_bos_token=True,  # special tokens as the tokenizer adds them, like in torch
        batch_size=_BATCH,
    )
