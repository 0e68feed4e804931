"""The ways to run a stack of layers under LayerDrop that are compared, on one set of weights.

A way is made to keep what a plan keeps, as far as its rule allows; ``kept`` says what that is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast.nn import LayerDropStack, TransformerLayer, TransformerStack, set_step
from layerdrop_fast.nn.parts import Parts
from layerdrop_fast.plan import DropPlan, draw_plan
from layerdrop_fast.recipes.bench.peers import Masked, RunAndDiscard, SampleSkip, Skip, Subset
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


class _Following(Way):
    """Keeps exactly what the plan keeps."""

    def kept(self, plan: DropPlan) -> Tensor:
        return plan.keep.expand(-1, self.setting.samples)


class MaskedWay(_Following):
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


class _ByLayer(_Following):
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


class SampleSkipWay(_Following):
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


class StackWay(_Following):
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


def twin(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """A layer of its own with the same parameters."""
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})


def ours(layers: Layers, setting: Setting) -> list[TransformerLayer]:
    """The layers on this package's ops, with the same parameters."""
    converted = [TransformerLayer.from_torch(layer) for layer in layers]
    if setting.compiled:
        for layer in converted:
            layer.compile()
    return converted


# Name -> what it does, and what makes it.
WAYS: dict[str, tuple[str, Callable[[Layers, Setting], Way]]] = {
    "dense": ("every layer runs", Way),
    "masked": (
        "timm's DropPath, torchvision's StochasticDepth: all runs, each branch is multiplied by a mask",
        MaskedWay,
    ),
    "discard": ("fairseq2: all runs, what a dropped layer returns is thrown away", DiscardWay),
    "skip": ("fairseq's LayerDropModuleList: a comparison a layer, inside the loop", SkipWay),
    "sample-skip": (
        "torchtune's LayerDropout: the device is asked for the kept samples, layer by layer",
        SampleSkipWay,
    ),
    "subset": ("DINOv2: a fixed number of samples for each branch, the stream copied behind each", SubsetWay),
    "stack": ("LayerDropStack over the same layers: one plan a step", StackWay),
    "ours": (
        "TransformerStack, the same plan: one pass a branch; neither the stream, masks nor GELU outputs are saved",
        OursWay,
    ),
    "recompute": ('the same with recompute="qkv"', partial(OursWay, recompute="qkv")),
    "limit": ("a dense TransformerStack of as many layers as the others keep", LimitWay),
    "narrow": ("a dense TransformerStack of all layers, on as many samples as the others keep", NarrowWay),
}
BY_GRANULARITY = {
    "batch": ("dense", "masked", "discard", "skip", "stack", "ours", "recompute", "limit"),
    "sample": ("dense", "masked", "sample-skip", "subset", "stack", "ours", "recompute", "limit", "narrow"),
}
