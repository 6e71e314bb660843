"""The methods of the comparison, and their names.

A method of numprune is criterion/allocation/compensation; an allocation that may remove whole blocks is called
`allocation+skips`. Any other method has a plain name.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import product

from numprune.allocation import ALLOCATIONS
from numprune.axes import DEFAULT_AXES
from numprune.blocks import Anatomy
from numprune.criteria import CRITERIA
from numprune.errors import InputError
from numprune.flows.studies.rivals import RIVALS
from numprune.flows.studies.rivals import check as check_rival
from numprune.option_checks import check_options
from numprune.options import COMPENSATIONS, PruneOptions, uses_gradients
from numprune.serving.problems import did_you_mean
from numprune.target import Target

_SKIPS = "+skips"
_ALLOCATIONS = (*ALLOCATIONS, *(f"{name}{_SKIPS}" for name in ALLOCATIONS if name != "uniform"))
METHODS = (*("/".join(parts) for parts in product(CRITERIA, _ALLOCATIONS, COMPENSATIONS)), *RIVALS)

# Published methods as published, then with least squares added, then numprune's own.
DEFAULT = (
    "random/uniform/none",
    "magnitude/uniform/none",
    "wanda-sp",
    "flap/global/bias",
    "flap/uniform/bias",
    "taylor/uniform/none",
    "shortgpt",
    "slicegpt",
    "numerical-newton/global/none",
    "obs/uniform/oneshot",
    "numerical/uniform/joint",
    "obs/uniform/joint",
    "obs/error/joint",
)


def options_of(
    method: str, ratio: float, target: Target, seed: int, axes: Sequence[str] = DEFAULT_AXES
) -> PruneOptions:
    """Return the options of a criterion/allocation/compensation."""
    criterion, allocation, compensation = method.split("/")
    skips = allocation.endswith(_SKIPS)
    return PruneOptions(
        ratio,
        criterion,
        allocation.removesuffix(_SKIPS),
        compensation,
        target=target,
        axes=tuple(axes),
        skips=skips,
        seed=seed,
    )


def reads_dense_moments(method: str) -> bool:
    """Return whether the method uses the dense model's moments: for scores, error curves or compensation."""
    return method not in RIVALS


def reads_gradients(method: str) -> bool:
    """Return whether the method uses the gradients of the loss."""
    return method not in RIVALS and uses_gradients(options_of(method, 0, Target(), 0))


def check(method: str, anatomy: Anatomy, ratio: float, target: Target, axes: Sequence[str] = DEFAULT_AXES) -> None:
    """Raise InputError if the method is not applicable to the model, or to these axes."""
    if method not in RIVALS:
        check_options(anatomy, options_of(method, ratio, target, 0, axes))
        return
    if set(axes) != set(DEFAULT_AXES):
        raise InputError(f"--axes {','.join(axes)}: {method} is defined for {','.join(DEFAULT_AXES)}")
    check_rival(method, anatomy, ratio)


def chosen(patterns: Sequence[str], check: Callable[[str], None], *, asked: bool = True) -> tuple[list[str], list[str]]:
    """Return the methods matching `patterns`, in their order, and a line with the reason for each omitted one.

    Args:
        patterns: names, or file-name wildcards: `obs/*/sequential`.
        check: raises InputError for an inapplicable method, which is refused if named in full, and omitted if it only
            matched a wildcard.
        asked: `patterns` come from the user; if they are defaults, inapplicable methods are always omitted.

    Raises:
        InputError: a pattern matches no method, or a method named in full is not applicable.
    """
    methods: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for pattern in patterns:
        matching = [method for method in METHODS if fnmatchcase(method, pattern)]
        if not matching:
            raise InputError(
                f"--methods: {pattern!r} is not a method; choose {', '.join(RIVALS)}, or "
                f"criterion/allocation/compensation with "
                f"{', '.join(CRITERIA)} / {', '.join(_ALLOCATIONS)} / {', '.join(COMPENSATIONS)}; wildcards are allowed"
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
    """Return the default methods; FLAP has no bias compensation if the model's blocks cannot have biases."""
    try:
        check("flap/global/bias")
    except InputError:
        return [method.replace("/bias", "/none") for method in DEFAULT]
    return list(DEFAULT)
