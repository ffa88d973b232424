"""Modules without weights: the architecture alone, for parameters that come from elsewhere, such as other ranks.

A module that is made on the meta device loses its buffers too, and these are in no checkpoint (a rotary embedding's
frequencies, which `to_empty` would leave as whatever the memory holds). So parameters alone are made there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.func.functional import make_functional
from fkernel.func.inputs.leaves import leaves_of
from fkernel.shapes import Tensor, Tree


class InShards(NamedTuple):
    """A policy whose parameters several ranks hold in shards.

    Attributes:
        model: without weights.
        params: all of its parameters, frozen ones as constants.
    """

    model: Any
    params: ShardedTree

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config


@public
def policy_function(model: Any) -> tuple[Any, Tree]:
    """Return a policy as (apply, θ), for passes without gradients, θ with frozen parameters.

    Args:
        model: a causal language model; or `InShards`, of which all ranks must run the same passes together: each
            parameter is gathered where it is used.

    Returns:
        apply, (params, input_ids, attention_mask) -> logits; and θ, which it is given.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        >>> apply, params = policy_function(model)
        >>> apply(params, torch.tensor([[1, 2]]), torch.ones(1, 2)).shape
        torch.Size([1, 2, 11])
    """
    if not isinstance(model, InShards):
        return make_functional(model, select=lambda name: True)  # a frozen model is evaluated as well
    apply, leaves = make_functional(model.model, select=lambda name: True)[0], leaves_of(model.params)

    def gathered(params: Tree, ids: Tensor, mask: Tensor) -> Tensor:
        return leaves.run(apply, {**leaves.constants, **leaves.trained}, ids, mask)

    return gathered, model.params


@contextmanager
def without_weights() -> Iterator[None]:
    """Have modules that are made within the context hold parameters on the meta device, and buffers as they are.

    Example:
        >>> with without_weights():
        ...     norm = nn.BatchNorm1d(3)
        >>> norm.weight.device.type, norm.running_var
        ('meta', tensor([1., 1., 1.]))
    """
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        own(self, name, param)
        if type(param) is nn.Parameter and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own
