"""Check that a plan, perhaps edited by hand, fits a model."""

from collections.abc import Iterator

from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.hidden import narrowed
from numprune.option_checks import check_options
from numprune.options import options_of
from numprune.plans import Plan
from numprune.quantization.allocation import Form, levels_of, model_bytes
from numprune.slices import Size
from numprune.spans import full_layers, with_windows
from numprune.target import allowed_sizes

_SHOWN = 12  # problems shown


def check_plan(anatomy: Anatomy, plan: Plan) -> None:
    """Refuse a plan that cannot be followed on this model.

    Raises:
        InputError: every problem with its block: sizes of another model, or sizes or schemes that the plan's own
            target, limits or budget do not allow.
    """
    problems = [*_other_model(anatomy, plan)]
    if not problems:
        check_options(anatomy, options_of(plan), planned=True)
        anatomy = anatomy if plan.window is None else with_windows(anatomy, plan.window, plan.windowed_layers())
        problems = [*_sizes(anatomy, plan), *_schemes(plan)] or [
            *_bytes(anatomy, plan),
            *_time(anatomy, plan),
            *_cache(anatomy, plan),
        ]
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise InputError(f"the plan does not fit the model: {'; '.join(shown)}")


def _other_model(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    if plan.family != anatomy.family:
        yield f"it is for {plan.family}, the model is {anatomy.family}"
    blocks = {block.name: block for block in anatomy.blocks}
    for name in plan.blocks.keys() - blocks.keys():
        yield f"{name}: the model has no such block"
    for name, block in blocks.items():
        planned = plan.blocks.get(name)
        if planned is None:
            yield f"{name}: the plan does not cover it"
        elif (planned.units, planned.members) != (block.units, block.members):
            had = Size(planned.units, planned.members)
            yield f"{name}: the plan is for {_told(had)}, the model has {_told(block.size)}"
    dropped = plan.dropped_layers()
    if len(set(dropped)) != plan.drop_layers:
        yield f"drop_layers is {plan.drop_layers}, and {len(set(dropped))} layers are dropped"
    alone = plan.names_of_dropped_blocks()
    if len(set(alone)) != plan.drop_blocks:
        yield f"drop_blocks is {plan.drop_blocks}, and {len(set(alone))} blocks are dropped"
    for name in set(alone) - blocks.keys():
        yield f"{name} is dropped, and the model has no such block"
    if plan.hidden and plan.hidden.size != anatomy.hidden_size:
        yield f"it is for hidden size {plan.hidden.size}, the model has {anatomy.hidden_size}"
    yield from _other_windows(anatomy, plan)
    for layer in dropped:
        if layer >= anatomy.layers:
            yield f"layer {layer} is dropped, and the model has {anatomy.layers}"


def _other_windows(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    found, full = plan.windowed_layers(), full_layers(anatomy)
    if plan.window is None:
        if found:
            yield f"layers {', '.join(map(str, found))} get a window, and window is missing"
        return
    if not found or len(set(found)) != len(found):
        yield "windowed must be layers that get a window, each of them once"
    if plan.window_layers and len(set(found)) != plan.window_layers:
        yield f"window_layers is {plan.window_layers}, and {len(set(found))} layers get a window"
    for layer in sorted({*found} - {*full}):
        yield f"layer {layer} gets a window, and the model has no such layer that sees the whole context"


def _sizes(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    sizes, gone, limits = plan.sizes(), plan.dropped_layers(), options_of(plan).limits
    alone = plan.names_of_dropped_blocks()
    after = plan.result(anatomy)
    for kind in anatomy.kinds:
        if not any(block.units for block in after.of_kind(kind)):
            yield f"no {kind} block keeps a unit; keep at least one"
    if plan.allocation == "uniform" and not after.is_uniform:
        yield 'allocation is "uniform", but layers keep different sizes; change it to "error"'
    of_width = anatomy.narrowed(after.hidden_size)
    allowed = allowed_sizes(of_width, plan.target, limits, stock=plan.allocation == "uniform")
    for block in anatomy.blocks:
        size, options = sizes[block.name], allowed[block.name]
        if block.layer not in gone and block.name not in alone and size not in options:
            distance = [(abs(option.units - size.units), abs(option.members - size.members)) for option in options]
            nearest = sorted(option for _, option in sorted(zip(distance, options, strict=True))[:2])
            yield (
                f"{block.name} keeps {_told(size)}, which the plan's target or limits do not allow; the nearest "
                f"allowed: {', '.join(map(_told, nearest))}"
            )


def _schemes(plan: Plan) -> Iterator[str]:
    levels = plan.budget.levels if plan.budget else (None,)
    names = ", ".join(level or "none" for level in levels)
    for name, block in plan.blocks.items():
        if block.scheme and not plan.budget:
            yield f"{name} has scheme {block.scheme}, and the plan has no budget; remove the scheme"
        elif block.scheme and not block.kept:
            yield f"{name} has scheme {block.scheme}, and keeps no unit; remove the scheme"
        elif block.kept and block.scheme not in levels:
            yield f"{name} has scheme {block.scheme or 'none'}, which is not among the budget's levels: {names}"


def _bytes(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    if plan.budget is None:
        return
    levels = {level and level.name: level for level in levels_of(plan.budget, plan.target)}
    forms = {name: Form(size, levels.get(plan.blocks[name].scheme)) for name, size in plan.sizes().items()}
    narrow = narrowed(anatomy, len(plan.hidden.kept), plan.hidden.basis) if plan.hidden else anatomy
    total = model_bytes(narrow, forms, plan.budget.resized(anatomy.fixed_parameters, narrow.fixed_parameters))
    if total > plan.budget.limit:
        yield (
            f"its sizes and schemes take {total:,} bytes, and its budget is {plan.budget.limit:,}; keep less, or "
            "remove the budget and the schemes"
        )


def _time(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    if plan.time_budget is None:
        return
    predicted = plan.time_budget.predicted(plan.result(anatomy)).ms
    if predicted > plan.time_budget.limit_ms:
        yield (
            f"its sizes take {predicted:.4g} ms, and its budget is {plan.time_budget}; keep less, or remove the time "
            "budget"
        )


def _cache(anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    if plan.sequence_budget is not None:
        at = plan.sequence_budget.cost(anatomy)
        if at > plan.sequence_budget.limit:
            yield f"its windows leave {at:,}, and its budget is {plan.sequence_budget}; give more layers a window"
    if (cache := plan.kv_budget) is None:
        return
    found = sum(cache.cost(anatomy, block, block.size) for block in anatomy.keeping(plan.sizes()).blocks)
    if found > cache.limit:
        yield f"its sizes take {found:,}, and its budget is {cache}; keep less, or remove the KV budget"


def _told(size: Size) -> str:
    return f"{size.units} units" + (f" of {size.members}" if size.members > 1 else "")
