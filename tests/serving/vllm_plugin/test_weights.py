import json

import pytest
import torch
from numprune_vllm.sizes import Expected
from numprune_vllm.weights import INDEX, audit, checked
from safetensors.torch import save_file

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBEDDING: (7, 4), OUTPUT: (7, 4), "model.norm.weight": (4,)}
WEIGHTS = {name: torch.randn(shape) for name, shape in SHAPES.items()}
UNTIED, TIED = Expected(SHAPES, {}), Expected(SHAPES, {OUTPUT: EMBEDDING})


def test_matching_tensors_are_passed_on_unchanged_in_any_order():
    weights = {**dict(reversed(WEIGHTS.items())), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    passed = dict(checked(weights.items(), UNTIED))
    assert passed.keys() == WEIGHTS.keys()
    assert all(passed[name] is tensor for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_output_matrix_may_be_stored_or_not(order):
    twins = {**WEIGHTS, OUTPUT: WEIGHTS[EMBEDDING].clone()}
    weights = dict(list(twins.items())[::order])
    assert OUTPUT not in dict(checked(weights.items(), TIED))
    del weights[OUTPUT]
    assert dict(checked(weights.items(), TIED)).keys() == weights.keys()


@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_output_matrix_that_differs_is_refused(order):
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        list(checked(list(WEIGHTS.items())[::order], TIED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": torch.ones(5)}, r"model\.norm\.weight: stored with shape \[5\], .* implies \[4\]"),
        ({"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight: stored with shape \[3\], .* implies \[4\]"),
        ({EMBEDDING: torch.ones(4, 7)}, r"stored with shape \[4, 7\], .* implies \[7, 4\]"),
        ({"model.norm.bias": torch.ones(4)}, r"model\.norm\.bias: stored, but .* has no such tensor"),
        (
            {"model.norm.weight": torch.ones(4).char()},
            r"norm\.weight: stored as I8, .* F32 or BF16 or F16 or F64; .*export",
        ),
        ({EMBEDDING: torch.ones(7, 4, dtype=torch.uint8)}, "stored as torch.uint8"),
    ],
)
def test_an_unexpected_tensor_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        list(checked((WEIGHTS | change).items(), UNTIED))


@pytest.mark.parametrize(
    ("names", "tied", "message"),
    [
        ([EMBEDDING, OUTPUT], False, r"model\.norm\.weight \[4\]: not stored"),
        ([EMBEDDING], False, r"lm_head\.weight \[7, 4\]: not stored, .* \(1 more are missing\)"),
        ([OUTPUT, "model.norm.weight"], True, r"model\.embed_tokens\.weight \[7, 4\]: not stored"),
        ([EMBEDDING, OUTPUT, "model.norm.weight", OUTPUT], False, r"lm_head\.weight: stored twice"),
    ],
)
def test_every_tensor_must_occur_exactly_once(names, tied, message):
    with pytest.raises(ValueError, match=message):
        list(checked([(name, WEIGHTS[name]) for name in names], TIED if tied else UNTIED))


def test_files_are_audited_by_their_headers(tmp_path):
    names = sorted(WEIGHTS)
    shards = {"a.safetensors": names[:1], "b.safetensors": names[1:]}
    for shard, held in shards.items():
        save_file({name: WEIGHTS[name] for name in held}, tmp_path / shard)
    audit(tmp_path, UNTIED)

    save_file({EMBEDDING: torch.ones(7, 4)}, tmp_path / "consolidated.safetensors")  # a copy in another format
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: stored twice"):
        audit(tmp_path, UNTIED)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / INDEX).write_text(json.dumps(index))  # says which files vLLM reads
    audit(tmp_path, UNTIED)

    with pytest.raises(ValueError, match=r"model\.norm\.weight: stored with shape \[4\], .* implies \[3\]"):
        audit(tmp_path, Expected(SHAPES | {"model.norm.weight": (3,)}, {}))
    with pytest.raises(ValueError, match=r"model\.norm\.bias \[4\]: not stored"):
        audit(tmp_path, Expected(SHAPES | {"model.norm.bias": (4,)}, {}))


def test_the_data_types_of_quantized_tensors_are_audited(tmp_path):
    names = ("layer.weight", "layer.weight_scale")
    expected = Expected({names[0]: (2, 3), names[1]: (2, 1)}, dtypes={names[0]: (torch.int8,)})
    for scales in (torch.float32, torch.bfloat16):
        tensors = {names[0]: torch.ones(2, 3, dtype=torch.int8), names[1]: torch.ones(2, 1, dtype=scales)}
        save_file(tensors, tmp_path / "model.safetensors")
        audit(tmp_path, expected)
        assert dict(checked(tensors.items(), expected)).keys() == tensors.keys()
    wrong = {"layer.weight": torch.float8_e4m3fn, "layer.weight_scale": torch.int32}
    for name, dtype in wrong.items():
        save_file(tensors | {name: tensors[name].to(dtype)}, tmp_path / "model.safetensors")
        message = {
            names[0]: "layer.weight: stored as F8_E4M3, .* I8;",
            names[1]: "weight_scale: stored as I32, .* F32 or",
        }
        with pytest.raises(ValueError, match=message[name]):
            audit(tmp_path, expected)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no safetensors files"):
        audit(tmp_path, UNTIED)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/model.safetensors"])
def test_no_file_outside_the_folder_is_read(tmp_path, name):
    folder = tmp_path / "a"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file(WEIGHTS, place / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, name)}))
    with pytest.raises(ValueError, match="is not a file name in this folder"):
        audit(folder, UNTIED)
