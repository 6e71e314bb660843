"""A model's image processor, read from its own files. Pillow alone is used, whatever else is installed."""

import json
from pathlib import Path
from typing import Any

import transformers

from numprune.anatomy import family_of, image_shape
from numprune.errors import InputError, reason
from numprune.export import files
from numprune.images import Processor

_FILES = ("preprocessor_config.json", "processor_config.json")
_CHANNELS = (1, 3)
_PROBED = (48, 32)  # not square: its shape would show


def load_processor(folder: Path, config: Any) -> Processor:
    """Return the image processor in `folder` of a model with this configuration.

    Raises:
        InputError: no or a malformed file, or images would not have the shape that the model reads.
    """
    from PIL import Image
    from transformers import AutoImageProcessor

    shape = image_shape(config)
    if shape[0] not in _CHANNELS:
        raise InputError(f"{folder}: num_channels={shape[0]}; images have {' or '.join(map(str, _CHANNELS))}")
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: no image processor ({_FILES[0]}) in this folder; copy it from the original model")
    declared = _declared(files.read_object(found[0]))
    try:
        run = AutoImageProcessor.from_pretrained(
            folder, backend="pil", config=config, local_files_only=True, trust_remote_code=False
        )
        settings = json.dumps(run.to_dict(), sort_keys=True, default=str)
        processor = Processor(settings, shape, run)
        made = tuple(run(Image.new("RGB" if shape[0] > 1 else "L", _PROBED), return_tensors="pt")["pixel_values"].shape)
    except Exception as error:  # a malformed file can make transformers raise anything
        raise InputError(f"{found[0]}: transformers cannot process images by it: {reason(error)}") from error
    used = type(run).__name__.removesuffix("Pil")
    if declared not in (None, used):  # transformers replaces classes that it does not have
        raise InputError(
            f"{found[0]}: declares {declared[:80]!r}, which transformers {transformers.__version__} does not have, and "
            f"code from the folder is not run; if {used} gives the same pixels, declare it instead"
        )
    if made[1:] != shape:
        patches = family_of(config).patches
        remedy = (
            "; positions are not interpolated: set its sizes to image_size, or write the model with positions of its "
            "size (Families, Positions of DINOv2)"
        )
        raise InputError(
            f"{found[0]}: gives images of shape {list(made[1:])}, but config.json says num_channels and image_size of "
            f"{list(shape)}; they do not belong together{remedy if patches and patches.square else ''}"
        )
    return processor


def _declared(content: dict[str, Any]) -> str | None:
    """Return the declared class, without the suffix of its backend; older files call processors feature extractors."""
    own = content.get("image_processor", content)
    if not isinstance(own, dict):
        return None
    name = own.get("image_processor_type") or own.get("feature_extractor_type")
    if not isinstance(name, str):
        return None
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
