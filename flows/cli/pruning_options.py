"""Options of pruning that several commands have: sizes that the result may have, and budgets."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numprune.errors import InputError
from numprune.flows import names
from numprune.flows.cli.parser import at_least
from numprune.refinement import MINUTES

if TYPE_CHECKING:
    from numprune.options import PruneOptions

# Defaults of `prune` without an option or a plan.
DEFAULTS: dict[str, Any] = {
    "criterion": "obs",
    "allocation": "uniform",
    "compensation": "joint",
    "align": 8,
    "tensor_parallel": 1,
    "quantization_group": 1,
    "axes": names.DEFAULT_AXES,
    "keep": [],
    "floor": [],
    "skips": False,
    "drop_layers": [],
    "drop_blocks": 0,
    "window": None,
    "window_layers": 0,
    "refine": "none",
    "refine_minutes": MINUTES,
    "hidden_size": [],
    "basis": "fisher",
    "seed": 0,
}


def add_limits(parser: argparse.ArgumentParser, axes: Sequence[str], default: Sequence[str]) -> None:
    """Add the options that say which sizes the result may have. Those that are not given are None."""
    for name, help_text in (
        ("align", "intermediate sizes are multiples of N channels"),
        ("tensor_parallel", "GPUs that will share each layer"),
        ("quantization_group", "channels that will share a quantization scale"),
    ):
        add_number(parser, name, 1, help_text)
    parser.add_argument(
        "--axes",
        nargs="+",
        action="extend",
        choices=axes,
        metavar="AXIS",
        help=f"what may be pruned: {', '.join(axes)}; may be repeated (default: {' '.join(default)})",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="what to protect: layers (layers.0, layers.-1), blocks (layers.0.mlp) or all blocks of a kind (mlp); "
        "may be repeated (default: nothing)",
    )
    parser.add_argument(
        "--floor",
        type=_floor,
        action="append",
        metavar="KIND=SHARE",
        help="minimum share that each block of a kind keeps, like attention=0.5; may be repeated, for each kind "
        "(default: none)",
    )
    parser.add_argument(
        "--skips",
        action="store_const",
        const=True,
        help="with --allocation error or global: allow removing whole blocks (default: each keeps a unit)",
    )


def add_number(parser: argparse.ArgumentParser, name: str, least: int, help_text: str) -> None:
    """Add an integer option of pruning."""
    option = f"--{name.replace('_', '-')}"
    parser.add_argument(option, type=at_least(least), metavar="N", help=f"{help_text} (default: {DEFAULTS[name]})")


def _floor(text: str) -> tuple[str, float]:
    kind, sign, share = text.partition("=")
    try:
        if sign:
            return kind, float(share)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be KIND=SHARE, like attention=0.5")


def options_within_budget(given: Mapping[str, Any], base: Path) -> "PruneOptions":
    """Return the options for the model in `base`, as `options_of_arguments`, within the --budget if there is one.

    `given`: also --budget, --scheme, --lm-head-bits, --dtype and --timings. Raises InputError.
    """
    from numprune.budget_texts import parse_budgets
    from numprune.flows.steps.prune import byte_budget, kv_budget, sequence_budget
    from numprune.flows.steps.timed_prune import time_budget
    from numprune.served import served_as
    from numprune.timings import read_timings

    rest = dict(given)
    budgets, scheme, bits, dtype, tables = (
        rest.pop(name, None) for name in ("budget", "scheme", "lm_head_bits", "dtype", "timings")
    )
    asked = parse_budgets(budgets or [])
    if (asked.time is not None) != (tables is not None):
        raise InputError(
            f"--budget {asked.time}: a time needs --timings TABLE; make the table with numprune timings"
            if asked.time
            else "--timings is for a --budget of time, like 20ms@decode,b=8,ctx=2048; leave it out"
        )
    if scheme and asked.bytes is None and asked.time is None:
        raise InputError(
            "--scheme is counted in a --budget of bytes or time; leave it out, and give it to numprune quantize"
        )
    for option, value in (("--lm-head-bits", bits), ("--dtype", dtype)):
        if value is not None and tables is None:
            raise InputError(f"{option} {value} has an effect only with --timings; leave it out")
    if asked.bytes is not None and dtype not in (None, "auto"):
        raise InputError(f"--dtype {dtype}: a --budget of bytes counts the weights as they are stored; leave it out")
    if not budgets:
        return options_of_arguments(rest)
    divided = {} if asked.sizes_by_ratio else {"allocation": "error"}
    chosen, scheme = options_of_arguments({"ratio": 0.0, **divided, **rest}), scheme or "none"
    timed = None
    if asked.time is not None and tables is not None:
        served = served_as(scheme, chosen.target, bits or 8, dtype or "auto")
        timed = time_budget(base, asked.time, [read_timings(table) for table in tables], chosen, served)
    return dataclasses.replace(
        chosen,
        budget=None if asked.bytes is None else byte_budget(base, asked.bytes, scheme),
        time_budget=timed,
        kv_budget=None if asked.kv is None else kv_budget(base, asked.kv),
        sequence_budget=None if asked.sequence is None else sequence_budget(base, asked.sequence),
    )


def options_of_arguments(given: Mapping[str, Any]) -> "PruneOptions":
    """Return the options of pruning that were given by the names of their arguments, the others by default."""
    from numprune.options import PruneOptions
    from numprune.shape import shape_fields
    from numprune.target import Target

    chosen = DEFAULTS | dict(given)
    target = Target(**{name: chosen.pop(name) for name in ("align", "tensor_parallel", "quantization_group")})
    floors = dict(chosen.pop("floor"))
    shape = shape_fields(chosen.pop("hidden_size"), chosen.pop("drop_layers"))
    return PruneOptions(**chosen, **shape, target=target, floors=floors)
