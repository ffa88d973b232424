"""A character tokenizer that Hugging Face saves and loads like any other, without a network."""

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from fkernel.demo.task import ALPHABET

PAD, EOS = "<pad>", "<eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of the task's alphabet, and two special ones.

    Padding and end of sequence are DISTINCT: where they are one token, code that masks padding also masks the
    EOS that ended a response, and the EOS belongs to the response's score. There is no BOS.

    It is Qwen2's own class with a vocabulary of characters and no merges, because `AutoTokenizer` loads that
    class beside a Qwen2 model whatever class was saved: another one would come back as something else.

    Returns:
        A tokenizer whose ids are 0 for padding, 1 for EOS, and 2.. for the alphabet in order.
    """
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([PAD, EOS, *ALPHABET])},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,  # type: ignore[arg-type]  # the default would add a token that the model has no row for
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """The id of the special token PAD or EOS.

    Args:
        tokenizer: the demo's tokenizer.
        name: the token's text.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    found = tokenizer.get_vocab().get(name)
    if found is None:
        raise ValueError(f"the tokenizer has no token {name!r}; the demo needs the one from build_tokenizer()")
    return found


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text, nothing added before or after it.

    Raises:
        ValueError: a character is outside the alphabet; byte-pair models drop such characters silently.
    """
    unknown = sorted(set(text) - set(ALPHABET))
    if unknown:
        raise ValueError(f"cannot encode {text!r}: {unknown} not in the alphabet {ALPHABET!r}")
    return list(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of ids, special tokens shown: a padding token that was sampled must not read as nothing."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)  # a list only for a batch of ids
    return text
