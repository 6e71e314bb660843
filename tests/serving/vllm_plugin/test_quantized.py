"""vLLM serves quantized checkpoints, with equal and different layers, as the quantized reference computes.

Everything runs in bfloat16, in which vLLM's 4-bit kernels compute. The yardstick is how far vLLM is off there with the
same model before it was quantized.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.export import checkpoint, noise, vllm
from numprune.export.noise import Noise
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from tests.conftest import write_checkpoint
from tests.serving.vllm_plugin.engine import PROMPTS, Answer, Engine, EngineError, build, reference

pytestmark = pytest.mark.vllm

# Sizes that groups of 32 divide, in every layer its own.
LAYERS = {
    0: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
    1: {"skip": ["attention"], "intermediate_size": 32},
    2: {"skip": ["mlp"]},
}
W8A8, W4A16 = Scheme("w8a8"), Scheme("w4a16", 32)
CASES = {
    "stock, w8a8": ("llama", {}, W8A8),
    "layers that differ, w8a8": ("numprune_llama", {"per_layer_config": LAYERS}, W8A8),
    "heads that vLLM's class cannot have, w4a16": (
        "numprune_stablelm",
        {"per_layer_config": LAYERS, "use_qkv_bias": True},
        W4A16,
    ),
    "transformers backend, w4a16": ("numprune_starcoder2", {"per_layer_config": LAYERS}, W4A16),
}


def quantized(folder: Path, family: str, config: dict[str, object], scheme: Scheme) -> Path:
    """A checkpoint exported for vLLM; what it was made of is in `base`."""
    write_checkpoint(build(family, **config).bfloat16(), folder / "base")
    quantize_checkpoint(folder / "base", scheme, folder / "quantized", torch.device("cpu"))
    vllm.export(folder / "quantized", folder / "out")
    return folder / "out"


def off(engine: Engine, folder: Path, of: Path | None = None) -> Noise:
    """How far vLLM is off in bfloat16 from what the checkpoint, or that in `of`, computes in float32."""

    def prompts(answer: Answer) -> torch.Tensor:  # what follows depends on which greedy tokens were taken
        parts = [found[: len(prompt) - 1] for found, prompt in zip(answer.logprobs, PROMPTS, strict=True)]
        return torch.from_numpy(np.concatenate(parts))

    expected = prompts(reference(checkpoint.load(of or folder)[0]))
    return noise.of_logits(expected, prompts(engine.run(folder, dtype="bfloat16")))


@pytest.mark.parametrize("case", CASES)
def test_vllm_matches_the_quantized_reference(engine: Engine, tmp_path: Path, case: str) -> None:
    folder = quantized(tmp_path, *CASES[case])
    found, floor = off(engine, folder), off(engine, tmp_path / "base")
    print(f"vLLM is off by {found}; unquantized by {floor}")
    assert found.share_of(floor) <= 1


def test_a_wrong_scale_exceeds_the_noise(engine: Engine, tmp_path: Path) -> None:
    folder = quantized(tmp_path, "llama", {}, W4A16)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= -1
    save_file(tensors, weights, {"format": "pt"})
    assert off(engine, folder, tmp_path / "quantized").share_of(off(engine, tmp_path / "base")) > 1


def test_quantized_tensors_that_contradict_the_configuration_are_refused(engine: Engine, tmp_path: Path) -> None:
    folder = quantized(tmp_path, "numprune_llama", {"per_layer_config": LAYERS}, W4A16)
    path = folder / "config.json"
    config = json.loads(path.read_text())

    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"group_size is 64, which does not divide the 32 inputs of layers\.1\.mlp"):
        engine.run(folder, dtype="bfloat16")

    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {"group_size": 32, "num_bits": 2}
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"weights\.num_bits is '2', not 4"):
        engine.run(folder, dtype="bfloat16")

    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    path.write_text(json.dumps(config))
    save_file(load_file(tmp_path / "base" / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"_proj\.weight: stored, but .* has no such tensor"):
        engine.run(folder, dtype="bfloat16")


def test_groups_that_gpus_would_split_are_refused_before_loading(engine: Engine, tmp_path: Path) -> None:
    folder = quantized(tmp_path, "numprune_llama", {"per_layer_config": {0: {"intermediate_size": 32}}}, W4A16)
    with pytest.raises(EngineError, match=r"group_size is 32, .*on 2 GPUs"):
        engine.run(folder, dtype="bfloat16", tensor_parallel_size=2, distributed_executor_backend="mp")
