"""Images as the pixel values that a model reads: decoded by Pillow, processed by the model's own image processor.

Pillow is imported where an image is read: models of text are pruned without it, as `make gpu` does on a bare machine.
"""

import hashlib
import io
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from numprune.corpus import TokenRows
from numprune.counted import counted
from numprune.errors import InputError, reason
from numprune.pictures import Picture
from numprune.progress import progress

if TYPE_CHECKING:
    from PIL import Image

_MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Processor:
    """Turns images into the pixel values that a model reads.

    Attributes:
        settings: as JSON; two processors with the same settings are equal.
        shape: channels, height and width of its images.
        run: transformers' image processor, of Pillow's backend.
    """

    settings: str
    shape: tuple[int, int, int]
    run: Any = field(compare=False, repr=False)

    def pixels(self, picture: Picture) -> Tensor:
        """Return (C, height, width) float32. Raises InputError if the image cannot be decoded."""
        found: Tensor = self.run(_decoded(picture, self.shape[0]), return_tensors="pt")["pixel_values"][0].float()
        return found

    def picture(self, pixels: Tensor) -> "Image.Image":
        """Return the image that gives the pixel values (C, height, width), as far as they determine it."""
        from PIL import Image

        settings = json.loads(self.settings)
        values = pixels.double()
        if settings.get("do_normalize"):
            # One number for all channels, or one for each.
            mean, deviation = (torch.tensor(settings[name]).double() for name in ("image_mean", "image_std"))
            values = values * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
        if settings.get("do_rescale"):
            values = values / settings["rescale_factor"]
        levels = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def rgb(picture: Picture) -> Tensor:
    """Return an image as it is stored, upright, (3, height, width) uint8. Raises InputError if it cannot be decoded."""
    return torch.from_numpy(np.array(_decoded(picture, 3))).permute(2, 0, 1)


def _decoded(picture: Picture, channels: int) -> Any:
    """Return an upright image of Pillow with so many channels. Raises InputError."""
    from PIL import Image, ImageOps

    source = picture.source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            mode, upright = opened.mode, ImageOps.exif_transpose(opened)
            if mode.startswith(("I", "F")):
                raise InputError(f"image {picture.name}: has 16 or 32 bits per channel; convert it to 8 bits")
            return upright.convert(_MODES[channels])
    except InputError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise InputError(f"image {picture.name}: Pillow cannot read it: {reason(error)}") from None


def image_rows(
    pictures: Sequence[Picture], processor: Processor, labels: list[int] | None = None, *, distinct: bool = False
) -> TokenRows:
    """Return each picture as a row of pixel values; the digest includes the labels.

    Args:
        labels: class of each picture.
        distinct: of pictures with the same pixel values and class, only the first becomes a row.

    Raises InputError.
    """
    if not pictures:
        raise InputError("no images: give at least one folder of them")
    rows: dict[Hashable, tuple[int, Tensor]] = {}  # what makes it distinct -> its picture and pixel values
    problems: list[str] = []
    for index, picture in enumerate(progress(pictures, "read", "image")):
        try:
            pixels = processor.pixels(picture)
        except InputError as error:
            problems.append(str(error))
            continue
        content = hashlib.sha256(pixels.numpy().tobytes()).digest(), None if labels is None else labels[index]
        rows.setdefault(content if distinct else index, (index, pixels))
    if problems:
        more = f"; and {counted(len(problems) - _SHOWN, 'more image')}" if len(problems) > _SHOWN else ""
        raise InputError("; ".join(problems[:_SHOWN]) + more)
    used, values = zip(*rows.values(), strict=True)
    labels = None if labels is None else [labels[index] for index in used]
    digest = hashlib.sha256(repr((processor.shape, labels)).encode())
    for pixels in values:
        digest.update(pixels.numpy().tobytes())
    names = [pictures[index].name for index in used]
    return TokenRows(list(values), list(range(len(values))), names, digest.hexdigest(), labels=labels)


def draw_pictures(pictures: Sequence[Picture], samples: int, seed: int) -> list[Picture]:
    """Return `samples` pictures drawn without replacement with `seed`. Raises InputError if there are fewer."""
    if len(pictures) < samples:
        raise InputError(
            f"there are {counted(len(pictures), 'calibration image')}, but {samples} samples were requested; give more "
            "images or fewer samples"
        )
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:samples]
    return [pictures[index] for index in order.tolist()]
