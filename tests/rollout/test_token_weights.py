"""Token weights: a loss by its parts, on records, in batches, on disk; what cannot be one is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.io import checksummed_json, hash_json, read_checksummed
from fkernel.rollout import GeneratedBatch, content_of_batch, load_batch, save_batch
from tests.rollout.test_files import NAMES, record


@pytest.fixture
def batch() -> GeneratedBatch:
    return GeneratedBatch(tuple(record(name, reward=1.0) for name in NAMES), "f" * 64)


def parts_of(batch: GeneratedBatch, *names: str, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    mask = batch.sequences.response_mask
    return {name: torch.where(mask, torch.randn(mask.shape), 0.0) for name in names}


def test_token_weights_come_back_as_they_were_laid_out(batch):
    parts, entropy = parts_of(batch, "advantage", "kl"), parts_of(batch, "entropy", seed=1)["entropy"]
    told = batch.with_token_weights(parts, entropy, total=parts["advantage"] + parts["kl"])
    assert [*told.token_weights] == ["advantage", "kl"]
    for name, part in parts.items():
        torch.testing.assert_close(told.token_weights[name], part.double(), rtol=0, atol=0)
    torch.testing.assert_close(told.entropy_weights["entropy"], entropy.double(), rtol=0, atol=0)
    one, mask = told.by_id("U-001-00"), batch.sequences.response_mask
    assert one.token_weights["kl"] == tuple(parts["kl"][2][mask[2]].tolist())
    assert told.with_token_weights({}).token_weights == {}
    named = batch.with_token_weights(parts, {"bonus": entropy})
    assert [*named.entropy_weights] == ["bonus"]
    assert batch.token_weights == {}
    assert batch.entropy_weights == {}


def test_they_are_laid_out_as_token_logprobs(batch):
    """Σ_t ω_t log π_t of `weighted_logprob` is the sum over each record's own response tokens."""
    sequences = batch.sequences
    logits = torch.randn(16, 16, dtype=torch.float64)
    f = func.token_logprobs(lambda params, ids, mask: params["z"][ids])
    log_p = f({"z": logits}, sequences)
    told = batch.with_token_weights(parts_of(batch, "advantage"))
    summed = (told.token_weights["advantage"] * log_p).sum(1)
    for row, one in enumerate(told):
        own = log_p[row][sequences.response_mask[row]]
        expected = (torch.tensor(one.token_weights["advantage"], dtype=torch.float64) * own).sum()
        torch.testing.assert_close(summed[row], expected)


def test_subsets_and_merged_batches_keep_them(batch):
    told = batch.with_token_weights(parts_of(batch, "advantage"))
    some = told.clone_with_subset(["U-000-01", "U-001-01"])
    assert [one.token_weights for one in some] == [told.by_id(name).token_weights for name in some.ids]
    again = GeneratedBatch.merge([told.clone_with_subset(NAMES[:2]), told.clone_with_subset(NAMES[2:])])
    assert again == told


def test_a_saved_batch_has_them(batch, tmp_path):
    told = batch.with_token_weights(parts_of(batch, "zeta", "alpha"), parts_of(batch, "entropy")["entropy"])
    save_batch(told, tmp_path / "U")
    loaded = load_batch(tmp_path / "U")
    assert loaded == told
    assert [*loaded.token_weights] == ["zeta", "alpha"]
    assert save_batch(told, tmp_path / "U", replace=True).exists()
    assert "token_weights" not in (tmp_path / "U" / "records.jsonl").read_text()
    manifest = json.loads((tmp_path / "U" / "manifest.json").read_text())
    assert manifest["parts"] == ["token_weights/zeta", "token_weights/alpha", "entropy_weights/entropy"]


def test_rewards_of_several_functions_are_saved(batch, tmp_path):
    values = {"right": 1.0, "short": None}
    weights = {"right": 1.0, "short": 0.5}
    told = replace(batch, records=tuple(replace(one, rewards=values, reward_weights=weights) for one in batch))
    save_batch(told, tmp_path / "U")
    assert load_batch(tmp_path / "U") == told
    assert content_of_batch(told) != content_of_batch(batch)


def test_a_batch_of_schema_1_is_read(batch, tmp_path):
    place = save_batch(batch, tmp_path / "U")
    manifest = read_checksummed(place / "manifest.json")
    del manifest["parts"]
    (place / "manifest.json").write_bytes(checksummed_json({**manifest, "schema": 1}))
    assert load_batch(place) == batch


def test_their_content_is_part_of_what_names_a_batch(batch):
    parts = parts_of(batch, "advantage")
    told = batch.with_token_weights(parts)
    names = {content_of_batch(one, scores) for one in (batch, told) for scores in (True, False)}
    assert len(names) == 4
    other = {"advantage": parts["advantage"] * 1.000001}
    assert content_of_batch(batch.with_token_weights(other)) != content_of_batch(told)
    assert content_of_batch(batch.with_token_weights({"kl": parts["advantage"]})) != content_of_batch(told)
    assert content_of_batch(batch.with_token_weights({}, parts["advantage"])) != content_of_batch(
        batch.with_token_weights({}, parts["advantage"] * 2)
    )


