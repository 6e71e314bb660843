"""Prunes a checkpoint to a budget of time: by measured latencies of blocks, confirmed on the whole model."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from numprune.anatomy import read_anatomy
from numprune.errors import EnvironmentInvalid, InputError
from numprune.export import checkpoint, temporary
from numprune.flows.names import ROOFLINE
from numprune.flows.sections import Prune
from numprune.flows.steps.estimates import estimate_key
from numprune.flows.steps.prune import options_of, prune_checkpoint, with_one_shape
from numprune.flows.steps.results import TimedCheckpoint
from numprune.flows.steps.served import as_served, opened_by
from numprune.flows.steps.timings import key_of, runtime_of, timed_in
from numprune.hidden import Width
from numprune.option_checks import check_options
from numprune.options import PruneOptions, widths_of
from numprune.plans import PLAN_FILE, Draw, Plan, read_plan
from numprune.scenario import parse_scenario, parse_time
from numprune.served import Served
from numprune.serving.benchmark import run_benchmark
from numprune.serving.benchmark.visits import QUIET, Runtime, Timed, in_turn, weighted_medians
from numprune.serving.report import LatencyBudget, Milliseconds
from numprune.target import Target
from numprune.time_budget import TimeBudget
from numprune.timings import Key, Time, TimingTable, anatomy_at, check_key, shape_of

logger = logging.getLogger(__name__)

_CORRECTIONS = 3
_VISITS = 6  # of each side, in vLLM
_METRICS = {
    "decode": "itl",
    "prefill": "ttft",
    "request": "e2e",
    "forward": "latency",
}  # of the benchmark, by what is timed


def time_budget(
    base: Path, asked: str, tables: Sequence[TimingTable], options: PruneOptions, served: Served
) -> TimeBudget:
    """Return the budget for the pruned model of `base`.

    Args:
        asked: as in `parse_time`.
        tables: of the model's blocks, one for each hidden size that the result may have; that of its own may be given
            beside others.
        options: of the pruning, without the budget.
        served: how the result will be.

    Raises:
        InputError: a table is missing, or of another machine, runtime or model, or lacks the scenario or a size of the
            model.
    """
    limit = parse_time(asked)
    scenario = limit.scenario
    anatomy, first = read_anatomy(checkpoint.read_config(base)), tables[0].key
    here = estimate_key(base, first.device, served) if tables[0].estimate else key_of(base, first.runtime, served)
    left = _by_hidden_size(tables)
    widths = widths_of(anatomy, options)
    if None not in widths and anatomy.hidden_size in left:
        widths.append(None)  # for the prediction of the dense model
    if limit.speedup is not None and None not in widths:
        raise InputError(
            f"budget is {asked!r}: a speedup is over the model itself, and no table is of its hidden size "
            f"{anatomy.hidden_size}; give that table, too"
        )
    results, times = [anatomy_at(anatomy, width, options.target) for width in widths], {}
    for width, result in zip(widths, results, strict=True):
        table = left.pop(result.hidden_size, None)
        if table is None:
            raise InputError(
                f"timings: no table is of hidden size {result.hidden_size}; make it with "
                f"{_command(base, first, str(scenario), served, options.target, width)}"
            )
        check_key(table, here.model_copy(update={"shape": shape_of(result)}))
        times[result.hidden_size] = table.times(str(scenario))
    if left:
        raise InputError(
            f"timings: the hidden size of the result cannot be {', '.join(map(str, left))}; leave these tables out"
        )
    budget = TimeBudget.of(limit, times, first.runtime, served)
    for result in results:
        budget.check_measured(result)
    return budget.resolved(anatomy)


def _by_hidden_size(tables: Sequence[TimingTable]) -> dict[int, TimingTable]:
    """Return the tables by hidden size. Raises InputError if there are two of one."""
    found: dict[int, TimingTable] = {}
    for table in tables:
        size = table.key.shape.hidden_size
        if found.setdefault(size, table) is not table:
            raise InputError(f"timings: two tables are of hidden size {size}; leave one of them out")
    return found


def _command(base: Path, key: Key, scenario: str, served: Served, target: Target, width: Width | None) -> str:
    """Return the command that makes a table beside one with this key."""
    where = "--roofline DEVICE" if key.runtime == ROOFLINE else f"--runtime {key.runtime}"
    options = [f"--hidden-size {width.hidden_size} --basis {width.basis}"] if width else []
    options += [f"--align {target.align}"] if target.align != Target.align else []
    if served.scheme is not None:
        group = f" --group-size {served.scheme.group_size}" if served.scheme.group_size else ""
        head = f" --lm-head-bits {served.lm_head_bits}" if served.lm_head_bits != 8 else ""
        options.append(f"--scheme {served.scheme.name}{group}{head}")
    if served.dtype != "auto":
        options.append(f"--dtype {served.dtype}")
    if served.tensor_parallel > 1:
        options.append(f"--tensor-parallel {served.tensor_parallel}")
    return " ".join(["numprune timings", str(base), where, f"--scenario {scenario}", *options, "--out TABLE"])


def options_within_time(
    asked: Prune, target: Target, base: Path, tables: Sequence[TimingTable], served: Served
) -> PruneOptions:
    """Return the options of a recipe with a budget of time. Raises InputError as `time_budget`."""
    assert asked.allowed.time is not None
    options = options_of(asked, target, base, served.scheme.name if served.scheme else "none")
    return replace(options, time_budget=time_budget(base, asked.allowed.time, tables, options, served))


def prune_within_time(
    base: Path,
    rows: Tensor,
    options: PruneOptions,
    out: Path,
    device: torch.device,
    *,
    draw: Draw,
    stream: bool,
    plan: Plan | None = None,
    origin: Path | None = None,
) -> TimedCheckpoint:
    """Write the pruned `base` to the new folder `out` once its measured latency is within the budget.

    If the budget is of a quantized model, both sides are quantized to be measured; what is written is not.
    A result that is slower, by more than its interval, corrects the table by measured / predicted; it is then pruned
    again, at most three times, to the shape that was chosen first. A speedup is over the dense model as it is measured.
    A plan is only measured, because nothing else would be as it says. With an estimated table nothing is measured:
    there is no target.

    `plan`, `origin`: as for `prune_checkpoint`.

    Raises:
        InputError: as `prune_checkpoint`, or the budget is not met after that; `out` is then not written.
        EnvironmentInvalid: the machine is in no state to measure.
    """
    assert options.time_budget is not None
    budget, shape = options.time_budget, None
    if plan is None:
        options, shape = with_one_shape(base, rows, options, device, stream=stream)
    with temporary.beside(out) as scratch:
        folder = scratch / "pruned"
        for corrections in range(_CORRECTIONS + 1):
            made = prune_checkpoint(
                base, rows, options, folder, device, draw=draw, stream=stream, plan=plan, shape=shape, origin=origin
            )
            with tempfile.TemporaryDirectory(dir=scratch) as exports:
                found, too_slow = _latencies(base, folder, corrections, Path(exports))
            if found.measured is None or not too_slow:
                temporary.move(folder, out)
                return TimedCheckpoint(**vars(made), latency=found)
            said = f"{found.measured.ms:.4g} ms were measured where {found.predicted.ms:.4g} ms were predicted"
            if plan is not None:
                raise InputError(f"the budget is {_limit(options.time_budget, found)}, and {said}: {_remedy(found)}")
            logger.warning("%s; the table is corrected by that", said)
            shutil.rmtree(folder)
            budget = budget.corrected(found.measured.ms / found.predicted.ms).within(found.limit_ms)
            options = replace(options, time_budget=budget)
            _check_still_possible(base, options, said)
        assert found.measured is not None
        low, high = found.measured.interval95
        raise InputError(
            f"the budget is {_limit(options.time_budget, found)}, and after {_CORRECTIONS} corrections of the table "
            f"the pruned model still takes {found.measured.ms:.4g} ms (95 % interval {low:.4g} to {high:.4g}); measure "
            "the table again, or allow more time"
        )


def _limit(budget: TimeBudget | None, found: LatencyBudget) -> str:
    """The budget, and what a speedup comes to."""
    return f"{budget}" + ("" if found.speedup is None else f", so at most {found.limit_ms:.4g} ms")


def _remedy(found: LatencyBudget) -> str:
    """What helps if a plan takes longer than predicted."""
    assert found.measured is not None
    allowed = found.limit_ms * found.predicted.ms / found.measured.ms
    return f"measure the table again, or learn masks for a budget of about {allowed:.3g}ms@{found.scenario}"


def _check_still_possible(base: Path, options: PruneOptions, said: str) -> None:
    try:
        check_options(read_anatomy(checkpoint.read_config(base)), options)
    except InputError as error:
        raise InputError(f"{said}: {error}") from None


def _latencies(base: Path, pruned: Path, corrections: int, scratch: Path) -> tuple[LatencyBudget, bool]:
    """Measure both models in turn, unless latencies are estimated; `scratch`: a folder for their exports.

    Returns the latencies, and whether the pruned model is too slow, beyond the 95 % interval of what it exceeds.
    """
    budget = read_plan(pruned / PLAN_FILE).time_budget
    assert budget is not None
    dense, after = (read_anatomy(checkpoint.read_config(folder)) for folder in (base, pruned))
    measured: dict[str, Milliseconds] = {}
    limit_ms, too_slow = budget.limit_ms, False
    if budget.estimated_for is None:
        timed = timed_in(parse_scenario(budget.scenario), dense)
        sides = {
            side: as_served(folder, scratch / f"{side}-quantized", budget.served)
            for side, folder in (("baseline", base), ("candidate", pruned))
        }
        ms = _measured(runtime_of(base, budget.runtime, budget.served), sides, timed, scratch)
        measured = {side: _median(values) for side, values in ms.items()}
        if budget.speedup is None:
            too_slow = measured["candidate"].interval95[0] > limit_ms
        else:
            limit_ms = measured["baseline"].ms / budget.speedup
            _, (low, _) = weighted_medians([ms["candidate"], ms["baseline"]], [1.0, -1 / budget.speedup])
            too_slow = low > 0
    latencies = LatencyBudget(
        scenario=budget.scenario,
        runtime=budget.runtime,
        served=str(budget.served),
        limit_ms=limit_ms,
        speedup=budget.speedup,
        dense_predicted=_reported(budget.predicted(dense)) if dense.hidden_size in budget.times else None,
        dense_measured=measured.get("baseline"),
        predicted=_reported(budget.predicted(after)),
        measured=measured.get("candidate"),
        corrections=corrections,
        estimated_for=budget.estimated_for,
    )
    return latencies, too_slow


def _measured(runtime: Runtime, sides: Mapping[str, Path], timed: Timed, scratch: Path) -> dict[str, list[float]]:
    """Return the milliseconds of each side in every visit, or repeat of a benchmark, that both sides completed."""
    if runtime.vllm:
        return in_turn(runtime, sides, timed, _VISITS)
    return _benchmarked(runtime, sides, timed, scratch)


def _benchmarked(runtime: Runtime, sides: Mapping[str, Path], timed: Timed, scratch: Path) -> dict[str, list[float]]:
    """Return the milliseconds of each side in every repeat of a benchmark; `scratch`: a folder for their exports."""
    folders = opened_by(runtime, sides, scratch, [timed])
    found = run_benchmark(
        folders["candidate"],
        folders["baseline"],
        runtime.name,
        timed.load(),
        dtype=runtime.dtype,
        torch_mode="eager",
    )
    if not found["environment"]["valid"]:
        raise EnvironmentInvalid(f"{'; '.join(found['environment']['reasons'])}; {QUIET}")
    metric = _METRICS[timed.phase]
    by_repeat = {side: found["speed"][side]["by_repeat"][metric] for side in sides}
    both = [values for values in zip(*by_repeat.values(), strict=True) if None not in values]
    if not both:
        failed = [side for side, values in by_repeat.items() if None in values]
        raise InputError(
            f"the {' and the '.join(failed)}: requests fail in every repeat, with logits that are not finite"
        )
    return {side: [values[index] for values in both] for index, side in enumerate(by_repeat)}


def _reported(time: Time) -> Milliseconds:
    return Milliseconds(ms=time.ms, interval95=time.interval95)


def _median(values: list[float]) -> Milliseconds:
    ms, interval = weighted_medians([values], [1.0])
    return Milliseconds(ms=ms, interval95=interval)
