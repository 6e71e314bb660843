"""vLLM with the plug-in in its own environment: one process for any number of checkpoints."""

import json
import select
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import numprune.modeling  # noqa: F401 - registers the per-layer classes
from numprune.anatomy import PER_LAYER_PREFIX
from numprune.families import FAMILIES
from tests.conftest import OF_FAMILY

ANSWER_S = 300.0  # importing vLLM takes most of it, on a busy machine

# One head size that vLLM's CPU kernels know; prompts of different lengths in one batch.
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = ([*range(5, 25)], [7, 9, 11], [40, 200] * 20)
STEPS = 32


@dataclass(frozen=True)
class Answer:
    """Of one engine for one batch: per prompt the log-probabilities [positions, vocabulary] of what follows its first
    token, greedy tokens, and how many tokens' keys and values its cache holds; what it said to each reload."""

    logprobs: list[np.ndarray]
    tokens: list[list[int]]
    kv_tokens: int
    refused: Sequence[str] = ()


class EngineError(Exception):
    """What vLLM raised."""


class Engine:
    def __init__(self, python: Path, folder: Path) -> None:
        self.out = folder / "logprobs.npz"
        script = Path(__file__).parent / "engine_worker.py"
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def run(
        self,
        checkpoint: Path,
        prompts: Sequence[list[int]] = PROMPTS,
        *,
        kv_cache_bytes: int = 16 << 20,
        reload: Sequence[Path] = (),
        **options: Any,
    ) -> Answer:
        """Load `checkpoint` with vLLM's `options`, reload from each of `reload`, and continue `prompts` greedily.

        Raises EngineError.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {
            "model": str(checkpoint),
            "prompts": prompts,
            "steps": STEPS,
            "kv_cache_bytes": kv_cache_bytes,
            "reload": [str(folder) for folder in reload],
            "options": options,
            "out": str(self.out),
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        assert select.select([self.process.stdout], [], [], ANSWER_S)[0], "vLLM did not answer"
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise EngineError(answer["error"])
        with np.load(self.out) as arrays:
            logprobs = [arrays[str(i)] for i in range(len(prompts))]
        return Answer(logprobs, answer["tokens"], answer["kv_tokens"], answer["refused"])


def sizes_of(family: str) -> dict[str, Any]:
    """SIZES in the family's own fields, with what makes it differ from Llama."""
    entry = FAMILIES[family]
    of_family = {key: value for key, value in OF_FAMILY.get(family, {}).items() if key != "layer_types"}
    sizes = SIZES | {entry.width: SIZES["intermediate_size"]} | of_family
    if entry.kv_heads is None:
        del sizes["num_key_value_heads"]
    return sizes


def build(model_type: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of SIZES, changed by `config`."""
    torch.manual_seed(seed)
    family = model_type.removeprefix(PER_LAYER_PREFIX)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**sizes_of(family), **config}),
        attn_implementation=FAMILIES[family].attention_implementation,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the initialiser's, and biases not zero: else every comparison would pass.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def reference(model: PreTrainedModel) -> Answer:
    """What transformers computes for PROMPTS: tokens with its own cache, log-probabilities without one."""
    logprobs, tokens = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=STEPS,
                do_sample=False,
            )
            logprobs.append(model(ids[:, :-1]).logits[0].log_softmax(-1).numpy())
            tokens.append(ids[0, len(prompt) :].tolist())
    return Answer(logprobs, tokens, 0)
