"""Sampling: from the distribution that it says, the same for a seed in any company, ended where it ended."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.rollout import Sampling, score
from fkernel.rollout.sampling import draw, seed_of
from tests.rollout.conftest import byte_tokenizer

PROMPTS = ["1+1=", "a much longer prompt than the others", "x", "How many apples?", "=", "two words"]


def drawn(model, tokenizer, sampling=None, microbatch=32, seed=0, prompts=PROMPTS):
    ids = [tokenizer.encode(text) for text in prompts]
    seeds = [seed_of(seed, i) for i in range(len(ids))]
    return ids, draw(model, tokenizer, ids, seeds, sampling or Sampling(max_new_tokens=12), microbatch)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("microbatch", [1, 2, 5])
def test_company_changes_nothing(model, tokenizer, microbatch):
    _, together = drawn(model, tokenizer)
    _, apart = drawn(model, tokenizer, microbatch=microbatch)
    assert [one.response_ids for one in apart] == [one.response_ids for one in together]
    assert [one.finish for one in apart] == [one.finish for one in together]
    for one, other in zip(apart, together, strict=True):
        close(one.logqs, other.logqs)


def test_a_seed_decides(model, tokenizer):
    torch.manual_seed(1)
    _, first = drawn(model, tokenizer)
    torch.manual_seed(2)
    _, again = drawn(model, tokenizer)
    assert first == again
    assert drawn(model, tokenizer, seed=1)[1] != first


def test_neither_the_model_nor_the_random_state_is_touched(model, tokenizer):
    model.train()
    model.generation_config.repetition_penalty = 1.5
    state, config = torch.get_rng_state(), model.generation_config
    penalised = drawn(model, tokenizer)[1]
    assert model.training
    assert model.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    model.generation_config.repetition_penalty = None
    assert drawn(model, tokenizer)[1] == penalised


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=1),
        Sampling(temperature=0.6, max_new_tokens=1),
        Sampling(top_k=5, max_new_tokens=1),
        Sampling(top_p=0.7, max_new_tokens=1),
        Sampling(temperature=1.7, top_k=40, top_p=0.8, max_new_tokens=1),
    ],
    ids=str,
)
def test_frequencies_are_those_of_q(model, tokenizer, sampling):
    n, prompt = 4000, tokenizer.encode("1+1=")
    found = draw(model, tokenizer, [prompt] * n, [seed_of(7, i) for i in range(n)], sampling, microbatch=1000)
    counts = Counter(one.response_ids[0] for one in found)
    q = {one.response_ids[0]: torch.tensor(one.logqs[0]).exp().item() for one in found}
    for token, count in counts.most_common(8):
        assert abs(count / n - q[token]) < 4.5 * (q[token] * (1 - q[token]) / n) ** 0.5
    # What was never drawn is rare: the probabilities of what was add up to nearly all.
    assert sum(q.values()) > (0.999 if sampling.top_k or sampling.top_p < 1 else 0.85)
    if sampling.top_k:
        assert len(counts) <= sampling.top_k


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=30)], ids=str)
def test_teacher_forcing_says_what_the_sampler_saw(model, tokenizer, sampling):
    ids, found = drawn(model, tokenizer, Sampling(**{**vars(sampling), "max_new_tokens": 12}))
    batch = func.pad(ids, [one.response_ids for one in found])
    for microbatch in (1, 3):
        for one, known in zip(found, score(model, batch, sampling, microbatch), strict=True):
            close(one.logprobs, known.logprobs)
            close(one.logqs, known.logqs)


def test_statistics_are_the_engines(model, tokenizer):
    ids, found = drawn(model, tokenizer)
    batch = func.pad(ids, [one.response_ids for one in found])
    apply, params = func.make_functional(model)
    statistics = score(model, batch, Sampling())
    S = func.evaluate(func.sequence_logprob(apply))(params, batch)
    H = func.evaluate(func.token_entropy(apply))(params, batch)
    for row, known in enumerate(statistics):
        close(sum(known.logprobs), S[row].item(), atol=1e-3)
        close(known.entropies, H[row][batch.response_mask[row]].tolist())
        assert known.logqs == known.logprobs


def test_logq_is_minus_infinity_outside_of_the_top(model, tokenizer):
    batch = func.pad([tokenizer.encode("1+1=")], [tokenizer.encode("\x00\x01\x02")])
    (known,) = score(model, batch, Sampling(top_k=1))
    assert -float("inf") in known.logqs
    assert all(value > -float("inf") for value in known.logprobs)


def test_eos_ends_a_response_and_belongs_to_it(model, tokenizer):
    _, found = drawn(model, tokenizer, Sampling(max_new_tokens=60), prompts=PROMPTS * 4)
    ended = [one for one in found if one.finish == "eos"]
    cut = [one for one in found if one.finish == "length"]
    assert ended
    assert cut
    assert all(one.response_ids[-1] == 1 and 1 not in one.response_ids[:-1] for one in ended)
    assert all(len(one.response_ids) == 60 and 1 not in one.response_ids for one in cut)
    assert all(len(one.response_ids) == len(one.logprobs) == len(one.logqs) for one in found)


def test_padding_and_eos_may_be_one_token(model, tokenizer):
    same = byte_tokenizer(pad_token="<eos>")
    assert same.pad_token_id == same.eos_token_id
    sampling = Sampling(max_new_tokens=60)
    assert drawn(model, same, sampling)[1] == drawn(model, tokenizer, sampling)[1]


def test_stop_strings_end_a_response_and_belong_to_it(model, tokenizer):
    prompts = PROMPTS * 5
    _, found = drawn(model, tokenizer, Sampling(max_new_tokens=40), prompts=prompts)
    texts = [tokenizer.decode(list(one.response_ids), skip_special_tokens=True) for one in found]
    stop, place = next(  # two letters in the middle of some response: other bytes do not decode one by one
        (text[i : i + 2], row)
        for row, text in enumerate(texts)
        for i in range(3, len(text) - 3)
        if text[i : i + 2].isascii() and text[i : i + 2].isalnum()
    )
    _, stopped = drawn(model, tokenizer, Sampling(max_new_tokens=40, stop_strings=(stop,)), prompts=prompts)
    one, before = stopped[place], found[place]
    assert one.finish == "stop_string"
    assert tokenizer.decode(list(one.response_ids)).endswith(stop)
    assert one.response_ids == before.response_ids[: len(one.response_ids)]
    assert len(one.response_ids) < len(before.response_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0.0; expected > 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected in \(0, 1\]"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1 or more"),
    ],
)
def test_impossible_distributions_are_refused(options, message):
    with pytest.raises(fk.RolloutError, match=message):
        Sampling(**options)
