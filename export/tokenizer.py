"""A model's tokenizer as its own files say, and whether other readers take it for the same.

transformers picks a class by the names in tokenizer_config.json and config.json, and some classes build a tokenizer of
their own from the vocabulary in tokenizer.json: a byte-level tokenizer that is labelled LlamaTokenizer, as many are
published, is then read as a sentencepiece one. Here tokenizer.json alone says which tokens a text has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from numprune.errors import InputError
from numprune.export import files
from numprune.export.config import reason

_FILE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_OBJECTS = (_SETTINGS, "special_tokens_map.json", "added_tokens.json")

# Spaces, breaks, digits, case, code, composed and decomposed accents, other scripts: where readers differ, it shows.
_SAMPLES = (
    " a b",
    "The 27 numbers, e.g. 3.14:\n\tdef f(x):  return x**2  # naïve — 数",
    "I'll  see\r\n\n   you,   it's 1,234,567 €\u00a0",
    "Cafe\u0301 caf\u00e9 \ufb01 ½ \u212a \uff21",
    "Привет, мир! 你好。 こんにちは 안녕 مرحبا नमस्ते 🙂",
    "<html>&nbsp;</html> ▁ Ġ <0x0A> <s>",
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer: where there is a tokenizer.json, its tokens are exactly those that `tokenizers` reads.

    Special tokens and the chat template are those of the other files; neither adds a token. Raises InputError.
    """
    if not any((folder / name).is_file() for name in (_FILE, "tokenizer.model", "vocab.json")):
        raise InputError(f"{folder}: no tokenizer (tokenizer.json) there; copy it from the model's origin")
    for path in files.carried(folder):  # each of an acceptable size
        if path.name in _OBJECTS:
            files.read_object(path)
    with _named(folder):
        return _as_written(folder) if (folder / _FILE).is_file() else _as_transformers_reads(folder)


def other_reading(folder: Path) -> str | None:
    """What is wrong, and the remedy, where transformers does not give the tokens that `load_tokenizer` does.

    vLLM reads tokenizers with transformers and would serve a model with text that it does not know. Raises InputError.
    """
    if not (folder / _FILE).is_file():
        return None
    ours = load_tokenizer(folder)
    reader = f"transformers {transformers.__version__}, by which vLLM reads tokenizers,"
    try:
        with _named(folder):
            theirs = _as_transformers_reads(folder)
            found = {text: (theirs.encode(text), ours.encode(text)) for text in _SAMPLES}
    except InputError as error:
        return f"{error}; {_FILE} is in order, but {reader} goes by {_SETTINGS}: mend that"
    different = next((text for text, (one, other) in found.items() if one != other), None)
    if different is None:
        return None
    label = files.read_object(folder / _SETTINGS).get("tokenizer_class") if (folder / _SETTINGS).is_file() else None
    taken = type(theirs).__name__
    if isinstance(label, str) and label.removesuffix("Fast") == taken.removesuffix("Fast"):
        remedy = f'set "tokenizer_class": "PreTrainedTokenizerFast" in {_SETTINGS}'
    else:
        remedy = f"it chooses {taken} by the model type, so vLLM cannot serve this tokenizer with this model"
    return (
        f"{folder}: {reader} takes it for {taken} and gives other tokens than {_FILE}: {different!r} is "
        f"{found[different][0][:8]}, not {found[different][1][:8]}; {remedy}"
    )


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn whatever malformed files raise into an InputError."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{folder}: its tokenizer cannot be read: {reason(error)}") from error


def _as_written(folder: Path) -> PreTrainedTokenizerBase:
    backend = tokenizers.Tokenizer.from_file(str(folder / _FILE))
    backend.no_truncation()  # some files keep the settings of a batch that was once encoded
    backend.no_padding()
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _SETTINGS):
        if (folder / name).is_file():
            settings |= files.read_object(folder / name)
    # Its chat template is text to us: nothing here renders it.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_chat_template(folder, settings))
    for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES:
        token = settings.get(name)
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if token and backend.token_to_id(token) is not None:
            setattr(tokenizer, name, token)  # given to the constructor, it would become an added token
    return tokenizer


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """As transformers finds it: one template, or several by name, or None."""
    if not (folder / files.CHAT_TEMPLATE).is_file():
        return settings.get("chat_template")
    paths = {path.stem: path for path in (folder / files.MORE_TEMPLATES).glob("*.jinja")}
    paths["default"] = folder / files.CHAT_TEMPLATE
    found = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    return found if len(found) > 1 else found["default"]


def _as_transformers_reads(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
