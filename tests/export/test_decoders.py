"""What draws an image generator's codes: the colours in its folder, or its tokenizer's decoder."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from numprune.errors import InputError
from numprune.export.decoders import PALETTE, load_decoder
from numprune.llamagen.config import LlamaGenConfig
from tests.numprune.llamagen import tokenizer_reference as reference
from tests.numprune.llamagen.tokenizer_reference import CODES, GRID, ZOOM

CPU = torch.device("cpu")


def config(codes: int, side: int) -> LlamaGenConfig:
    return LlamaGenConfig(vocab_size=codes + 2, num_classes=1, max_position_embeddings=1 + side * side, head_dim=64)


def test_colours_are_those_of_the_image_processor(tmp_path: Path) -> None:
    assert load_decoder(tmp_path, config(2, 2), None, CPU) is None
    (tmp_path / PALETTE).write_text(json.dumps({"clusters": [[-1, 0, 1], [1, 1, 1]]}))
    found = load_decoder(tmp_path, config(2, 2), None, CPU)
    assert found is not None
    assert found.side == 2
    picture = found.pictures(torch.tensor([[0, 1, 1, 0]]))
    assert picture.dtype == torch.uint8
    assert picture.permute(0, 2, 3, 1).tolist() == [
        [[[0, 128, 255], [255, 255, 255]], [[255, 255, 255], [0, 128, 255]]]
    ]
    for clusters in ([[0, 0, 0]], [[0, 0, 2], [0, 0, 0]], "grey", [[0, 0], [0]]):
        (tmp_path / PALETTE).write_text(json.dumps({"clusters": clusters}))
        with pytest.raises(InputError, match=re.escape("clusters must be 2 colours of three numbers from -1 to 1")):
            load_decoder(tmp_path, config(2, 2), None, CPU)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_tokenizer_is_read_from_its_published_file(tmp_path: Path, suffix: str) -> None:
    state, file = reference.random_state(), tmp_path / f"vq{suffix}"
    torch.save({"model": state, "steps": 3}, file) if suffix == ".pt" else save_file(state, file)
    found = load_decoder(tmp_path, config(CODES, GRID), file, CPU)
    assert found is not None
    assert found.side == ZOOM * GRID
    assert found.pictures(torch.zeros(1, GRID * GRID, dtype=torch.long)).shape == (1, 3, ZOOM * GRID, ZOOM * GRID)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vq.safetensors"
    save_file(reference.random_state(), file)
    with pytest.raises(InputError, match=r"vq\.safetensors: its codebook has 30 codes, and the model 31; give"):
        load_decoder(tmp_path, config(31, GRID), file, CPU)
    save_file({"weight": torch.ones(1)}, file)
    with pytest.raises(InputError, match=r"vq\.safetensors: the state dict is not of LlamaGen's image tokenizer"):
        load_decoder(tmp_path, config(CODES, GRID), file, CPU)
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        load_decoder(tmp_path, config(CODES, GRID), tmp_path / "gone.pt", CPU)
