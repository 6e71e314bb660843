"""Pictures of where the heads of an image classifier look, dense and pruned."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from numprune.export.checkpoint import load_model
from numprune.export.tasks import load_task
from numprune.flows.steps.attention_maps import draw_maps
from numprune.flows.steps.prune import prune_checkpoint
from numprune.layers import ModelLayers
from numprune.options import PruneOptions
from numprune.pictures import read_pictures
from numprune.plans import PLAN_FILE, read_plan
from numprune.probing import attention_maps
from numprune.serving.report import AttentionMaps, Report, page
from numprune.target import Target
from tests.conftest import build_tiny, write_checkpoint, write_images
from tests.serving.conftest import COMPLETE
from tests.serving.pages import Parsed

CPU = torch.device("cpu")
STEP = 44  # of the squares of a sheet
BAND = 3 * STEP + 8  # of an image


@pytest.mark.parametrize(("family", "tokens"), [("vit", 1), ("deit", 2), ("dinov2", 1)])
def test_maps_are_the_attention_of_the_class_token(family: str, tokens: int) -> None:
    model = build_tiny(family)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = attention_maps(ModelLayers(model), images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(pixel_values=images, output_attentions=True).attentions
    for layer in range(2):
        own = expected[layer][:, :, 0, tokens:]
        torch.testing.assert_close(found[f"layers.{layer}.attention"], own, atol=1e-5, rtol=1e-5)


def test_without_a_class_token_maps_are_the_mean_of_all_patches() -> None:
    model = build_tiny("swin", num_labels=2)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = attention_maps(ModelLayers(model), images)
    assert [one.shape for one in found.values()] == [(2, 2, 64), (2, 2, 64), (2, 4, 16)]
    # Padding takes a share of the attention in windows at the edge.
    assert all(0.5 < float(one.sum(-1).mean()) <= 1.0001 for one in found.values())


def squares(found: AttentionMaps) -> np.ndarray:
    """By image, row and column, (images, 3, 1 + layers): the square's pixels, (40, 40, 3)."""
    sheet = np.array(Image.open(io.BytesIO(base64.b64decode(found.png))))
    columns = 1 + len(found.layers)
    assert sheet.shape == (len(found.images) * BAND - 12, columns * STEP - 4, 3)
    return np.array(
        [
            [
                [sheet[y : y + 40, x : x + 40] for x in range(0, columns * STEP, STEP)]
                for y in range(top, top + 132, STEP)
            ]
            for top in range(0, len(found.images) * BAND, BAND)
        ]
    )


def test_a_sheet_of_swin_has_the_grid_of_each_stage(tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("swin", num_labels=2), tmp_path / "base")
    write_images(tmp_path / "images", 2)
    rows = load_task(base).rows(read_pictures([tmp_path / "images"]))
    options = PruneOptions(0.1, allocation="error", axes=["kv-groups"], target=Target(align=1))
    prune_checkpoint(base, torch.stack(rows.rows), options, tmp_path / "pruned", CPU)
    found = draw_maps(base, tmp_path / "pruned", rows, CPU, stream=False, scratch=tmp_path)
    assert (found.by, found.layers) == ("patches", (0, 1, 2))
    assert squares(found).shape[:3] == (2, 3, 4)


@pytest.mark.parametrize("drop_layers", [0, 1])
def test_a_sheet_shows_kept_and_removed_heads_beside_the_pruned_model(drop_layers: int, tmp_path: Path) -> None:
    base = write_checkpoint(build_tiny("vit", num_hidden_layers=3), tmp_path / "base")
    write_images(tmp_path / "images", 9)
    rows = load_task(base).rows(read_pictures([tmp_path / "images"]))
    ratio, axes = (0.34, ["channels"]) if drop_layers else (0.2, ["kv-groups"])
    options = PruneOptions(
        ratio, allocation="error", axes=axes, drop_layers=drop_layers, keep=["layers.0"], target=Target(align=1)
    )
    prune_checkpoint(base, torch.stack(rows.rows), options, tmp_path / "pruned", CPU)
    plan = read_plan(tmp_path / "pruned" / PLAN_FILE)
    found = draw_maps(base, tmp_path / "pruned", rows, CPU, stream=False, scratch=tmp_path)
    assert found == draw_maps(base, tmp_path / "pruned", rows, CPU, stream=True, scratch=tmp_path)
    assert found.by == "class token"
    assert found.images == ("000.png", "003.png", "005.png", "008.png")
    assert found.layers == (0, 1, 2)
    shown = squares(found)
    for layer in range(3):
        block = plan.blocks[f"layers.{layer}.attention"]
        lost = (shown[:, :, 1 + layer] == 235).all((-1, -2, -3)).tolist()
        assert lost == [[not block.kept, len(block.kept) == block.units, not block.kept]] * 4
    # Nothing was removed in front of the first layer's attention, so that it looks where it did.
    assert np.array_equal(shown[:, 0, 1], shown[:, 2, 1])
    if drop_layers:  # the whole model is left but for a layer
        dense = attention_maps(ModelLayers(load_model(base)), torch.stack(rows.rows)[[0, 3, 5, 8]])
        darkest = dense["layers.0.attention"].mean(1).argmax(1)
        for image, patch in enumerate(darkest.tolist()):
            row, column = divmod(patch, 4)
            assert shown[image, 0, 1][10 * row + 5, 10 * column + 5].tolist() == [31, 78, 140]


def report(maps: object) -> Report:
    name = "layers.0.attention"
    section = {
        "rows": 8,
        "sequence_length": 17,
        "heads": {name: [[0.25] * 4] * 4},
        "kept": {name: [True, True, True, False]},
        "spearman": {},
        "maps": maps,
    }
    return Report.model_validate({**COMPLETE, "pruning": {**COMPLETE["pruning"], "attention": section}})


def test_the_page_shows_the_sheet() -> None:
    maps = {"by": "class token", "images": ["a <b>.png", "c.png"], "layers": [0, 2], "png": "AAAA"}
    html = page.html(report(maps))
    parsed = Parsed(html)
    assert "Attention on images, before and after pruning" in parsed.text
    assert "where the class token looks in layers 0, 2:" in parsed.text
    assert "Images, held out: a <b>.png, c.png." in parsed.text
    assert 'src="data:image/png;base64,AAAA"' in html
    assert "where patches look on average in" in Parsed(page.html(report({**maps, "by": "patches"}))).text
    assert "Attention on images" not in page.html(report(None))


@pytest.mark.parametrize("png", ['"><script>', "AAAA\n", "", "A" * 600_000])
def test_a_sheet_that_is_no_base64_or_too_large_is_refused(png: str) -> None:
    with pytest.raises(ValidationError, match="png"):
        report({"by": "patches", "images": ["a.png"], "layers": [0], "png": png})
