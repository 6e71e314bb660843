"""Generation from prompts: sampled, or greedy to reveal what NLL does not: loops and empty answers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from numprune.chat import renderer
from numprune.errors import InputError, IntegrityError

MAXIMUM_TOKENS = 64  # per generation; three times the longest loop that is detected
_LONGEST_LOOP = 20
_ROUNDS = 3
_SHORTEST_TAIL = 16

# Instructions for a chat model to answer and a base model to continue.
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three kinds of fruit.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the larger of two numbers.",
    "Summarize in one sentence: The train left at nine, but the fog held it up, and we arrived after noon.",
    "How many days are there in two weeks?",
    "Tell me a short story that begins with an open window.",
)


@dataclass(frozen=True)
class Generation:
    """A model's generation from one prompt.

    Attributes:
        text: without special tokens.
        tokens: number of tokens, without the end token.
        empty: the text is only white space.
        repeating: see `ends_in_loop`.
    """

    text: str
    tokens: int
    empty: bool
    repeating: bool


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 8
) -> list[Generation]:
    """Generate greedily from each prompt, up to MAXIMUM_TOKENS, an end token or the model's context.

    Raises:
        InputError: like `encode`.
        IntegrityError: the model's logits are not finite.
    """
    encoded = [encode(tokenizer, prompt, model.config.max_position_embeddings) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    found: list[Generation] = []
    for start in range(0, len(encoded), batch_size):
        context = model.config.max_position_embeddings
        batch = encoded[start : start + batch_size]
        for tokens in continuations(model, batch, ends, _most_probable, maximum=MAXIMUM_TOKENS, length=context):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            found.append(Generation(text, len(tokens), not text.strip(), ends_in_loop(tokens)))
    return found


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, context: int) -> list[int]:
    """Return a prompt's tokens: as a user's turn if the model has a chat template, otherwise as plain text.

    Raises:
        InputError: the template cannot be rendered, or the prompt is empty or leaves no room in the context.
    """
    shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
    if not tokenizer.chat_template:
        tokens = tokenizer.encode(prompt)
    else:
        try:
            text = renderer(tokenizer, answer=True)([{"role": "user", "content": prompt}], None)
        except InputError as error:
            raise InputError(f"prompt {shown!r}: {error}; fix the template, or give no prompts") from None
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not 0 < len(tokens) < context:
        raise InputError(
            f"prompt {shown!r}: {len(tokens)} tokens; it must have at least 1, and fewer than the context of {context}"
        )
    return tokens


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Return whether the end repeats a sequence of up to 20 tokens at least three times, over at least 16 tokens."""
    for period in range(1, _LONGEST_LOOP + 1):
        length = max(_ROUNDS * period, _SHORTEST_TAIL)
        tail = list(tokens[-length:])
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the end tokens of the generation configuration (a chat model has its own) and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    several = configured if isinstance(configured, list) else [configured]
    return {end for end in (*several, tokenizer.eos_token_id) if isinstance(end, int)}


def _most_probable(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    choose: Callable[[Tensor], Tensor],
    *,
    maximum: int,
    length: int,
) -> list[list[int]]:
    """Return a continuation of each prompt, without its end token, computed with a KV cache.

    Args:
        model: of the prompts' vocabulary.
        prompts: their tokens, at least one each.
        ends: tokens that end a continuation.
        choose: logits of the next tokens (n, V) to the tokens (n,).
        maximum: tokens of a continuation.
        length: tokens of a prompt together with its continuation, at most the model's context.

    Raises IntegrityError where logits are not finite.
    """
    context = model.config.max_position_embeddings
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])  # (n, width), padded left
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    cache = DynamicCache(config=model.config)
    found: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for _ in range(maximum):
        positions = (mask.cumsum(1) - 1).clamp(0, context - 1)[:, -tokens.shape[1] :]
        logits: Tensor = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if not torch.isfinite(logits).all():
            raise IntegrityError("the model's logits are not finite; its weights are damaged or overflow")
        tokens = choose(logits)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        for row, token in enumerate(tokens[:, 0].tolist()):
            ended[row] = ended[row] or token in ends or len(prompts[row]) + len(found[row]) >= length
            if not ended[row]:
                found[row].append(token)
        if all(ended):
            break
    return found
