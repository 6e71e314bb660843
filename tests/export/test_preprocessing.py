"""A model's image processor belongs to it, or is refused with the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from numprune.errors import InputError
from numprune.export.config import read_config
from numprune.export.preprocessing import load_processor
from numprune.export.tasks import load_task, load_text_task
from tests.conftest import build_tiny, write_checkpoint


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(build_tiny("vit"), tmp_path / "base")


def load(folder):
    return load_processor(folder, read_config(folder))


def change(folder, **settings):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_models_with_one_processor_have_one_task(base, tmp_path):
    other = write_checkpoint(build_tiny("vit", seed=1), tmp_path / "other")
    assert load_task(base) == load_task(other)
    change(other, image_mean=[0.4])
    assert load_task(base) != load_task(other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"size": {"height": 4, "width": 8}},
            r"gives images of shape \[1, 4, 8\], but config\.json says .* \[1, 8, 8\]",
        ),
        ({"size": {"shortest_edge": 8}}, r"gives images of shape|cannot process images by it"),
        ({"image_mean": [0.5] * 3}, "cannot process images by it: mean must have 1 elements"),
    ],
)
def test_a_processor_of_another_model_is_refused(base, settings, said):
    change(base, **settings)
    with pytest.raises(InputError, match=said):
        load(base)


def test_dinov2_reads_images_of_the_size_in_its_configuration(tmp_path):
    base = dinov2(tmp_path / "base", crop=8)
    assert load(base).shape == (1, 8, 8)
    change(base, crop_size={"height": 6, "width": 6})
    said = r"\[1, 6, 6\].* positions are not interpolated: set its sizes to image_size, or write the model with"
    with pytest.raises(InputError, match=said):
        load(base)


def test_positions_of_dinov2_are_written_as_documented(tmp_path):
    """A published checkpoint has positions for 518 pixels, and its processor gives 224; here 8 and 4."""
    base, out = dinov2(tmp_path / "base", crop=4), tmp_path / "small"
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    snippet = page.split("## Positions of DINOv2")[1].split("```python\n")[1].split("```")[0]
    for shown, here in (('"dinov2"', repr(str(base))), ("224\n", "4\n"), ('"dinov2-224"', repr(str(out)))):
        assert shown in snippet
        snippet = snippet.replace(shown, here)
    exec(snippet, {})
    shutil.copy(base / "preprocessor_config.json", out)
    assert load(out).shape == (1, 4, 4)
    pixels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before, after = (AutoModelForImageClassification.from_pretrained(folder) for folder in (base, out))
    with torch.no_grad():  # published models interpolate whenever the size differs
        torch.testing.assert_close(after(pixel_values=pixels).logits, before(pixel_values=pixels).logits)


def dinov2(folder, crop):
    base = write_checkpoint(build_tiny("dinov2"), folder)
    settings = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_convert_rgb": False}
    change(base, **settings, size={"shortest_edge": 10}, crop_size={"height": crop, "width": crop})
    return base


@pytest.mark.parametrize("name", ["ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor"])
def test_processors_of_other_backends_and_older_files_are_read(base, name):
    expected = load(base)
    change(base, image_processor_type=name)
    assert load(base) == expected


def test_a_processor_that_transformers_does_not_have_is_not_replaced(base):
    change(base, image_processor_type="OwnImageProcessor", auto_map={"AutoImageProcessor": "own.OwnImageProcessor"})
    with pytest.raises(InputError, match=r"declares 'OwnImageProcessor', which transformers .* does not have"):
        load(base)


def test_a_folder_without_a_readable_processor_is_refused(base):
    path = base / "preprocessor_config.json"
    path.write_text("[")
    with pytest.raises(InputError, match=r"preprocessor_config\.json: not JSON"):
        load(base)
    path.unlink()
    with pytest.raises(
        InputError, match=r"no image processor \(preprocessor_config\.json\) in this folder; copy it from"
    ):
        load(base)


def test_what_needs_text_refuses_a_model_of_images(base):
    with pytest.raises(InputError, match="training reads text, and this model classifies images"):
        load_text_task(base, "training")
