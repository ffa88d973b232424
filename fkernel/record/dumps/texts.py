"""Tokens of a text that a trainer dumped, where only one sequence of tokens can have been meant.

Trainers decode with skip_special_tokens=True, so that a text has lost its EOS. A response shorter than the longest that
was allowed ended by itself, and has it; one of exactly that many tokens was cut off:

    response = encode(text) + [EOS]    where |encode(text)| < max_new_tokens
    response = encode(text)            where |encode(text)| = max_new_tokens

A model may write a text in other tokens than the tokenizer would; nothing in a text tells. What can be told is refused:
a text that its tokens do not decode to, and a boundary of prompt and response that falls inside a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fkernel.errors import RolloutError

KEEP_TOKENS = (
    "Keep the tokens in the next run: record it with fkernel.record.Recorder, or, with TRL, let a reward function call "
    "log_extra('completion_ids', completion_ids)."
)
"""What to do about a text that is not enough."""


def response_of(tokenizer: Any, prompt: str | None, text: str, most: int, place: str) -> tuple[list[int], bool]:
    """Tokenize a response.

    Args:
        tokenizer: the policy's.
        prompt: the prompt's text as it was tokenized, to look at the boundary; None where it is not known.
        text: of the response, without special tokens.
        most: tokens that a response could have, its EOS included.
        place: file and row, for messages.

    Returns:
        The tokens, and whether the response ended by itself.

    Raises:
        RolloutError: they are not the only ones possible, or more than `most`; or there is no EOS.

    Example:
        >>> from fkernel.demo.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> response_of(tokenizer, "1+2=", "3", 4, "row 0")
        ([5, 1], True)
    """
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    check_decoded(tokenizer, ids, text, "response", place)
    if prompt is not None and text:
        _check_boundary(tokenizer, prompt, text, ids, place)
    if len(ids) > most:
        raise RolloutError(
            f"{place}: its response is {len(ids)} tokens, and a response had at most {most} (max_new_tokens). Is that "
            f"the run's max_completion_length, and this its tokenizer? Or the model wrote the text in other tokens. "
            f"{KEEP_TOKENS}"
        )
    eos = tokenizer.eos_token_id
    if len(ids) == most:
        return ids, False
    if eos is None:
        raise RolloutError(f"{place}: its response ended, and the tokenizer has no EOS to end it with.")
    return [*ids, int(eos)], True


def check_decoded(tokenizer: Any, ids: Sequence[int], text: str, what: str, place: str) -> None:
    """Raise RolloutError where tokens do not decode to the text that they are of."""
    back = tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if back != text:
        at = next((i for i, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), min(len(back), len(text)))
        raise RolloutError(
            f"{place}: the tokens of its {what} decode to {back[at : at + 20]!r} where the file has "
            f"{text[at : at + 20]!r} (character {at}); which tokens it had is not known. {KEEP_TOKENS}"
        )


def _check_boundary(tokenizer: Any, prompt: str, text: str, ids: Sequence[int], place: str) -> None:
    """Refuse a boundary of prompt and response that falls inside a token."""
    alone, joint = (
        [int(i) for i in tokenizer.encode(one, add_special_tokens=False)] for one in (prompt, prompt + text)
    )
    if joint != [*alone, *ids]:
        raise RolloutError(
            f"{place}: prompt and response read as one text are {len(joint)} tokens, and read one after the other "
            f"{len(alone)} + {len(ids)}: the boundary between them falls inside a token, so that it is not known which "
            f"tokens the model wrote. {KEEP_TOKENS}"
        )


def chat_text(messages: Any, place: str) -> str:
    """The text of a completion that is a list of messages: one of the assistant's, and nothing but text.

    Args:
        messages: what the file has.
        place: file and row, for messages.

    Raises:
        RolloutError: there are several (tools, environments), or it has more than a text.

    Example:
        >>> chat_text([{"role": "assistant", "content": "4"}], "row 0")
        '4'
    """
    roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
    if len(messages) != 1 or roles != ["assistant"]:
        raise RolloutError(
            f"{place}: its completion is {len(messages)} messages ({', '.join(map(str, roles))}); which of their "
            f"tokens the loss was about is not in the file. Record such a run with fkernel.record.Recorder."
        )
    content = messages[0].get("content")
    more = sorted(key for key, value in messages[0].items() if key not in ("role", "content") and value)
    if more or not isinstance(content, str):
        raise RolloutError(
            f"{place}: its completion was parsed into parts ({', '.join([*more, type(content).__name__])}), from which "
            f"its tokens cannot be told. {KEEP_TOKENS}"
        )
    return content
