"""Certificates: checks of computed values and derivatives on the caller's own model."""

from fkernel.func.trust.along import true_derivative
from fkernel.func.trust.checks import certify_values, plan_of
from fkernel.func.trust.comparisons import Values
from fkernel.func.trust.directional import along_direction, first_derivative, second_derivative

__all__ = [
    "Values",
    "along_direction",
    "certify_values",
    "first_derivative",
    "plan_of",
    "second_derivative",
    "true_derivative",
]
