"""The policy has the shape it should, learns on answers and EOS only, and stops by accuracy."""

import pytest
import torch

from fkernel.demo import DemoConfig
from fkernel.demo.policy import (
    IGNORED,
    PolicyConfig,
    Supervised,
    SupervisionConfig,
    build_model,
    count_parameters,
    supervise,
    supervised_tensors,
)
from fkernel.demo.task import problem, splits
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.rollout import SampleGenerator, Sampling, TablePrompts

TOKENIZER = build_tokenizer()


def supervised(tiny: DemoConfig, config: SupervisionConfig) -> Supervised:
    prompts, model = splits(tiny.task), build_model(tiny.policy, TOKENIZER)
    sampling = Sampling(max_new_tokens=5)
    policy = SampleGenerator(model, TOKENIZER, prompts, sampling=sampling, template="bare")
    return supervise(policy, prompts, config)


def test_shape_of_the_real_policy() -> None:
    model = build_model(PolicyConfig(), TOKENIZER)
    assert 0.75e6 < count_parameters(model) < 0.85e6
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_initial_weights_depend_on_the_seed_and_disturb_nobody() -> None:
    small = PolicyConfig(layers=1, width=8, heads=2, mlp=8)
    before = torch.get_rng_state()
    one, two = build_model(small, TOKENIZER), build_model(small, TOKENIZER)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_targets_are_answer_and_eos_only() -> None:
    inputs, targets = supervised_tensors(
        TOKENIZER, TablePrompts("demo", "train", [problem(37, "+", 85), problem(12, "-", 10)])
    )
    assert inputs.tolist() == [[5, 9, 12, 10, 7, 14, 3, 4, 4], [3, 4, 13, 3, 2, 14, 4, 1, 0]]
    assert targets.tolist() == [[IGNORED] * 5 + [3, 4, 4, 1], [IGNORED] * 5 + [4, 1, IGNORED, IGNORED]]


@pytest.mark.parametrize(("band", "word"), [((0.99, 1.0), "raise max_steps"), ((-1.0, -0.5), "lower check_every")])
def test_ending_outside_of_the_band_says_what_happened(tiny: DemoConfig, band: tuple[float, float], word: str) -> None:
    config = SupervisionConfig(batch=4, max_steps=2, check_every=1, band=band, stop_at=0.99)
    with pytest.raises(RuntimeError, match=rf"after 2 of at most 2 steps with a sampled accuracy.*{word}"):
        supervised(tiny, config)


def test_training_stops_at_the_first_check_that_reaches_the_accuracy(tiny: DemoConfig) -> None:
    config = SupervisionConfig(batch=4, max_steps=50, check_every=3, band=(0.0, 1.0), stop_at=0.0)
    assert supervised(tiny, config).steps == 3
