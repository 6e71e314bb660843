"""transformers 4.57, the last version before `rope_parameters`, reads the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from numprune.export import checkpoint
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.target import Target
from tests.conftest import build_tiny, write_checkpoint

OLDER = Path(sys.prefix) / "share" / "transformers-4.57"  # where `make env` puts it
pytestmark = [
    pytest.mark.skipif(not OLDER.is_dir(), reason="needs transformers 4.57, which make env installs"),
    pytest.mark.slow,
]

# Longer than the context that the scaled ones were trained for.
TOKENS = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(0))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scaled(rope_type: str, **rope: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5e5, **rope}}


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", scaled("default")),
    "linear": ("llama", scaled("linear", factor=4.0)),
    "dynamic": ("llama", {**scaled("dynamic", factor=4.0), "max_position_embeddings": 64}),
    "yarn": ("llama", scaled("yarn", factor=8.0, original_max_position_embeddings=32)),
    "llama3": ("llama", scaled("llama3", **LLAMA3, original_max_position_embeddings=32)),
    "heads that do not divide": ("mistral", {**scaled("default"), "num_attention_heads": 6, "num_key_value_heads": 3}),
    "mistral": ("mistral", {**scaled("default"), "sliding_window": 16}),
    "qwen2": ("qwen2", scaled("yarn", factor=8.0, original_max_position_embeddings=32)),
    "qwen3": ("qwen3", {**scaled("default"), "tie_word_embeddings": True}),
}

# One process for all cases: it takes longer to start than to read them.
READ = """
import sys
import torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4.57."), transformers.__version__
out, *folders = sys.argv[1:]
tokens = torch.load(out + "/tokens.pt", weights_only=True)
found = {}
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.bfloat16 if "half" in folder else torch.float32, model.dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model.float()(tokens).logits
    found[folder + " tokens"] = torch.tensor(tokenizer.encode("Caf\\u00e9 27\\n\\tx"))
save_file(found, out + "/found.safetensors")
"""


def base(folder: Path, family: str, config: dict[str, object]) -> Path:
    write_checkpoint(build_tiny(family, **config), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as it was called before transformers 5
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits and tokens by the case's folder, as the older transformers reads them."""
    root = tmp_path_factory.mktemp("older")
    torch.save(TOKENS, root / "tokens.pt")
    options = PruneOptions(0.2, allocation="uniform", compensation="none", target=Target(align=8))
    folders = []
    for name, (family, config) in CASES.items():
        dense = base(root / f"{name} dense", family, config)
        prune_checkpoint(dense, TOKENS[:, :16], options, root / name, torch.device("cpu"))
        folders.append(str(root / name))
    environment = {**os.environ, "PYTHONPATH": str(OLDER)}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(root), *folders], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(root / "found.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_transformers_4_reads_the_same_model(read: dict[str, torch.Tensor], case: str) -> None:
    (folder,) = (Path(name) for name in read if Path(name).name == case)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(read[str(folder)], model(TOKENS).logits, atol=2e-5, rtol=1e-5)
    assert checkpoint.load_tokenizer(folder).encode("Café 27\n\tx") == read[f"{folder} tokens"].tolist()
