"""The compressed-tensors format, against the package of that name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from numprune.errors import InputError, IntegrityError
from numprune.export import checkpoint, headers, weights
from numprune.export.streaming import CheckpointLayers
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.layers import ModelLayers
from numprune.quantization import SCHEMES, Scheme, compressed_tensors, quantized_tensors, round_to_nearest
from tests.conftest import recast

Checkpoint = Callable[..., Path]
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
Q = "model.layers.0.self_attn.q_proj"


def scheme(name: str) -> Scheme:
    return Scheme(name, 32 if name == "w4a16" else None)


def quantized(folder: Path, name: str, rows: torch.Tensor | None = None) -> Path:
    out = folder.with_name(f"{folder.name}-{name}")
    quantize_checkpoint(folder, scheme(name), out, CPU, rows=rows)
    return out


def alter_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("columns", range(1, 18))
def test_packing_matches_compressed_tensors(columns: int) -> None:
    values = torch.randint(-8, 8, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(columns))
    packed = compressed_tensors.pack(values)
    assert torch.equal(packed, pack_to_int32(values, 4))
    assert torch.equal(compressed_tensors.unpack(packed, columns), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decompresses_to_our_weights(
    tiny_checkpoint: Checkpoint, name: str, dtype: torch.dtype
) -> None:
    """Exactly; it rounds the product to the data type of the scales."""
    folder = quantized(recast(tiny_checkpoint(), dtype), name, TOKENS)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors = load_file(folder / "model.safetensors")
    model, _ = checkpoint.load(folder)
    matrices = list(quantized_tensors(ModelLayers(model).anatomy))
    assert len(matrices) == 14
    for matrix in matrices:
        path = matrix.removesuffix("weight")
        parts = {key.removeprefix(path): value for key, value in tensors.items() if key.startswith(path)}
        assert set(parts) == set(compressor.compression_param_names(group))
        found = compressor.decompress(parts, group)["weight"]
        assert torch.equal(model.get_parameter(matrix).to(found.dtype), found)


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_gives_the_same_logits(tiny_checkpoint: Checkpoint, name: str) -> None:
    folder = quantized(tiny_checkpoint(tie_word_embeddings=True), name)
    ours, _ = checkpoint.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found, expected = theirs(TOKENS).logits, ours(TOKENS).logits
    # It spans a token with 127.5 steps of an 8-bit integer, vLLM and we with 127.
    assert (found - expected).std() < (0.06 if name == "w8a8" else 1e-4) * expected.std()


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_a_quantized_checkpoint_is_read_whole_and_layer_by_layer(
    tiny_checkpoint: Checkpoint, tmp_path: Path, family: str, name: str
) -> None:
    base = tiny_checkpoint(family)
    folder = quantized(base, name)
    model, _ = checkpoint.load(folder)
    dense, _ = checkpoint.load(base)
    layers = CheckpointLayers(folder, scratch=tmp_path)
    with torch.no_grad():
        entered = layers.enter(TOKENS)
        hidden = entered.hidden
        for index, arguments in enumerate(entered.arguments):
            with layers.layer(index) as layer:
                hidden = arguments.call(layer, hidden)
        with layers.head() as head:
            torch.testing.assert_close(head(TOKENS, hidden), model(TOKENS).logits)
        assert not torch.equal(model(TOKENS).logits, dense(TOKENS).logits)
    assert checkpoint.weight_bytes(folder) == sum(
        tensor.numel() * tensor.itemsize for tensor in load_file(folder / "model.safetensors").values()
    )
    assert weights.main_dtype(headers.read_headers(folder)) == torch.float32


def test_modules_outside_the_layers_stay_unquantized_and_are_listed_as_ignored(tiny_checkpoint: Checkpoint) -> None:
    base = recast(tiny_checkpoint("bert"), torch.bfloat16)
    folder = quantized(base, "w4a16")
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    kept = [name for name in after if ".encoder.layer." not in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["cls.predictions.decoder", "cls.predictions.transform.dense"]
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_variants_of_the_format_are_read(tiny_checkpoint: Checkpoint) -> None:
    """Fields that others write and that mean nothing here, and the data type of their scales."""
    folder = quantized(tiny_checkpoint(), "w8a8")
    expected = checkpoint.load(folder)[0](TOKENS).logits
    path = folder / "model.safetensors"
    tensors = load_file(path)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}
    save_file(tensors | {name: tensor.bfloat16() for name, tensor in scales.items()}, path, {"format": "pt"})
    alter_config(
        folder,
        lambda config: (
            config.update(version="0.9", global_compression_ratio=1.5, kv_cache_scheme=None, sparsity_config={}),
            config["config_groups"]["group_0"]["weights"].update(
                observer="mse", actorder="static", block_structure=None
            ),
        ),
    )
    torch.testing.assert_close(checkpoint.load(folder)[0](TOKENS).logits, expected, atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda config: (config.clear(), config.update(quant_method="gptq", bits=4)), "quant_method is 'gptq'"),
        (lambda config: config.update(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (lambda config: config["config_groups"].update(group_1={}), "group_1.targets is 'None'; it must be a list"),
        (lambda config: config.update(config_groups={}), "config_groups is empty"),
        (lambda config: config["config_groups"]["group_0"].update(targets=["Conv1d"]), "'Conv1d' is not 'Linear'"),
        (lambda config: config["config_groups"]["group_0"].update(targets=["re:(.*)*x"]), "targets: .*not supported"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(num_bits=3), "weights.num_bits is '3'"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=False), "weights.symmetric"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(group_size=16), "group_size is 16"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder is 'group'"),
        (lambda config: config["config_groups"]["group_0"].update(input_activations={}), "input_activations"),
        (lambda config: config.update(config_groups=[]), "config_groups is '\\[\\]'; it must be an object"),
    ],
)
def test_other_quantizations_are_refused_by_file_and_field(
    tiny_checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    folder = quantized(tiny_checkpoint(), "w4a16")
    alter_config(folder, change)
    with pytest.raises(InputError, match=rf"^{folder / 'config.json'}: .*{field}"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{Q}.weight_packed": None}, "weight_packed is missing"),
        ({f"{Q}.weight_scale": torch.ones(64, 3)}, r"weight_scale is F32 \[64, 3\]"),
        ({f"{Q}.weight_scale": torch.ones(64, 2, dtype=torch.int8)}, "weight_scale is I8 .* has one of F64, F32"),
        ({f"{Q}.weight_shape": torch.tensor([64, -64])}, r"q_proj.weight has shape \[64, -64\]"),
        ({f"{Q}.weight_shape": torch.tensor([64, 128])}, r"weight_packed is I32 .* where w4a16.* has I32 \[64, 16\]"),
        ({f"{Q}.weight_scale": torch.full((64, 2), torch.nan)}, "NaN"),
        (
            {f"{Q}.weight_scale": None, f"{Q}.weight_shape": None},
            "I32, but model.*q_proj.weight_scale is missing",
        ),
    ],
)
def test_damaged_tensors_are_named(
    tiny_checkpoint: Checkpoint, change: dict[str, torch.Tensor | None], says: str
) -> None:
    folder = quantized(tiny_checkpoint(), "w4a16")
    path = folder / "model.safetensors"
    tensors = {name: change.get(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
    with pytest.raises((InputError, IntegrityError), match=says):
        checkpoint.load(folder)


def mixed(folder: Path, rows: torch.Tensor | None = None) -> Path:
    """Attention of layer 0 in 4 bits, its MLP as it is, layer 1 in 8 bits."""
    int8 = Scheme("w8a8")
    schemes = {"layers.0.attention": Scheme("w4a16", 32), "layers.1.attention": int8, "layers.1.mlp": int8}
    out = folder.with_name(f"{folder.name}-mixed")
    quantize_checkpoint(folder, schemes, out, CPU, rows=rows)
    return out


def test_the_package_decompresses_a_scheme_for_each_block(tiny_checkpoint: Checkpoint) -> None:
    """What the package matches each layer to, and what it decompresses there, value for value."""
    folder = mixed(recast(tiny_checkpoint(), torch.bfloat16), TOKENS)
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(content)
    assert config.format == "mixed-precision"
    model, _ = checkpoint.load(folder)
    found: dict[str, str] = {}
    tensors = load_file(folder / "model.safetensors")
    for group in config.config_groups.values():
        for path, _ in match_named_modules(model, group.targets, config.ignore):
            compressor = BaseCompressor.get_value_from_registry(group.format)
            parts = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{path}.")}
            assert set(parts) == set(compressor.compression_param_names(group))
            weight = compressor.decompress(parts, group)["weight"]
            assert torch.equal(model.get_parameter(f"{path}.weight").to(weight.dtype), weight)
            found[path.removeprefix("model.layers.")] = group.format
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert found == {
        **{f"0.self_attn.{name}": "pack-quantized" for name in attention},
        **{f"1.self_attn.{name}": "int-quantized" for name in attention},
        **{f"1.mlp.{name}": "int-quantized" for name in mlp},
    }
    assert {f"model.layers.0.mlp.{name}" for name in mlp} < set(config.ignore)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits, expected = theirs(TOKENS).logits.float(), model(TOKENS).logits
    assert (logits - expected).std() < 0.1 * expected.std()


def test_blocks_of_one_scheme_need_no_names(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    schemes = {"layers.0.attention": Scheme("w8a8")}
    quantize_checkpoint(base, schemes, base.with_name("one"), CPU)
    content = json.loads((base.with_name("one") / "config.json").read_text())["quantization_config"]
    assert content["format"] == "int-quantized"
    assert [group["targets"] for group in content["config_groups"].values()] == [["Linear"]]
    before, after = (checkpoint.load(folder)[0].state_dict() for folder in (base, base.with_name("one")))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_scales_of_a_layer_that_the_configuration_leaves_out_are_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = mixed(tiny_checkpoint())
    alter_config(folder, lambda config: config["config_groups"]["group_0"]["targets"].remove(Q))
    with pytest.raises(IntegrityError, match=rf"{Q}.weight_scale is stored, but .* leaves {Q} unquantized"):
        checkpoint.load(folder)


def test_full_weights_beside_a_quantized_configuration_are_refused(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    folder = quantized(base, "w8a8")
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"layers\.0\.\S+\.weight is not quantized, but .* says w8a8"):
        checkpoint.audit(folder)
    alter_config(folder, lambda config: config["ignore"].append("re:.*_proj$"))
    checkpoint.audit(folder)  # others may leave a layer as it was


@pytest.mark.parametrize("name", ["fp8", "w8a8"])
def test_only_linear_layers_can_be_quantized(tiny_checkpoint: Checkpoint, name: str) -> None:
    """The inputs of an embedding are tokens; they would be rounded."""
    folder = quantized(tiny_checkpoint(), name)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    found = round_to_nearest(tensors["model.embed_tokens.weight"], scheme(name))
    tensors |= compressed_tensors.tensors_of("model.embed_tokens.weight", found, torch.float32)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        IntegrityError, match=r"embed_tokens\.weight is quantized, but it is not the weight of a Linear"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("ignore", "says"),
    [
        (["re:("], r"ignore: 're:\(' is not supported"),
        (["re:(.*)*x"], "is not supported"),
        (["re:" + ".*" * 4], "up to 3 of"),
        (5, "ignore is '5'; it must be a list of strings"),
        ([5], "must be a list of strings"),
        ("lm_head", "must be a list of strings"),
    ],
)
def test_ignored_modules_are_names_or_simple_patterns(tiny_checkpoint: Checkpoint, ignore: object, says: str) -> None:
    folder = quantized(tiny_checkpoint(), "w8a8")
    alter_config(folder, lambda config: config.update(ignore=ignore))
    with pytest.raises(InputError, match=says):
        checkpoint.audit(folder)
