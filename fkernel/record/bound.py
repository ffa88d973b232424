"""What a recorder is bound to: the bare model, its optimizers, and the names of what they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fkernel.record.optimizers import bare_model, bare_optimizer, class_of, trained_names
from fkernel.shapes import Tensor


@dataclass(frozen=True, eq=False)
class Bound:
    """A model and the optimizers that train it.

    Attributes:
        model: without its wrappers.
        optimizers: without theirs.
        groups: names of trained parameters, by optimizer and group.
        trained: {name: parameter}.
    """

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    groups: list[list[list[str]]]
    trained: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> Bound:
        """Take the wrappers off, and name what is trained.

        Args:
            model: wrapped or bare.
            optimizer: one, or a list.

        Raises:
            OptimizerStateError: the optimizer is not this model's, or leaves a trained parameter out.

        Example:
            >>> linear = nn.Linear(2, 1)
            >>> [*Bound.of(linear, torch.optim.SGD(linear.parameters(), lr=0.1)).trained]
            ['weight', 'bias']
        """
        given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        bare, optimizers = bare_model(model), tuple(bare_optimizer(each) for each in given)
        groups, params = trained_names(bare, optimizers), dict(bare.named_parameters())
        return cls(
            bare, optimizers, groups, {name: params[name] for each in groups for group in each for name in group}
        )

    def position(self, optimizer: torch.optim.Optimizer) -> int:
        """Which of the optimizers it is."""
        return next(i for i, each in enumerate(self.optimizers) if each is optimizer)

    def own(self, i: int) -> dict[str, Tensor]:
        """{name: parameter} of one optimizer."""
        return {name: self.trained[name] for group in self.groups[i] for name in group}

    def about(self) -> dict[str, Any]:
        """What recording.json says of them, JSON."""
        return {
            "model": type(self.model).__qualname__,
            "shapes": {name: [*leaf.shape] for name, leaf in self.trained.items()},
            "dtypes": sorted({str(leaf.dtype)[6:] for leaf in self.trained.values()}),
            "optimizers": [
                {"class": class_of(each), "groups": groups}
                for each, groups in zip(self.optimizers, self.groups, strict=True)
            ],
        }
