"""Tasks of the lm-evaluation-harness: loaded, answered, compared and gated."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.documents import Reading
from numprune.errors import InputError, IntegrityError
from numprune.export import manifest
from numprune.flows.recipe import load
from numprune.flows.steps import answers
from numprune.flows.steps.answers import (
    TaskFailed,
    answer,
    compare_answers,
    find_endpoint,
    read_rows,
)
from numprune.flows.steps.checks.recipe import check
from numprune.flows.steps.evaluate import compare_checkpoints
from numprune.flows.steps.harness import Tasks, load_tasks
from numprune.flows.steps.prepare import prepare
from numprune.flows.steps.text import heldout_rows
from numprune.flows.steps.training import kept_until_done
from numprune.serving import gates
from numprune.serving import report as reports
from numprune.serving.gates import Gate, Policy
from numprune.serving.report import Report, page
from tests.conftest import build_tiny
from tests.flows.conftest import RECIPE, Answered, write_inputs
from tests.flows.faults import finish
from tests.flows.tasks import NAME, YAML, swap_letters, write_task
from tests.serving.conftest import COMPLETE
from tests.serving.servers import answering

CPU = torch.device("cpu")
DELTA = f"tasks.{NAME}.acc.accuracy_delta"


@pytest.fixture(scope="module")
def task(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that `tiny`'s model answers all right; not to be written to."""
    return write_task(tmp_path_factory.mktemp("task"), tiny / "base", 40)


def test_a_task_gate_fails_a_model_that_nll_would_pass(tiny: Path, task: Path, tmp_path: Path) -> None:
    """The candidate gives every wrong letter and is otherwise the same: its held-out text has neither letter."""
    swapped = swap_letters(tiny / "base", tmp_path / "swapped")
    tasks = load_tasks([str(task)])
    folders = {"baseline": tiny / "base", "candidate": swapped}
    for side in folders:
        (tmp_path / side).mkdir()
    found = {side: answer(tmp_path / side, tasks, folder, "torch", CPU) for side, folder in folders.items()}
    compared = compare_answers(tmp_path / "candidate", tmp_path / "baseline", found["candidate"])
    accuracy = compared[NAME]["acc"]
    assert (accuracy["items"], accuracy["baseline"], accuracy["candidate"]) == (40, 1.0, 0.0)
    assert (accuracy["right_to_wrong"], accuracy["wrong_to_right"]) == (40, 0)
    assert accuracy["mcnemar_p"] == pytest.approx(2 / 2**40)

    rows = heldout_rows([tiny / "heldout.jsonl"], 32, [tiny / "base"], Reading())
    [quality] = compare_checkpoints([swapped], tiny / "base", rows, CPU)
    report = Report.model_validate({**COMPLETE, "quality": quality, "tasks": compared})
    policy = Policy(
        gates=(
            Gate(metric="quality.loss_delta", bound="ci95_upper", max=0.001),
            Gate(metric=DELTA, bound="ci95_lower", min=-0.05),
        )
    )
    verdict = gates.judge(report, policy)
    assert [gate.outcome for gate in verdict.gates] == ["pass", "fail"]
    assert verdict.gates[1].power is not None
    assert verdict.outcome == "fail"
    judged = report.judged(verdict)
    assert f"| {NAME}, acc | 40 | 100.0 % | 0.0 % | -1 [" in reports.markdown(judged)
    assert f"Accuracy difference ({NAME}, acc)" in page.html(judged)


def test_every_answer_is_kept(tiny: Path, task: Path, tmp_path: Path) -> None:
    found = answer(tmp_path, load_tasks([str(task)], num_fewshot=2, limit=5), tiny / "base", "torch", CPU)
    assert (found.runtime, found.tasks[NAME].items, found.tasks[NAME].num_fewshot) == ("torch", 5, 2)
    rows = read_rows(tmp_path, NAME)
    items = [json.loads(line) for line in (task.parent / "items.jsonl").read_text().splitlines()[:5]]
    assert [row["doc"] for row in rows] == items
    assert [row["target"] for row in rows] == [item["answer"] for item in items]
    assert [row["item"] for row in rows] == list(range(5))
    assert all(set(row["metrics"]) == {"acc"} and len(row["answers"]) == 2 for row in rows)
    assert found.tasks[NAME].accuracy == {"acc": sum(row["metrics"]["acc"] for row in rows) / 5}


