"""A model's tokenizer, read from its own files, and a check that other readers agree.

transformers picks a class by the names in tokenizer_config.json and config.json, and some classes rebuild the tokenizer
from the vocabulary in tokenizer.json: a byte-level tokenizer labelled LlamaTokenizer, as in many published models, is
then read as a sentencepiece one. Here, tokenizer.json alone defines the tokens of a text.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from numprune.anatomy import code_vocabulary, family_of
from numprune.codes import CodeVocabulary
from numprune.errors import InputError, reason
from numprune.export import files
from numprune.export.config import read_config

logger = logging.getLogger(__name__)

_FILE = "tokenizer.json"
_MODEL = "tokenizer.model"
_SETTINGS = "tokenizer_config.json"
_OBJECTS = (_SETTINGS, "special_tokens_map.json", "added_tokens.json")

# Line breaks, digits, case, code, accents, other scripts: these reveal differences between readers.
_PLAIN = (
    "The 27 numbers, e.g. 3.14:\n\tdef f(x):  return x**2  # naïve — 数",
    "I'll  see\r\n\n   you,   it's 1,234,567 €\u00a0",
    "Caf\u00e9 \ufb01 ½ \uff21",
    "Привет, мир! 你好。 こんにちは 안녕 مرحبا नमस्ते 🙂",
)
_SAMPLES = (" a b", *_PLAIN, "<html>&nbsp;</html> ▁ Ġ <0x0A> <s>")
_DECOMPOSED = "Cafe\u0301"  # decomposed; rare in text, so a reader that composes it is no reason to refuse a model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer. With a tokenizer.json, its tokens are exactly those of the `tokenizers` library.

    An image generator without a tokenizer gets one whose words are the numbers of its codes.
    A tokenizer.model alone is read by transformers, and refused if sentencepiece gives other tokens. Special tokens and
    the chat template come from the other files; neither adds a token. Raises InputError.
    """
    if not any((folder / name).is_file() for name in (_FILE, _MODEL, "vocab.json")):
        if (folder / files.CONFIG).is_file() and (codes := code_vocabulary(read_config(folder))):
            return _of_codes(codes)
        raise InputError(f"{folder}: no tokenizer (tokenizer.json) in this folder; copy it from the original model")
    for path in files.carried(folder):  # each of an acceptable size
        if path.name in _OBJECTS:
            files.read_object(path)
    with _named(folder):
        if (folder / _FILE).is_file():
            return _as_written(folder)
        return _as_sentencepiece(folder) if (folder / _MODEL).is_file() else _as_transformers_reads(folder)


def text_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model that reads text; None: it reads images. Raises InputError."""
    return load_tokenizer(folder) if family_of(read_config(folder)).patches is None else None


def other_reading(folder: Path) -> str | None:
    """Refuse a tokenizer that transformers reads differently from `load_tokenizer`, with the remedy.

    vLLM reads tokenizers with transformers, and would feed such a model tokens that it was not trained on. A difference
    in decomposed accents alone is only a warning. Raises InputError.
    """
    ours = text_tokenizer(folder)
    if ours is None or not (folder / _FILE).is_file():
        return None
    reader = f"transformers {transformers.__version__}, which vLLM uses to read tokenizers,"
    try:
        with _named(folder):
            theirs = _as_transformers_reads(folder)
            found = {text: (theirs.encode(text), ours.encode(text)) for text in _SAMPLES}
    except InputError as error:
        return f"{error} ({_FILE} is valid, but {reader} follows {_SETTINGS})"
    text = next((text for text, (one, other) in found.items() if one != other), None)
    if text is None:
        if theirs.encode(_DECOMPOSED) != ours.encode(_DECOMPOSED):
            logger.warning(
                "%s: %s composes accents, but %s does not: decomposed accents get other tokens", folder, reader, _FILE
            )
        return None
    taken, label = type(theirs).__name__, _settings(folder).get("tokenizer_class")
    if isinstance(label, str) and label.removesuffix("Fast") == taken.removesuffix("Fast"):
        remedy = f'set "tokenizer_class": "PreTrainedTokenizerFast" in {_SETTINGS}'
    else:
        remedy = f"it uses {taken} for this model type, so vLLM cannot serve the model with this tokenizer"
    one, other = (tokens[:8] for tokens in found[text])
    return f"{folder}: {reader} reads it as {taken}: {text!r} begins with {one}, by {_FILE} with {other}; {remedy}"


def _of_codes(codes: CodeVocabulary) -> PreTrainedTokenizerBase:
    """Return a tokenizer of numbers between spaces, `<class:N>` and `<start>`."""
    words = [*map(str, range(codes.codes)), *(f"<class:{label}>" for label in range(codes.classes)), "<start>"]
    model = tokenizers.models.WordLevel({word: token for token, word in enumerate(words)})
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn any exception about malformed files into an InputError."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # a Rust panic in tokenizers is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason(error)}") from error


def _as_written(folder: Path) -> PreTrainedTokenizerBase:
    backend = tokenizers.Tokenizer.from_file(str(folder / _FILE))
    backend.no_truncation()  # some files contain the settings of an earlier batch
    backend.no_padding()
    settings = _settings(folder)
    # The chat template is kept as text and never rendered here.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_chat_template(folder, settings))
    for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES:
        token = settings.get(name)
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if token and backend.token_to_id(token) is not None:
            setattr(tokenizer, name, token)  # passed to the constructor, it would become an added token
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of tokenizer_config.json, and special tokens that only special_tokens_map.json has."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _SETTINGS):
        if (folder / name).is_file():
            found |= files.read_object(folder / name)
    return found


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """Return the chat template as transformers finds it: one template, several by name, or None."""
    if not (folder / files.CHAT_TEMPLATE).is_file():
        return settings.get("chat_template")
    paths = {path.stem: path for path in (folder / files.MORE_TEMPLATES).glob("*.jinja")}
    paths["default"] = folder / files.CHAT_TEMPLATE
    found = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    return found if len(found) > 1 else found["default"]


def _as_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Return transformers' conversion of a tokenizer.model, if it gives the same tokens as sentencepiece itself.

    Only plain text is compared: the conversion is known to drop a leading space and to parse special tokens in a text.
    """
    from sentencepiece import SentencePieceProcessor  # needed for few models only

    path = folder / _MODEL
    try:
        original = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a sentencepiece model ({reason(error)}); put the model's {_FILE} beside it"
        ) from None
    tokenizer = _as_transformers_reads(folder)
    for text in _PLAIN:
        if tokenizer.encode(text, add_special_tokens=False) != original.encode(text):
            raise InputError(
                f"{path}: transformers reads it as {type(tokenizer).__name__} and gives other tokens for {text!r} than "
                f"sentencepiece; put the model's {_FILE} beside it"
            )
    return tokenizer


def _as_transformers_reads(folder: Path) -> PreTrainedTokenizerBase:
    for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES:
        if _settings(folder).get(name) == "":  # transformers would look it up endlessly
            raise InputError(f'{folder / _SETTINGS}: "{name}": "" is not a token; remove that line')
    config = read_config(folder)  # transformers itself refuses some that are accepted here
    return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