def test_a_batch_without_them_keeps_the_name_it_had():
    """The name that schema 1 gave: workspaces that were made before stay valid."""
    one = record("U-000-00", reward=1.0)
    fields = {
        "sequence_id": "U-000-00", "prompt_ids": one.prompt_ids, "response_ids": one.response_ids, "prompt": one.prompt,
        "response": one.response, "logprobs": one.logprobs, "logqs": one.logqs, "entropies": one.entropies,
        "finish": "eos", "provenance": vars(one.provenance), "reward": 1.0, "advantage": None, "weight": None,
        "abstained": False,
    }  # fmt: skip
    assert content_of_batch(GeneratedBatch((one,))) == hash_json([[fields], None, None])


def outside(batch: GeneratedBatch) -> torch.Tensor:
    ω = parts_of(batch, "kl")["kl"]
    ω[2, 0] = 0.25
    return ω


def spoiled(batch: GeneratedBatch, value: float) -> torch.Tensor:
    ω = parts_of(batch, "kl")["kl"]
    ω[1, 3] = value
    return ω


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda b: {"kl": torch.zeros(4, 2)},
            r"token_weights\['kl'\] is of shape \[4, 2\] for the sequences 'U-000-00'",
        ),
        (outside, r"U-001-00: token_weights\['kl'\] is 0.25 at token 0; that token is not one of the response"),
        (lambda b: spoiled(b, float("nan")), r"U-000-01: token_weights\['kl'\] is nan at token 3; expected a finite"),
        (lambda b: spoiled(b, float("inf")), r"U-000-01: token_weights\['kl'\] is inf at token 3; expected a finite"),
    ],
)
def test_what_is_no_token_weight_names_sequence_and_part(batch, make, message):
    given = make(batch)
    parts = given if isinstance(given, dict) else {"kl": given}
    with pytest.raises(fk.RolloutError, match=message):
        batch.with_token_weights(parts)
    with pytest.raises(fk.RolloutError, match=message.replace("token_weights", "entropy_weights")):
        batch.with_token_weights({}, parts)


def test_parts_that_do_not_add_up(batch):
    parts = parts_of(batch, "advantage", "kl")
    ω = parts["advantage"] + parts["kl"]
    batch.with_token_weights(parts, total=ω.double() * (1 + 1e-7))
    wrong = ω.clone()
    wrong[3, 3] += 0.5
    with pytest.raises(
        fk.RolloutError, match=r"U-001-01: the parts 'advantage', 'kl' of its token_weights add up to .* at token 3"
    ):
        batch.with_token_weights(parts, total=wrong)
    with pytest.raises(fk.RolloutError, match="a part is missing, or is counted twice"):
        batch.with_token_weights({"advantage": parts["advantage"]}, total=ω)
    with pytest.raises(fk.RolloutError, match=r"token_weights\['total'\] is of shape \[4, 1\]"):
        batch.with_token_weights(parts, total=ω[:, :1])
    with pytest.raises(fk.RolloutError, match="total is given without any part"):
        batch.with_token_weights({}, total=ω)


def test_sequences_of_different_parts(batch):
    told = batch.with_token_weights(parts_of(batch, "advantage", "kl"))
    first = told.records[0]
    with pytest.raises(
        fk.RolloutError, match="U-000-01 lacks 'advantage', 'kl' in its token_weights, which others have"
    ):
        GeneratedBatch((first, *batch.records[1:]))
    more = replace(told.records[1], token_weights={**told.records[1].token_weights, "ratio": (0.0,) * len(
        told.records[1].response_ids)})  # fmt: skip
    with pytest.raises(fk.RolloutError, match="U-000-01 has 'ratio' in its token_weights, which others lack"):
        GeneratedBatch((first, more))
    with pytest.raises(fk.RolloutError, match="U-000-01 lacks 'entropy' in its entropy_weights"):
        GeneratedBatch((replace(first, entropy_weights={"entropy": first.logprobs}), told.records[1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_weights": {"kl": ()}}, r"U-000-00: token_weights\['kl'\] has 0 numbers for a response of \d+ tokens"),
        ({"entropy_weights": {"": (0.0,)}}, "U-000-00: entropy_weights has a part named ''; expected a text"),
        ({"rewards": {"a": float("nan")}, "reward_weights": {"a": 1.0}}, "U-000-00: its reward 'a' is nan"),
        ({"rewards": {"a": 1.0}, "reward_weights": {"a": float("inf")}}, "its weight of the reward 'a' is inf"),
        (
            {"rewards": {"a": 1.0}},
            "its rewards are of 'a', and its reward_weights of none; expected one weight for each",
        ),
    ],
)
def test_records_that_cannot_be(fields, message):
    with pytest.raises(fk.RolloutError, match=message):
        record("U-000-00", **fields)


def test_a_record_names_the_token_that_is_not_finite():
    one = record("U-000-00")
    with pytest.raises(fk.RolloutError, match=r"U-000-00: token_weights\['kl'\] of response token 0 is nan"):
        replace(one, token_weights={"kl": (float("nan"),) * len(one.response_ids)})
