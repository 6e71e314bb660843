"""Gates that can only fail, because the report will not have the figure."""

from collections.abc import Collection, Iterator, Sequence

from numprune.flows.recipe import Recipe
from numprune.flows.steps.harness import Tasks
from numprune.serving.metrics import other_task
from numprune.serving.problems import did_you_mean, models_in
from numprune.serving.report import ONCE, Report, TaskAccuracy, path_of
from numprune.tasks import TaskName

# Figures of a classifier's quality that need labels.
_OF_LABELS = {
    *("accuracy_delta", "accuracy", "top5_accuracy", "right_to_wrong", "wrong_to_right"),
    *("nll_nats_per_text", "nll_nats_per_image"),
}


def metrics(recipe: Recipe, task: TaskName | None, tasks: Tasks | None, unlabelled: Collection[str] = ()) -> list[str]:
    """Gates that can only fail, because the report will not have the figure.

    `tasks`: None if there are none, or if they could not be loaded. `unlabelled`: fields of held-out text or images
    without labels.
    """
    problems = []
    for index, gate in enumerate(recipe.gates):
        section, name, *rest = path_of(gate.metric).split(".")
        where = f"gates.{index}.metric = {gate.metric!r}"
        of_corpus, corpus = (section, name) == ("quality", "corpora"), next(iter(recipe.data.corpora))
        if of_corpus:
            if unknown := _corpus(recipe, rest):
                problems.append(f"{where}: {unknown}")
                continue
            corpus, name, *rest = [*rest, ""]
        if task and (why := other_task(".".join([section, name, *rest]), task)):
            problems.append(f"{where}: {why}")
            continue
        judged = f"data.heldout.{corpus}".rstrip(".")
        if section == "quality" and judged in unlabelled and not {name, *rest[:1]}.isdisjoint(_OF_LABELS):
            problems.append(f"{where}: {judged} has no labels; label it, or use quality.loss_delta")
            continue
        if section == "tasks":
            problems += [f"{where}: {problem}" for problem in _task_metric(recipe, gate.bound, name, rest, tasks)]
            continue
        field = Report.model_fields.get(section)
        if field is None:
            problems.append(
                f"{where}: the report has no section {section!r}{did_you_mean(section, list(Report.model_fields))}"
            )
            continue
        if section in ("speed", "memory"):
            if name not in recipe.benchmark.runtimes:
                runtimes = ", ".join(recipe.benchmark.runtimes)
                problems.append(f"{where}: {name!r} is not benchmarked; benchmark.runtimes are {runtimes}")
            name = rest[0] if rest else ""
        known = [key for model in models_in(field.annotation) for key in model.model_fields]
        known = [key for key in known if not (of_corpus and key in ONCE)]
        if known and name not in known:
            problems.append(f"{where}: the report has no such figure{did_you_mean(name, known)}")
        if recipe.quantize.scheme == "none" and "quantization" in (section, name.partition("_")[0]):
            problems.append(f"{where}: quantize.scheme = 'none' has no such figure; choose a scheme or drop the gate")
        kind = "recovery" if (section, name) == ("quality", "pruned") else name.partition("_")[0]
        for training, figures in (("learn", "learning"), ("recover", "recovery")):
            if getattr(recipe, training).method == "none" and figures in (section, kind):
                problems.append(
                    f"{where}: {training}.method = 'none' has no such figure; choose a method or drop the gate"
                )
        if (section, name) == ("quality", "generation") and not recipe.evaluate.prompts:
            problems.append(f"{where}: evaluate.prompts = [] generates nothing; add prompts")
    return problems


def _task_metric(recipe: Recipe, bound: str, name: str, rest: Sequence[str], tasks: Tasks | None) -> Iterator[str]:
    """Why the report's section `tasks` will not have the figure or its bound; nothing if it will."""
    if not recipe.evaluate.tasks:
        yield "evaluate.tasks = [] answers none; add the task"
    elif tasks is None:  # said already
        return
    elif name not in tasks.members:
        yield f"{name!r} is not among evaluate.tasks, which are {', '.join(tasks.members)}"
    elif (
        len(rest) != 2
        or rest[0] not in tasks.metrics(name)
        or rest[1] not in {*TaskAccuracy.model_fields} - {"runtime"}
    ):
        metrics = " or ".join(tasks.metrics(name))
        yield f"the report has no such figure; use tasks.{name}.METRIC.accuracy_delta with METRIC {metrics}"
    elif rest[1] != "accuracy_delta" and bound != "point":
        yield 'only accuracy_delta has bounds; use it, or bound = "point"'


def _corpus(recipe: Recipe, path: Sequence[str]) -> str:
    """Why the report has no such corpus; empty if it has. `path`: the corpus's name and the figure."""
    first, *others = recipe.data.corpora
    asked, figure = path[0] if path else "", ".".join(path[1:])
    if not first:
        return "data.heldout is one text without a name; name several, or use quality.loss_delta"
    if asked == first:
        return f"{first!r} is the first corpus, which quality itself is of; use quality.{figure}"
    if asked in others:
        return ""
    return f"data.heldout has no such corpus; beside the first, {first!r}, there are: {', '.join(others) or 'none'}"
