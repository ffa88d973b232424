"""Token weights between records and batches: one number a response token there, tensors [n t] here.

A tensor is laid out as `fkernel.func.token_logprobs` lays out log π: column t belongs to token t of prompt, response
and padding, and is 0 outside of the response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fkernel.errors import RolloutError, listing
from fkernel.rollout.record import TOKEN_WEIGHTS, SequenceRecord
from fkernel.shapes import Tensor

TOLERANCE = 1e-5
"""By which a declared total may differ from the sum of its parts, relative to the sum of their sizes: float32 adds up
to a few times 1e-7."""


def check_same_parts(records: Sequence[SequenceRecord]) -> None:
    """Check that all sequences have the same parts of the loss.

    Raises:
        RolloutError: one lacks a part that another has; it names sequence and part.
    """
    for kind in TOKEN_WEIGHTS:
        expected = next((getattr(record, kind) for record in records if getattr(record, kind)), {})
        for record in records:
            missing = [part for part in expected if part not in getattr(record, kind)]
            extra = [part for part in getattr(record, kind) if part not in expected]
            if missing or extra:
                verb, parts = ("lacks", missing) if missing else ("has", extra)
                other = "which others have" if missing else "which others lack"
                raise RolloutError(
                    f"{record.sequence_id} {verb} {listing(parts)} in its {kind}, {other}; every sequence of a batch "
                    f"needs the same parts of the loss, with zeros where a part left a sequence out."
                )


def laid_out(records: Sequence[SequenceRecord], response_mask: Tensor, kind: str) -> dict[str, Tensor]:
    """Lay the token weights of records out as tensors.

    Args:
        records: n sequences with the same parts.
        response_mask: [n t] bool.
        kind: "token_weights" or "entropy_weights".

    Returns:
        {part: [n t] float64}, 0 outside of the response.
    """
    parts: Mapping[str, tuple[float, ...]] = getattr(records[0], kind)
    tensors = {part: torch.zeros(response_mask.shape, dtype=torch.float64) for part in parts}
    for part, tensor in tensors.items():
        values = [value for record in records for value in getattr(record, kind)[part]]
        tensor[response_mask] = torch.tensor(values, dtype=torch.float64)
    return tensors


def by_record(
    parts: Mapping[str, Tensor], records: Sequence[SequenceRecord], response_mask: Tensor, kind: str
) -> list[dict[str, tuple[float, ...]]]:
    """Cut token weights into those of each response.

    Args:
        parts: {part: [n t]}.
        records: the n sequences.
        response_mask: [n t] bool.
        kind: "token_weights" or "entropy_weights".

    Returns:
        n times {part: one number a response token}.

    Raises:
        RolloutError: a part has another shape, is not finite, or is not 0 outside of the response; it names sequence
            and part.
    """
    for part, tensor in parts.items():
        check_part(part, tensor, records, response_mask, kind)
    values = {part: tensor.detach().double().cpu() for part, tensor in parts.items()}
    return [
        {part: tuple(tensor[row, response_mask[row]].tolist()) for part, tensor in values.items()}
        for row in range(len(records))
    ]


def check_part(
    part: str, tensor: Tensor, records: Sequence[SequenceRecord], response_mask: Tensor, kind: str = "token_weights"
) -> None:
    """Check one part's token weights.

    Raises:
        RolloutError: see `by_record`.
    """
    if tensor.shape != response_mask.shape:
        ids = listing([record.sequence_id for record in records], 2)
        raise RolloutError(
            f"{kind}[{part!r}] is of shape {list(tensor.shape)} for the sequences {ids} of shape "
            f"{list(response_mask.shape)}; expected one number a token, [n t], as token_logprobs returns it."
        )
    mask = response_mask.to(tensor.device)
    _refuse(~torch.isfinite(tensor), tensor, part, records, kind, "expected a finite number")
    _refuse((tensor != 0) & ~mask, tensor, part, records, kind, "that token is not one of the response: expected 0")


def check_total(parts: Mapping[str, Tensor], total: Tensor, records: Sequence[SequenceRecord]) -> None:
    """Check that the parts of a loss's ω add up to it.

    Raises:
        RolloutError: they do not; it names the sequence, and the largest of its parts there.
    """
    if not parts:
        raise RolloutError("total is given without any part; give parts={'advantage': total}, or leave total out.")
    each = torch.stack([part.detach().double().cpu() for part in parts.values()])
    ω = total.detach().double().cpu()
    off = (each.sum(0) - ω).abs()
    wrong = off > TOLERANCE * each.abs().sum(0).maximum(ω.abs())
    if bool(wrong.any()):
        row, t = divmod(int(torch.where(wrong, off, -1.0).argmax()), off.shape[1])
        largest = [*parts][int(each[:, row, t].abs().argmax())]
        raise RolloutError(
            f"{records[row].sequence_id}: the parts {listing([*parts])} of its token_weights add up to "
            f"{float(each[:, row, t].sum()):.6g} at token {t}, and total is {float(ω[row, t]):.6g} there (the largest "
            f"part is {largest!r}, {float(each[:, row, t].abs().max()):.6g}); a part is missing, or is counted twice."
        )


def _refuse(
    wrong: Tensor, tensor: Tensor, part: str, records: Sequence[SequenceRecord], kind: str, expected: str
) -> None:
    if bool(wrong.any()):
        row, t = (int(i) for i in wrong.nonzero()[0])
        raise RolloutError(
            f"{records[row].sequence_id}: {kind}[{part!r}] is {float(tensor[row, t])} at token {t}; {expected}."
        )
