"""Images are found, labelled, decoded and processed, or refused by name."""

import io
import json
import shutil

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from numprune.errors import InputError
from numprune.images import Processor, draw_pictures, image_rows
from numprune.pictures import Picture, read_pictures
from tests.conftest import image_processor, write_images

GREY = Processor("{}", (1, 8, 8), image_processor())


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def grey(level=0, size=(8, 8), mode="L"):
    return Image.new(mode, size, level)


def test_subfolders_are_classes(tmp_path):
    found = read_pictures([write_images(tmp_path / "images", 5, ["cat", "dog"])])
    assert [(one.name, one.label) for one in found] == [
        ("cat/000.png", "cat"),
        ("cat/002.png", "cat"),
        ("cat/004.png", "cat"),
        ("dog/001.png", "dog"),
        ("dog/003.png", "dog"),
    ]
    assert {one.label for one in read_pictures([write_images(tmp_path / "plain", 2)])} == {None}


def test_subfolders_may_be_links(tmp_path):
    whole = write_images(tmp_path / "whole", 6, ["cat", "dog"])
    some = tmp_path / "some"
    some.mkdir()
    (some / "dog").symlink_to(whole / "dog")
    shutil.copytree(whole / "cat", some / "cat")
    assert [(one.name, one.label) for one in read_pictures([some])] == [
        (one.name, one.label) for one in read_pictures([whole])
    ]


def test_an_image_given_twice_is_refused(tmp_path):
    write_images(tmp_path / "train", 2, ["cat"])
    (tmp_path / "again").symlink_to(tmp_path / "train")
    for folders, message in (
        (["train", "train"], r"train: given twice; it would count twice, so omit one"),
        (["train", "again"], r"again: given twice, also as .*train; it would"),
        (["train", "train/cat"], r"000\.png: given twice; it would"),
    ):
        with pytest.raises(InputError, match=message):
            read_pictures([tmp_path / folder for folder in folders])


def test_a_table_has_encoded_images_and_labels(tmp_path):
    images = [encoded(grey(level)) for level in (0, 255)]
    path = tmp_path / "images.parquet"
    parquet.write_table(
        pyarrow.table({"image": [{"bytes": one, "path": None} for one in images], "label": [1, 0]}), path
    )
    found = read_pictures([path])
    assert [(one.name, one.label) for one in found] == [("images.parquet:1", 1), ("images.parquet:2", 0)]
    assert [float(GREY.pixels(one).mean()) for one in found] == [-1, 1]


