"""Matrices that read a narrower stream are refitted to the dense one."""

import pytest
import torch

from numprune.anatomy import read_anatomy
from numprune.hidden import inputs_of
from numprune.layers import CopiedLayers
from numprune.moments import Moments
from numprune.readers import ReadMap, copy_readers, fit_read_map, has_biases, refit_readers
from tests.conftest import build_tiny

KEPT = torch.tensor([0, 2, 3, 5, 7])
HIDDEN = 8


def streams(tokens=60, shift=0.0):
    """What a norm gives in the dense model and in the narrower one, which has noise of its own."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(HIDDEN, HIDDEN, generator=draw, dtype=torch.float64)
    dense = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64) @ mixed + shift
    noise = torch.randn(tokens, len(KEPT), generator=draw, dtype=torch.float64)
    return dense, 1.2 * dense[:, KEPT] + 0.5 * noise - 0.3 * shift


def moments_of(narrow, dense):
    moments = Moments(len(KEPT), HIDDEN)
    moments.add(narrow, dense)
    return moments


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("chosen", [False, True])
def test_no_matrix_reads_worse_than_with_fewer_columns(centred, damping, chosen):
    dense, narrow = streams(shift=0.7)
    held_out = moments_of(narrow[::4], dense[::4]) if chosen else None
    found = fit_read_map(KEPT, HIDDEN, moments_of(narrow, dense), held_out, damping, centred=centred)
    shift = found.shift if centred else torch.zeros(HIDDEN, dtype=torch.float64)
    for seed in range(5):
        matrix = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fitted = narrow @ (matrix @ found.columns).T + matrix @ shift
        plain = narrow @ matrix[:, KEPT].T
        assert float((dense @ matrix.T - fitted).square().sum()) < float((dense @ matrix.T - plain).square().sum())


@pytest.mark.parametrize("centred", [False, True])
def test_without_damping_it_is_least_squares(centred):
    dense, narrow = streams(shift=0.7)
    found = fit_read_map(KEPT, HIDDEN, moments_of(narrow, dense), None, 0.0, centred=centred)
    inputs = torch.cat([narrow, torch.ones(len(narrow), 1, dtype=torch.float64)], 1) if centred else narrow
    wanted = torch.linalg.lstsq(inputs, dense).solution
    torch.testing.assert_close(found.columns, wanted[: len(KEPT)].T)
    assert (found.shift is None) is not centred
    if centred:
        torch.testing.assert_close(found.shift, wanted[-1])


def test_nothing_missing_changes_nothing():
    dense, _ = streams()
    every = torch.arange(HIDDEN)
    moments = Moments(HIDDEN, HIDDEN)
    moments.add(dense, dense)
    found = fit_read_map(every, HIDDEN, moments, None, 1e-3)
    torch.testing.assert_close(found.columns, torch.eye(HIDDEN, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_moe", "gpt_oss", "phi3"])
def test_only_what_reads_the_stream_is_refitted(family):
    model = build_tiny(family)
    anatomy, kept = read_anatomy(model.config), torch.arange(0, 64, 2)
    draw = torch.Generator().manual_seed(0)
    columns = torch.randn(64, len(kept), generator=draw, dtype=torch.float64)
    shift = torch.randn(64, generator=draw, dtype=torch.float64)
    for block in anatomy.of_layer(1):
        with CopiedLayers(model).layer(1) as layer:
            before = {name: value.clone() for name, value in layer.state_dict().items()}
            biased = has_biases(layer, block)
            original = copy_readers(layer, block)
            refit_readers(layer, block, kept, ReadMap(columns, shift if biased else None))
            readers = inputs_of(block)
            assert readers
            now, biases = layer.state_dict(), set()
            for name, dim in readers.items():
                matrix, found = before[name].movedim(dim, -1).double(), now[name].movedim(dim, -1)
                torch.testing.assert_close(found[..., kept], (matrix @ columns).float())
                assert not found[..., 1::2].any()
                if biased:
                    bias = name.replace(".weight", ".bias") if name.endswith("weight") else f"{name}_bias"
                    torch.testing.assert_close(now[bias], before[bias] + (matrix @ shift).float())
                    biases.add(bias)
            assert all(torch.equal(now[name], before[name]) for name in now.keys() - readers.keys() - biases)
            assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_biases_take_part_where_all_matrices_have_them():
    for family, wanted in (("llama", [False, False]), ("qwen2", [True, False]), ("gpt_oss", [True, True])):
        model = build_tiny(family)
        blocks = read_anatomy(model.config).of_layer(0)
        assert [has_biases(model.model.layers[0], block) for block in blocks] == wanted, family
