"""Conversations to text, by the model's own chat template."""

from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from numprune.documents import Render
from numprune.errors import InputError

# Some templates write today's date into the system prompt. The same conversations must give the same tokens tomorrow.
_DATE = datetime(2024, 7, 26)


def renderer(tokenizer: PreTrainedTokenizerBase, *, answer: bool = False) -> Render:
    """Return the function that writes a conversation as the model was trained to see it, special tokens included.

    `answer`: the conversation ends where the model's answer begins.

    The template comes with the model and is not trusted: transformers renders it in Jinja's sandbox, where it can reach
    nothing but the conversation. The function raises InputError where there is no template, or where it does not accept
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
        except Exception as error:  # whatever the template runs into or raises itself
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"the model's chat template does not accept this conversation: {reason}") from None
        return str(text)

    return render
