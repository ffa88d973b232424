"""Inputs of functions: sequences, objectives and parameters; their validation and microbatching."""

from fkernel.func.inputs.batch import (
    Sequences,
    by_length,
    check_batch,
    find_sequences,
    holding_inside,
    length,
    lengths,
    pad,
    take,
    token_counts,
    trim,
    widths,
)
from fkernel.func.inputs.called import arguments_of
from fkernel.func.inputs.microbatch import check_size, cut, groups, token_grant
from fkernel.func.inputs.objective import Function, Objective, bare, check_values, name_of, own_width
from fkernel.func.inputs.source import Source, computed_like, is_half, moved, plain, widened
from fkernel.func.inputs.validation import check_inputs, check_params, check_weights, translate_errors

__all__ = [
    "Function",
    "Objective",
    "Sequences",
    "Source",
    "arguments_of",
    "bare",
    "by_length",
    "check_batch",
    "check_inputs",
    "check_params",
    "check_size",
    "check_values",
    "check_weights",
    "computed_like",
    "cut",
    "find_sequences",
    "groups",
    "holding_inside",
    "is_half",
    "length",
    "lengths",
    "moved",
    "name_of",
    "own_width",
    "pad",
    "plain",
    "take",
    "token_counts",
    "token_grant",
    "translate_errors",
    "trim",
    "widened",
    "widths",
]
