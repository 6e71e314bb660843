"""Convert text to the rows of an encoder: windows framed by the special tokens of its tokenizer."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from numprune.corpus import Frame, Pack, TokenRows, token_rows
from numprune.documents import Document
from numprune.errors import InputError

_SAMPLE = "a"


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return the special tokens that the tokenizer adds around a text, such as [CLS] and [SEP].

    Raises InputError if it changes a text in any other way.
    """
    plain = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    whole = tokenizer.encode(_SAMPLE)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            prefix, suffix = whole[:start], whole[start + len(plain) :]
            return Frame(tuple(prefix), tuple(suffix), tokenizer.sep_token_id)
    raise InputError(f"the tokenizer does not encode {_SAMPLE!r} as the same tokens with and without special tokens")


def encoder_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack
) -> TokenRows:
    """Return the documents in windows of at most `length` tokens. Raises InputError."""
    return token_rows(documents, tokenizer, length, pack, frame_of(tokenizer))


def text_rows(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, pack: Pack) -> TokenRows:
    """Return the documents as texts that a model reads one by one, each cut into windows of at most `length` tokens.

    Raises InputError: the text is too short, or `pack` asks for texts to be joined.
    """
    if pack is True:
        raise InputError("pack: predictions are per text, so texts cannot be joined; omit it")
    return token_rows(documents, tokenizer, length, False, frame_of(tokenizer))