def test_answers_to_other_items_are_not_compared(tiny: Path, task: Path, tmp_path: Path) -> None:
    for folder, limit in (("one", 4), ("other", 5)):
        (tmp_path / folder).mkdir()
        found = answer(tmp_path / folder, load_tasks([str(task)], limit=limit), tiny / "base", "torch", CPU)
    with pytest.raises(IntegrityError, match=f"task {NAME}: the two models did not answer the same items"):
        compare_answers(tmp_path / "other", tmp_path / "one", found)


def test_the_digest_is_that_of_the_requests(task: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "renamed.yaml"
    moved.write_bytes(task.read_bytes())
    (tmp_path / "moved" / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    first = load_tasks([str(task)], limit=8).digest()
    assert load_tasks([str(moved)], limit=8).digest() == first
    assert load_tasks([str(task)], limit=9).digest() != first
    with_examples = load_tasks([str(task)], num_fewshot=1, limit=8)
    assert with_examples.digest() == with_examples.digest() != first  # the same examples every time
    grouped = replace(with_examples, members={"group": [NAME]})  # whose answers are in a file of another name
    assert grouped.digest() != with_examples.digest()
    (tmp_path / "moved" / "items.jsonl").write_text((task.parent / "items.jsonl").read_text().replace("sheep", "cows"))
    assert load_tasks([str(moved)], limit=8).digest() != first
    moved.write_text(YAML + "process_results: !function judge.right\n")
    judge = tmp_path / "moved" / "judge.py"
    judge.write_text("def right(doc, results):\n    return {'acc': 1.0}\n")
    before = load_tasks([str(moved)], limit=8).digest()
    judge.write_text("def right(doc, results):\n    return {'acc': 0.0}\n")
    assert load_tasks([str(moved)], limit=8).digest() != before


@pytest.mark.parametrize("module", ["common/judge.py", "mine/of/judge.py"])
def test_the_digest_covers_code_in_other_folders(module: str, task: Path, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "mine" / "of").mkdir(parents=True)
    (tmp_path / "mine" / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "common" / "base.yaml").write_text(f"{YAML}process_results: !function judge.right\n")
    own = "process_results: !function of.judge.right\n" if "of" in module else ""
    for folder in ("common", "mine/of"):
        (tmp_path / folder / "judge.py").write_text("def right(doc, results):\n    return {'acc': 1.0}\n")
    (tmp_path / "mine" / "task.yaml").write_text(f"include: ../common/base.yaml\n{own}")
    asked = [str(tmp_path / "mine" / "task.yaml")]
    before = load_tasks(asked, limit=2).digest()
    (tmp_path / module).write_text("def right(doc, results):\n    return {'acc': 0.0}\n")
    assert load_tasks(asked, limit=2).digest() != before
    (tmp_path / module).write_text("def right(doc, results):\n    return {'acc': 1.0}\n")
    assert load_tasks(asked, limit=2).digest() == before
    (tmp_path / "moved").mkdir()
    for folder in ("common", "mine"):
        (tmp_path / folder).rename(tmp_path / "moved" / folder)
    assert load_tasks([str(tmp_path / "moved" / "mine" / "task.yaml")], limit=2).digest() == before


def test_code_that_fails_on_a_later_item_is_refused_before_any_work(tiny: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "code.py").write_text("def ask(doc):\n    return {'After 0': 'q'}[doc['question'][:7]]\n")
    asked = YAML.replace('"{{question}}"', "!function code.ask")
    (tmp_path / "task.yaml").write_text(asked)
    with pytest.raises(InputError, match="task letters: its requests cannot be made \\(KeyError: 'After 1'"):
        prepare(load(tiny / "recipe.toml", [f"evaluate.tasks=['{tmp_path / 'task.yaml'}']"]), tmp_path / "w")


def edited(old: str, new: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        assert old in YAML
        (folder / "task.yaml").write_text(YAML.replace(old, new))
        (folder / "items.jsonl").write_text('{"question": "a", "answer": 0}\n')
        (folder / "empty.jsonl").touch()
        return str(folder / "task.yaml")

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda folder: str(folder / "none.yaml"), r"task .*none.yaml: no such file"),
        (edited("items.jsonl", "none.jsonl"), r"dataset_kwargs.data_files: .*none.jsonl: no such file"),
        (edited("items.jsonl", "empty.jsonl"), r"dataset_kwargs.data_files: .*empty.jsonl is empty; write an item"),
        (edited("task: letters", "tasks: letters"), "must have its name as `task`"),
        (edited("task: letters", "task: my letters"), "'my letters': the name is part of a gate's metric"),
        (edited("metric: acc,", "metric: brier_score,"), r"none of its metrics \(brier_score\) is right or wrong"),
        (edited("test_split: test\n", "test_split: dev\n"), r"its dataset json cannot be loaded \("),
        (edited("task: letters", "task: [letters"), r"task .*task.yaml: cannot be read \("),
    ],
)
def test_what_cannot_be_judged_is_refused(write: Callable[[Path], str], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        load_tasks([write(tmp_path)])


def test_a_metric_that_is_neither_right_nor_wrong_is_refused(tiny: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "half.py").write_text("def right(doc, results):\n    return {'acc': 0.5}\n")
    (tmp_path / "task.yaml").write_text(YAML + "process_results: !function half.right\n")
    tasks = load_tasks([str(tmp_path / "task.yaml")], limit=2)
    with pytest.raises(InputError, match=r"task letters: acc of item 0 is 0.5, neither right nor wrong"):
        answer(tmp_path, tasks, tiny / "base", "torch", CPU)


def test_a_task_whose_code_fails_is_named(tiny: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "code.py").write_text("def right(doc, results):\n    return doc['none']\n")
    (tmp_path / "task.yaml").write_text(YAML + "process_results: !function code.right\n")
    with pytest.raises(TaskFailed, match="task letters in torch: KeyError: 'none'"):
        answer(tmp_path, load_tasks([str(tmp_path / "task.yaml")], limit=2), tiny / "base", "torch", CPU)


def test_an_item_without_its_metric_is_refused(tiny: Path, task: Path, tmp_path: Path) -> None:
    """Otherwise one model's answer to an item could be compared with the other's to the next item."""
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "code.py").write_text(
        "def right(doc, results):\n    return {'acc': 1.0} if '0' in doc['question'] else {}\n"
    )
    (tmp_path / "task.yaml").write_text(YAML + "process_results: !function code.right\n")
    tasks = load_tasks([str(tmp_path / "task.yaml")], limit=2)
    with pytest.raises(InputError, match=r"task letters: acc of item 1 is missing.*must give 1 or 0 for every item"):
        answer(tmp_path, tasks, tiny / "base", "torch", CPU)


