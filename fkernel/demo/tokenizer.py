"""A character tokenizer in Hugging Face's format."""

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from fkernel.demo.task import ALPHABET

PAD, EOS = "<pad>", "<eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of the task's alphabet, and two special ones.

    Padding and EOS are distinct, so that code that masks padding does not mask the EOS of a response, which counts in
    its score. There is no BOS.

    The class is Qwen2's, with a vocabulary of characters and no merges, because `AutoTokenizer` loads that class beside
    a Qwen2 model whatever class was saved.

    Returns:
        A tokenizer whose ids are 0 for padding, 1 for EOS, and 2.. for the alphabet in order.
    """
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([PAD, EOS, *ALPHABET])},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,  # type: ignore[arg-type]  # the default would add a token
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
