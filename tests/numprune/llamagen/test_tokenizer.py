"""The decoder of LlamaGen's image tokenizer computes what the published one does."""

import re

import pytest
import torch

from numprune.errors import InputError, IntegrityError
from numprune.llamagen.tokenizer import ImageTokenizer, TokenizerDecoder, TokenizerSizes, sizes_of
from tests.numprune.llamagen import tokenizer_reference as reference
from tests.numprune.llamagen.tokenizer_reference import BLOCKS, CODES, DEPTH, GRID, LATENT, ZOOM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state():
    return reference.random_state()


def test_pictures_are_those_of_the_published_decoder(state):
    codes = torch.randint(CODES, (5, GRID * GRID), generator=torch.Generator().manual_seed(1))
    expected = reference.images(state, codes)
    assert float(expected.std()) > 0.3
    tokenizer = ImageTokenizer(state, GRID * GRID, CPU)
    assert tokenizer.side == expected.shape[-1] == ZOOM * GRID
    found = tokenizer.pictures(codes)  # in two batches
    assert (found.dtype, found.shape) == (torch.uint8, (5, 3, 32, 32))
    levels = 127.5 * (expected.clamp(-1, 1) + 1)
    assert float((found - levels).abs().max()) < 0.51  # rounded
    assert float((found.float() > 0).float().mean()) > 0.5


def test_half_precision_files_are_decoded_in_float32(state):
    half = ImageTokenizer({name: value.half() for name, value in state.items()}, GRID * GRID, CPU)
    codes = torch.arange(GRID * GRID)[None] % CODES
    apart = half.pictures(codes).int() - ImageTokenizer(state, GRID * GRID, CPU).pictures(codes).int()
    assert int(apart.abs().max()) <= 2


def test_sizes_are_read_from_the_tensors(state):
    found = sizes_of(state)
    assert (found.codes, found.latent_channels, found.blocks, found.depth) == (CODES, LATENT, BLOCKS, DEPTH)
    assert found.zoom == ZOOM


@pytest.mark.parametrize(("blocks", "zoom"), [((512, 256, 256, 128, 128), 16), ((512, 256, 256, 128), 8)])
def test_the_published_sizes_are_known(blocks, zoom):
    """VQ-16 and VQ-8: 128 channels times 4, 2, 2, 1, 1 and 4, 2, 2, 1."""
    with torch.device("meta"):
        made = TokenizerDecoder(TokenizerSizes(16384, 8, 256, blocks, 3))
    found = sizes_of(made.state_dict())
    assert (found.codes, found.code_channels, found.blocks, found.zoom) == (16384, 8, blocks, zoom)
    tokenizer = ImageTokenizer(made.state_dict(), 256, torch.device("meta"))
    assert tokenizer.side == 16 * zoom


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quantize.embedding.weight": None},
            "not of LlamaGen's image tokenizer: it lacks 'quantize.embedding.weight'",
        ),
        ({"decoder.mid.1.q.bias": None}, "it lacks 'decoder.mid.1.q.bias'"),
        ({"decoder.up.0.block": torch.ones(1)}, "it has the unknown 'decoder.up.0.block'"),
        ({"post_quant_conv.weight": torch.ones(4)}, "post_quant_conv.weight has shape [4], which is not that of"),
        ({"decoder.conv_out.bias": torch.ones(1)}, "decoder.conv_out.bias has shape [1]; the other tensors need [3]"),
        (
            {"decoder.conv_blocks.1.res.0.conv1.weight": torch.ones(33, 64, 3, 3)},
            "the state dict has blocks of 33 channels; they must be multiples of 32",
        ),
    ],
)
def test_other_state_dicts_are_refused(state, change, message):
    changed = {name: value for name, value in (state | change).items() if value is not None}
    with pytest.raises(InputError, match=re.escape(message)):
        sizes_of(changed)


def test_damaged_weights_are_named(state):
    damaged = state | {"decoder.conv_out.bias": torch.full((3,), torch.nan)}
    with pytest.raises(IntegrityError, match="the decoder's images are not finite"):
        ImageTokenizer(damaged, GRID * GRID, CPU).pictures(torch.zeros(1, GRID * GRID, dtype=torch.long))
