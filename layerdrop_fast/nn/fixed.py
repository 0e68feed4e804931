"""A stack's forward whose shapes do not depend on the plan, which is drawn on the device, as a captured graph needs it.

At granularity "sample" each unit has room for the most samples that it can keep; what a step does not need are spare
rows, -1. At granularity "batch" there are as many slots as layers that can be kept, and slot j runs the j-th kept one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast import ops
from layerdrop_fast.nn.attention import Attend
from layerdrop_fast.nn.residual import Step, add
from layerdrop_fast.nn.steps import Inputs, site_table, sites_of
from layerdrop_fast.nn.transformer_layer import TransformerLayer, Visit
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.reference.rows import accumulator, take
from layerdrop_fast.schedule import FloatArray


class Room(NamedTuple):
    """How many of the samples of each unit, or of all layers, systematic sampling keeps in any step."""

    least: tuple[int, ...]  # granularity "sample": B where all are kept for certain, else 0
    most: tuple[int, ...]

    @classmethod
    def at(cls, rates: FloatArray, batch: int | None) -> Room:
        """At these drop rates; ``batch``: None at granularity "batch"."""
        thresholds = [int(t) for t in np.rint((1.0 - rates) * 2.0**32)]
        if batch is None:
            return cls((sum(thresholds) >> 32,), (-(-sum(thresholds) >> 32),))
        totals = [t * batch for t in thresholds]
        return cls(
            tuple(batch if total >> 32 == batch else 0 for total in totals),
            tuple(-(-total >> 32) for total in totals),
        )

    def and_for(self, other: Room) -> Room:
        """Room for both; equal to this one if it has room for the other."""
        pairs = zip(self.least, other.least, strict=True)
        return Room(tuple(a if a <= b else 0 for a, b in pairs), tuple(map(max, self.most, other.most)))


class Spare(Attend):
    """For rows some of which are spare: those attend to all, and read zeros, so that nothing is infinite there."""

    def of(self, rows: Tensor | None, samples: Sequence[int] | None = None) -> Attend:
        chosen = super().of(rows, samples)
        mask = chosen.mask
        if rows is None or mask is None or mask is self.mask:
            return chosen
        return chosen._replace(mask=mask | (rows < 0).view(-1, 1, 1, 1)) if mask.dtype == torch.bool else chosen

    def read(self, x: Tensor, rows: Tensor) -> Tensor:
        return take(x, rows)


class Whole(Attend):
    """For a slot whose rows are all samples, or, unused, none: nothing has to be chosen."""

    def of(self, rows: Tensor | None, samples: Sequence[int] | None = None) -> Attend:
        return self

    def read(self, x: Tensor, rows: Tensor) -> Tensor:
        return x


class Call(NamedTuple):
    """One layer of a forward."""

    layer: TransformerLayer
    steps: list[Step | None]  # of each branch


class FixedForward:
    """Takes the place of a stack's forward: draws the plan of the step in ``counters``, advances them, and runs it.

    Args:
        counters: int64 [3], (seed, step, stream).
        rates: float64 [units]; scales: f32|f64 [units], the residual scales of scale "inverse". Read in each forward.
        slots: the layers as slots, at granularity "batch".
    """

    def __init__(
        self, stack: TransformerStack, counters: Tensor, rates: Tensor, scales: Tensor, room: Room, slots: Slots | None
    ) -> None:
        self.stack, self.counters, self.rates, self.scales = stack, counters, rates, scales
        self.room, self.slots = room, slots
        self.calls = 0
        self.dropped: Tensor | None = None  # f32 [units]: 1 for units that no sample of the last forward kept

    def __call__(self, x: Tensor, batch: int, inputs: Inputs) -> Tensor:
        stack = self.stack
        if inputs.packed is not None or inputs.cache is not None:
            raise ValueError("GraphedStep: got cu_seqlens or a cache, expected a padded batch, whose shape is fixed")
        # A recompute under activation checkpointing runs the plan that was drawn.
        if not stack.counters.recomputing:
            self.calls += 1
            self._draw(batch)
        kind = Spare if self.slots is None else Whole
        attend, memory_attend = kind(*inputs.attend), kind(*inputs.memory_attend)
        calls = self._by_sample(x, batch) if self.slots is None else self._by_slot(x, batch, self.slots)
        y: Tensor | None = None
        before: Step | None = None
        out = x
        for layer, steps in calls:
            visit = Visit(before, steps, attend, memory_attend, in_place=True, cache=None)
            out, y = layer(out, inputs.memory, y=y, visit=visit)
            before = [step for step in steps if step is not None][-1]
        return x.clone() if y is None or before is None else add(out, y, before, in_place=True)

    def _draw(self, batch: int) -> None:
        stack = self.stack
        size = None if stack.granularity == "batch" else batch
        self.key = None
        if any(layer.dropout or layer.activation_dropout for layer in stack.layers):
            self.key = ops.step_key(self.counters)
        self.keep, self.rows, _, self.kept = ops.draw_plan(
            self.counters, self.rates, size, sampling="systematic", advance=True
        )
        self.dropped = (self.kept == 0).to(torch.float32)

    def _by_sample(self, x: Tensor, batch: int) -> list[Call]:
        stack, branches = self.stack, self.stack._branches
        per_unit, layers = branches // stack.units_per_layer, cast(Sequence[TransformerLayer], stack.layers)
        sites = None if self.key is None else sites_of(stack, x.device)
        scales = self._scales(x, batch)
        steps: list[Step | None] = []
        for unit, (least, most) in enumerate(zip(*self.room, strict=True)):
            rows = None if least == batch else self.rows[unit, :most]
            for branch in range(unit * per_unit, (unit + 1) * per_unit):
                site, inner = (None, None) if sites is None else sites[branch]
                layer = layers[branch // branches]
                step = Step(rows, None, scales[unit], rate_of(layer), self.key, site, inner, training=layer.training)
                steps.append(step if most else None)
        calls = [Call(layer, steps[n * branches : (n + 1) * branches]) for n, layer in enumerate(layers)]
        return [call for call in calls if any(step is not None for step in call.steps)]

    def _scales(self, x: Tensor, batch: int) -> Sequence[Tensor | None]:
        """Of every unit."""
        if self.stack.scale == "inverse":
            return self.scales.unbind()
        if self.stack.scale == "realized":
            # Not ``batch / kept``, which torch computes as a product with 1 / kept, in other bits than the host's.
            kept = self.kept.clamp(min=1).double()
            return (torch.full_like(kept, batch) / kept).to(accumulator(x.dtype)).unbind()
        return [None] * len(self.rates)

    def _by_slot(self, x: Tensor, batch: int, slots: Slots) -> list[Call]:
        stack, device = self.stack, x.device
        (certain,), (most,) = self.room
        # The kept layers, ascending, then dropped ones: an unused slot leaves zeros in the gradient of one of those.
        order = torch.argsort((~self.keep.view(-1)).to(torch.int32), stable=True)[:most]
        used = torch.arange(most, device=device) < self.keep.sum()
        layers = slots.layers(order)
        samples = torch.arange(batch, dtype=torch.int32, device=device)
        rows = samples.masked_fill(~used[:, None], -1)
        scales: Sequence[Tensor | None] = [None] * most
        if stack.scale == "inverse":
            scales = self.scales.index_select(0, order).unbind()
        sites = None
        if self.key is not None:
            every = site_table(stack, device)
            sites = every.view(len(stack.layers), stack._branches, -1).index_select(0, order)
        calls = []
        for slot, layer in enumerate(layers):
            steps: list[Step | None] = []
            for branch in range(stack._branches):
                site, inner = (None, None) if sites is None else sites[slot, branch].unbind()
                part = None if slot < certain else rows[slot]
                scale, rate = scales[slot], rate_of(layer)
                steps.append(Step(part, None, scale, rate, self.key, site, inner, training=layer.training))
            calls.append(Call(layer, steps))
        return calls


def rate_of(layer: TransformerLayer) -> float:
    """Of the dropout behind its branches."""
    return layer.dropout if layer.training else 0.0


class Slots:
    """A stack's layers as one tensor [L, ...] a weight; each of some slots reads one layer of it, chosen on the device.

    The layers' parameters stay what they are, and become views of these tensors. A slot holds a copy of its layer's
    weights until backward; backward writes their gradients to ``gradients`` at once, so that gradients of all slots are
    never held together.
    """

    def __init__(self, stack: TransformerStack) -> None:
        self.stack = stack
        self.stacked: list[Tensor] = []
        self.gradients: list[Tensor | None] = []  # [L, ...]; None: not trained
        per_layer = zip(*(layer.parameters() for layer in stack.layers), strict=True)
        with torch.no_grad():
            for weights in per_layer:
                together = torch.stack([weight.detach() for weight in weights])
                for weight, view in zip(weights, together.unbind(), strict=True):
                    weight.data = view
                self.stacked.append(together)
                self.gradients.append(torch.zeros_like(together) if weights[0].requires_grad else None)
        # Makes autograd ask the slots for gradients.
        self.anchor = torch.zeros((), device=self.stacked[0].device, requires_grad=True)
        self._shells: list[_Shell] = []

    def bytes_a_slot(self) -> int:
        """Of the copy of a layer's weights."""
        return sum(weight[0].numel() * weight.element_size() for weight in self.stacked)

    def clear(self) -> None:
        """Zero gradients, for the layers that no slot will run."""
        for gradient in self.gradients:
            if gradient is not None:
                gradient.zero_()

    def layers(self, order: Tensor) -> list[TransformerLayer]:
        """A layer for each slot, with the weights of layer ``order[slot]``.

        Shapes:
            order: int64 [slots], no two alike
        """
        first: Any = self.stack.layers[0]
        while len(self._shells) < len(order):
            self._shells.append(_Shell(first))
        shells = self._shells[: len(order)]
        for slot, shell in enumerate(shells):
            shell.fill(_Weights.apply(self.anchor, order[slot : slot + 1], self))  # type: ignore[no-untyped-call]
        return [shell.layer for shell in shells]

    def release(self) -> None:
        """Lets the copies of the weights go."""
        for shell in self._shells:
            shell.fill([None] * len(self.stacked))


