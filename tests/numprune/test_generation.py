"""Greedy generation against one prompt at a time without a cache, and the definition of a loop."""

import pytest
import torch

from numprune import generation
from numprune.errors import InputError, IntegrityError
from numprune.generation import PROMPTS, encode, ends_in_loop, generate
from tests.conftest import build_tiny, byte_tokenizer

TEXTS = ["a", "The quick brown fox", "seven sheep jump over the moon"]  # of different lengths: shorter ones are padded


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 16, True),
        ([7] * 15, False),
        ([1, 2, *[7] * 16], True),
        ([*[7] * 16, 1], False),  # it got out of it
        ([1, 2, 3] * 5, False),  # 15 tokens
        ([1, 2, 3] * 6, True),
        ([9, *[3, 1, 2] * 5, 3], True),  # cut off in the middle of a round
        (list(range(20)) * 3, True),
        (list(range(20)) * 2, False),
        (list(range(21)) * 3, False),  # longer than a loop that is looked for
        ([], False),
    ],
)
def test_a_loop_needs_three_rounds_and_sixteen_tokens(tokens, expected):
    assert ends_in_loop(tokens) is expected


def alone(model, tokenizer, text, ends):
    """One prompt, no cache, no padding."""
    sequence = torch.tensor([encode(tokenizer, text, 256)])
    found = []
    while len(found) < generation.MAXIMUM_TOKENS and sequence.shape[1] < model.config.max_position_embeddings:
        with torch.no_grad():
            token = int(model(input_ids=sequence, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        sequence = torch.cat([sequence, torch.tensor([[token]])], 1)
    return found


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("mistral", {"sliding_window": 8}), ("qwen2", {}), ("qwen3", {}), ("llama", {"eos_token_id": 65})],
)
def test_batched_generation_matches_single_prompts(family, overrides, monkeypatch):
    monkeypatch.setattr(generation, "MAXIMUM_TOKENS", 12)
    model, tokenizer = build_tiny(family, seed=3, **overrides), byte_tokenizer()
    ends = {257, overrides.get("eos_token_id", 257)}
    outputs = generate(model, tokenizer, TEXTS, batch_size=2)
    expected = [alone(model, tokenizer, text, ends) for text in TEXTS]
    assert [output.text for output in outputs] == [tokenizer.decode(tokens) for tokens in expected]
    assert [output.tokens for output in outputs] == [len(tokens) for tokens in expected]
    assert len(set(map(tuple, expected))) == len(TEXTS)


def test_any_end_token_of_the_generation_configuration_ends_it():
    model, tokenizer = build_tiny(), byte_tokenizer()
    first = alone(model, tokenizer, TEXTS[1], set())[0]
    model.generation_config.eos_token_id = [257, first]
    (output,) = generate(model, tokenizer, TEXTS[1:2])
    assert (output.text, output.tokens, output.empty, output.repeating) == ("", 0, True, False)


def test_generation_ends_with_the_context():
    model, tokenizer = build_tiny(max_position_embeddings=24), byte_tokenizer()
    outputs = generate(model, tokenizer, TEXTS[:2])
    assert [output.tokens for output in outputs] == [23, 24 - len(TEXTS[1])]
    with pytest.raises(InputError, match=r"prompt 'seven sheep jump over the moon': 30 tokens; .* context of 24"):
        generate(model, tokenizer, TEXTS)


def test_a_prompt_goes_through_the_chat_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode(tokenizer, "Hello", 256)) == "Hello"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    assert tokenizer.decode(encode(tokenizer, "Hello", 256)) == "<user>Hello<bot>"
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"  # as Llama 3 has it
    assert tokenizer.decode(encode(tokenizer, "Hello", 256)) == "26 Jul 2024 Hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no users here') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{% if %}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_is_refused(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        InputError, match=r"prompt 'Hello': the model's chat template does not accept .*; fix the template"
    ):
        encode(tokenizer, "Hello", 256)


def test_a_nan_model_generates_nothing():
    model = build_tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        generate(model, byte_tokenizer(), TEXTS)


def test_the_built_in_prompts_fit_a_small_context():
    assert all(len(encode(byte_tokenizer(), prompt, 128)) < 128 for prompt in PROMPTS)  # a token a byte
