"""Tasks of EleutherAI's lm-evaluation-harness: loading them by name, or from a user's YAML file.

A YAML file is as the harness describes it, with the paths in `dataset_kwargs.data_files` relative to its folder. Its
`!function` entries run Python code beside it, so it must be trusted like code.
"""

import hashlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from numprune.errors import InputError, MissingRuntime
from numprune.export.imports import bring_back_sklearn
from numprune.flows.names import ALL_ITEMS, TASKS_OWN
from numprune.flows.recipe import TASK_FILES
from numprune.flows.values import FewShot, Limit
from numprune.serving.problems import did_you_mean, listed

ACCURACIES = ("acc", "acc_norm", "exact_match")  # metrics that are right or wrong, item by item
INSTALL = 'pip install "numprune[tasks]"'
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a segment of a gate's metric
SEED = 1234  # of the examples before an item, and of sampled answers; the harness's own


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
        of: the harness's tasks, by name.
        members: the tasks of each one that was asked for; several of a group.
        limit: items of each task; None for all.
        code: digest of the YAML files, and of the Python files in the folders of their functions.
    """

    of: Mapping[str, Any]
    members: Mapping[str, Sequence[str]]
    limit: int | None
    code: str

    def metrics(self, name: str) -> list[str]:
        """The accuracies that all members have, each filter's apart: "acc", or "exact_match-strict-match"."""
        found = [
            [_key(metric, one) for metric in ACCURACIES if metric in self.of[member]._metric_fn_list for one in filters]
            for member in self.members[name]
            for filters in [[one.name for one in self.of[member]._filters]]
        ]
        return [metric for metric in found[0] if all(metric in others for others in found)]

    def start_over(self) -> None:
        """Have the next requests begin with the same examples: they are drawn one item after the other."""
        for task in self.of.values():
            task.set_fewshot_seed(seed=SEED)

    def digest(self) -> str:
        """SHA-256 of every request to a model, of what judges its answers, and of the groups they are counted in.

        The harness's own code is left out: its version is part of a stage's key.

        Raises:
            InputError: a task's code or template fails on an item.
        """
        found = hashlib.sha256(self.code.encode())
        found.update(json.dumps([[name, list(members)] for name, members in self.members.items()]).encode())
        self.start_over()
        for name, task in self.of.items():
            try:
                task.build_all_requests(limit=self.limit)
            except Exception as error:  # of the task's code
                raise InputError(f"task {name}: its requests cannot be made ({_brief(error)})") from None
            for one in task.instances:
                facts = [name, one.doc_id, one.request_type, one.arguments, one.doc]
                found.update(json.dumps(facts, sort_keys=True, default=str).encode() + b"\n")
        return found.hexdigest()


def load_tasks(asked: Sequence[str], num_fewshot: FewShot = TASKS_OWN, limit: Limit = ALL_ITEMS) -> Tasks:
    """Load tasks with their data, which is looked for offline too.

    Args:
        asked: names in the harness, of tasks or groups, and YAML files.
        num_fewshot: examples before each item; tasks that allow none stay without.
        limit: items of each task.

    Raises:
        InputError: with every problem: an unknown task, a dataset that is not there, no metric that is right or wrong.
        MissingRuntime: the harness is not installed.
    """
    manager_of = _harness()
    manager = manager_of(include_defaults=not all(map(is_file, asked)))
    of: dict[str, Any] = {}
    members: dict[str, list[str]] = {}
    code, problems = hashlib.sha256(), []
    for name in asked:
        try:
            found = _own(manager, Path(name), code) if is_file(name) else _built_in(manager, name)
            for one, task in found.items():
                _check(one, task)
                if one in of:
                    raise InputError(f"task {one}: asked for twice, also as a member of a group; name it once")
                of[one] = task
            known = next(iter(found)) if is_file(name) else name
            if not _NAME.fullmatch(known):
                raise InputError(
                    f"task {known!r}: the name is part of a gate's metric; use up to 64 letters, digits, _ and -"
                )
            if known in members:
                raise InputError(f"task {known}: a group of this name is asked for too; rename the task")
            members[known] = list(found)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(problems[0] if len(problems) == 1 else listed("tasks", problems))
    for task in of.values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot != TASKS_OWN and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
    tasks = Tasks(of, members, None if limit == ALL_ITEMS else limit, code.hexdigest())
    for name in members:
        if not tasks.metrics(name):
            raise InputError(f"task {name}: its tasks have no metric in common of {', '.join(ACCURACIES)}")
    return tasks


def is_file(task: str) -> bool:
    """Whether a task is given by a YAML file, not by its name in the harness."""
    return task.endswith(TASK_FILES)


def metrics_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The accuracies of one of the harness's samples, by the names of `Tasks.metrics`; None where there is none."""
    return ((_key(metric, sample["filter"]), sample.get(metric)) for metric in ACCURACIES)


def _key(metric: str, filtered_by: str) -> str:
    return metric if filtered_by == "none" else f"{metric}-{filtered_by}"


