"""What a way to run a stack of layers is.

A way is made to keep what a plan keeps, as far as its rule allows; ``kept`` says what that is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerdrop_fast.plan import DropPlan
from layerdrop_fast.recipes.bench.setting import Setting

Layers = Sequence[nn.TransformerEncoderLayer]


class Way:
    """Every layer for every sample: what a dense model does, and what the others change.

    Args:
        layers: the weights; every way makes modules of its own that share them.
    """

    # Whether dropped layers run too, and get gradients of zeros instead of none.
    runs_dropped: bool = False

    def __init__(self, layers: Layers, setting: Setting) -> None:
        self.setting = setting
        self.modules = self.make(layers)

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        """The modules that stand for the layers, with the same parameters; compiled where the setting says so."""
        return [self.own(twin(layer)) for layer in layers]

    def own(self, module: nn.Module) -> nn.Module:
        """A module as this way calls it."""
        # Not module.compile(), which does nothing for torch's own layers: their code is on the list that it skips.
        return torch.compile(module) if self.setting.compiled else module  # type: ignore[return-value]

    def kept(self, plan: DropPlan) -> Tensor:
        """Which samples run which layer when it is to follow the plan, bool [L, B]."""
        return torch.ones(self.setting.layers, self.setting.samples, dtype=torch.bool)

    def scale(self, plan: DropPlan) -> float:
        """What a branch is multiplied by."""
        return 1.0

    def kept_branches(self, plan: DropPlan) -> Tensor:
        """The same of every branch, bool [2 L, B]."""
        return self.kept(plan).repeat_interleave(2, 0)

    def kept_parts(self, plan: DropPlan) -> Mapping[int, Tensor] | None:
        """Which heads or chunks of which branches run, where that is fewer than all."""
        return None

    def follow(self, plan: DropPlan | None) -> None:
        """Makes the next forward keep ``kept(plan)``; None: what the rule draws."""
        # At rate 0 a rule draws nothing.
        self.keep(plan if self.setting.p else None)

    def keep(self, plan: DropPlan | None) -> None:
        """The same for a rule that draws."""

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x

    def decide(self, turn: int, x: Tensor) -> object:
        """Draws what a step needs to know, and nothing else, as independent decisions; None: nothing to decide."""
        return None


class Following(Way):
    """Keeps exactly what the plan keeps."""

    def kept(self, plan: DropPlan) -> Tensor:
        return plan.keep.expand(-1, self.setting.samples)


def twin(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """A layer of its own with the same parameters."""
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
