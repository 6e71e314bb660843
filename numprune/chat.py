"""Render conversations as text, with the model's own chat template."""

from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from numprune.documents import Render
from numprune.errors import InputError

# Some templates insert today's date into the system prompt. The same conversations must always give the same tokens.
_DATE = datetime(2024, 7, 26)


def renderer(tokenizer: PreTrainedTokenizerBase, *, answer: bool = False) -> Render:
    """Return a function that renders a conversation in the model's training format, including special tokens.

    `answer`: the conversation ends where the model's answer begins.

    The template comes with the model and is not trusted: transformers renders it in Jinja's sandbox, which gives it
    access to the conversation only. The function raises InputError if there is no template, or if the template rejects
    a conversation.
    """

    def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        if not tokenizer.chat_template:
            raise InputError(
                'the model has no chat template for rendering messages; add its chat_template.jinja, or give "text"'
            )
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=answer, strftime_now=_DATE.strftime
            )
        except Exception as error:  # any error in or raised by the template
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"the model's chat template does not accept this conversation: {reason}") from None
        return str(text)

    return render
