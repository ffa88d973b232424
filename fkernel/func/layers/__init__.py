"""A causal language model cut at its decoder layers, and the walk back through them."""

from fkernel.func.layers.along_step import values_along
from fkernel.func.layers.cut import Call, Cut, before, constants_of, layer
from fkernel.func.layers.cutting import FUSED, cut_of
from fkernel.func.layers.walk import Walk

__all__ = ["FUSED", "Call", "Cut", "Walk", "before", "constants_of", "cut_of", "layer", "values_along"]
