"""The methods that can be compared, and their names.

A method of ours is criterion/allocation/compensation; an allocation that may take whole blocks is called
`allocation+skips`. A method that is no such triple has a plain name.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import product

from numprune.allocation import ALLOCATIONS
from numprune.blocks import Anatomy
from numprune.criteria import CRITERIA
from numprune.errors import InputError
from numprune.flows.studies.rivals import RIVALS
from numprune.flows.studies.rivals import check as check_rival
from numprune.options import COMPENSATIONS, PruneOptions, check_options, uses_gradients
from numprune.serving.problems import did_you_mean
from numprune.target import Target

_SKIPS = "+skips"
_ALLOCATIONS = (*ALLOCATIONS, *(f"{name}{_SKIPS}" for name in ALLOCATIONS if name != "uniform"))
METHODS = (*("/".join(parts) for parts in product(CRITERIA, _ALLOCATIONS, COMPENSATIONS)), *RIVALS)

# Published rivals as they were published, then what is least squares on top of them, and ours.
DEFAULT = (
    "random/uniform/none",
    "magnitude/uniform/none",
    "wanda/uniform/none",
    "flap/global/bias",
    "taylor/uniform/none",
    "shortgpt",
    "slicegpt",
    "numerical-newton/global/none",
    "obs/uniform/oneshot",
    "numerical/uniform/joint",
    "obs/uniform/joint",
    "obs/error/joint",
)


def options_of(method: str, ratio: float, target: Target, seed: int) -> PruneOptions:
    """The options of a criterion/allocation/compensation."""
    criterion, allocation, compensation = method.split("/")
    skips = allocation.endswith(_SKIPS)
    return PruneOptions(
        ratio, criterion, allocation.removesuffix(_SKIPS), compensation, target=target, skips=skips, seed=seed
    )


def reads_dense_moments(method: str) -> bool:
    """Whether the method uses the dense model's moments: for its scores, its error curves or its compensation."""
    return method not in RIVALS


def reads_gradients(method: str) -> bool:
    """Whether the method uses the gradients of the loss."""
    return method not in RIVALS and uses_gradients(options_of(method, 0, Target(), 0))


def check(method: str, anatomy: Anatomy, ratio: float, target: Target) -> None:
    """Raises InputError where the method cannot work on the model."""
    if method in RIVALS:
        check_rival(method, anatomy, ratio)
    else:
        check_options(anatomy, options_of(method, ratio, target, seed=0))


def chosen(patterns: Sequence[str], check: Callable[[str], None], *, asked: bool = True) -> tuple[list[str], list[str]]:
    """Return the methods that `patterns` name, in their order, and for each that was left out a line that says why.

    Args:
        patterns: names, or with wildcards as in file names: `obs/*/sequential`.
        check: raises InputError for a method that cannot work here; one that was named in full is then refused, one
            that only a wildcard matched is left out.
        asked: by whoever runs the command; what stands in `patterns` by default is left out, too.

    Raises:
        InputError: a pattern matches no method, or a method named in full cannot work.
    """
    methods: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for pattern in patterns:
        matching = [method for method in METHODS if fnmatchcase(method, pattern)]
        if not matching:
            raise InputError(
                f"--methods: {pattern!r} is no method: {', '.join(RIVALS)}, or criterion/allocation/compensation with "
                f"{', '.join(CRITERIA)} / {', '.join(_ALLOCATIONS)} / {', '.join(COMPENSATIONS)}; wildcards may be used"
                f"{did_you_mean(pattern, METHODS)}"
            )
        for method in matching:
            try:
                check(method)
            except InputError as error:
                if method == pattern and asked:
                    raise InputError(f"--methods: {method}: {error}") from None
                left_out[method] = f"{method}: {error}"
            else:
                methods[method] = None
    return list(methods), list(left_out.values())


def defaults(check: Callable[[str], None]) -> list[str]:
    """Return the default methods; where no block can hold a bias, FLAP goes without its own."""
    try:
        check("flap/global/bias")
    except InputError:
        return ["flap/global/none" if method == "flap/global/bias" else method for method in DEFAULT]
    return list(DEFAULT)
