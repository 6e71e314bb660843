"""The stage that probes attention, its section of the report, and the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from numprune.export.checkpoint import load
from numprune.flows.steps.attention import attention_section, probe
from numprune.flows.steps.prune import prune_checkpoint
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.plans import PLAN_FILE, read_plan
from numprune.probing import attention_masses
from numprune.serving.report import Report, markdown, page
from numprune.target import Target
from tests.conftest import build_tiny, write_checkpoint
from tests.serving.conftest import COMPLETE
from tests.serving.pages import Parsed

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_kept_heads_are_marked_in_the_report(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny(family), tmp_path / "base")
    rows = torch.randint(0, 250, (12, 32), generator=torch.Generator().manual_seed(0))
    rows[:, ::5] = 258  # the mask, for an encoder to predict
    found = probe(base, rows, CPU, stream=False, scratch=tmp_path)
    assert (found.rows, found.sequence_length) == (8, 32)
    streamed = probe(base, rows, CPU, stream=True, scratch=tmp_path)
    for name, heads in found.heads.items():
        assert np.allclose(heads, streamed.heads[name], atol=1e-5)
        assert np.allclose(np.sum(heads, 1), 1, atol=1e-5)

    options = PruneOptions(ratio=0.1, allocation="error", axes=["kv-groups"], target=Target(align=1))
    prune_checkpoint(base, rows, options, tmp_path / "pruned", CPU)
    plan = read_plan(tmp_path / "pruned" / PLAN_FILE)
    section = attention_section(found, plan)
    removed = 0
    for name, block in plan.blocks.items():
        if name.endswith(".attention"):
            members = block.members
            assert section["kept"][name] == [head // members in block.kept for head in range(block.units * members)]
            removed += section["kept"][name].count(False)
    assert removed > 0
    data = {**COMPLETE, "pruning": {**COMPLETE["pruning"], "attention": section}}
    report = Report.model_validate(data)
    html = page.html(report)
    assert "Mean attention of each head, before pruning." in html
    assert "over 8 calibration rows of 32 tokens" in Parsed(html).text
    assert "Attention of the heads" in markdown(report)


def test_a_masked_token_stands_for_a_word(tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("bert"), tmp_path / "base")
    rows = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    rows[:, 0], rows[:, -1], rows[:, 3::5] = 256, 257, 258  # [CLS], [SEP], [MASK]
    found = probe(base, rows, CPU, stream=False, scratch=tmp_path)
    expected = attention_masses(ModelLayers(load(base)[0]), rows, [256, 257])
    assert found.heads == {name: table.tolist() for name, table in expected.items()}


def test_masks_of_other_heads_are_refused() -> None:
    section = {
        "rows": 8,
        "sequence_length": 32,
        "heads": {"layers.0.attention": [[0.25] * 4] * 4},
        "kept": {"layers.0.attention": [True] * 3},
        "spearman": {},
    }
    with pytest.raises(ValidationError, match="must be of the same heads"):
        Report.model_validate({**COMPLETE, "pruning": {**COMPLETE["pruning"], "attention": section}})


def test_a_model_with_many_heads_has_a_table_but_no_picture() -> None:
    heads = {f"layers.{layer}.attention": [[0.25] * 4] * 64 for layer in range(32)}
    kept = {name: [True] * 63 + [False] for name in heads}
    section = {"rows": 8, "sequence_length": 32, "heads": heads, "kept": kept, "spearman": {"special": None}}
    html = page.html(Report.model_validate({**COMPLETE, "pruning": {**COMPLETE["pruning"], "attention": section}}))
    assert "Mean attention of each head" not in html
    assert "Attention of kept and removed heads" in html
