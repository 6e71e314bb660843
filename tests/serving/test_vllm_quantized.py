"""A real vLLM server of a quantized release, compared with the reference answers of the release."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import ParityError
from numprune.export import manifest
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from numprune.serving import reference_answers
from numprune.serving.deployment import Deployment, prove
from numprune.serving.vllm.server import serving
from tests.conftest import recast
from tests.serving.releases import SMALL, make_release, require_vllm, write_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCALE = "model.layers.1.mlp.down_proj.weight_scale"


def quantized(folder: Path) -> Path:
    base = recast(write_checkpoint(folder / "model"), torch.bfloat16)
    quantize_checkpoint(base, Scheme("w4a16", 32), folder / "quantized", torch.device("cpu"))
    return folder / "quantized"


def turn_scale(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[SCALE] = tensors[SCALE] * -4
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def test_a_server_matches_the_quantized_model_and_detects_a_wrong_scale(tmp_path: Path) -> None:
    found, checkpoint = require_vllm(), quantized(tmp_path)
    good = make_release(checkpoint, tmp_path / "good", unquantized=tmp_path / "model")
    bad = make_release(checkpoint, tmp_path / "bad", turn_scale, unquantized=tmp_path / "model")
    assert reference_answers.read(good) == reference_answers.read(bad)
    for folder in (good, bad):
        release = Deployment("tiny/1", "tiny", 1, manifest.read(folder).digest, folder, "bfloat16")
        with serving(found, release.checkpoint, name="tiny", dtype="bfloat16", options=SMALL) as running:
            if folder is good:
                found_here = prove(running, release, "bfloat16")
                assert found_here["greedy_match"] > 0.9
                # As precise as transformers: what is allowed beyond that is for other devices. With AMX, vLLM would
                # round activations to 8 bits by default.
                [mean, p99] = [found_here[f"{name}_error"] for name in ("mean", "p99")]
                own = reference_answers.read(good).rounding["bfloat16"]
                assert own.p99 is not None
                assert own.mean / 2 < mean < 2 * own.mean
                assert own.p99 / 2 < p99 < 2 * own.p99
            else:
                with pytest.raises(ParityError, match="the server gives"):
                    prove(running, release, "bfloat16")


def test_a_server_runs_blocks_of_different_schemes(tmp_path: Path) -> None:
    """Attention in 4 and 8 bits, one MLP in 8 and one as it is: vLLM fuses the projections of each block."""
    found = require_vllm()
    base = recast(write_checkpoint(tmp_path / "model"), torch.bfloat16)
    int8 = Scheme("w8a8")
    schemes = {"layers.0.attention": Scheme("w4a16", 32), "layers.1.attention": int8, "layers.0.mlp": int8}
    quantize_checkpoint(base, schemes, tmp_path / "quantized", torch.device("cpu"))
    folder = make_release(tmp_path / "quantized", tmp_path / "release")
    release = Deployment("tiny/1", "tiny", 1, manifest.read(folder).digest, folder, "bfloat16")
    with serving(found, release.checkpoint, name="tiny", dtype="bfloat16", options=SMALL) as running:
        assert prove(running, release, "bfloat16")["greedy_match"] > 0
