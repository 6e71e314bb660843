"""A converted LlamaGen computes what the published one computes."""

import re

import pytest
import torch

from numprune.errors import InputError
from numprune.llamagen.convert import PUBLISHED_HEADS, config_of, converted, half_split
from numprune.llamagen.model import LlamaGenForCausalLM
from tests.numprune.llamagen import reference
from tests.numprune.llamagen.reference import CLASSES, CODES, GRID, HEADS


def model_of(state):
    config = config_of(state, GRID * GRID, HEADS)
    model = LlamaGenForCausalLM(config)
    model.load_state_dict(dict(converted(state, config)), strict=True)
    return model.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_converted_model_computes_what_the_published_one_does(implementation):
    state = reference.random_state()
    model = model_of(state)
    model.set_attn_implementation(implementation)
    labels = torch.tensor([0, 2, CLASSES])
    codes = torch.randint(CODES, (3, GRID * GRID), generator=torch.Generator().manual_seed(1))
    expected = reference.logits(state, labels, codes)
    assert float(expected.std()) > 0.5
    with torch.no_grad():
        found = model(torch.cat([CODES + labels[:, None], codes], 1)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_class_attends_with_zero_queries_and_is_seen_with_zero_keys():
    """So it weighs the same for every code, but not nothing."""
    model = model_of(reference.random_state())
    positions = torch.arange(1 + GRID * GRID)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    assert not cos[0, 0].any()
    assert not sin[0, 0].any()
    torch.testing.assert_close(cos[0, 1:].square() + sin[0, 1:].square(), torch.ones(GRID * GRID, 16))


def test_rows_are_permuted_within_heads_from_pairs_to_halves():
    rows = torch.arange(8)[:, None]  # two heads of four channels
    assert half_split(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_sizes_are_read_from_the_tensors():
    config = config_of(reference.random_state(), GRID * GRID, HEADS)
    assert (config.vocab_size, config.num_classes) == (CODES + CLASSES + 1, CLASSES)
    assert (config.num_key_value_heads, config.head_dim, config.grid) == (2, 16, GRID)
    assert (config.intermediate_size, config.num_hidden_layers) == (96, 2)


def published(hidden, layers, width=128):
    """The tensors of a published size, without values."""
    shapes = {
        "cls_embedding.embedding_table.weight": (1001, hidden),
        "tok_embeddings.weight": (16384, hidden),
        "norm.weight": (hidden,),
        "output.weight": (16384, hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * hidden, hidden),
            f"layers.{layer}.attention.wo.weight": (hidden, hidden),
            f"layers.{layer}.feed_forward.w1.weight": (width, hidden),
            f"layers.{layer}.feed_forward.w3.weight": (width, hidden),
            f"layers.{layer}.feed_forward.w2.weight": (hidden, width),
            f"layers.{layer}.attention_norm.weight": (hidden,),
            f"layers.{layer}.ffn_norm.weight": (hidden,),
        }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("size", PUBLISHED_HEADS)
def test_published_models_need_no_number_of_heads(size):
    hidden, _ = size
    state = published(*size)
    config = config_of(state, 576)
    assert config.num_attention_heads == config.num_key_value_heads == PUBLISHED_HEADS[size]
    assert config.head_dim * config.num_attention_heads == hidden
    assert (config.vocab_size, config.num_classes, config.grid) == (17385, 1000, 24)
    assert config_of(state, 576, PUBLISHED_HEADS[size]).head_dim == config.head_dim


def test_other_heads_than_published_are_refused():
    with pytest.raises(InputError, match="heads: 6 were given, but the published model with hidden size 768 and 12 la"):
        config_of(published(768, 12), 576, 6)
    with pytest.raises(InputError, match=r"hidden size 768 with 11 layers \(they have 768 with 12, .*; give"):
        config_of(published(768, 11), 576)
    assert config_of(published(768, 11), 576, 6).head_dim == 128


def test_a_rotary_table_determines_the_heads():
    state = reference.random_state() | {"freqs_cis": torch.zeros(1 + GRID * GRID, 8, 2)}  # 8 pairs: heads of 16
    assert config_of(state, GRID * GRID).num_attention_heads == HEADS
    with pytest.raises(InputError, match="heads: 8 were given, but freqs_cis is of 4; omit them"):
        config_of(state, GRID * GRID, 8)
    with pytest.raises(InputError, match=r"freqs_cis has shape \[17, 8, 2\]; for 25 codes .* \[26, D / 2, 2\]"):
        config_of(state, 25)


@pytest.mark.parametrize(
    ("change", "codes", "heads", "message"),
    [
        ({"norm.weight": None}, 16, 4, "it lacks 'norm.weight'"),
        ({"extra": torch.ones(1)}, 16, 4, "it has the unknown 'extra'"),
        ({"cls_embedding.cap_proj.fc1.weight": torch.ones(1)}, 16, 4, "text-conditional LlamaGen"),
        ({"tok_embeddings.weight": torch.ones(64)}, 16, 4, "tok_embeddings.weight has shape [64]; it must be a matrix"),
        (
            {"layers.1.attention.wqkv.weight": torch.ones(100, 64)},
            16,
            4,
            "layers.1.attention.wqkv.weight has shape [100, 64]; the other tensors need [128, 64]",
        ),
        (
            {"cls_embedding.embedding_table.weight": torch.ones(4, 63)},
            16,
            4,
            "cls_embedding.embedding_table.weight has shape [4, 63]; the other tensors need [4, 64]",
        ),
        ({}, 16, None, "no published LlamaGen has the hidden size 64 with 2 layers (they have 768"),
        ({}, 16, 5, "5 do not divide the hidden size 64 into multiples of 4 channels"),
        ({}, 16, 1, "1 heads do not fit attention.wqkv.weight, which has 128 rows"),
        ({}, 17, 4, "17 are not those of a square image"),
    ],
)
def test_what_is_not_a_class_conditional_model_is_refused(change, codes, heads, message):
    state = {name: value for name, value in (reference.random_state() | change).items() if value is not None}
    with pytest.raises(InputError, match=re.escape(message)):
        config_of(state, codes, heads)
