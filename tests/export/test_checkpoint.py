"""Checkpoints: complete ones load unchanged, others are refused with the name of the tensor or file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from numprune.errors import InputError, IntegrityError
from numprune.export import checkpoint, headers
from numprune.export.streaming import CheckpointLayers
from numprune.surgery import skeleton
from tests.conftest import recast

Checkpoint = Callable[..., Path]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
Q = "model.layers.1.self_attn.q_proj.weight"


def shards(folder: Path) -> Path:
    """Write the same model again, in shards."""
    target = folder.with_name(folder.name + "-shards")
    checkpoint.save(checkpoint.load(folder)[0], folder, target, shard_bytes=100_000)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_load_and_save_keep_every_weight(tiny_checkpoint: Checkpoint, family: str) -> None:
    folder = tiny_checkpoint(family=family)
    model, tokenizer = checkpoint.load(folder)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    again, _ = checkpoint.load(shards(folder))
    tokens = torch.tensor([tokenizer.encode("prune")])
    assert model(tokens).logits.equal(again(tokens).logits)


def test_tied_weights_are_stored_once(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    assert "lm_head.weight" not in checkpoint.audit(folder)
    checkpoint.load(folder)


def per_layer(folder: Path) -> Path:
    sizes = {0: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}}
    config = AutoConfig.for_model(
        **{**AutoConfig.from_pretrained(folder).to_dict(), "model_type": "numprune_llama", "per_layer_config": sizes}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_layers_that_differ_load_and_are_audited_layer_by_layer(tiny_checkpoint: Checkpoint) -> None:
    folder = per_layer(tiny_checkpoint())
    model, _ = checkpoint.load(folder)
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [16, 32]
    tensors = load_file(folder / headers.SINGLE)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].clone()
    save_file(tensors, folder / headers.SINGLE)
    with pytest.raises(IntegrityError, match=r"layers\.0\.self_attn\.k_proj\.weight has shape \[32, 64\]"):
        checkpoint.load(folder)


def test_every_tensor_keeps_its_stored_data_type(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Whatever config.json says; it then says what most of the bytes are."""
    folder = recast(tiny_checkpoint(), torch.bfloat16, **{"model.norm.weight": torch.float32})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert checkpoint.read_config(folder).dtype == torch.bfloat16
    model, _ = checkpoint.load(folder)
    checkpoint.save(model, folder, tmp_path / "out")
    before, after = (checkpoint.audit(place) for place in (folder, tmp_path / "out"))
    assert {name: header.dtype for name, header in after.items()} == {name: h.dtype for name, h in before.items()}
    assert after["model.norm.weight"].dtype == "F32"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert checkpoint.weight_bytes(tmp_path / "out") == checkpoint.weight_bytes(folder)
    assert model.dtype == torch.float32  # what is in memory is left alone


@pytest.mark.parametrize(
    ("value", "words"),
    [(70_000.0, r"7e\+04 is out of range of float16 \(6\.55e\+04\)"), (torch.nan, "NaN or infinite")],
)
def test_an_out_of_range_value_is_named(tiny_checkpoint: Checkpoint, value: float, words: str) -> None:
    folder = recast(tiny_checkpoint(), torch.float16)
    model, _ = checkpoint.load(folder)
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = value
    with pytest.raises(IntegrityError, match=rf"layers\.1\.mlp\.down_proj\.weight: .*{words}"):
        checkpoint.save(model, folder, folder.with_name("out"))
    assert not list(folder.with_name("out").glob("*.safetensors"))


# --- weights that are not what the configuration says ------------------------------------------------


def alter(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / headers.SINGLE)
    change(tensors)
    save_file(tensors, folder / headers.SINGLE)


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            put(Q, 80, 64),
            rf"{Q} has shape \[80, 64\], but config.json implies \[64, 64\]",
        ),  # larger: vLLM would truncate
        (put(Q, 48, 64), rf"{Q} has shape \[48, 64\]"),
        (put(Q, 64 * 64), rf"{Q} has shape \[4096\]"),
        (lambda tensors: tensors.pop(Q), rf"{Q} \[64, 64\] is missing"),
        (
            put("model.layers.2.self_attn.q_proj.weight", 64, 64),
            r"layers\.2\.self_attn\.q_proj\.weight is stored, but .* has no such tensor",
        ),
        (put("model.layers.1.self_attn.q_proj.bias", 64), r"q_proj\.bias is stored, but .* has no such tensor"),
    ],
)
def test_audit_names_the_tensor(tiny_checkpoint: Checkpoint, change: Callable, named: str) -> None:
    folder = tiny_checkpoint()
    alter(folder, change)
    for check in (checkpoint.audit, checkpoint.load):
        with pytest.raises(IntegrityError, match=named):
            check(folder)


def test_a_configuration_smaller_than_the_weights_is_detected(tiny_checkpoint: Checkpoint) -> None:
    """Dense weights beside a pruned configuration: what vLLM serves wrongly without a word."""
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=r"mlp\.down_proj\.weight has shape \[64, 96\].*\[64, 64\]"):
        checkpoint.load(folder)


