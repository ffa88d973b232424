"""Which advantages of U may be exchanged within their prompts, and what an advantage of 1 weighs a column with.

Where U's columns are the whole loss by its token weights ω, as of recorded and dumped steps, they hold the advantages
already. A policy gradient at ratios of 1 without a penalty is told by its weights:

    ω_ut = −w_u A_u        w_u > 0, the same for all tokens of u that count; in a prompt w_u or w_u |u| is the same

Then column u under another advantage is A_π(u)/A_u times itself, and the permutation test holds with 1/A_u for w_u. A
sequence with A_u = 0 has no column, so what it would be under another advantage is not known: it keeps its own. Any
other loss may depend on the advantages' signs, token by token, and nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor
from fkernel.study.workspace import KernelWorkspace

CLOSE = 1e-3
"""Of two weights of single precision, relative to the larger."""
SIGNS = "the loss may weigh tokens otherwise under other advantages, so none was permuted"
UNKNOWN = "not every sequence of the batch has an advantage, so none was permuted"


class Exchangeable(NamedTuple):
    """What permutations of U's advantages are made of.

    Attributes:
        weights: [n] w, what an advantage of 1 weighs a column with, before clipping.
        advantages: [n] A.
        permuted: [n] bool, which sequences are permuted; None for all.
        reason: why no sequence is permuted; None where some are.
    """

    weights: Tensor
    advantages: Tensor
    permuted: Tensor | None = None
    reason: str | None = None


def exchangeable(workspace: KernelWorkspace, advantages: str | Mapping[str, float] | None = None) -> Exchangeable:
    """Say which advantages of a workspace's U may be exchanged.

    Args:
        workspace: U.
        advantages: other ones of the same loss, as `KernelWorkspace.advantages_with` takes them.
    """
    batch = workspace.batch
    given = Exchangeable(workspace.unit_weights, workspace.advantages_with(advantages), judged(batch))
    if not workspace.keeps_signs:
        return given
    if not workspace.whole or batch.entropy_weights:
        return given._replace(reason=SIGNS)
    if any(record.advantage is None for record in batch):
        return given._replace(reason=UNKNOWN)
    if not is_policy_gradient(batch):
        return given._replace(reason=SIGNS)
    A = batch.advantages.to(given.weights)
    some = A != 0
    permuted = some if given.permuted is None else some & given.permuted
    return Exchangeable(torch.where(some, 1 / A.where(some, torch.ones_like(A)), 0.0), A, permuted)


def is_policy_gradient(batch: GeneratedBatch) -> bool:
    """Whether token weights are −w_u A_u, with weights w_u as losses without a ratio and a penalty give them.

    Args:
        batch: with an advantage and token weights of every sequence.

    Example:
        >>> from fkernel.rollout import Provenance, SequenceRecord
        >>> where = Provenance("custom-0", "custom", "custom", 0, 0)
        >>> one = SequenceRecord("U-000-00", (1,), (2, 3), "a", "b", *3 * [(-1.0, -1.0)], "eos", where, advantage=2.0)
        >>> weighed = lambda *omega: GeneratedBatch((one,)).with_token_weights({"loss": torch.tensor([[0.0, *omega]])})
        >>> is_policy_gradient(weighed(-0.5, -0.5)), is_policy_gradient(weighed(-0.5, -0.6))
        (True, False)
    """
    omega = torch.stack([*batch.token_weights.values()]).sum(0)
    A = batch.advantages[:, None].to(omega)
    counted, some = omega != 0, A != 0
    if bool((counted & ~some).any()):
        return False
    w = torch.where(counted, -omega / A.where(some, torch.ones_like(A)), 0.0)
    tokens = counted.sum(1)
    own = w.sum(1) / tokens.clamp_min(1)
    level = torch.where(counted, own[:, None], 0.0)
    if bool((own < 0).any()) or not torch.allclose(w, level, rtol=CLOSE, atol=0.0):
        return False
    heard = tokens > 0
    prompts = [(batch.groups == g) & heard for g in batch.groups[heard].unique()]
    return all(_same(own[at]) or _same((own * tokens)[at]) for at in prompts)


def judged(batch: GeneratedBatch) -> Tensor | None:
    """[n] bool, which sequences are exchangeable within their prompt; None for all.

    One whose reward abstained is not: its advantage is 0 whatever the others' rewards are.
    """
    exchangeable = torch.tensor([not record.abstained or record.reward is not None for record in batch])
    return None if bool(exchangeable.all()) else exchangeable


def _same(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= CLOSE * values.max())
