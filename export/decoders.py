"""What draws the codes of an image generator: the colours in its folder, or the decoder of its image tokenizer."""

from math import isqrt
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from numprune.anatomy import code_vocabulary, codes_per_image
from numprune.decoding import Decoder, Palette
from numprune.errors import InputError
from numprune.export import files
from numprune.export.state_dict import read_state_dict
from numprune.llamagen.tokenizer import ImageTokenizer, sizes_of

PALETTE = "preprocessor_config.json"  # of the model folder, with the colour of each code in `clusters`


def load_decoder(folder: Path, config: PretrainedConfig, file: Path | None, device: torch.device) -> Decoder | None:
    """Return what draws the codes of the image generator in `folder`.

    Args:
        config: the generator's.
        file: state dict of LlamaGen's image tokenizer; None: the colours in the folder.
        device: where it draws.

    Returns None if there is no file, and the folder has no colours.

    Raises InputError.
    """
    vocabulary, image = code_vocabulary(config), codes_per_image(config)
    assert vocabulary is not None
    if file is not None:
        state = read_state_dict(file)
        try:
            codes = sizes_of(state).codes
            if codes != vocabulary.codes:
                raise InputError(
                    f"its codebook has {codes:,} codes, and the model {vocabulary.codes:,}; give the decoder of the "
                    "tokenizer that the model was trained with"
                )
            return ImageTokenizer(state, image, device)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
    colours = _colours(folder / PALETTE, vocabulary.codes)
    return None if colours is None else Palette(torch.from_numpy(colours), isqrt(image))


def _colours(path: Path, codes: int) -> np.ndarray | None:
    """Return the colour of each code, (codes, 3) uint8; None if the file has none.

    `clusters` are colours from -1 to 1, as in ImageGPT. Raises InputError.
    """
    found = files.read_object(path).get("clusters") if path.is_file() else None
    if found is None:
        return None
    try:
        clusters = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        clusters = np.empty(0)
    if clusters.shape != (codes, 3) or not (np.abs(clusters) <= 1).all():
        raise InputError(f"{path}: clusters must be {codes} colours of three numbers from -1 to 1")
    return np.rint(127.5 * (clusters + 1)).astype(np.uint8)
