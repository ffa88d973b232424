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
