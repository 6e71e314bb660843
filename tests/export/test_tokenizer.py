"""A text's tokens are those of the tokenizer's own file, whatever class its configuration names."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer

from numprune.errors import InputError
from numprune.export import checkpoint, vllm
from numprune.export.tokenizer import load_tokenizer, other_reading

Checkpoint = Callable[..., Path]
TEXTS = ("a b", " The 27 numbers\n\n  of Cafe\u0301", "<s>x</s>")


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter(folder: Path, change: Callable[[Tokenizer], object]) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    change(tokenizer)
    tokenizer.save(path)


def reads_as_written(folder: Path) -> None:
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    truth.no_padding()
    truth.no_truncation()
    for text in TEXTS:
        assert load_tokenizer(folder).encode(text) == truth.encode(text).ids
    ours = load_tokenizer(folder)(list(TEXTS), add_special_tokens=False)["input_ids"]
    assert ours == [one.ids for one in truth.encode_batch(list(TEXTS), add_special_tokens=False)]


@pytest.mark.parametrize("label", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_byte_level_tokenizer_labelled_llama(tiny_checkpoint: Checkpoint, label: str, family: str) -> None:
    """So R1-distilled models are published; transformers builds a tokenizer of sentencepiece's kind instead."""
    folder = tiny_checkpoint(family)
    settings(folder, tokenizer_class=label)
    assert AutoTokenizer.from_pretrained(folder).encode("a b") != load_tokenizer(folder).encode("a b")
    reads_as_written(folder)
    with pytest.raises(
        InputError, match=r'reads it as LlamaTokenizer: .*set "tokenizer_class": "PreTrainedTokenizerFast"'
    ):
        vllm.export(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()
    settings(folder, tokenizer_class="PreTrainedTokenizerFast")  # the remedy
    assert other_reading(folder) is None
    reads_as_written(folder)


def test_a_tokenizer_class_chosen_by_the_model_type(
    tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers gives every Qwen2 that class's normaliser, whatever the files say."""
    folder = tiny_checkpoint("qwen2")
    assert other_reading(folder) is None
    assert "decomposed accents get other tokens" in caplog.text
    reads_as_written(folder)
    alter(folder, lambda tokenizer: setattr(tokenizer, "normalizer", Lowercase()))
    assert "it uses Qwen2Tokenizer for this model type" in str(other_reading(folder))
    reads_as_written(folder)


def test_padding_and_truncation_settings_are_ignored(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    alter(folder, lambda tokenizer: (tokenizer.enable_truncation(2), tokenizer.enable_padding(length=9)))
    assert len(load_tokenizer(folder).encode("abcdef")) == 6
    reads_as_written(folder)


def test_special_tokens_outside_the_vocabulary_add_no_token(tiny_checkpoint: Checkpoint) -> None:
    """transformers adds those that tokenizer.json has not, beyond the model's vocabulary."""
    folder = tiny_checkpoint()
    settings(folder, pad_token="<nowhere>", unk_token="", mask_token={"content": "<pad>"})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259
    assert len(tokenizer.encode("<nowhere>")) == len("<nowhere>")
    reads_as_written(folder)


def test_an_empty_unknown_token_that_vllm_fails_on_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()
    settings(folder, unk_token="")
    with pytest.raises(InputError, match=r'tokenizer_config\.json: "unk_token": "" is not a token; remove that line'):
        vllm.export(folder, folder.with_name("out"))
    settings(folder, unk_token=None)
    assert other_reading(folder) is None


MESSAGES = [{"role": "user", "content": "hi"}]


def test_the_chat_template_is_found_like_in_transformers(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint()

    def rendered() -> str:
        shown = load_tokenizer(folder).apply_chat_template(MESSAGES, tokenize=False)
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False) == shown
        return shown

    settings(folder, chat_template="1{{ bos_token }}{{ messages[0]['content'] }}")
    assert rendered() == "1<s>hi"
    settings(folder, chat_template=[{"name": "default", "template": "2"}, {"name": "rag", "template": "no"}])
    assert rendered() == "2"
    (folder / "chat_template.jinja").write_text("3")
    assert rendered() == "3"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("no")
    assert rendered() == "3"


# --- without tokenizer.json -------------------------------------------------------------------------


@pytest.fixture
def sentencepiece(tiny_checkpoint: Checkpoint) -> Callable[..., Path]:
    """A checkpoint that has a tokenizer.model and nothing else of its tokenizer's vocabulary."""

    def write(**options: Any) -> Path:
        words = [f"{one}{two} 27 naïve: {two}" for one in ("un", "in", "re", "over") for two in ("do", "tell", "seen")]
        made = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=made,
            vocab_size=258 + 26,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        folder = tiny_checkpoint(vocab_size=300)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(made.getvalue())
        described = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
        return folder

    return write


LLAMA = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def test_a_sentencepiece_model_alone(sentencepiece: Callable[..., Path]) -> None:
    folder = sentencepiece(**LLAMA)
    model, tokenizer = checkpoint.load(folder)
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("undo overseen", "A naïve  cafe\u0301\n\t数"):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    checkpoint.save(model, folder, folder.with_name("out"))
    assert not folder.with_name("out").joinpath("tokenizer.json").exists()
    settings(folder.with_name("out"), unk_token="")
    with pytest.raises(InputError, match=r'"unk_token": "" is not a token; remove that line'):
        load_tokenizer(folder.with_name("out"))
    vllm.export(folder, folder.with_name("vllm"))
    for name in ("out", "vllm"):
        assert (folder.with_name(name) / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_a_sentencepiece_model_that_transformers_reads_differently_is_refused(
    sentencepiece: Callable[..., Path],
) -> None:
    """The Llama class knows nothing of this one's normalisation."""
    folder = sentencepiece(**LLAMA | {"normalization_rule_name": "nmt_nfkc_cf"})
    with pytest.raises(
        InputError, match=r"tokenizer\.model: transformers reads it as LlamaTokenizer .*sentencepiece; put"
    ):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")  # tiktoken's format, under the same name
    with pytest.raises(InputError, match=r"not a sentencepiece model .*put the model's tokenizer\.json beside it"):
        load_tokenizer(folder)
