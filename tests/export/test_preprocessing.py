"""A model's image processor belongs to it, or is refused with the remedy."""

import json

import pytest

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
    base = write_checkpoint(build_tiny("dinov2"), tmp_path / "base")
    sizes = {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}}
    settings = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "do_convert_rgb": False}
    change(base, **settings, **sizes)
    assert load(base).shape == (1, 8, 8)
    change(base, crop_size={"height": 6, "width": 6})
    with pytest.raises(InputError, match=r"\[1, 6, 6\].* positions are not interpolated: set its sizes to image_size"):
        load(base)


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
