import pytest
import torch
from transformers import AutoModelForCausalLM

from numprune.export.runtimes import open_runtime
from numprune.serving.benchmark.generation import generate

PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


class Recorder:
    """A real runtime, with a note of what went through it."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.decoded = []

    def prefill(self, tokens, mask=None, *, last_only=False):
        return self.runtime.prefill(tokens, mask, last_only=last_only)

    def decode(self, tokens):
        self.decoded.append(tokens.clone())
        return self.runtime.decode(tokens)


def test_generation_matches_the_model_and_never_stops_early(tiny_checkpoint):
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    runtime = Recorder(open_runtime("torch", folder, device="cpu"))

    generation = generate(runtime, PROMPTS, output_length=6)

    expected = model.generate(PROMPTS, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(runtime.decoded, dim=1), expected[:, 4:9])  # the sixth token is not fed back
    assert (generation.size, generation.prompt_length, len(generation.itl_ms), generation.failed) == (2, 4, 5, 0)
    assert generation.e2e_ms == pytest.approx(generation.ttft_ms + sum(generation.itl_ms))


def test_a_request_with_infinite_logits_fails(tiny_checkpoint):
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38
    broken = folder.with_name("broken")
    model.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())

    assert generate(open_runtime("torch", broken, device="cpu"), PROMPTS, output_length=3).failed == 2
