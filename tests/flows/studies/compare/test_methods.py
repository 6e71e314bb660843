import pytest

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.flows.studies.compare.methods import (
    DEFAULT,
    METHODS,
    check,
    chosen,
    defaults,
    options_of,
    reads_dense_moments,
    reads_gradients,
)
from numprune.options import COMPENSATIONS
from numprune.slices import GONE, Size
from numprune.target import Target
from tests.conftest import build_tiny


def checked(family="llama", **overrides):
    anatomy = read_anatomy(build_tiny(family, **overrides).config)
    return lambda method: check(method, anatomy, 0.3, Target(align=1))


def test_wildcards_select_every_applicable_method_and_report_the_others():
    methods, left_out = chosen(["shortgpt", "flap/*", "flap/uniform/none"], checked("qwen2"))
    assert methods[0] == "shortgpt"
    assert {method.split("/")[2] for method in methods[1:]} == set(COMPENSATIONS) - {"bias"}
    assert len(methods) == len(set(methods))
    assert left_out
    assert all(line.split(":")[0].endswith("/bias") for line in left_out)


def test_skips_are_part_of_the_allocation_name():
    options = options_of("flap/global+skips/oneshot", 0.3, Target(), seed=1)
    assert (options.criterion, options.allocation, options.skips) == ("flap", "global", True)
    assert not options_of("flap/global/oneshot", 0.3, Target(), seed=1).skips
    assert "flap/uniform+skips/none" not in METHODS


def test_an_inapplicable_method_named_in_full_is_refused():
    with pytest.raises(
        InputError, match=r"flap/global/bias: compensation bias: the projections of .* cannot have a bias"
    ):
        chosen(["flap/global/bias"], checked("qwen2"))


def test_inapplicable_defaults_are_left_out():
    base = read_anatomy(build_tiny().config)
    differing = base.keeping({block.name: Size(block.units - block.layer, block.members) for block in base.blocks})
    methods, left_out = chosen(DEFAULT, lambda method: check(method, differing, 0.3, Target(align=1)), asked=False)
    assert methods == [method for method in DEFAULT if "/uniform/" not in method]
    assert all("layers differ already" in line for line in left_out)


@pytest.mark.parametrize(
    ("rival", "overrides", "message"),
    [
        ("shortgpt", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, "sliding windows"),
        ("slicegpt", {}, "skips blocks"),
    ],
)
def test_an_inapplicable_rival_is_refused_before_any_work(rival, overrides, message):
    anatomy = read_anatomy(build_tiny("qwen2", **overrides).config)
    with pytest.raises(InputError, match=r"ratio is 1\.5"):
        check(rival, anatomy, 1.5, Target())
    if rival == "slicegpt":
        anatomy = anatomy.keeping({block.name: block.size if block.layer else GONE for block in anatomy.blocks})
    with pytest.raises(InputError, match=message):
        check(rival, anatomy, 0.3, Target())


def test_a_pattern_without_match_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'wanda/uniform/none'"):
        chosen(["wnda/uniform/none"], checked())


def test_defaults_are_valid_and_flap_drops_its_bias_where_unsupported():
    assert set(DEFAULT) <= set(METHODS)
    assert defaults(checked()) == list(DEFAULT)
    of_flap = [method for method in defaults(checked("qwen3")) if method.startswith("flap/")]
    assert of_flap == ["flap/global/none", "flap/uniform/none"]


@pytest.mark.parametrize(
    ("method", "moments", "gradients"),
    [
        ("shortgpt", False, False),
        ("wanda-sp", False, False),
        ("obs/uniform/joint", True, False),
        ("flap/global/sequential", True, False),
        ("wanda/uniform/none", True, False),
        ("obs/error+skips/joint", True, True),
        ("taylor/uniform/none", True, True),
    ],
)
def test_methods_that_share_the_calibration_and_the_backward_pass(method, moments, gradients):
    assert reads_dense_moments(method) is moments
    assert reads_gradients(method) is gradients
