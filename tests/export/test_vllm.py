import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import numprune.modeling  # noqa: F401 - registers the per-layer classes
from numprune.errors import InputError, IntegrityError
from numprune.export import checkpoint, manifest, vllm
from numprune.export.headers import read_headers
from numprune.export.weights import read_tensor
from numprune.plans import PLAN_FILE
from numprune.quantization import Scheme
from numprune.quantization.compressed_tensors import CONFIG_FIELD, QuantizationConfig, config_of, read_quantization
from tests.conftest import LLAMA_LIKE, build_tiny, byte_tokenizer, tiny_config, write_checkpoint

ROWS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))


def test_a_sharded_copy_loads_in_stock_transformers_with_the_same_logits(tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    made = vllm.export(source, out, shard_size="100KB")
    assert len([name for name in made.files if name.endswith(".safetensors")]) > 1
    assert manifest.verify(out).parents["checkpoint"] == manifest.folder_digest(source)
    assert made.kind == "vllm"
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (source, out)]
    with torch.no_grad():
        assert torch.equal(models[0](ROWS).logits, models[1](ROWS).logits)
    assert checkpoint.load_tokenizer(out).encode("abc") == byte_tokenizer().encode("abc")


@pytest.mark.parametrize(("family", "needs"), [("qwen2", ["--model-impl", "transformers"]), ("qwen3", [])])
def test_server_requirements_are_recorded(tmp_path, family, needs):
    narrow = build_tiny(family, num_attention_heads=2, num_key_value_heads=1)  # heads of 16 at a hidden size of 64
    facts = vllm.export(write_checkpoint(narrow, tmp_path / "pruned"), tmp_path / "out").facts
    assert (facts["query_heads"], facts["kv_heads"], facts["head_size"]) == ([2, 2], [1, 1], 16)
    assert (facts["needs"], facts["plugin"], facts["head_shapes"]) == (needs, False, 1)
    assert facts["tensor_parallel"] == [1, 2]
    assert facts["cpu"] is False


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"attention_bias": True}),
    ],
)
def test_settings_ignored_by_the_vllm_class_need_the_transformers_backend(family, settings):
    needs = [vllm.preflight(build_tiny(family, **changed).config)["needs"] for changed in ({}, settings)]
    assert needs == [[], ["--model-impl", "transformers"]]


@pytest.mark.parametrize("model_type", ["gpt2", "numprune_gpt2"])
def test_a_setting_unsupported_by_every_vllm_class_is_refused(model_type):
    layers = {"per_layer_config": {}} if model_type.startswith("numprune_") else {}
    config = build_tiny(model_type, **layers, reorder_and_upcast_attn=True).config
    with pytest.raises(InputError, match="vLLM does not run gpt2 with reorder_and_upcast_attn=True; leave vllm out"):
        vllm.preflight(config)


def test_windows_that_vllm_would_place_in_other_layers_are_refused():
    windows = ["sliding_attention", "full_attention"]
    vllm.check_settings(tiny_config("gpt_oss", sliding_window=8, num_hidden_layers=4, layer_types=2 * windows))
    dropped = tiny_config("gpt_oss", sliding_window=8, num_hidden_layers=3, layer_types=[*windows[1:], *windows])
    with pytest.raises(InputError, match=r"layers 0, 2, 4, … a sliding window.*but layer 0 has full_attention"):
        vllm.check_settings(dropped)