def test_answers_to_finished_tasks_of_a_killed_process_are_used(
    tiny: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    names = ("first", "second")
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(YAML.replace(f"task: {NAME}", f"task: {name}"))
    tasks = load_tasks([str(tmp_path / f"{name}.yaml") for name in names], num_fewshot=2, limit=3)
    folders = [tmp_path / name for name in ("kept", "out", "undisturbed")]
    for folder in folders:
        folder.mkdir()
    kept, out, undisturbed = folders
    asked: list[str] = []
    ask = answers._asked

    def killed(tasks: Tasks, name: str, *given: Any) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(tasks, name, *given)

    monkeypatch.setattr(answers, "_asked", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(out, tasks, tiny / "base", "torch", CPU, kept)
    found = answer(out, tasks, tiny / "base", "torch", CPU, kept)
    assert asked == ["first", "second", "second"]
    assert found == answer(undisturbed, tasks, tiny / "base", "torch", CPU)
    for name in names:
        assert read_rows(out, name) == read_rows(undisturbed, name)


def test_only_finished_parts_of_a_failed_work_are_kept(tmp_path: Path) -> None:
    def fail_after(parts: list[str]) -> None:
        with kept_until_done(tmp_path, ["asked"], "tasks") as (folder, _):
            for part in parts:
                (folder / part).touch()
            raise TaskFailed("task letters")

    for parts in ([], ["one"]):
        with pytest.raises(TaskFailed):
            fail_after(parts)
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == ({*parts, "lock"} if parts else set())
    with kept_until_done(tmp_path, ["asked"], "tasks") as (folder, _):
        assert (folder / "one").exists()
        refused = pytest.raises(InputError, match="another process is running the same tasks; wait for it or stop it")
        with refused, kept_until_done(tmp_path, ["asked"], "tasks"):
            pass
    assert not list(tmp_path.iterdir())


def test_sampled_answers_are_the_same_every_time(tiny: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    sampled = "generate_until\ngeneration_kwargs: {until: [X], do_sample: true, temperature: 1.0, max_gen_toks: 8}"
    (tmp_path / "task.yaml").write_text(YAML.replace("multiple_choice", sampled).replace("acc,", "exact_match,"))
    tasks = load_tasks([str(tmp_path / "task.yaml")], limit=2)
    rows = []
    for _ in range(2):
        answer(tmp_path, tasks, tiny / "base", "torch", CPU)
        rows.append(read_rows(tmp_path, NAME))
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_unknown_and_missing_tasks_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    asked = ["evaluate.tasks=['arc_eazy', 'arc_easy']", "evaluate.task_runtime=vllm", "export.targets=['onnx']"]
    recipe = load(tiny / "recipe.toml", asked)
    with pytest.raises(InputError) as refused:
        check(recipe, tmp_path / "w")
    said = str(refused.value)
    assert "task arc_eazy: the harness has no such task; did you mean 'arc_easy'?" in said
    assert "task arc_easy: its dataset allenai/ai2_arc cannot be loaded (" in said
    assert "evaluate.task_runtime = 'vllm': serves the export 'vllm'; add it to export.targets" in said


@pytest.mark.parametrize(
    ("metric", "bound", "said"),
    [
        (f"tasks.{NAME}.acc.accuracy_delta", "ci95_lower", None),
        (f"tasks.{NAME}.acc.candidate", "point", None),
        (f"tasks.{NAME}.acc.candidate", "ci95_lower", 'only accuracy_delta has bounds; use it, or bound = "point"'),
        (f"tasks.{NAME}.acc.accuracy_delta.value", "point", "the report has no such figure"),
        (f"tasks.{NAME}.acc.runtime", "point", "the report has no such figure"),
        ("tasks.others.acc.accuracy_delta", "point", "'others' is not among evaluate.tasks, which are letters"),
        (f"tasks.{NAME}.acc_norm.accuracy_delta", "point", "with METRIC acc"),
        (f"tasks.{NAME}.accuracy_delta", "point", f"use tasks.{NAME}.METRIC.accuracy_delta"),
    ],
)
def test_gates_on_figures_that_no_task_has_are_refused(
    tiny: Path, task: Path, metric: str, bound: str, said: str | None, tmp_path: Path
) -> None:
    gate = f'gates=[{{metric = "{metric}", bound = "{bound}", min = 0}}]'
    recipe = load(tiny / "recipe.toml", [f"evaluate.tasks=['{task}']", gate])
    if said is None:
        check(recipe, tmp_path / "w")
        return
    with pytest.raises(InputError, match=said):
        check(recipe, tmp_path / "w")


def test_a_gate_without_tasks_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = load(tiny / "recipe.toml", [f'gates=[{{metric = "{DELTA}", bound = "point", min = 0}}]'])
    with pytest.raises(InputError, match=r"evaluate.tasks = \[\] answers none; add the task"):
        check(recipe, tmp_path / "w")


def test_task_files_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE + '[evaluate]\ntasks = ["arc_easy", "mine/task.yaml"]\n')
    assert load(tmp_path / "recipe.toml").evaluate.tasks == ["arc_easy", str(tmp_path / "mine" / "task.yaml")]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.num_fewshot=-1", r'evaluate.num_fewshot.*must be "task" or a number from 0 to 100'),
        ("evaluate.num_fewshot=true", r'must be "task" or a number'),
        ("evaluate.limit=0", r'evaluate.limit.*must be "all" or a number of items, at least 1'),
        ("evaluate.tasks=['a', 'a']", "must not contain duplicates"),
    ],
)
def test_values_are_checked(tiny: Path, override: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tiny / "recipe.toml", [override])


