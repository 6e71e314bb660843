"""Networks that the ONNX writers support, and how far their exports are from the originals."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from numprune.export import checkpoint
from numprune.export.runtimes import open_runtime


def error(base: Path, export: Path) -> float:
    """The largest error of a logit: ragged rows together in ONNX Runtime, each alone and uncached in torch."""
    model, _ = checkpoint.load(base)
    runtime = open_runtime("onnxruntime", export, device="cpu", threads=1)
    tokens = torch.randint(0, 259, (3, 24), generator=torch.Generator().manual_seed(0))
    starts = (0, 6, 17)
    mask = torch.stack([(torch.arange(18) >= start).long() for start in starts])
    found = [
        runtime.prefill(tokens[:, :18], mask),
        *(runtime.decode(tokens[:, i : i + 1])[:, None] for i in range(18, 24)),
    ]
    logits = torch.cat(found, dim=1)
    assert logits.isfinite().all()  # at padding too: NaN there would reach the other positions
    with torch.inference_mode():
        errors = [
            (logits[row, start:] - model(tokens[row : row + 1, start:]).logits[0]).abs().max()
            for row, start in enumerate(starts)
        ]
    return float(max(errors))


NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "mistral with a sliding window": {"family": "mistral", "sliding_window": 5},
    "qwen2": {"family": "qwen2"},
    "qwen2 with a window in some layers": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "smollm3 with a window in some layers": {
        "family": "smollm3",
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "no_rope_layers": [1, 1],
    },
    "qwen3": {"family": "qwen3"},
    "multi-head attention": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "heads that do not fill the hidden size": {"family": "mistral", "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama3 rotary scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "gelu": {"hidden_act": "gelu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
}


SIZES: dict[int, dict[str, Any]] = {
    0: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40},
    1: {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 72},
}


def per_layer(folder: Path, family: str, sizes: dict[int, dict[str, Any]]) -> Path:
    """The same configuration, with layers of different sizes, and new random weights."""
    stock = AutoConfig.from_pretrained(folder).to_dict()
    config = AutoConfig.for_model(**{**stock, "model_type": f"numprune_{family}", "per_layer_config": sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # wider than the initializer's
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder
