"""Which servers of quantized releases pass: transformers in half precision, correct and wrong."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from numprune.errors import ParityError
from numprune.export.checkpoint import load
from numprune.flows import names
from numprune.flows.steps import reference_answers as making
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme
from numprune.serving import reference_answers
from numprune.serving.reference_answers import CompletionAnswers
from tests.conftest import build_tiny, recast, write_checkpoint
from tests.serving.servers import computing

pytestmark = pytest.mark.slow

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Completions:
    """What the check asks of vLLM, computed by transformers.

    Its decode ignores the KV cache from the step `forgets_from` of a request on.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, forgets_from: float = math.inf):
        self.model, self.tokenizer = load(folder, dtype)
        self.forgets_from = forgets_from

    def __call__(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "model"}]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        answer = self.prefill if "prompt_logprobs" in body else partial(self.decode, steps=body["max_tokens"])
        return {"choices": [{"index": index, **answer(tokens)} for index, tokens in enumerate(body["prompt"])]}

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> dict[str, Any]:
        logprobs = self.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        found = [{str(token): {"logprob": float(row[token])}} for row, token in zip(logprobs, tokens[1:], strict=False)]
        return {"prompt_logprobs": [None, *found]}

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], steps: int) -> dict[str, Any]:
        cache, found = None, []
        for step in range(steps):
            output = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = None if step + 1 >= self.forgets_from else output.past_key_values
            best = output.logits[0, -1].double().log_softmax(-1).max(-1)
            found.append((int(best.indices), float(best.values)))
            tokens = [found[-1][0]]
        return {"token_ids": [token for token, _ in found], "logprobs": {"token_logprobs": [one for _, one in found]}}


Release = tuple[Path, CompletionAnswers]


@pytest.fixture(scope="module", params=get_args(names.Scheme))
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A quantized checkpoint and its reference answers."""
    folder = tmp_path_factory.mktemp(request.param)
    base = recast(write_checkpoint(build_tiny(), folder / "base"), torch.bfloat16)
    scheme = Scheme(request.param, 32 if request.param == "w4a16" else None)
    quantize_checkpoint(base, scheme, folder / "quantized", torch.device("cpu"))
    made = making.answers_of(folder / "quantized", unquantized=base)
    assert isinstance(made, CompletionAnswers)
    return folder / "quantized", made


def checked(release: Release, dtype: str, **how: float) -> dict[str, Any]:
    folder, answers = release
    with computing(Completions(folder, HALF[dtype], **how)) as url:
        return reference_answers.check(url, answers, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_transformers_passes_in_half_precision(release: Release, dtype: str) -> None:
    found = checked(release, dtype)
    assert found["greedy_compared"] == 4 * 32
    for error in ("mean", "p99"):  # with room for other kernels
        assert 0 < found[f"{error}_error"] < 0.6 * found[f"{error}_tolerance"]


@pytest.mark.parametrize("step", [1, 16])
def test_a_decode_that_goes_wrong_is_refused(release: Release, step: int) -> None:
    with pytest.raises(ParityError, match=r"decode, .* which led by .* nats: the greedy continuation differs"):
        checked(release, "float16", forgets_from=step)
