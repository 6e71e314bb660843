"""A checkpoint read layer by layer equals the one loaded whole, and a damaged one is refused."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from numprune.errors import DiskError, IntegrityError
from numprune.export import checkpoint, headers
from numprune.export.streaming import CheckpointLayers
from numprune.layers import Layers, ModelLayers
from numprune.options import PruneOptions
from numprune.pruning import prune
from numprune.target import Target
from tests.conftest import LLAMA_LIKE, recast

TOKENS = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(0))


def sharded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The same checkpoint in many small shards of another data type."""
    target = folder.with_name("sharded")
    checkpoint.save(checkpoint.load(recast(folder, dtype))[0], folder, target, shard_bytes=40_000)
    return target


def forward_and_gradients(layers: Layers) -> list[torch.Tensor]:
    """Logits, and the gradients of a loss with respect to what enters each layer, last layer first."""
    entered = layers.enter(TOKENS)

    def through(index: int, hidden: torch.Tensor) -> torch.Tensor:
        with layers.layer(index) as layer:
            return entered.arguments[index].call(layer, hidden)

    with torch.no_grad():
        entering = [entered.hidden]
        for index in range(layers.anatomy.layers):
            entering.append(through(index, entering[-1]))
    hidden = entering.pop().detach().requires_grad_()
    with layers.head() as head:
        logits = head(TOKENS, hidden)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = [hidden.grad]
    for index in reversed(range(layers.anatomy.layers)):
        hidden = entering.pop().detach().requires_grad_()
        with layers.layer(index) as layer:  # the gradient is taken while the weights are there
            entered.arguments[index].call(layer, hidden).backward(gradients[-1])
        gradients.append(hidden.grad)
    return [logits.detach(), *gradients]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in LLAMA_LIKE), ("llama", {"tie_word_embeddings": True}), ("llama", {"mlp_bias": True})],
)
def test_streamed_layers_match_the_loaded_model(tiny_checkpoint, tmp_path, family, overrides) -> None:
    folder = sharded(tiny_checkpoint(family, **overrides))
    streamed = CheckpointLayers(folder, scratch=tmp_path)
    loaded = ModelLayers(checkpoint.load(folder)[0])
    assert streamed.anatomy.blocks == loaded.anatomy.blocks
    for ours, theirs in zip(forward_and_gradients(streamed), forward_and_gradients(loaded), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_layers_that_differ_or_skip_blocks_are_streamed(tiny_checkpoint, tmp_path) -> None:
    base = tiny_checkpoint(num_hidden_layers=3)
    model, _ = checkpoint.load(base)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    options = PruneOptions(0.35, criterion="magnitude", allocation="global", skips=True, target=Target(align=1))
    pruned = prune(model, TOKENS, options).model
    assert pruned.config.per_layer_config[1].skip == ["mlp"]
    checkpoint.save(pruned, base, tmp_path / "pruned")
    streamed = CheckpointLayers(tmp_path / "pruned", scratch=tmp_path)
    torch.testing.assert_close(forward_and_gradients(streamed)[0], pruned(TOKENS).logits)


def test_a_layer_holds_its_weights_only_inside_the_context(tiny_checkpoint, tmp_path) -> None:
    layers = CheckpointLayers(tiny_checkpoint(), scratch=tmp_path)
    with layers.layer(1) as later, layers.layer(0) as first:
        assert not torch.equal(later.mlp.up_proj.weight, first.mlp.up_proj.weight)
        first.mlp.up_proj.weight.data.zero_()
    assert all(parameter.is_meta for module in (first, later) for parameter in module.parameters())
    with layers.layer(0) as again:
        assert again.mlp.up_proj.weight.abs().max() > 0


def test_hidden_states_are_in_an_unlinked_file(tiny_checkpoint, tmp_path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    layers = CheckpointLayers(tiny_checkpoint(), scratch=scratch)
    device = os.stat(scratch).st_dev

    def mapped() -> int:
        """Bytes of deleted files of that file system that this process has mapped."""
        total = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, where, *rest = line.split()
            if rest[-1:] == ["(deleted)"] and where == f"{os.major(device):02x}:{os.minor(device):02x}":
                low, high = (int(bound, 16) for bound in span.split("-"))
                total += high - low
        return total

    before = mapped()
    room = layers.allocate(4, 1024, 64)
    room.fill_(1.5)
    assert mapped() - before == room.nbytes == 1 << 20
    assert list(scratch.iterdir()) == []
    assert room.dtype == torch.float32
    assert float(room.sum()) == 1.5 * room.numel()
    del room
    assert mapped() == before


def test_hidden_states_need_no_folder_that_is_created_later(tiny_checkpoint, tmp_path) -> None:
    layers = CheckpointLayers(tiny_checkpoint(), scratch=tmp_path / "new" / "folder")
    assert layers.allocate(2, 3).shape == (2, 3)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named(tiny_checkpoint, tmp_path) -> None:
    layers = CheckpointLayers(tiny_checkpoint(), scratch=tmp_path)
    with pytest.raises(DiskError, match=r"no space for 8,796,093,022,208 bytes of hidden states"):
        layers.allocate(1 << 41)


# --- checkpoints that are not what they say ----------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_values_that_are_not_finite_are_refused_by_name(tiny_checkpoint, tmp_path, name, value) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / headers.SINGLE)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / headers.SINGLE, {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"model\.safetensors: {name} has values that are NaN or infinite"):
        CheckpointLayers(folder, scratch=tmp_path)


def test_wrong_shapes_and_truncated_shards_are_refused(tiny_checkpoint, tmp_path) -> None:
    folder = sharded(tiny_checkpoint())
    last = max(folder.glob("model-*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-2])
    with pytest.raises(IntegrityError, match=rf"{last.name}: not a complete safetensors file"):
        CheckpointLayers(folder, scratch=tmp_path)
    last.write_bytes(whole)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 104'))
    with pytest.raises(
        IntegrityError, match=r"mlp\.down_proj\.weight has shape \[64, 96\], but .* implies \[64, 104\]"
    ):
        CheckpointLayers(folder, scratch=tmp_path)


def test_a_shard_truncated_later_is_an_error(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    layers = CheckpointLayers(folder, scratch=tmp_path)
    os.truncate(folder / headers.SINGLE, 50_000)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: ends in the middle of a tensor"), layers.layer(1):
        pass


def test_rotary_frequencies_stored_by_older_versions_are_not_layer_weights(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / headers.SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / headers.SINGLE, {"format": "pt"})
    layers = CheckpointLayers(folder, scratch=tmp_path)
    with layers.layer(0) as layer:
        assert "self_attn.rotary_emb.inv_freq" not in layer.state_dict()
    assert not any("inv_freq" in name for name in layers.stored)


def test_a_damaged_layer_is_an_error_where_it_is_used(tiny_checkpoint, tmp_path) -> None:
    folder = tiny_checkpoint(num_hidden_layers=3)
    layers = CheckpointLayers(folder, scratch=tmp_path)
    last = next(name for name in layers.stored if name.startswith("model.layers.2."))
    os.truncate(folder / headers.SINGLE, layers.stored[last].offset)
    for index in range(2):
        with layers.layer(index):
            pass
    with pytest.raises(IntegrityError, match=r"model\.safetensors: ends in the middle of a tensor"), layers.layer(2):
        pass


def test_an_interrupted_walk_reads_nothing_further(tiny_checkpoint, tmp_path) -> None:
    layers = CheckpointLayers(tiny_checkpoint(num_hidden_layers=3), scratch=tmp_path)
    with pytest.raises(KeyboardInterrupt), layers.layer(0):
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read layer")]
