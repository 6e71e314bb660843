"""What attention heads attend to: constructed weights, every family, streamed, and the kept heads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from numprune.export.streaming import CheckpointLayers
from numprune.families import FAMILIES
from numprune.layers import ModelLayers
from numprune.plans import BlockPlan
from numprune.probing import CATEGORIES, attention_masses, correlations, kept_heads, masses
from tests.conftest import build_tiny

SPECIAL = [256, 257]


def test_constructed_heads_have_known_masses() -> None:
    """A head for each kind, and one that looks at everything alike."""
    S = 6
    first, itself, previous, second = (torch.zeros(S, S) for _ in range(4))
    first[:, 0] = 1
    itself.fill_diagonal_(1)
    previous[0, 0] = 1
    previous[torch.arange(1, S), torch.arange(S - 1)] = 1
    second[:, 2] = 1  # special, too
    even = torch.full((S, S), 1 / S)
    special = torch.tensor([True, False, True, False, False, False])
    found = masses(torch.stack([first, itself, previous, second, even]), special)
    # Of five tokens, one is special itself (2), and two follow a special one (1 and 3).
    expected = [[1, 0, 0, 0], [0.2, 0.8, 0, 0], [0.4, 0, 0.6, 0], [1, 0, 0, 0], [2 / 6, 0.8 / 6, 0.6 / 6, 2.6 / 6]]
    assert found.numpy() == pytest.approx(np.array(expected))


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if not family.stages))
def test_masses_are_those_of_the_models_own_attention(family: str) -> None:
    model = build_tiny(family)
    patches, generator = FAMILIES[family].patches, torch.Generator().manual_seed(0)
    if patches:
        rows = torch.randn(2, 1, 8, 8, generator=generator)
        named = {"pixel_values": rows}
        special = (torch.arange(16 + len(patches.tokens)) < len(patches.tokens)).expand(2, -1)
    else:
        rows = torch.randint(0, 250, (2, 12), generator=generator)
        rows[:, 5] = SPECIAL[0]
        named = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        special = torch.isin(rows, torch.tensor(SPECIAL))
        special[:, 0] = True
    before = model.config._attn_implementation
    found = attention_masses(ModelLayers(model), rows, SPECIAL)
    assert model.config._attn_implementation == before

    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model.base_model(**named, output_attentions=True).attentions
    for layer, of_layer in enumerate(weights):
        expected = sum(masses(one, marked) for one, marked in zip(of_layer, special, strict=True)) / len(rows)
        assert torch.allclose(found[f"layers.{layer}.attention"], expected, atol=1e-5)
        sums = expected.sum(1)
        assert (sums < 1).all() if family == "gpt_oss" else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_a_streamed_model_gives_the_same(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    rows = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    streamed = attention_masses(CheckpointLayers(folder, scratch=tmp_path), rows, SPECIAL)
    found = attention_masses(ModelLayers(build_tiny()), rows, SPECIAL)
    assert found.keys() == streamed.keys()
    for name, table in found.items():
        assert torch.allclose(table, streamed[name], atol=1e-6)


def test_kept_heads_are_marked_and_correlated() -> None:
    """Two KV groups of two heads in each layer; one group is kept of the first, and one head of each of the second."""

    plans = {
        "layers.0.attention": BlockPlan(units=2, members=2, kept=[1]),
        "layers.1.attention": BlockPlan(units=2, members=2, kept=[0, 1], kept_members=[[0], [1]]),
    }
    found = {
        "layers.0.attention": np.array([[0.9, 0, 0.1, 0], [0.8, 0, 0.2, 0], [0.1, 0, 0.9, 0], [0.2, 0, 0.8, 0]]),
        "layers.1.attention": np.array([[0.3, 0, 0.7, 0], [0.7, 0, 0.3, 0], [0.6, 0, 0.4, 0], [0.4, 0, 0.6, 0]]),
    }
    kept = {name: kept_heads(plan, plan.units * plan.members) for name, plan in plans.items()}
    assert kept["layers.0.attention"].tolist() == [False, False, True, True]
    assert kept["layers.1.attention"].tolist() == [True, False, False, True]
    told = correlations(found, kept)
    assert list(told) == list(CATEGORIES)
    assert told["special"] == pytest.approx(-0.8729, abs=1e-3)
    assert told["previous"] == pytest.approx(0.8729, abs=1e-3)
    assert told["self"] is None
    everything = {name: np.ones(4, bool) for name in kept}
    assert set(correlations(found, everything).values()) == {None}
    assert set(correlations({}, {}).values()) == {None}  # a model whose attention blocks are all gone