def test_rotary_frequencies_stored_by_old_checkpoints_are_accepted(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    alter(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", 8))
    checkpoint.load(folder)


def test_tied_weights_that_differ_are_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    embedding = load_file(folder / headers.SINGLE)["model.embed_tokens.weight"]
    alter(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    checkpoint.load(folder)
    alter(folder, lambda tensors: tensors["lm_head.weight"][5, 5].add_(1))
    with pytest.raises(
        IntegrityError, match=r"differs from model\.embed_tokens\.weight.*\"tie_word_embeddings\": false"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_checkpoint: Checkpoint, value: float) -> None:
    folder = tiny_checkpoint()
    alter(folder, lambda tensors: tensors[Q][3, 3].fill_(value))
    with pytest.raises(IntegrityError, match=Q):
        checkpoint.load(folder)


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_truncated_file_is_named(tiny_checkpoint: Checkpoint, keep: int) -> None:
    folder = tiny_checkpoint()
    path = folder / headers.SINGLE
    os.truncate(path, keep % path.stat().st_size)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: not a complete"):
        checkpoint.load(folder)


def test_shards_and_their_index_must_agree(tiny_checkpoint: Checkpoint) -> None:
    folder = shards(tiny_checkpoint())
    index = json.loads((folder / headers.INDEX).read_text())
    shard = index["weight_map"][Q]

    def write(weight_map: object) -> None:
        (folder / headers.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    write({name: file for name, file in index["weight_map"].items() if name != Q})
    with pytest.raises(IntegrityError, match=rf"{shard}: contains {Q}"):
        checkpoint.audit(folder)
    write({**index["weight_map"], "ghost": shard})
    with pytest.raises(IntegrityError, match=rf"{shard}: lacks ghost"):
        checkpoint.audit(folder)
    for escape in ("../model.safetensors", "/model.safetensors", "model.bin", 1):
        write({**index["weight_map"], Q: escape})
        with pytest.raises(IntegrityError, match="not the name of a safetensors file"):
            checkpoint.audit(folder)
    for wrong in ([], None):
        write(wrong)
        with pytest.raises(IntegrityError, match="not an index"):
            checkpoint.audit(folder)
    write(index["weight_map"])
    checkpoint.audit(folder)
    (folder / shard).unlink()
    with pytest.raises(IntegrityError, match=f"{shard}: missing"):
        checkpoint.load(folder)


def test_a_single_file_beside_shards_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (shards(folder) / headers.INDEX).rename(folder / headers.INDEX)
    with pytest.raises(InputError, match="stale"):
        checkpoint.audit(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", r"config\.json: missing"), ("model.safetensors", "neither"), ("tokenizer.json", "no tokenizer")],
)
def test_a_missing_file_is_named(tiny_checkpoint: Checkpoint, file: str, message: str) -> None:
    folder = tiny_checkpoint()
    (folder / file).unlink()
    with pytest.raises(InputError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model_type": "no-such"}', '{"hidden_size": 64}', '{"model_type": "llama", "hidden_size": "a"}'],
)
def test_a_malformed_configuration_is_named(tiny_checkpoint: Checkpoint, text: str) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoint.load(folder)


def test_unsupported_architectures_are_refused_by_name(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(InputError, match="MambaForCausalLM"):
        checkpoint.load(folder)


def test_quantized_weights_and_other_formats_are_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    alter(folder, lambda tensors: tensors.update({Q: torch.zeros(64, 64, dtype=torch.int8)}))
    with pytest.raises(InputError, match=f"{Q} is stored as I8"):
        checkpoint.load(folder)
    (folder / headers.SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"convert pytorch_model\.bin"):
        checkpoint.load(folder)


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(vocab_size=200, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with pytest.raises(InputError, match=r"259 tokens.*vocab_size=200"):
        checkpoint.load(folder)


def test_resolve(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    assert checkpoint.resolve(str(folder)) == folder
    for absent in (tmp_path / "nowhere", "a/b/c"):
        with pytest.raises(InputError, match="no such folder"):
            checkpoint.resolve(absent)
    with pytest.raises(InputError, match="not available from the hub"):
        checkpoint.resolve("numprune-tests/no-such-model")  # offline in the tests: an error, not a download


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_weights_named_by_the_base_model_are_read(
    tiny_checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint("gpt2")
    model, _ = checkpoint.load(folder)
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(folder / headers.SINGLE).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=dtype)
    save_file(tensors, folder / headers.SINGLE, {"format": "pt"})
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        assert checkpoint.load(folder)[0](tokens).logits.equal(expected)
        layers = CheckpointLayers(folder, scratch=tmp_path)
        entered = layers.enter(tokens)
        hidden = entered.hidden
        for index, arguments in enumerate(entered.arguments):
            with layers.layer(index) as layer:
                hidden = arguments.call(layer, hidden)
        with layers.head() as head:
            torch.testing.assert_close(head(tokens, hidden), expected)


def test_a_bias_of_a_missing_layer_is_not_taken_for_a_causal_mask(tiny_checkpoint: Checkpoint) -> None:
    path = tiny_checkpoint("gpt2") / headers.SINGLE
    save_file(load_file(path) | {"transformer.h.2.attn.c_attn.bias": torch.ones(192)}, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"h\.2\.attn\.c_attn\.bias is stored, but .* has no such tensor"):
        checkpoint.audit(path.parent)


def test_loading_shows_no_library_progress_bar(
    tiny_checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    folder = tiny_checkpoint()
    capfd.readouterr()
    checkpoint.load(folder)
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()  # those of downloads stay


def test_a_setting_that_transformers_does_not_know_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "nonsense"}
    (folder / "config.json").write_text(json.dumps(config))
    for read in (checkpoint.load, lambda folder: skeleton(checkpoint.read_config(folder))):
        with pytest.raises(InputError, match=r"config\.json: transformers cannot build a model from it: .*nonsense"):
            read(folder)
