"""Data-driven pruning: drop rates that are learned while the network trains."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn

from layerdrop_fast._checks import check_count, check_range, check_rate
from layerdrop_fast.nn.distributed import several_ranks
from layerdrop_fast.nn.residual import Step, add
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.transformer_layer import Visit
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.plan import DropPlan
from layerdrop_fast.prune.regression import FadingRegression
from layerdrop_fast.schedule import DropSchedule, per_layer

HIGHEST_RATE = 0.95  # a layer that never runs could never show that it is missed
HALVINGS = 60


def check_target_rate(rate: float, name: str = "target_rate") -> float:
    """A mean of drop rates that can be held while all stay below the highest."""
    if not 0 < check_rate(rate, name) < HIGHEST_RATE:
        raise ValueError(f"{name} is {rate}, expected a number in (0, {HIGHEST_RATE})")
    return float(rate)


class DataDriven(nn.Module):
    """Learns a drop rate for each layer of a stack, with their mean fixed: layers that help are dropped less.

    The score of layer l is a small network's answer to its activation, s_l = w2 . tanh(W1 a_l + b1), with a_l the mean
    over samples and positions of what the layer adds to the stream, scaled to norm sqrt(D): a running mean over steps
    (the plan of a step is drawn before its activations exist). The rates are a softmax with room for one:

        p_l = 0.95 * sigmoid(s_l + b),  b such that mean(p) = target_rate

    which for small rates is ``L * target_rate * softmax(s)_l`` and never passes 0.95: a layer that never ran could not
    show that it is missed.

    What a layer is worth is a ridge regression of the loss on the decisions, in which earlier steps count less and
    less: ``loss = c + e . (m - (1 - p))``, m_l = 1 where layer l was kept. Its slope e_l is the derivative of the
    expected loss by the density 1 - p_l, so ``-e_l`` is the gradient of p_l. Dropped layers are skipped and nothing is
    held for it.

        driven = DataDriven(stack, 0.5)
        optimizer = torch.optim.AdamW([*model.parameters(), *driven.parameters()])
        for batch in batches:
            loss = criterion(model(batch))
            loss.backward()
            driven.backward(loss)  # every so many steps: gradients of its own parameters, and new rates
            optimizer.step()
            optimizer.zero_grad()
        small = extract(model, driven.keep(8))

    The paper names a non-linear function of the activation, a softmax and a fixed mean; the rest is chosen here. Its
    own parametrisation was never published.

    Args:
        stack: a LayerDropStack or TransformerStack; its layers may be compiled, each by itself, not all as one. Its
            schedule's depth profile is set, its time multiplier stays.
        target_rate: the mean of the drop rates, in (0, 0.95).
        hidden: width of the small network.
        every: steps from one gradient and setting of the rates to the next; it waits for the device, and in the step
            after it the layers' outputs are looked at.
        momentum: of the running mean of activations.
        memory: steps over which the regression's weights of earlier steps fall to 1 / e.
        width: of the stream; None: the layers' ``d_model``.

    Shapes:
        rates: float32 [L]; activations: float32 [L, D]; slopes: float64 [L]

    State dict: the small network, activations, rates and the regression; loading it sets the stack's schedule.

    On several ranks losses and activations are averaged and the small network is rank 0's, so that all have the same
    rates; every rank calls ``backward`` as often.

    Raises:
        ValueError: a number out of range. TypeError: another kind of stack or number. RuntimeError: a stack that is
            compiled as one, also when it is called.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3, "Data Driven Pruning".
    """

    rates: Tensor
    activations: Tensor
    steps: Tensor  # forwards that were taken, as of the last gradient
    looking: Tensor  # whether the activation of a layer is taken when it runs next

    def __init__(
        self,
        stack: LayerDropStack,
        target_rate: float,
        *,
        hidden: int = 32,
        every: int = 10,
        momentum: float = 0.9,
        memory: int = 500,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(stack, LayerDropStack):
            raise TypeError(f"stack: got {type(stack).__name__}, expected a LayerDropStack or TransformerStack")
        _check_not_compiled(stack)
        self.target_rate = check_target_rate(target_rate)
        check_count(hidden, "hidden", 1)
        self.every, self.momentum = check_count(every, "every", 1), check_rate(momentum, "momentum")
        self.memory = check_count(memory, "memory", 1)
        self._stack = (stack,)  # not a part of this module
        width = getattr(stack.layers[0], "d_model", None) if width is None else width
        if width is None:
            kind = type(stack.layers[0]).__name__
            raise ValueError(f"width is None, expected the stream's last dimension: {kind} has no d_model")
        layers, width, device = len(stack.layers), check_count(width, "width", 1), _device_of(stack)
        self.hidden = nn.Linear(width, hidden, device=device)
        self.score = nn.Linear(hidden, 1, bias=False, device=device)
        nn.init.zeros_(self.score.weight)  # all rates are the same at first
        self.register_buffer("activations", torch.zeros(layers, width, device=device))
        self.register_buffer("rates", torch.full((layers,), self.target_rate, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("looking", torch.ones(layers, dtype=torch.bool))
        self.regression = FadingRegression(layers)
        self._taken = 0
        self._last_taken: DropPlan | None = None
        self._hooks: dict[int, Any] = {}
        stack.register_forward_pre_hook(_Before(self))
        self.register_state_dict_pre_hook(lambda module, *_: module.steps.fill_(module._taken))  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(lambda module, _: module._take_up())  # type: ignore[no-untyped-call]
        self._take_up()

    def forward(self) -> Tensor:
        """The rates as the activations and the parameters are now, float32 [L], differentiable by the parameters."""
        scale = self.activations.norm(dim=1, keepdim=True).clamp_min(1e-12) / self.activations.shape[1] ** 0.5
        scores = self.score(torch.tanh(self.hidden(self.activations / scale)))[:, 0]
        return _rates(scores, self.target_rate)

    def backward(self, loss: Tensor) -> None:
        """Takes the loss of the last forward; every so many of them, adds to this module's gradients and sets rates.

        To be called once a training forward, between the loss's backward and the optimizer's step.

        Args:
            loss: as the forward's plan left it: float [], or [B] at granularity "sample", one a sample.

        Raises:
            ValueError: another shape, or another number of samples than the last forward had. TypeError: no tensor.
                RuntimeError: there was no training forward yet, or its loss was taken already. Nothing has changed
                then.
        """
        stack = self._stack[0]
        wanted = "[]" if stack.granularity == "batch" else "[B], one a sample"
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: got a {type(loss).__name__}, expected the tensor {wanted}")
        if loss.dim() != (stack.granularity == "sample"):
            raise ValueError(f"loss: got {list(loss.shape)}, expected {wanted} at granularity {stack.granularity!r}")
        plan = stack.counters.last_plan
        if plan is None:
            raise RuntimeError("backward: got no training forward of the stack, expected one before it")
        if plan is self._last_taken:
            last = f"training forward {stack.counters.forwards - 1}"
            raise RuntimeError(
                f"backward: got a second loss after {last}, expected one loss a forward, of the last one"
            )
        if loss.dim() and len(loss) != plan.batch_size:
            raise ValueError(
                f"loss: got {list(loss.shape)}, expected [{plan.batch_size}], as the last forward's samples"
            )
        self._last_taken = plan
        units = plan.keep[: len(stack.layers) * stack.units_per_layer]  # heads and chunks come after them
        kept = units.double().view(len(stack.layers), stack.units_per_layer, -1).mean(1)  # [L, B]
        self.regression.add(kept - torch.from_numpy(1.0 - stack.schedule(plan.step))[:, None], loss)
        self._taken += 1
        if self._taken % self.every == 0:
            self._learn()

    @property
    def slopes(self) -> Tensor:
        """What the loss gains by a layer's density, ``e``: the more negative, the more the layer helps."""
        return self.regression.slopes

    def keep(self, kept: int) -> list[int]:
        """The ``kept`` layers with the lowest drop rates, ascending; of equal ones the first."""
        rates = self.rates.tolist()
        check_range(kept, "kept", 1, len(rates))
        return sorted(sorted(range(len(rates)), key=lambda layer: (rates[layer], layer))[:kept])

    def _learn(self) -> None:
        if several_ranks():  # who may have drawn the small network from generators of their own
            for parameter in self.parameters():
                distributed.broadcast(parameter.data, 0)
        self.activations.copy_(self._common(self.activations))
        self.regression.fade(math.exp(-self.every / self.memory), self._common)
        with torch.enable_grad():
            rates = self()
            (rates * -self.slopes.to(rates)).sum().backward()
        self.rates.copy_(rates.detach())
        self.steps.fill_(self._taken)
        self.looking.fill_(True)
        self._take_up()

    def _common(self, x: Tensor) -> Tensor:
        """The mean over ranks."""
        if not several_ranks():
            return x
        total = x.to(self.rates.device, copy=True)
        distributed.all_reduce(total)
        return (total / distributed.get_world_size()).to(x.device)

    def _take_up(self) -> None:
        """Sets the stack's rates, and takes the activations of the layers that are looked at when they run next."""
        stack = self._stack[0]
        self._taken = int(self.steps)
        stack.schedule = DropSchedule(len(self.rates), per_layer(self.rates.tolist()), stack.schedule.time)
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {
            index: layer.register_forward_hook(_Look(self, index), with_kwargs=True)
            for index, (layer, looking) in enumerate(zip(stack.layers, self.looking.tolist(), strict=True))
            if looking
        }

    @torch.no_grad()
    def _take(self, index: int, inputs: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        """The activation of a layer, of which it is not asked again before the next gradient."""
        self._hooks.pop(index).remove()
        self.looking[index] = False
        before, after = inputs[0], out[0] if isinstance(out, tuple) else out
        visit = keywords.get("visit")
        if isinstance(visit, Visit):  # in a TransformerStack the last branch is still to be added
            before = _with(before, keywords["y"], visit.before)
            after = _with(out[0], out[1], [step for step in visit.steps if step is not None][-1])
        if after.numel():
            added = (after.float() - before.float()).flatten(0, -2).mean(0)
            known = self.activations[index]
            known.copy_(torch.where(known.any(), torch.lerp(added, known, self.momentum), added))


class _Look:
    """A forward hook that hands on what a layer did; a copy of the layer has one that only removes itself."""

    def __init__(self, driven: DataDriven | None, index: int) -> None:
        self.driven, self.index = None if driven is None else weakref.ref(driven), index

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        driven = None if self.driven is None else self.driven()
        if driven is None:
            _remove_left_over(layer)
        elif layer.training:
            driven._take(self.index, inputs, keywords, out)

    def __reduce__(self) -> Any:
        return _Look, (None, self.index)


class _Before:
    """A forward pre-hook of the stack, which must not be compiled; a copy's removes itself and what its layers have."""

    def __init__(self, driven: DataDriven | None) -> None:
        self.driven = None if driven is None else weakref.ref(driven)

    def __call__(self, stack: LayerDropStack, inputs: tuple[Any, ...]) -> None:
        if self.driven is not None and self.driven() is not None:
            _check_not_compiled(stack)
            return
        for key, hook in list(stack._forward_pre_hooks.items()):
            if hook is self:
                del stack._forward_pre_hooks[key]
        for layer in stack.layers:
            _remove_left_over(layer)

    def __reduce__(self) -> Any:
        return _Before, (None,)


def _remove_left_over(layer: nn.Module) -> None:
    """The hooks that look at a layer for what is gone, or was not copied with it."""
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(hook, _Look) and (hook.driven is None or hook.driven() is None):
            del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]


