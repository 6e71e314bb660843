"""A rotated model computes the same, in every family whose hidden size can be cut."""

import pytest
import torch

from numprune.calibration import Walker
from numprune.export.streaming import CheckpointLayers
from numprune.families import FAMILIES
from numprune.layers import CopiedLayers
from numprune.rotation import RotatedLayers
from tests.conftest import build_tiny, write_checkpoint
from tests.numprune.test_hidden import NARROWABLE, ROWS, logits


def orthogonal(size=64):
    draw = torch.Generator().manual_seed(2)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


@torch.no_grad()
def output_of(layers):
    walker = Walker(layers, ROWS.shape[1:])
    hidden = walker.embed(ROWS).hidden
    for index in range(layers.anatomy.layers):
        with layers.layer(index) as layer:
            walker.through(layer, index, hidden, hidden)
    with layers.head() as head:
        return hidden, head(ROWS, hidden)


@pytest.mark.parametrize("family", NARROWABLE)
def test_the_rotated_model_gives_the_same_logits(family):
    tied = True in FAMILIES[family].requires.get("tie_word_embeddings", (True,))
    model = build_tiny(family, tie_word_embeddings=tied)
    with torch.no_grad():  # gains of 1 would hide a wrong place
        for name, gain in model.named_parameters():
            if "norm" in name and gain.dim() == 1:
                gain.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    wanted = logits(model)
    hidden, _ = output_of(CopiedLayers(model))
    rotation = orthogonal()
    turned, found = output_of(RotatedLayers(CopiedLayers(model), rotation))
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    close = {"atol": 1e-5 * float(hidden.abs().max()), "rtol": 0}
    torch.testing.assert_close(turned, (hidden.double() @ rotation).float(), **close)
    assert torch.equal(logits(model), wanted)


def test_a_rotated_checkpoint_is_read_layer_by_layer(tmp_path):
    model = build_tiny()
    folder = write_checkpoint(model, tmp_path / "base")
    layers = RotatedLayers(CheckpointLayers(folder, scratch=tmp_path), orthogonal())
    assert not layers.anatomy.is_tied
    wanted = logits(model)
    torch.testing.assert_close(output_of(layers)[1], wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
