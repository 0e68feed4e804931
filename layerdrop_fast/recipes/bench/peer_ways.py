"""The ways of other libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerdrop_fast.plan import DropPlan
from layerdrop_fast.recipes.bench.peers import Masked, RunAndDiscard, SampleSkip, Skip, Subset
from layerdrop_fast.recipes.bench.way import Following, Layers, Way, twin


class MaskedWay(Following):
    """timm's and torchvision's."""

    runs_dropped = True

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        mode = "row" if self.setting.granularity == "sample" else "batch"
        self.masks = [Masked(self.setting.p, mode) for _ in range(2 * len(layers))]
        twins = [twin(layer) for layer in layers]
        for number, layer in enumerate(twins):
            first, second = self.masks[2 * number : 2 * number + 2]
            layer.dropout1 = nn.Sequential(layer.dropout1, first)  # type: ignore[assignment]
            layer.dropout2 = nn.Sequential(layer.dropout2, second)  # type: ignore[assignment]
        return [self.own(layer) for layer in twins]

    def scale(self, plan: DropPlan) -> float:
        return 1 / (1 - self.setting.p) if self.setting.p < 1 else 1.0

    def keep(self, plan: DropPlan | None) -> None:
        kept = None if plan is None else plan.keep.to(self.setting.device)
        for number, mask in enumerate(self.masks):
            mask.keep(None if kept is None else kept[number // 2])

    def decide(self, turn: int, x: Tensor) -> object:
        return [mask.mask(x) for mask in self.masks]


class _ByLayer(Following):
    """A rule that decides about whole layers."""

    kind: type[Skip] | type[RunAndDiscard]

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        modules = super().make(layers)
        self.rule = self.kind(self.setting.p, modules)
        return modules

    def keep(self, plan: DropPlan | None) -> None:
        self.rule.keep(None if plan is None else plan.layers)


class SkipWay(_ByLayer):
    """fairseq's."""

    kind = Skip

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.rule:
            x = layer(x)
        return x

    def decide(self, turn: int, x: Tensor) -> object:
        return list(self.rule)


class DiscardWay(_ByLayer):
    """fairseq2's."""

    kind = RunAndDiscard
    runs_dropped = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.rule(x)  # type: ignore[no-any-return]

    def decide(self, turn: int, x: Tensor) -> object:
        uniform = torch.rand(self.setting.layers)
        return [float(number) > self.setting.p for number in uniform]


class SampleSkipWay(Following):
    """torchtune's."""

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        self.rules = [SampleSkip(self.setting.p, seed=number) for number in range(len(layers))]
        return super().make(layers)

    def keep(self, plan: DropPlan | None) -> None:
        for number, rule in enumerate(self.rules):
            rule.keep(None if plan is None else plan.kept_samples(number))

    def __call__(self, x: Tensor) -> Tensor:
        for rule, layer in zip(self.rules, self.modules, strict=True):
            x = rule(layer, x)
        return x

    def decide(self, turn: int, x: Tensor) -> object:
        return [(rule.mask(len(x)).to(x.device) == 0).nonzero() for rule in self.rules]


class _SubsetLayer(nn.Module):
    """A pre-norm layer whose branches run on subsets of the batch."""

    def __init__(self, layer: nn.TransformerEncoderLayer, p: float) -> None:
        super().__init__()
        self.layer, self.rules = layer, (Subset(p), Subset(p))

    def attention(self, x: Tensor) -> Tensor:
        return self.layer._sa_block(self.layer.norm1(x), None, None)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.layer._ff_block(self.layer.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        for rule, branch in zip(self.rules, (self.attention, self.feed_forward), strict=True):
            x = rule(x, branch)
        return x


class SubsetWay(Way):
    """DINOv2's, which keeps a fixed number of samples: those of the plan, less or more some where it keeps others."""

    def make(self, layers: Layers) -> Sequence[nn.Module]:
        twins = [_SubsetLayer(twin(layer), self.setting.p) for layer in layers]
        self.rules = [rule for layer in twins for rule in layer.rules]
        return [self.own(layer) for layer in twins]

    def kept(self, plan: DropPlan) -> Tensor:
        kept = torch.zeros_like(plan.keep)
        for row, keep in zip(kept, plan.keep, strict=True):
            # Kept samples first, each group in its own order.
            row[torch.argsort(keep, descending=True, stable=True)[: self.number]] = True
        return kept

    @property
    def number(self) -> int:
        """How many samples run each branch."""
        return Subset(self.setting.p).count(self.setting.samples)

    def scale(self, plan: DropPlan) -> float:
        return self.setting.samples / self.number

    def keep(self, plan: DropPlan | None) -> None:
        kept = None if plan is None else self.kept(plan).to(self.setting.device)
        for number, rule in enumerate(self.rules):
            rule.keep(None if kept is None else kept[number // 2].nonzero()[:, 0], self.setting.samples)

    def decide(self, turn: int, x: Tensor) -> object:
        return [rule.rows(x) for rule in self.rules]
