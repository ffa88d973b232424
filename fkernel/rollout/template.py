"""From a question to the text that the policy reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fkernel.errors import RolloutError
from fkernel.rollout.prompts import Prompt

Template = Callable[[Prompt], str]
"""prompt -> text; what the tokenizer is given, special tokens included."""

R1_INSTRUCTION = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and the answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)


def gsm8k_r1(prompt: Prompt) -> str:
    """Instruction, question, and the beginning of a thought: the GSM8K R1 template.

    Example:
        >>> gsm8k_r1(Prompt("train-000000", "What is 1+1?")).splitlines()[-2:]
        ['Question: What is 1+1?', 'Response: <think>']

    Source: DeepSeek-AI, "DeepSeek-R1" (2025), Table 1.
    """
    return f"{R1_INSTRUCTION}\n\nQuestion: {prompt.question}\nResponse: <think>"


def bare(prompt: Prompt) -> str:
    """The question itself."""
    return prompt.question


def chat(tokenizer: Any, system: str | None = None) -> Template:
    """Make the template of a tokenizer: the question is the user's turn, and the assistant's begins.

    Raises:
        RolloutError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RolloutError("The tokenizer has no chat template; choose the template 'gsm8k_r1' or 'bare', or give one.")

    def template(prompt: Prompt) -> str:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": prompt.question})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    return template


TEMPLATES: dict[str, Template] = {"gsm8k_r1": gsm8k_r1, "bare": bare}
"""Those that need no tokenizer, by name; "chat" is the other name that a plan may give."""


def template_of(name: str | Template, tokenizer: Any) -> Template:
    """Find a template by its name; one that is a function already is returned as it is.

    Raises:
        RolloutError: there is none of that name.
    """
    if callable(name):
        return name
    if name == "chat":
        return chat(tokenizer)
    if name not in TEMPLATES:
        raise RolloutError(f"There is no template {name!r}; expected {', '.join([*TEMPLATES, 'chat'])}, or a function.")
    return TEMPLATES[name]