def _harness() -> Any:
    """The harness's TaskManager, with progress bars on terminals only. Raises MissingRuntime."""
    bring_back_sklearn()
    try:
        import datasets
        from lm_eval.api import model, task
        from lm_eval.models import huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingRuntime(
            f"tasks need the lm-evaluation-harness, which cannot be imported ({error}): {INSTALL}"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    show_bars_on_terminals(model, task, huggingface)
    return TaskManager


def show_bars_on_terminals(*modules: Any) -> None:
    """Have the harness's modules draw their progress bars where our own are drawn."""

    def bar(*arguments: Any, disable: bool = False, **options: Any) -> Any:
        return tqdm(*arguments, disable=disable or None, **options)

    for module in modules:
        module.tqdm = bar


def _built_in(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.task_index:
        hint = did_you_mean(name, manager.all_tasks)
        raise InputError(f"task {name}: the harness has no such task{hint}; your own is given as a YAML file")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # any of the data's source, or of the task's code
        data = f"dataset{_dataset_of(manager.task_index[name])}"
        raise InputError(
            f"task {name}: its {data} cannot be loaded ({_brief(error)}); load it once where the Hugging Face hub can "
            "be reached, or give your own data in a YAML file"
        ) from None


def _dataset_of(entry: Any) -> str:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = load_yaml(entry.yaml_path, resolve_func=False).get("dataset_path") if entry.yaml_path else None
    return f" {path}" if path else ""


def _own(manager: Any, path: Path, code: Any) -> dict[str, Any]:
    """The task of a user's file; what it depends on, besides its items, is added to `code`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise InputError(f"task {path}: no such file")
    try:
        config, written = load_yaml(path), load_yaml(path, resolve_func=False)
    except Exception as error:  # of YAML, or of the code beside it
        raise InputError(f"task {path}: cannot be read ({_brief(error)})") from None
    if not isinstance(config.get("task"), str) or "group" in config:
        raise InputError(f"task {path}: must have its name as `task`; a group's tasks need a file each")
    text = json.dumps(written, sort_keys=True, default=str)
    folders = {path.resolve().parent, *_folders_of_functions(config)}
    for folder in sorted(map(str, folders), key=len, reverse=True):
        text = text.replace(folder, ".")
    code.update(text.encode())
    for name, content in sorted((file.name, file.read_bytes()) for folder in folders for file in folder.glob("*.py")):
        code.update(name.encode() + content)
    arguments = dict(config.get("dataset_kwargs") or {})
    with ExitStack() as stack:
        if "data_files" in arguments:
            # Read anew every time: the cache of datasets does not notice every change of a file.
            arguments["cache_dir"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="numprune-"))
            arguments["data_files"] = _anchored(arguments["data_files"], path)
            config["dataset_kwargs"] = {**arguments, "keep_in_memory": True}
        try:
            return dict(manager.load([config])["tasks"])
        except Exception as error:  # as above
            data = f"dataset {config['dataset_path']}" if config.get("dataset_path") else "task"
            raise InputError(f"task {path}: its {data} cannot be loaded ({_brief(error)})") from None


def _folders_of_functions(config: Any) -> set[Path]:
    """Folders with the code of a task's functions: included YAML files, and packages, have theirs elsewhere."""
    if isinstance(config, Mapping | list):
        parts = config.values() if isinstance(config, Mapping) else config
        return {folder for part in parts for folder in _folders_of_functions(part)}
    file = getattr(sys.modules.get(getattr(config, "__module__", "")), "__file__", None) if callable(config) else None
    return {Path(file).resolve().parent} if file else set()


def _anchored(files: Any, path: Path) -> Any:
    """Data files relative to the folder of the YAML file. Raises InputError for a missing one."""
    if isinstance(files, Mapping):
        return {split: _anchored(of_split, path) for split, of_split in files.items()}
    if isinstance(files, list):
        return [_anchored(one, path) for one in files]
    found = path.parent / str(files)
    if "://" in str(files) or any(mark in str(files) for mark in "*?["):
        return str(files) if "://" in str(files) else str(found)
    if not found.is_file():
        raise InputError(f"task {path}: dataset_kwargs.data_files: {found}: no such file")
    if not found.stat().st_size:
        raise InputError(f"task {path}: dataset_kwargs.data_files: {found} is empty; write an item per line")
    return str(found.absolute())


def _check(name: str, task: Any) -> None:
    """Refuse a task whose answers no gate could judge."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name}: it runs code that the model writes, which numprune does not; choose another")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name}: its items have images or sound; choose a task of text")
    known = [str(metric) for metric in getattr(task, "_metric_fn_list", {})]
    if not any(metric in known for metric in ACCURACIES):
        raise InputError(
            f"task {name}: none of its metrics ({', '.join(known) or 'unknown'}) is right or wrong item by item; "
            f"choose a task with {' or '.join(ACCURACIES)}"
        )


def _brief(error: Exception) -> str:
    """The error's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