def test_a_key_without_a_server_is_refused(tiny: Path, task: Path, numprune: Callable[..., Answered]) -> None:
    found = numprune("tasks", tiny / "base", "--tasks", task, "--api-key-file", "key")
    assert found.code == 1
    assert "--api-key-file: has no effect without --url" in found.err


def test_a_command_that_fails_leaves_no_folder(
    tiny: Path, task: Path, numprune: Callable[..., Answered], tmp_path: Path
) -> None:
    (tmp_path / "items.jsonl").write_bytes((task.parent / "items.jsonl").read_bytes())
    (tmp_path / "code.py").write_text("def right(doc, results):\n    return doc['none']\n")
    (tmp_path / "task.yaml").write_text(YAML + "process_results: !function code.right\n")
    found = numprune("tasks", tiny / "base", "--tasks", tmp_path / "task.yaml", "--out", tmp_path / "out")
    assert found.code == 1
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_the_command_compares_two_checkpoints(
    tiny: Path, task: Path, numprune: Callable[..., Answered], tmp_path: Path
) -> None:
    swapped = swap_letters(tiny / "base", tmp_path / "swapped")
    asked = ("tasks", swapped, "--tasks", task, "--limit", "6")
    found = numprune(*asked, "--json").json
    assert found["tasks"][NAME]["accuracy"] == {"acc": 0.0}
    answered = numprune(*asked, "--num-fewshot", "1", "--baseline", tiny / "base", "--out", tmp_path / "out")
    assert "of 6 items" in answered.out
    assert answered.err == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"baseline", "candidate"}
    assert len(read_rows(tmp_path / "out" / "candidate", NAME)) == 6


