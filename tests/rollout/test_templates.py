"""Prompts become the tokens that trainers make of them: chats as they are, texts as the tokenizer reads them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tokenizers import processors

import fkernel as fk
from fkernel.rollout import CustomSample, SampleGenerator, Sampling
from fkernel.rollout.template import chat
from tests.rollout.conftest import byte_tokenizer

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TEMPLATES = {"without BOS": TURNS, "with BOS": "{{ bos_token }}" + TURNS}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.RolloutWarning)
        yield


def adds_bos(template: str | None = None) -> Any:
    """A tokenizer that puts a BOS before whatever it reads, and an EOS behind nothing."""
    tokenizer = byte_tokenizer(bos_token="<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id, *tokenizer.encode("a", add_special_tokens=False)]
    return tokenizer


def hub_of(model, tokenizer, template) -> SampleGenerator:
    return SampleGenerator(model, tokenizer, template=template, sampling=Sampling(max_new_tokens=3))


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("adds", [True, False], ids=["BOS is added", "no BOS is added"])
def test_chat_prompts_are_those_of_apply_chat_template(model, text, system, adds):
    tokenizer = adds_bos(text) if adds else byte_tokenizer(bos_token="<bos>", chat_template=text)
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": "1+1?"})
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == (text == TEMPLATES["with BOS"])
    generator = hub_of(model, tokenizer, chat(tokenizer, system))
    sampled = generator.generate_from_custom_prompts(["1+1?"], completions_per_prompt=2)
    assert [list(record.prompt_ids) for record in sampled] == [expected] * 2
    (given,) = generator.build_custom_sequence("1+1?", "2")
    assert list(given.prompt_ids) == expected
    (again,) = generator.build_custom_sequence(CustomSample(given.prompt, "2", raw=True))
    assert again.content_hash == given.content_hash


def test_a_chat_by_its_name_is_the_same(model):
    tokenizer = adds_bos(TURNS)
    by_name, by_function = (
        hub_of(model, tokenizer, template).build_custom_sequence("Hi", "Yo").ids
        for template in ("chat", chat(tokenizer))
    )
    assert by_name == by_function


@pytest.mark.parametrize("template", ["bare", "gsm8k_r1", lambda prompt: f"Q: {prompt.question}"])
def test_texts_are_read_as_the_tokenizer_reads_them(model, template):
    tokenizer = adds_bos()
    for record in hub_of(model, tokenizer, template).generate_from_custom_prompts(["1+1?"]):
        assert list(record.prompt_ids) == tokenizer(text=[record.prompt])["input_ids"][0]
        assert record.prompt_ids[0] == tokenizer.bos_token_id


def test_a_bos_that_stands_in_a_text_is_not_doubled(model):
    tokenizer = adds_bos()
    (record,) = hub_of(model, tokenizer, lambda prompt: f"<bos>{prompt.question}").build_custom_sequence("a", "b")
    assert record.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_a_function_that_writes_a_chat_says_so(model):
    tokenizer = adds_bos(TURNS)
    turns = [{"role": "user", "content": "Hi"}]

    def template(prompt):
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    setattr(template, "writes_special_tokens", True)  # noqa: B010
    (record,) = hub_of(model, tokenizer, template).build_custom_sequence("Hi", "Yo")
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert list(record.prompt_ids) == expected


def test_a_chat_is_one_text_with_its_response(model):
    """The boundary is looked for in the tokens that are scored: without a BOS that is nowhere."""
    tokenizer = adds_bos(TURNS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fk.RolloutWarning)
        hub_of(model, tokenizer, "chat").build_custom_sequence("Hi", "Yo")


def test_what_a_chat_template_says_is_passed_on(model):
    tokenizer = adds_bos(NO_SYSTEM)
    assert hub_of(model, tokenizer, "chat").build_custom_sequence("Hi", "Yo").records[0].prompt == "[user]Hi>"
    refused = hub_of(model, tokenizer, chat(tokenizer, "Be brief."))
    message = r"custom-\w+: .* fails on a system turn and a user turn, .*System role not supported.* Leave the system"
    with pytest.raises(fk.RolloutError, match=message) as caught:
        refused.build_custom_sequence("Hi", "Yo")
    assert caught.value.__cause__ is not None
    with pytest.raises(fk.RolloutError, match="System role not supported"):
        refused.generate_from_custom_prompts(["Hi"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0]['content'] + 1 }}", "fails on a user turn, TypeError"),
        ("{{ messages[0].parts[0].text }}", "fails on a user turn, UndefinedError: .*has no attribute 'parts'"),
        ("{% for m in messages %}", "fails on a user turn, TemplateSyntaxError"),
        ({"tool_use": TURNS}, "fails on a user turn, ValueError"),
    ],
)
def test_templates_that_fail_name_the_prompt(model, text, message):
    with pytest.raises(fk.RolloutError, match=rf"custom-\w+: the tokenizer's chat template {message}"):
        hub_of(model, adds_bos(text), "chat").build_custom_sequence("Hi", "Yo")


def test_a_tokenizer_without_a_chat_template(model):
    with pytest.raises(fk.RolloutError, match="has no chat template; choose the template 'gsm8k_r1' or 'bare'"):
        hub_of(model, adds_bos(), "chat")


def test_functions_that_are_no_templates(model):
    tokenizer = adds_bos(TURNS)

    def failing(prompt):
        return prompt.metadata["name"]

    def tokens(prompt):
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt.question}])

    with pytest.raises(fk.RolloutError, match=r"custom-\w+: the template raised KeyError: 'name'"):
        hub_of(model, tokenizer, failing).build_custom_sequence("Hi", "Yo")
    with pytest.raises(fk.RolloutError, match=r"custom-\w+: the template returned a BatchEncoding; expected the text"):
        hub_of(model, tokenizer, tokens).generate_from_custom_prompts(["Hi"])