def test_what_holds_no_images_is_refused_by_name(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("text")
    deep = write_images(tmp_path / "deep" / "a" / "b", 1).parent.parent
    table = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), table)
    with pytest.raises(InputError) as caught:
        read_pictures([empty, tmp_path / "none", empty / "notes.txt", deep, table])
    for problem in (
        "empty: contains no images; supported are .png, .jpg",
        "none: no such folder of images",
        "notes.txt: give the folder of the images, a .parquet file, or a folder saved by `datasets`",
        "a/b/000.png is in a subfolder of a class; give a folder whose subfolders are the classes",
        "text.parquet: no column named \"image\"; its columns are 'text'",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode_become_what_the_model_reads(mode):
    picture = Picture("a", encoded(grey(0, mode=mode), "TIFF"))
    black = {"CMYK": 1.0}.get(mode, -1.0)  # no ink is white
    for shape in ((1, 8, 8), (3, 8, 8)):
        run = image_processor() if shape[0] == 1 else image_processor_of_colours()
        found = Processor("{}", shape, run).pixels(picture)
        assert (tuple(found.shape), found.dtype) == (shape, torch.float32)
        assert torch.allclose(found, torch.full(shape, black))


def image_processor_of_colours():
    run = image_processor()
    run.image_mean = run.image_std = [0.5] * 3
    return run


def test_a_turned_photograph_stands_upright():
    values = np.zeros((8, 8), dtype=np.uint8)
    values[0] = 255  # a white row at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", exif=exif)
    found = GREY.pixels(Picture("a", buffer.getvalue()))
    assert (float(found[0, 0].mean()), float(found[0, -1].mean())) == (-1, 1)


def test_damaged_images_are_refused_by_name():
    sixteen = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    pictures = [
        Picture("good.png", encoded(grey())),
        Picture("cut.png", encoded(grey(size=(64, 64)))[:60]),
        Picture("text.png", b"text"),
        Picture("deep.png", encoded(sixteen)),
        Picture("more.png", b""),
    ]
    with pytest.raises(InputError) as caught:
        image_rows(pictures, GREY)
    said = str(caught.value)
    assert "image cut.png: Pillow cannot read it" in said
    assert "image text.png: Pillow cannot read it" in said
    assert "image deep.png: has 16 or 32 bits per channel; convert it to 8 bits" in said
    assert "and 1 more image" in said
    assert "good.png" not in said


def test_damaged_metadata_is_refused_by_name():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"  # turned, with a description
    buffer = io.BytesIO()
    grey().save(buffer, "JPEG", exif=exif)
    content = bytearray(buffer.getvalue())
    content[content.index(b"Exif") + 17] = 0  # the tag before the orientation gets a type that it cannot have
    with pytest.raises(InputError, match=r"image a\.jpg: Pillow cannot read it"):
        GREY.pixels(Picture("a.jpg", bytes(content)))


@pytest.mark.parametrize("value", [0.5, [0.5]])
def test_pixel_values_become_the_picture_again(value):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    run = image_processor()
    run.image_mean = run.image_std = value
    reader = Processor(json.dumps(run.to_dict(), default=str), (1, 8, 8), run)
    pixels = reader.pixels(Picture("a", encoded(Image.fromarray(levels))))
    assert np.array_equal(np.array(reader.picture(pixels)), levels)


def test_rows_are_identified_by_pixels_and_labels(tmp_path):
    pictures = read_pictures([write_images(tmp_path / "images", 6, ["a", "b"])])
    rows = image_rows(pictures, GREY, [0, 0, 0, 1, 1, 1])
    assert (rows.documents, rows.tokens, len(rows.rows), rows.packed) == (6, 6, 6, False)
    same, other, unlabelled = (
        image_rows(pictures, GREY, labels).digest for labels in ([0] * 3 + [1] * 3, [1] * 6, None)
    )
    assert same == rows.digest
    assert len({same, other, unlabelled}) == 3


def test_samples_are_drawn_without_repeats():
    pictures = [Picture(str(index), b"") for index in range(20)]
    drawn = draw_pictures(pictures, 12, seed=3)
    assert drawn == draw_pictures(pictures, 12, seed=3)
    assert drawn != draw_pictures(pictures, 12, seed=4)
    assert len({one.name for one in drawn}) == 12
    with pytest.raises(InputError, match="there are 20 calibration images, but 21 samples were requested"):
        draw_pictures(pictures, 21, seed=0)


def test_copies_in_one_class_count_once_where_a_model_is_judged(tmp_path):
    folder = write_images(tmp_path / "images", 4, ["a", "b"])
    shutil.copy(folder / "a" / "000.png", folder / "a" / "copy.png")
    shutil.copy(folder / "a" / "000.png", folder / "b" / "other-class.png")
    pictures, labels = read_pictures([folder]), [0, 0, 0, 1, 1, 1]
    rows = image_rows(pictures, GREY, labels, distinct=True)
    assert rows.names == ["a/000.png", "a/002.png", "b/001.png", "b/003.png", "b/other-class.png"]
    assert (rows.labels, rows.document, len(rows.rows)) == ([0, 0, 1, 1, 1], [0, 1, 2, 3, 4], 5)
    alone = [one for one in pictures if one.name != "a/copy.png"]
    assert rows.digest == image_rows(alone, GREY, [0, 0, 1, 1, 1]).digest
    assert len(image_rows(pictures, GREY, distinct=True).rows) == 4
    assert len(image_rows(pictures, GREY).rows) == 6