def test_expert_sizes_are_recorded(tmp_path):
    narrow = build_tiny("qwen2_moe", num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    facts = vllm.preflight(narrow.config)
    assert facts["intermediate_size"] == [96, 40, 40, 40]  # of the MLP and of the shared experts
    assert (facts["experts"], facts["channels_per_expert"]) == ([5, 5, 5], [24, 24, 24])
    assert facts["needs"] == ["--model-impl", "transformers"]
    assert vllm.preflight(build_tiny("mixtral", intermediate_size=12).config)["tensor_parallel"] == [1, 2, 4]


def test_a_shared_expert_unknown_to_the_family_is_refused():
    config = build_tiny("qwen3_moe", shared_expert_intermediate_size=32).config
    with pytest.raises(InputError, match="shared_expert_intermediate_size is set, but qwen3_moe has no shared expert"):
        vllm.preflight(config)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_layers_that_differ_are_exported_for_the_plug_in(tmp_path, family):
    layers = {
        0: {"skip": ["attention"], "intermediate_size": 32},
        1: {"num_attention_heads": 2, "num_key_value_heads": 1, "skip": ["mlp"]},
        2: {"num_attention_heads": 2},  # one query head in each KV group
    }
    model = build_tiny(f"numprune_{family}", num_hidden_layers=4, per_layer_config=layers)
    source, out = write_checkpoint(model, tmp_path / "pruned"), tmp_path / "out"
    made = vllm.export(source, out)
    assert manifest.verify(out) == made
    facts = made.facts
    assert (facts["query_heads"], facts["kv_heads"]) == ([0, 2, 2, 4], [0, 1, 2, 2])
    assert facts["intermediate_size"] == [32, 0, 96, 96]
    assert (facts["needs"], facts["plugin"], facts["head_shapes"]) == ([], True, 3)
    assert facts["tensor_parallel"] == [1, 2]  # one KV head can be copied to two, two query heads not to four
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (source, out)]
    with torch.no_grad():
        assert torch.equal(models[0](ROWS).logits, models[1](ROWS).logits)


def test_dense_weights_beside_a_pruned_configuration_are_refused(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(IntegrityError, match=r"mlp\.down_proj\.weight has shape \[64, 96\]"):
        vllm.export(source, tmp_path / "out")


def test_a_cast_checkpoint_names_its_precision_everywhere(tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint(), tmp_path / "out"
    (source / PLAN_FILE).write_text("{}", encoding="utf-8")
    (source / "README.md").write_text(
        "| stored in | float32 |\n| KV cache per token | 1,024 → 512 bytes |\n", encoding="utf-8"
    )
    made = vllm.export(source, out, shard_size="100KB", dtype="bfloat16")
    assert made.facts["dtype"] == "bfloat16"
    stored = read_headers(out)
    before = read_headers(source)
    assert stored.keys() == before.keys()
    for name, header in stored.items():
        assert torch.equal(read_tensor(header), read_tensor(before[name]).to(torch.bfloat16))
    content = json.loads((out / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"
    assert (out / "README.md").read_text() == "| stored in | bfloat16 |\n| KV cache per token | 1,024 → 256 bytes |\n"
    assert checkpoint.weight_bytes(out) == checkpoint.weight_bytes(source) / 2


def test_a_cast_that_overflows_names_the_tensor(tmp_path):
    model = build_tiny()
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(IntegrityError, match=r"^model\.norm\.weight: 1e\+05 is out of range of float16"):
        vllm.export(write_checkpoint(model, tmp_path / "base"), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def quantized(scheme: Scheme) -> QuantizationConfig | None:
    return read_quantization({CONFIG_FIELD: config_of({"model.layers.0.mlp.up_proj": scheme}, ["lm_head"])})


def test_the_scheme_determines_which_runtimes_apply() -> None:
    config = build_tiny("llama", head_dim=32, intermediate_size=128).bfloat16().config
    config.dtype = torch.bfloat16
    groups = vllm.preflight(config, quantized(Scheme("w4a16", 64)))
    assert (groups["quantization"], groups["cpu"]) == ("w4a16, groups of 64", True)
    assert (groups["tensor_parallel"], vllm.preflight(config)["tensor_parallel"]) == ([1, 2], [1, 2, 4])
    assert not vllm.preflight(config, quantized(Scheme("fp8")))["cpu"]
    config.dtype = torch.float32
    assert vllm.preflight(config, quantized(Scheme("w8a8")))["cpu"]
    for scheme, device in (("w4a16", "cpu"), ("w8a8", "gpu")):
        with pytest.raises(
            InputError, match=f"stored in float32, and vLLM's kernels for {scheme} on a {device.upper()}"
        ):
            vllm.check_quantized(Scheme(scheme), torch.float32, device)
    with pytest.raises(InputError, match="only on CPUs with AMX"):
        vllm.check_quantized(Scheme("fp8"), torch.bfloat16, "cpu")
