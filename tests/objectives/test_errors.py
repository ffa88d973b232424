"""What is wrong with a loss's inputs or settings is said, with what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.func.objectives import (
    LossInputs,
    LossTerm,
    cispo,
    clipped_ratio,
    corrected_kl_penalty,
    cross_entropy,
    dppo,
    entropy_bonus,
    from_autograd,
    high_entropy_mask,
    ipo,
    kl_penalty,
    luspo,
    masked_importance,
    off_policy_mask,
    policy_gradient,
    preference,
    sapo,
    scale_advantages,
    total,
    truncated_importance,
    vespo,
)

ZEROS, MASK = torch.zeros(2, 3), torch.tensor([[0, 1, 1], [0, 1, 0]])
NAN = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, torch.nan, 0.0]])  # the first one is of no response token
INPUTS = LossInputs(ZEROS, MASK, torch.ones(2), torch.ones(2), ZEROS, ZEROS, ZEROS, ZEROS)
PAIRS = torch.tensor([[0, 1]])


def given(**fields: Any) -> LossInputs:
    return INPUTS._replace(**fields)


NEEDS: dict[Callable[..., Any], set[str]] = {
    policy_gradient: {"advantages", "weights"},
    clipped_ratio: {"advantages", "weights", "old"},
    luspo: {"advantages", "weights", "old"},
    sapo: {"advantages", "weights", "old"},
    vespo: {"advantages", "weights", "old"},
    dppo: {"advantages", "weights", "old"},
    ipo: {"advantages", "weights", "old"},
    partial(cispo, cap=5.0): {"advantages", "weights", "old"},
    partial(kl_penalty, beta=0.1): {"weights", "reference"},
    partial(corrected_kl_penalty, beta=0.1): {"weights", "old", "reference"},
    partial(entropy_bonus, coefficient=0.1): {"weights"},
    cross_entropy: {"weights"},
    partial(preference, pairs=PAIRS, beta=0.1): {"reference"},
    truncated_importance: {"old", "sampler"},
    masked_importance: {"old", "sampler"},
    partial(high_entropy_mask, quantile=0.2): {"entropies"},
    partial(off_policy_mask, threshold=0.1): {"advantages"},
    scale_advantages: {"advantages"},
}


def name_of(loss: Any) -> str:
    return loss.func.__name__ if isinstance(loss, partial) else loss.__name__


@pytest.mark.parametrize(
    ("loss", "field"), [(loss, field) for loss, fields in NEEDS.items() for field in sorted(fields)]
)
def test_a_loss_says_what_it_needs(loss, field):
    with pytest.raises(fk.BatchError, match=f"{name_of(loss)} needs {field}, and LossInputs has none; give "):
        loss(given(**{field: None}))


@pytest.mark.parametrize("loss", NEEDS, ids=name_of)
def test_a_loss_looks_at_nothing_else(loss):
    needed = NEEDS[loss] | ({"old"} if name_of(loss) == "off_policy_mask" else set())  # it takes that or the sampler's
    loss(LossInputs(ZEROS, MASK, **{name: getattr(INPUTS, name) for name in needed}))


@pytest.mark.parametrize(
    ("loss", "field"), [(loss, field) for loss, fields in NEEDS.items() for field in sorted(fields)]
)
def test_every_field_is_checked(loss, field):
    with pytest.raises(fk.BatchError, match=rf"^{field} has shape \[2, 2\]; {name_of(loss)} expected .*\[2, 3\], as"):
        loss(given(**{field: ZEROS[:, 1:]}))
    bad = torch.where(NAN.isnan(), torch.inf, 0.0) if field == "sampler" else NAN  # a sampler may have NaN
    with pytest.raises(fk.NonFiniteError, match=f"^{field} of sequence 1 is not finite") as caught:
        loss(given(**{field: bad}))
    assert caught.value.row == 1


FAR = ZEROS - torch.tensor([[0.0], [1e3]])
"""Of the second sequence e^1000 is between the policies."""


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            fk.BatchError,
            lambda: policy_gradient(given(response_mask=MASK[0])),
            r"logprobs has shape \[2, 3\], and response_mask \[3\]; expected one shape \[n t\]",
        ),
        (
            fk.BatchError,
            lambda: policy_gradient(given(response_mask=2 * MASK)),
            r"response_mask of sequence 0 holds values other than 0 and 1",
        ),
        (
            fk.BatchError,
            lambda: policy_gradient(given(logprobs=ZEROS.long())),
            r"logprobs is torch.int64; expected log-",
        ),
        (
            fk.BatchError,
            lambda: policy_gradient(given(advantages=torch.ones(3))),
            r"advantages has shape \[3\]; policy_gradient expected \[2\] or \[2, 3\]",
        ),
        (
            fk.BatchError,
            lambda: kl_penalty(given(weights=torch.tensor([1.0, -0.5])), 0.1),
            r"weights of sequence 1 holds -0.5; expected loss weights w ≥ 0: the sign is the advantage's",
        ),
        (fk.NonFiniteError, lambda: clipped_ratio(given(logprobs=NAN)), r"^logprobs of sequence 1 is not finite"),
        (fk.NonFiniteError, lambda: clipped_ratio(given(old=FAR)), r"exp\(logprobs − old\) of sequence 1 is not fin"),
        (
            fk.NonFiniteError,
            lambda: sapo(given(old=FAR)),
            r"exp\(logprobs − old\) of sequence 1 is not finite .* tempe",
        ),
        (
            fk.NonFiniteError,
            lambda: cispo(given(old=FAR), torch.inf),
            r"exp\(logprobs − old\) of sequence 1 is not finite",
        ),
        (
            fk.NonFiniteError,
            lambda: kl_penalty(given(logprobs=FAR), 0.1),
            r"exp\(reference − logprobs\) of sequence 1 is not finite",
        ),
        (
            fk.NonFiniteError,
            lambda: corrected_kl_penalty(given(old=FAR), 0.1, "sequence"),
            r"exp\(logprobs − old\) of sequence 1 is not finite",
        ),
        (
            fk.NonFiniteError,
            lambda: truncated_importance(given(sampler=FAR), high=torch.inf),
            r"exp\(old − sampler\) of sequence 1 is not finite .* give a finite high",
        ),
        (fk.ModelError, lambda: clipped_ratio(INPUTS, low=-0.1), r"low is -0.1; expected a number in \[0, 1\]"),
        (fk.ModelError, lambda: luspo(INPUTS, low=1.1), r"low is 1.1; expected a number in \[0, 1\]"),
        (fk.ModelError, lambda: clipped_ratio(INPUTS, high=torch.nan), r"high is nan; expected a number ≥ 0"),
        (fk.ModelError, lambda: clipped_ratio(INPUTS, delta=0.0), r"delta is 0.0; expected a number > 0"),
        (
            fk.ModelError,
            lambda: clipped_ratio(INPUTS, level="word"),
            r"level is 'word'; expected 'token' or 'sequence'",
        ),
        (fk.ModelError, lambda: cispo(INPUTS, cap=0.0), r"cap is 0.0; expected a number > 0, the largest ratio"),
        (fk.ModelError, lambda: sapo(INPUTS, negative=0.0), r"negative is 0.0; expected a positive number"),
        (
            fk.ModelError,
            lambda: vespo(INPUTS, positive=(2.0, -1.0)),
            r"λ of positive is -1.0; expected a finite number",
        ),
        (fk.ModelError, lambda: vespo(INPUTS, negative=(torch.inf, 1.0)), r"k of negative is inf; expected a finite"),
        (fk.ModelError, lambda: kl_penalty(INPUTS, 0.0), r"beta is 0.0; expected a positive number; leave the penalty"),
        (fk.ModelError, lambda: corrected_kl_penalty(INPUTS, -1.0), r"beta is -1.0; expected a positive number"),
        (fk.ModelError, lambda: preference(INPUTS, PAIRS, 0.0), r"beta is 0.0; expected a positive number"),
        (fk.ModelError, lambda: entropy_bonus(INPUTS, torch.inf), r"coefficient is inf; expected a finite number"),
        (fk.ModelError, lambda: off_policy_mask(INPUTS, 0.0), r"threshold is 0.0; expected a positive number, nats"),
        (fk.ModelError, lambda: high_entropy_mask(INPUTS, 1.2), r"quantile is 1.2; expected a number in \[0, 1\]"),
        (fk.ModelError, lambda: truncated_importance(INPUTS, "word"), r"level is 'word'; expected 'token' or 'seque"),
        (fk.ModelError, lambda: masked_importance(INPUTS, low=-1.0), r"low is -1.0; expected a finite number ≥ 0"),
        (fk.ModelError, lambda: masked_importance(INPUTS, low=2.0, high=1.0), r"high is 1.0; expected a number ≥ low"),
        (
            fk.BatchError,
            lambda: off_policy_mask(given(sampler=None, old=None), 0.1),
            r"off_policy_mask needs old, and LossInputs has none; .* where it was θ itself, old=logprobs",
        ),
        (
            fk.BatchError,
            lambda: scale_advantages(INPUTS, ZEROS, ZEROS[:1]),
            r"factor 1 is \[1, 3\]; expected \[n t\] =",
        ),
        (fk.BatchError, lambda: scale_advantages(INPUTS, ZEROS - 1), r"factor 0 of sequence 0 holds -1; expected fac"),
        (fk.NonFiniteError, lambda: scale_advantages(INPUTS, NAN), r"factor 0 of sequence 1 is not finite"),
        (
            fk.BatchError,
            lambda: vespo(INPUTS, correction=ZEROS[0]),
            r"correction is \[3\]; expected \[n t\] = \[2, 3\]",
        ),
        (fk.BatchError, lambda: entropy_bonus(INPUTS, 0.1, ZEROS[0]), r"tokens is \[3\]; expected \[n t\] = \[2, 3\]"),
        (fk.BatchError, lambda: preference(INPUTS, PAIRS[0], 0.1), r"pairs is \[2\]; expected \[k 2\], the rows of ch"),
        (fk.BatchError, lambda: preference(INPUTS, PAIRS[:0], 0.1), r"pairs is \[0, 2\]; expected \[k 2\].* k ≥ 1"),
        (fk.BatchError, lambda: preference(INPUTS, PAIRS.int(), 0.1), r"pairs is torch.int32; rows of a batch are int"),
        (fk.BatchError, lambda: preference(INPUTS, PAIRS + 1, 0.1), r"pairs\[0\] is \[1, 2\]; expected two different "),
        (fk.BatchError, lambda: preference(INPUTS, 0 * PAIRS, 0.1), r"pairs\[0\] is \[0, 0\]; expected two different "),
        (
            fk.BatchError,
            lambda: preference(INPUTS, PAIRS, 0.1, torch.ones(2)),
            r"weights has shape \[2\]; there are 1 pairs, so expected \[1\]",
        ),
        (
            fk.BatchError,
            lambda: preference(INPUTS, PAIRS, 0.1, -torch.ones(1)),
            r"weights\[0\] is -1; expected weights ≥ 0",
        ),
        (
            fk.NonFiniteError,
            lambda: preference(INPUTS, PAIRS, 0.1, torch.ones(1) / 0),
            r"weights of pair 0 is not finite",
        ),
        (fk.BatchError, lambda: total({}), r"There is no part to add up; give the parts of a loss"),
        (
            fk.BatchError,
            lambda: total({"advantage": LossTerm(ZEROS), "kl": LossTerm(ZEROS[:1])}),
            r"Parts of one loss have one shape \[n t\]; 'advantage' has \[2, 3\], 'kl' has \[1, 3\]",
        ),
        (
            fk.ModelError,
            lambda: from_autograd(lambda l: l, ZEROS),
            r"returned a tensor of shape \[2, 3\]; expected one ",
        ),
        (fk.ModelError, lambda: from_autograd(lambda l: l.sum().item(), ZEROS), r"The loss returned float; expected o"),
        (
            fk.ModelError,
            lambda: from_autograd(lambda l: l.detach().sum(), ZEROS),
            r"returned a tensor of shape \[\]; expected one number that depends on its arguments",
        ),
        (
            fk.NonFiniteError,
            lambda: from_autograd(lambda l: l.sqrt().sum(), ZEROS + MASK),
            r"∂loss/∂logprobs of sequence 0 is not finite .* look for log, exp or a division by 0",
        ),
        (
            fk.NonFiniteError,
            lambda: from_autograd(lambda l, H: l.sum() + H.log().sum(), ZEROS, ZEROS),
            r"∂loss/∂entropies of sequence 0 is not finite",
        ),
    ],
)
def test_what_is_wrong_is_said(kind, call, message):
    with pytest.raises(kind, match=message):
        call()


def test_what_is_cut_off_may_overflow():
    """What is held constant and e^1000 is capped, or left out, as in TRL; a sampler's NaN counts as no difference."""
    assert cispo(given(old=FAR), cap=5.0)["advantage"].omega.tolist() == [[0.0, -1.0, -1.0], [0.0, -5.0, 0.0]]
    assert truncated_importance(given(sampler=FAR)).tolist() == [[0.0, 1.0, 1.0], [0.0, 3.0, 0.0]]
    assert masked_importance(given(sampler=FAR)).tolist() == [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert truncated_importance(given(sampler=NAN)).tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    assert off_policy_mask(given(sampler=NAN, advantages=-torch.ones(2)), 0.1).tolist() == MASK.tolist()