def _check_not_compiled(stack: LayerDropStack) -> None:
    if isinstance(stack, TransformerStack) and stack._compiled is not None:
        raise RuntimeError(
            "the stack is compiled as one, expected it not to be, as its layers are looked at: compile each layer by "
            "itself"
        )


def _with(x: Tensor, y: Tensor | None, step: Step | None) -> Tensor:
    """The stream, with the branch that is still to be added."""
    return x if y is None or step is None else add(x, y, step, in_place=False)


def _device_of(stack: nn.Module) -> torch.device | None:
    return next((weight.device for weight in stack.parameters()), None)


def _rates(scores: Tensor, mean: float) -> Tensor:
    """``0.95 * sigmoid(scores + b)`` with b such that the mean is as given, differentiable by the scores."""
    with torch.no_grad():
        exact = scores.double()
        level = torch.special.logit(torch.full((), mean / HIGHEST_RATE, dtype=torch.float64, device=scores.device))
        low, high = level - exact.max(), level - exact.min()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = torch.sigmoid(exact + middle).mean() < mean / HIGHEST_RATE
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        slopes = torch.sigmoid(exact + low) * (1 - torch.sigmoid(exact + low))
    # b follows the scores so that the mean stays: db = -(slopes . ds) / sum(slopes).
    b = low - ((scores - scores.detach()) * slopes / slopes.sum()).sum()
    return HIGHEST_RATE * torch.sigmoid(scores + b.to(scores.dtype))
