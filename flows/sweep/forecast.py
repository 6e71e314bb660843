"""Forecast of a sweep: which stages its candidates share, and how long the missing ones took in earlier runs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numprune.counted import counted
from numprune.flows import forecast
from numprune.flows.sweep.grid import Candidate
from numprune.flows.sweep.run import prepare_all


def plan(candidates: Sequence[Candidate], workspace: Path) -> dict[str, Any]:
    """Return what is known about a sweep before it starts, as plain JSON. Nothing is written.

    Raises InputError with the problems of all candidates.
    """
    runs = prepare_all(candidates, workspace)
    needed = [forecast.planned(run) for run in runs]
    users = Counter(stage.inputs for stages in needed for stage in {stage.inputs: stage for stage in stages}.values())
    distinct = {stage.inputs: stage for stages in needed for stage in stages}
    missing = [stage for stage in distinct.values() if not stage.reused]
    took = forecast.former(workspace)
    seconds = [took[stage.name]["last_seconds"] for stage in missing if stage.name in took]
    return {
        "stages": sum(map(len, needed)),
        "distinct": len(distinct),
        "reused": len(distinct) - len(missing),
        "missing": len(missing),
        "shared_by_all": [stage.name for stage in distinct.values() if users[stage.inputs] == len(candidates)],
        "seconds": round(sum(seconds), 1),
        "never_timed": sorted({stage.name for stage in missing if stage.name not in took}),
        "candidates": [
            {
                "number": candidate.number,
                "label": candidate.label,
                "settings": candidate.settings,
                "stages": [
                    {"name": stage.name, "reused": stage.reused, "candidates": users[stage.inputs]} for stage in stages
                ],
            }
            for candidate, stages in zip(candidates, needed, strict=True)
        ],
    }


def text(found: Mapping[str, Any]) -> str:
    """The forecast for a terminal."""
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    candidates = found["candidates"]
    yield (
        f"{counted(len(candidates), 'candidate')}: {counted(found['stages'], 'stage')}, of which {found['distinct']:,} "
        f"are different; {found['reused']:,} would be reused, {found['missing']:,} are to be computed"
    )
    yield f"  shared by all: {', '.join(found['shared_by_all']) or 'none'}"
    for candidate in candidates:
        stages = candidate["stages"]
        own = [stage["name"] for stage in stages if stage["candidates"] == 1]
        some = [stage["name"] for stage in stages if 1 < stage["candidates"] < len(candidates)]
        yield f"  {candidate['number']:>2}  {candidate['label']}: {counted(len(own), 'stage')} of its own" + (
            f"; shared with some: {', '.join(some)}" if some else ""
        )
    untimed = found["never_timed"]
    if not found["missing"]:
        yield "nothing is to be computed"
    elif found["seconds"]:
        beside = f", and {', '.join(untimed)}, never computed in this workspace" if untimed else ""
        yield f"estimated time, one candidate at a time: {found['seconds']:,.0f} s, as earlier runs here took{beside}"
    else:
        yield "estimated time: unknown, because no run in this workspace has computed these stages"
