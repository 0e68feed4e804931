"""Our ways, and the limit: dense stacks of as much as they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast.nn import LayerDropStack, TransformerLayer, TransformerStack, set_step
from layerdrop_fast.nn.parts import Parts
from layerdrop_fast.plan import DropPlan, draw_plan
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.way import Following, Layers, Way


class StackWay(Following):
    """LayerDropStack over torch's layers."""

    stack: LayerDropStack

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        modules = super().make(layers)
        self.stack = LayerDropStack(modules, self.setting.p, **self.keywords)
        return modules

    @property
    def keywords(self) -> dict[str, Any]:
        return {"granularity": self.setting.granularity, "sampling": "systematic", "seed": self.setting.seed}

    def follow(self, plan: DropPlan | None) -> None:
        if plan is not None:
            set_step(self.stack, plan.step)

    def __call__(self, x: Tensor) -> Tensor:
        return self.stack(x)  # type: ignore[no-any-return]

    def decide(self, turn: int, x: Tensor) -> object:
        samples = len(x) if self.setting.granularity == "sample" else None
        plan = draw_plan(self.stack.schedule(turn), samples, seed=self.setting.seed, step=turn)
        return plan.layers if samples is None else [plan.to(x.device).rows(layer) for layer in plan.layers]


class OursWay(StackWay):
    """TransformerStack.

    Args:
        keywords: of ``TransformerStack.from_layers``, besides those of the plan; ``recompute`` is given to the layers.
    """

    def __init__(self, layers: Layers, setting: Setting, *, recompute: str | None = None, **keywords: Any) -> None:
        self.recompute, self.more = recompute, keywords
        super().__init__(layers, setting)

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        converted = ours(layers, self.setting)
        for layer in converted:
            layer.recompute = self.recompute
        self.stack = TransformerStack.from_layers(converted, self.setting.p, **self.keywords, **self.more)
        return converted


class PartsWay(OursWay):
    """TransformerStack with a decision for each head, each chunk of the feed-forward network, or both.

    Args:
        targets: of ``TransformerStack``'s schedule, all at the setting's rate.
    """

    def __init__(self, layers: Layers, setting: Setting, *, targets: Sequence[str]) -> None:
        self.targets = targets
        super().__init__(layers, setting)

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        converted = ours(layers, self.setting)
        rates = dict.fromkeys(self.targets, self.setting.p)
        self.stack = self.drawn = TransformerStack.from_layers(converted, rates, **self.keywords)
        return converted

    def decide(self, turn: int, x: Tensor) -> object:
        return self.drawn.plan(turn).layers

    def kept_branches(self, plan: DropPlan) -> Tensor:
        units = self.drawn.plan(plan.step).keep[: len(self.drawn.layers) * self.drawn.units_per_layer]
        keep = units.repeat_interleave(2 // self.drawn.units_per_layer, 0)
        some = torch.tensor([part is None or bool(part.kept) for part in self._parts(plan)])
        return (keep & some[:, None]).expand(-1, self.setting.samples)

    def kept_parts(self, plan: DropPlan) -> Mapping[int, Tensor] | None:
        masks = {}
        for branch, part in enumerate(self._parts(plan)):
            if part is not None:
                masks[branch] = torch.zeros(part.total, dtype=torch.float64, device=self.setting.device)
                masks[branch][list(part.kept)] = part.scale
        return masks

    def _parts(self, plan: DropPlan) -> list[Parts | None]:
        """What is kept of every branch."""
        stack, layers = self.drawn, list(self.drawn.layers)
        first = len(layers) * stack.units_per_layer
        return stack.parts.kept(layers, stack.plan(plan.step), first, stack.scale)


class LimitWay(Way):
    """Dense stacks of our layers that run as many layers and samples as the plan keeps, and nothing else.

    As many whole layers as that makes, from the first one on, and what is left over in one more layer.
    """

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        self.parts: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        return ours(layers, self.setting)

    def counts(self, plan: DropPlan) -> list[int]:
        """How many samples run each layer, the first ones; never more than run the layer before."""
        samples = self.setting.samples
        whole, rest = divmod(int(plan.keep.expand(-1, samples).sum()), samples)
        return ([samples] * whole + [rest] + [0] * self.setting.layers)[: self.setting.layers]

    def kept(self, plan: DropPlan) -> Tensor:
        return torch.arange(self.setting.samples) < torch.tensor(self.counts(plan))[:, None]

    def follow(self, plan: DropPlan | None) -> None:
        self.parts = []
        if plan is None:
            return
        for count, same in groupby(zip(self.counts(plan), self.modules, strict=True), key=lambda pair: pair[0]):
            if count:
                layers = [layer for _, layer in same]
                self.parts.append((count, TransformerStack.from_layers(layers, 0.0, seed=self.setting.seed)))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.parts:
            return x.clone()
        done = []
        for count, stack in self.parts:
            if count < len(x):
                done.append(x[count:])
                x = x[:count]
            x = stack(x)
        return torch.cat([x, *reversed(done)]) if done else x


class NarrowWay(LimitWay):
    """The same with every layer that the plan keeps for any sample: as many of them, on as many samples each."""

    def counts(self, plan: DropPlan) -> list[int]:
        return sorted(plan.kept_counts, reverse=True)


def ours(layers: Layers, setting: Setting) -> list[TransformerLayer]:
    """The layers on this package's ops, with the same parameters."""
    converted = [TransformerLayer.from_torch(layer) for layer in layers]
    if setting.compiled:
        for layer in converted:
            layer.compile()
    return converted