@pytest.mark.slow
def test_a_run_answers_tasks_with_both_models_and_shares_the_bases_answers(tmp_path: Path) -> None:
    gate = f'[[gates]]\nmetric = "{DELTA}"\nbound = "ci95_lower"\nmin = -1.0\n'
    extra = f'{gate}[evaluate]\ntasks = ["task/task.yaml"]\nlimit = 10\n[export]\ntargets = ["vllm"]\n'
    write_inputs(tmp_path, build_tiny(), RECIPE.replace('"onnxruntime"', '"torch"') + extra)
    write_task(tmp_path / "task", tmp_path / "base", 20)
    found = finish(tmp_path / "recipe.toml", tmp_path / "w")
    release = Path(found["release"])
    report = reports.read(release / "report.json")
    accuracy = report.tasks[NAME]["acc"]
    assert (accuracy.items, accuracy.baseline, accuracy.runtime) == (10, 1.0, "torch")
    assert report.identity.tasks == load_tasks([str(tmp_path / "task" / "task.yaml")], limit=10).digest()
    folders = sorted((tmp_path / "w" / "stages").glob("tasks-*"))
    assert len(folders) == 2
    assert all(len(read_rows(folder, NAME)) == 10 for folder in folders)
    assert {"tasks baseline", "tasks candidate"} <= {one["name"] for one in found["stages"]}
    assert not list((tmp_path / "w").rglob(".training-*"))
    manifest.verify(release)


def test_a_server_that_does_not_answer_is_named() -> None:
    with answering({}) as url, pytest.raises(InputError, match=f"--url {url}: no server of OpenAI's API answers there"):
        find_endpoint(url, None)
