"""Templates: make the text that the policy reads from a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fkernel.errors import RolloutError
from fkernel.rollout.prompts import Prompt

Template = Callable[[Prompt], str]
"""prompt -> text, which the tokenizer is given as trainers give it.

A plain text is read as `tokenizer(text)` reads it, with the special tokens that the tokenizer puts before one (but for
a BOS that stands there already). A chat template writes every special token itself: its text is read without any other,
as `tokenizer.apply_chat_template(turns, tokenize=True)` reads it. A function of yours that writes a chat says so by an
attribute: `template.writes_special_tokens = True`.

Source: TRL 1.16, `GRPOTrainer._tokenize_prompts`.
"""

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


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: whose template it is.
        system: text of the system's turn; None for no such turn.
    """

    tokenizer: Any
    system: str | None = None
    writes_special_tokens: ClassVar[bool] = True

    def turns(self, prompt: Prompt) -> list[dict[str, str]]:
        """Make the messages of the chat, as a trainer's data set has them under "prompt"."""
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": prompt.question}]

    def __call__(self, prompt: Prompt) -> str:
        """Write the question as the user's turn, and begin the assistant's.

        Raises:
            RolloutError: the template fails, or refuses such turns; the message says what the template said.
        """
        turns = self.turns(prompt)
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise whatever it likes
            roles = " and ".join(f"a {turn['role']} turn" for turn in turns)
            advice = "Choose" if self.system is None else "Leave the system turn out, or choose"
            raise RolloutError(
                f"{prompt.global_prompt_id}: the tokenizer's chat template fails on {roles}, {type(error).__name__}: "
                f"{error}. {advice} the template 'gsm8k_r1' or 'bare', or give a function."
            ) from error


def chat(tokenizer: Any, system: str | None = None) -> Template:
    """Make the template of a tokenizer: the question is the user's turn, and the assistant's begins.

    The tokens are those of `tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)`.

    Raises:
        RolloutError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RolloutError("The tokenizer has no chat template; choose the template 'gsm8k_r1' or 'bare', or give one.")
    return Chat(tokenizer, system)


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


def writes_special_tokens(template: Template) -> bool:
    """Tell whether a template writes every special token itself, so that the tokenizer adds none."""
    return bool(getattr(template, "writes_special_tokens", False))


def messages_of(template: Template, prompt: Prompt) -> list[dict[str, str]] | None:
    """Make a chat's messages for reward functions of TRL's signature; None where the template writes a text.

    A function of yours that writes a chat may have them too: an attribute `turns`, (prompt) -> messages.
    """
    turns = getattr(template, "turns", None)
    return None if turns is None else turns(prompt)


def render(template: Template, prompt: Prompt) -> str:
    """Put a prompt into a template.

    Raises:
        RolloutError: the template fails, or what it returns is no text; the message names the prompt.
    """
    try:
        text = template(prompt)
    except RolloutError:
        raise
    except Exception as error:  # a user's function may raise whatever it likes
        raise RolloutError(
            f"{prompt.global_prompt_id}: the template raised {type(error).__name__}: {error}. A template is called "
            f"with a Prompt and returns the text that the policy reads."
        ) from error
    if not isinstance(text, str):
        raise RolloutError(
            f"{prompt.global_prompt_id}: the template returned a {type(text).__name__}; expected the text that the "
            f"policy reads, such as apply_chat_template(..., tokenize=False) returns."
        )
    return text
