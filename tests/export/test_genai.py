"""The export for ONNX Runtime: every supported network, in our runtime and in onnxruntime-genai."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.export import checkpoint, genai, manifest, onnx, onnx_fused, onnx_quantized, parity
from numprune.export.runtimes import open_runtime
from numprune.export.runtimes.ort_fused import ROOM
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import BlockSchemes, Scheme
from numprune.quantization.lm_head import LmHeadBits
from tests.conftest import TINY, recast
from tests.export.networks import NETWORKS, SIZES, error, per_layer

Checkpoint = Callable[..., Path]
EMBEDDED = Path(__file__).parents[2] / "flows" / "embedded" / "model"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(tiny_checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    base = tiny_checkpoint(**NETWORKS[name])
    genai.export(base, tmp_path / "out")
    assert error(base, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_that_differ(tiny_checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    base = per_layer(tiny_checkpoint(family=family), family, SIZES)
    genai.export(base, tmp_path / "out")
    assert error(base, tmp_path / "out") < 1e-4


SKIPS: dict[int, dict[str, Any]] = {
    0: {"skip": ["attention"], "intermediate_size": 40},
    1: SIZES[1],
    2: {"skip": ["mlp"]},
    3: {},
}


def generated(folder: Path, prompts: Sequence[torch.Tensor], steps: int) -> list[list[int]]:
    """What onnxruntime-genai generates greedily from prompts (S,) that it runs together."""
    genai_runtime = pytest.importorskip("onnxruntime_genai")
    model = genai_runtime.Model(str(folder))
    width = max(map(len, prompts))
    settings = genai_runtime.GeneratorParams(model)
    settings.set_search_options(
        max_length=width + steps, min_length=width + steps, do_sample=False, batch_size=len(prompts)
    )
    padding = json.loads((folder / genai.CONFIG_FILE).read_text())["model"]["pad_token_id"]
    tokens = np.full((len(prompts), width), padding, dtype=np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt.numpy()
    generator = genai_runtime.Generator(model, settings)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[width:].tolist() for row in range(len(prompts))]


@torch.inference_mode()
def greedy(base: Path, prompt: torch.Tensor, steps: int) -> list[int]:
    """What the checkpoint generates in torch, without a cache."""
    model, _ = checkpoint.load(base)
    tokens = prompt[None]
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


def text(base: Path, length: int) -> torch.Tensor:
    tokenizer = checkpoint.load_tokenizer(base)
    return torch.tensor(
        tokenizer.encode("The river rose over its banks, and the town moved up the hill. " * 4)[:length]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "equal lengths", "ragged"])
def test_genai_generates_the_same_as_torch(tmp_path: Path, name: str) -> None:
    genai.export(EMBEDDED, tmp_path / "out")
    lengths = {"alone": [24], "equal lengths": [24, 24], "ragged": [24, 9, 1]}[name]
    prompts = [text(EMBEDDED, length) for length in lengths]
    assert generated(tmp_path / "out", prompts, 16) == [greedy(EMBEDDED, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize("sizes", [SIZES, SKIPS], ids=["layers that differ", "layers that skip a block"])
def test_genai_generates_the_same_as_torch_with_per_layer_sizes(
    tiny_checkpoint: Checkpoint, tmp_path: Path, sizes: dict[int, dict[str, Any]]
) -> None:
    base = per_layer(tiny_checkpoint(num_hidden_layers=len(sizes)), "llama", sizes)
    genai.export(base, tmp_path / "out")
    prompts = [text(base, length) for length in (24, 9)]
    assert generated(tmp_path / "out", prompts, 16) == [greedy(base, prompt, 16) for prompt in prompts]
    assert parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)["logit_error_max"] < 1e-4


def test_genai_generates_the_same_as_torch_with_windows_in_some_layers(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = tiny_checkpoint(**NETWORKS["smollm3 with a window in some layers"])
    genai.export(base, tmp_path / "out")
    prompts = [text(base, length) for length in (24, 9)]
    assert generated(tmp_path / "out", prompts, 16) == [greedy(base, prompt, 16) for prompt in prompts]


def test_genai_tokenizes_like_the_checkpoint(tmp_path: Path) -> None:
    genai_runtime = pytest.importorskip("onnxruntime_genai")
    genai.export(EMBEDDED, tmp_path / "out")
    tokenizer = genai_runtime.Tokenizer(genai_runtime.Model(str(tmp_path / "out")))
    sentence = "It rained, and then it didn't: 3.14 metres of snow."
    assert tokenizer.encode(sentence).tolist() == checkpoint.load_tokenizer(EMBEDDED).encode(sentence)


def test_the_folder_describes_itself(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(num_hidden_layers=1)
    made = genai.export(base, tmp_path / "out")
    assert manifest.verify(tmp_path / "out") == made
    assert (made.kind, made.facts["flavour"], made.facts["dtype"]) == ("onnxruntime", "onnxruntime", "float32")
    assert made.parents == {"checkpoint": manifest.folder_digest(base)}
    model = onnx_format.load(tmp_path / "out" / onnx.MODEL_FILE, load_external_data=False)
    assert {entry.domain for entry in model.opset_import} == {"", "com.microsoft"}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMul") == 5  # one for queries, keys and values, one for gate and up
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2
    settings = json.loads((tmp_path / "out" / genai.CONFIG_FILE).read_text())
    special = {name: TINY[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert special.items() <= settings["model"].items()
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == 256


def test_a_growing_cache_keeps_its_contents(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(num_hidden_layers=1, max_position_embeddings=2 * ROOM)
    genai.export(base, tmp_path / "out")
    model, _ = checkpoint.load(base)
    runtime = open_runtime("onnxruntime", tmp_path / "out", device="cpu", threads=1)
    tokens = torch.randint(0, 250, (2, ROOM + 8), generator=torch.Generator().manual_seed(0))
    runtime.prefill(tokens[:, :4], last_only=True)
    for position in range(4, tokens.shape[1]):
        found = runtime.decode(tokens[:, position : position + 1])
    with torch.inference_mode():
        torch.testing.assert_close(found, model(tokens).logits[:, -1], atol=1e-4, rtol=0)


def test_positions_beyond_the_context_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    genai.export(tiny_checkpoint(num_hidden_layers=1, max_position_embeddings=8), tmp_path / "out")
    runtime = open_runtime("onnxruntime", tmp_path / "out", device="cpu", threads=1)
    runtime.prefill(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="9 positions exceed the model's max_position_embeddings=8"):
        runtime.decode(torch.zeros(1, 1, dtype=torch.int64))


def test_half_precision(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = recast(tiny_checkpoint(), torch.float16)
    genai.export(base, tmp_path / "out", dtype="float16")
    found = parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)
    assert found["candidate"]["dtype"] == "float16"
    assert found["candidate"]["kv_bytes_per_token"] == 2 * 2 * 2 * 2 * 16


INT4, INT8 = Scheme("w4a16", 32), Scheme("w8a8")


MIXED = {"layers.0.attention": INT4, "layers.0.mlp": INT8, "layers.1.mlp": INT4, "layers.3.attention": INT8}


def quantized(base: Path, schemes: BlockSchemes, lm_head_bits: LmHeadBits = 8) -> Path:
    name = schemes.name if isinstance(schemes, Scheme) else "mixed"
    out = base.with_name(f"{base.name}-{name}")
    quantize_checkpoint(base, schemes, out, torch.device("cpu"), lm_head_bits=lm_head_bits)
    return out


@pytest.mark.parametrize(
    ("network", "scheme"),
    [
        ({}, INT4),
        ({}, INT8),
        ({}, Scheme("w4a16")),
        ({"tie_word_embeddings": True}, INT4),
        ({"family": "qwen3"}, INT8),
        ({"attention_bias": True, "mlp_bias": True}, INT4),
    ],
    ids=str,
)
def test_quantized_networks(
    tiny_checkpoint: Checkpoint, tmp_path: Path, network: dict[str, Any], scheme: Scheme
) -> None:
    base = quantized(tiny_checkpoint(**network), scheme)
    genai.export(base, tmp_path / "out")
    found = parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)
    assert {one["yardstick"] for one in found["prompts"]} == {"bfloat16 noise"}
    assert found["rounded"] == {"weights": str(scheme), "activations": "int8", "output_matrix": "int8"}
    assert found["noise"]["p99"] > 1e-4  # of rounded activations; the weights alone would leave float32 errors


@pytest.mark.parametrize("schemes", [INT4, INT8, MIXED], ids=["4 bits", "8 bits", "bits of each block"])
def test_genai_generates_what_our_runtime_does_of_quantized_layers_that_differ(
    tiny_checkpoint: Checkpoint, tmp_path: Path, schemes: BlockSchemes
) -> None:
    sizes: dict[int, dict[str, Any]] = {
        0: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
        1: {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 160},
        2: {"skip": ["attention"]},
        3: {},
    }
    dense = per_layer(tiny_checkpoint(num_hidden_layers=4, intermediate_size=96), "llama", sizes)
    base = quantized(dense, schemes)
    genai.export(base, tmp_path / "out")
    parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)
    if schemes is MIXED:
        assert bits_of_products(tmp_path / "out") == [4, 4, 8, 8, 16, 16, 4, 4, 16, 16, 8, 8, 16, 16, 8]
    runtime, steps, prompt = open_runtime("onnxruntime", tmp_path / "out", device="cpu", threads=1), 16, text(base, 24)
    found = [runtime.prefill(prompt[None], last_only=True)[0, -1].argmax()]
    while len(found) < steps:
        found.append(runtime.decode(found[-1].reshape(1, 1))[0].argmax())
    assert generated(tmp_path / "out", [prompt], steps) == [[int(token) for token in found]]


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_matrix_in_4_bits(tiny_checkpoint: Checkpoint, tmp_path: Path, tied: bool) -> None:
    """A tied embedding is stored once, in 4 bits, too; the runtimes compute what PyTorch does with the same values."""
    base = quantized(tiny_checkpoint(tie_word_embeddings=tied), INT8, lm_head_bits=4)
    made = genai.export(base, tmp_path / "out")
    assert made.facts["rounded"]["output_matrix"] == "int4"
    parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)
    graph = onnx_format.load(tmp_path / "out" / onnx.MODEL_FILE, load_external_data=False).graph
    assert bits_of_products(tmp_path / "out")[-1] == 4
    looked_up = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    assert len(looked_up) == tied
    vocabulary, hidden = TINY["vocab_size"], TINY["hidden_size"]
    whole = [one.name for one in graph.initializer if list(one.dims) == [vocabulary, hidden]]
    assert whole == ([] if tied else ["model.embed_tokens.weight"])
    runtime, steps, prompt = open_runtime("onnxruntime", tmp_path / "out", device="cpu", threads=1), 8, text(base, 24)
    found = [runtime.prefill(prompt[None], last_only=True)[0, -1].argmax()]
    while len(found) < steps:
        found.append(runtime.decode(found[-1].reshape(1, 1))[0].argmax())
    assert generated(tmp_path / "out", [prompt], steps) == [[int(token) for token in found]]


def bits_of_products(folder: Path) -> list[int]:
    """Bits of the weights of each product, in the order of the network; 16: not quantized."""
    nodes = onnx_format.load(folder / onnx.MODEL_FILE, load_external_data=False).graph.node
    found = []
    for node in nodes:
        if node.op_type == "MatMul":
            found.append(16)
        elif node.op_type == "MatMulNBits":
            found.append(next(one.i for one in node.attribute if one.name == "bits"))
    return found


def test_a_wrong_value_is_blocked(tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4-bit values the two in a byte are exchanged."""
    base = quantized(tiny_checkpoint(), INT4)

    def exchanged(*args: Any) -> Any:
        found = onnx_quantized.blocked(*args)
        return replace(found, values=found.values >> 4 | found.values << 4) if found.bits == 4 else found

    monkeypatch.setattr(onnx_fused, "blocked", exchanged)
    genai.export(base, tmp_path / "out")
    with pytest.raises(ParityError, match=r"PyTorch in bfloat16.*8-bit activations are too coarse .*--to vllm"):
        parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)


