"""config.json: unusual ones are read, or refused with the remedy, and nothing is lost when they are written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from numprune.anatomy import read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, onnx, vllm
from numprune.export.config import read_config
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.target import Target

Checkpoint = Callable[..., Path]
ROWS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config(folder), **fields}))
    return folder


def pruned(folder: Path, *, stream: bool = False) -> Path:
    out = folder.with_name("streamed" if stream else "pruned")
    options = PruneOptions(0.3, compensation="none", target=Target(align=8))
    prune_checkpoint(folder, ROWS, options, out, torch.device("cpu"), stream=stream)
    return out


def logits(folder: Path) -> torch.Tensor:
    """As plain transformers loads it."""
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ROWS).logits
    return found.detach()


# --- heads that do not divide the hidden size -------------------------------------------------------


def undivided(tiny_checkpoint: Checkpoint, **overrides: Any) -> Path:
    """A Llama of 6 heads of 16 channels at a hidden size of 64, which transformers makes only as Mistral."""
    folder = tiny_checkpoint("mistral", num_attention_heads=6, num_key_value_heads=3, **overrides)
    fields = config(folder) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
    del fields["sliding_window"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.slow
def test_a_llama_whose_heads_do_not_divide(tiny_checkpoint: Checkpoint) -> None:
    expected = logits(tiny_checkpoint("mistral", num_attention_heads=6, num_key_value_heads=3))
    folder = undivided(tiny_checkpoint)
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):
        AutoConfig.from_pretrained(folder)
    model, _ = checkpoint.load(folder)
    torch.testing.assert_close(model(ROWS).logits, expected)
    anatomy = read_anatomy(read_config(folder))
    assert [block.units for block in anatomy.of_kind("attention")] == [3, 3]
    in_memory, streamed = pruned(folder), pruned(folder, stream=True)
    torch.testing.assert_close(logits(in_memory), logits(streamed))
    for export, name in ((vllm.export, "vllm"), (onnx.export, "onnx")):
        export(folder, folder.with_name(name))
        written = config(folder.with_name(name))  # what stock readers take
        assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    torch.testing.assert_close(logits(folder.with_name("vllm")), expected)


def test_a_llama_with_biases_that_mistral_lacks(tiny_checkpoint: Checkpoint) -> None:
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "per_layer_config": {}, "attention_bias": True}
    folder = tiny_checkpoint("numprune_llama", **sizes)
    expected = logits(folder)
    fields = config(folder) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(fields))
    assert read_config(folder).model_type == "numprune_llama"
    torch.testing.assert_close(checkpoint.load(folder)[0](ROWS).logits, expected)
    assert vllm.export(folder, folder.with_name("vllm")).facts["plugin"] is True
    torch.testing.assert_close(logits(folder.with_name("vllm")), expected)


# --- refused, with the remedy ------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -1])
def test_a_sliding_window_of_zero_is_refused(tiny_checkpoint: Checkpoint, window: int) -> None:
    folder = change(tiny_checkpoint("mistral"), sliding_window=window)
    with pytest.raises(InputError, match=rf"config\.json: sliding_window={window}; use null for no window"):
        read_config(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "nonsense", "dtype='nonsense'; it must be one of float64, float32, float16, bfloat16"),
        ("torch_dtype", "int8", "torch_dtype='int8'; it must be one of float64"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000; no model has more than"),
        ("architectures", ["GPT9"], "architectures="),
    ],
)
def test_a_malformed_field_is_refused_with_the_file(
    tiny_checkpoint: Checkpoint, field: str, value: object, said: str
) -> None:
    folder = change(tiny_checkpoint(), **{field: value})
    with pytest.raises(InputError) as caught:
        read_config(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: {said}")


def test_an_adapter_beside_the_weights_or_alone(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    for place in (folder, tmp_path):
        (place / "adapter_config.json").write_text("{}")
        with pytest.raises(InputError, match=r"adapter_config\.json: .* merge the adapter first"):
            read_config(place)


# --- what is written ----------------------------------------------------------------------------------

GENERATION = {"temperature": 0.9, "top_p": 0.6, "max_length": 99, "pad_token_id": -1}


@pytest.mark.parametrize("stream", [False, True])
def test_generation_settings_stay_in_config_json(tiny_checkpoint: Checkpoint, stream: bool) -> None:
    """transformers would write none of them there, but reads them where there is no generation_config.json."""
    folder = change(tiny_checkpoint(), **GENERATION)
    (folder / "generation_config.json").unlink()
    out = pruned(folder, stream=stream)
    assert GENERATION.items() <= config(out).items()
    assert not (out / "generation_config.json").exists()
    assert GENERATION.items() <= GenerationConfig.from_pretrained(out, "config.json").to_dict().items()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_rotary_embeddings_are_stored_for_every_transformers_version(
    tiny_checkpoint: Checkpoint, rope: dict[str, Any]
) -> None:
    """And the same is read again, whichever way it was said before."""
    folder = tiny_checkpoint()
    fields = {name: value for name, value in config(folder).items() if name not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps(fields | rope | {"torch_dtype": "float16"}))
    said = read_config(folder).rope_parameters
    out = pruned(folder)
    assert read_config(out).rope_parameters == said
    written = config(out)
    assert (written["rope_theta"], written["torch_dtype"], written["dtype"]) == (5e5, "float32", "float32")
    scaling = {name: value for name, value in said.items() if name != "rope_theta"}
    assert written["rope_scaling"] == (None if said["rope_type"] == "default" else scaling)
    assert read_config(pruned(out.rename(folder.with_name("again")))).rope_parameters == said
