"""Whether a model can be pruned as a recipe asks."""

from dataclasses import replace
from pathlib import Path

from numprune.axes import HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.flows.names import ROOFLINE
from numprune.flows.recipe import Recipe
from numprune.flows.steps.benchmark import exported_as
from numprune.flows.steps.estimates import estimate
from numprune.flows.steps.export import precision_of
from numprune.flows.steps.learn import request_of
from numprune.flows.steps.prune import options_of
from numprune.flows.steps.timings import check_request, timing_request
from numprune.learning import check_learning
from numprune.option_checks import check_options
from numprune.options import PruneOptions, widths_timed
from numprune.scenario import parse_time
from numprune.search.refine import check_searchable
from numprune.shaping import check_comparable
from numprune.spans import check_reach
from numprune.time_budget import TimeBudget
from numprune.timings import ScenarioTimes


def pruning_options(recipe: Recipe, base: Path) -> PruneOptions:
    """The options that the model in `base` is pruned with. Raises InputError where its budget is not one of it.

    A budget of time has no times yet; masks, which cannot do without, get none.
    """
    options = options_of(recipe.prune, recipe.sizes(), base, recipe.quantize.scheme)
    masks, time = recipe.learn.method, recipe.prune.allowed.time
    if masks != "none":
        return replace(options, criterion=masks)
    if time is None:
        return options
    budget = TimeBudget.of(parse_time(time), {}, recipe.timings.runtime, recipe.served())
    return replace(options, time_budget=budget)


def check_pruning(recipe: Recipe, anatomy: Anatomy, base: Path) -> None:
    """Raises InputError if the request cannot be met, or masks cannot learn it."""
    options = pruning_options(recipe, base)
    times = _check_timings(recipe, anatomy, options, base)
    if recipe.learn.method == "none":
        if times and options.time_budget is not None:
            options = replace(options, time_budget=replace(options.time_budget, times=times).resolved(anatomy))
        check_options(anatomy, options)
        check_reach(options.window, recipe.data.sequence_length)
        if recipe.prune.refine != "none":
            check_searchable(recipe.data.samples, resident=not recipe.prune.stream)
        if options.shapes:
            check_comparable(recipe.data.samples, resident=not recipe.prune.stream)
    else:
        # What a budget of time allows is known once blocks are measured.
        timed = recipe.prune.allowed.time is not None
        constraint = "parameters" if timed else request_of(recipe.learn, options).constraint
        check_learning(anatomy, options, constraint, recipe.data.sequence_length)
    narrower = f"axes: with {HIDDEN_SIZE}" if HIDDEN_SIZE in recipe.prune.axes else "hidden_size: with a smaller one"
    if (HIDDEN_SIZE in recipe.prune.axes or recipe.prune.hidden_size) and recipe.recover.method == "distill":
        if recipe.recover.train == "blocks":
            raise InputError(
                f"{narrower}, blocks cannot be priced in the dense model; set recover.train to all or lora"
            )
        if recipe.recover.hidden_weight:
            raise InputError(
                f"{narrower}, hidden states cannot be compared with the dense model's; set recover.hidden_weight to 0"
            )


def _check_timings(recipe: Recipe, anatomy: Anatomy, options: PruneOptions, base: Path) -> dict[int, ScenarioTimes]:
    """Return the estimated times of every hidden size that the result may have; none if they are to be measured.

    Raises InputError if the blocks cannot be timed.
    """
    times = dict[int, ScenarioTimes]()
    if recipe.prune.allowed.time is None:
        return times
    target, asked, served = recipe.sizes(), recipe.timings, recipe.served()
    scenario = parse_time(recipe.prune.allowed.time).scenario
    for width in widths_timed(anatomy, options):
        if asked.runtime == ROOFLINE:
            table = estimate(base, [scenario], target, asked.sizes, asked.peaks(), served, width)
            times[table.key.shape.hidden_size] = table.times(str(scenario))
        else:
            check_request(base, timing_request(asked, str(scenario), target, served, width))
    if asked.runtime != ROOFLINE:
        _check_timed_is_exported(recipe, base)
    return times


def _check_timed_is_exported(recipe: Recipe, base: Path) -> None:
    """Raises InputError if the latencies would be those of an export that the release does not have."""
    runtime = recipe.timings.runtime
    timed = exported_as(runtime, [base], precision_of(base, runtime, recipe.export.dtype))
    if timed and timed not in recipe.export.targets:
        raise InputError(
            f"timings.runtime = {runtime!r}: this model is timed as the export {timed!r}, and export.targets are "
            f"{', '.join(recipe.export.targets) or 'empty'}; add {timed!r} to them, or choose torch"
        )