def test_matrices_that_are_not_quantized_alike_are_multiplied_apart(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Others leave single layers out of the quantization."""
    dense = tiny_checkpoint(attention_bias=True)
    base = quantized(dense, INT8)
    tensors, full = load_file(base / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    del tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight"] = full[f"{name}.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["ignore"].append(name)
    (base / "config.json").write_text(json.dumps(config))
    (base / manifest.FILE_NAME).unlink()
    genai.export(base, tmp_path / "out")
    parity.check(base, tmp_path / "out", "onnxruntime", device="cpu", threads=1)


def test_quantized_weights_that_it_cannot_compute_with_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(num_hidden_layers=1)
    for scheme, dtype, message in (
        (Scheme("fp8"), "float32", r"no FP8 weights, .*; quantize to w8a8 or w4a16, or use vLLM \(--to vllm\)"),
        (
            INT8,
            "float16",
            r"quantized weights \(w8a8\) are for CPUs, .*, not float16; leave dtype out or .* \(--to vllm\)",
        ),
    ):
        folder = quantized(base, scheme)
        with pytest.raises(InputError, match=message):
            genai.export(folder, tmp_path / "out", dtype=dtype)
    (folder / manifest.FILE_NAME).unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.safetensors: the scales of .*down_proj\.weight are NaN"):
        genai.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"family": "gpt2"}, r"not gpt2 with .*; use onnx \(--to onnx\)"),
        ({"family": "smollm3", "no_rope_layers": [0]}, "not smollm3 with silu and layers without rotary positions"),
        ({"hidden_act": "tanh"}, r"not llama with tanh; use onnx \(--to onnx\)"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_unsupported_networks_are_refused_by_name(
    tiny_checkpoint: Checkpoint, tmp_path: Path, network: dict[str, Any], message: str
) -> None:
    base = tiny_checkpoint(num_hidden_layers=1, **network)
    with pytest.raises(InputError, match=message):
        genai.export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float32_on_a_gpu_is_refused_because_its_attention_lacks_it() -> None:
    with pytest.raises(InputError, match=r"only supports float16 and bfloat16; .* use onnx \(--to onnx\)"):
        genai.check_precision("float32", "cuda")
    genai.check_precision("float16", "cuda")
    genai.check_precision("float32", "cpu")


def test_unsupported_head_sizes_are_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(num_hidden_layers=1, head_dim=24)
    with pytest.raises(InputError, match=r"head_dim=24: its GroupQueryAttention only supports .*\(--to onnx\)"):
        genai.export(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