class _Shell:
    """A layer like another one, to be filled with weights. Not ``functional_call``, which takes them away before
    backward, when recomputed parts of a layer read them."""

    def __init__(self, like: TransformerLayer) -> None:
        self.layer = copy.deepcopy(like, {id(weight): weight for weight in like.parameters()})
        parts = [part._parameters for part in self.layer.modules()]
        self._places: list[tuple[Any, str]] = [
            (part, name) for part in parts for name in part if part[name] is not None
        ]

    def fill(self, weights: Sequence[Tensor | None]) -> None:
        """In the order of ``parameters()``."""
        for (part, name), weight in zip(self._places, weights, strict=True):
            part[name] = weight


class _Weights(torch.autograd.Function):
    """Copies of one layer's weights; their gradients go to ``slots.gradients``."""

    @staticmethod
    def forward(anchor: Tensor, layer: Tensor, slots: Slots) -> tuple[Tensor, ...]:
        return tuple(weight.index_select(0, layer).squeeze(0) for weight in slots.stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, layer, ctx.slots = inputs
        ctx.save_for_backward(layer)
        ctx.set_materialize_grads(False)
        pairs = zip(output, ctx.slots.gradients, strict=True)
        ctx.mark_non_differentiable(*(weight for weight, gradient in pairs if gradient is None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (layer,) = ctx.saved_tensors
        for gradient, grad in zip(ctx.slots.gradients, grads, strict=True):
            if gradient is not None and grad is not None:
                gradient.index_copy_(0, layer, grad[None])
        return None, None, None
