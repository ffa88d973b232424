"""The tokenizer is a real Hugging Face one: it survives saving and AutoTokenizer, also beside the model."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fkernel.demo.policy import PolicyConfig, build_model
from fkernel.demo.task import ALPHABET
from fkernel.demo.tokenizer import EOS, PAD, build_tokenizer


def test_one_token_a_character_and_nothing_added() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("37+85=-48")
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "37+85=-48"
    assert sorted(tokenizer.encode(ALPHABET)) == list(range(2, 2 + len(ALPHABET)))


def test_padding_and_eos_are_distinct_and_there_is_no_bos() -> None:
    tokenizer = build_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert len(tokenizer) == 2 + len(ALPHABET)


def test_special_tokens_show_when_decoded() -> None:
    assert build_tokenizer().decode([4, 0, 1]) == "2<pad><eos>"


@pytest.mark.parametrize("beside_model", [False, True])
def test_round_trip_through_auto_tokenizer(tmp_path: Path, beside_model: bool) -> None:
    tokenizer = build_tokenizer()
    if beside_model:  # AutoTokenizer then chooses its class by the model's type
        build_model(PolicyConfig(layers=1, width=8, heads=2, mlp=8), tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token, len(loaded)) == (PAD, EOS, None, 15)
    assert loaded.padding_side == "right"
    assert loaded.encode("37+85=-48") == tokenizer.encode("37+85=-48")
    assert loaded.decode([5, 9, 1]) == tokenizer.decode([5, 9, 1]) == "37<eos>"
