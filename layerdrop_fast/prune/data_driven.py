"""Data-driven pruning: drop rates that are learned while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_count, check_rate
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.schedule import DropSchedule, per_layer

# What the linear maps that end a branch are called: here and in torch, fairseq, transformers (BERT, GPT-2, Llama), timm.
ENDS = ("out_proj", "linear2", "fc2", "output.dense", "c_proj", "o_proj", "down_proj", "proj")
HIGHEST_RATE = 0.95  # a layer that never runs could never show that it is missed
HALVINGS = 60


class DataDriven(nn.Module):
    """Learns a drop rate for each layer of a stack, with their mean fixed: layers that help are dropped less.

    The score of layer l is a small network's answer to its activation, s_l = w2 . tanh(W1 a_l + b1) with a_l the mean
    over samples and positions of what the layer adds to the stream, scaled to norm sqrt(D), as a running mean over steps
    (the plan of a step is drawn before its activations exist). The rates are a softmax with room for one:

        p_l = 0.95 * sigmoid(s_l + b),  b such that mean(p) = target_rate

    which for small rates is ``L * target_rate * softmax(s)_l`` and never passes 0.95: a layer that never ran could not
    show that it is missed. What the loss says of a rate comes
    from the weights' gradients: the output of a branch is linear in its last weight W, so the derivative of the loss by
    a factor at the branch is ``<W, dW>``, with no pass and no memory of its own; of a kept layer, divided by 1 - p_l, it
    is the derivative by the density, to first order, in expectation over plans.

        driven = DataDriven(stack, 0.5)
        optimizer = torch.optim.AdamW([*model.parameters(), *driven.parameters()])
        for batch in batches:
            loss(model(batch)).backward()
            driven.backward()  # now and then: gradients of its own parameters, and new rates
            optimizer.step()
            optimizer.zero_grad()
        small = extract(model, driven.keep(8))

    The paper names a non-linear function of the activation, a softmax and a fixed mean; the rest is chosen here. Its
    own parametrisation was never published.

    Args:
        stack: a LayerDropStack or TransformerStack; its schedule's depth profile is set, its time multiplier stays.
        target_rate: the mean of the drop rates, in (0, 0.95).
        hidden: width of the small network.
        every: steps from one gradient and setting of the rates to the next; it waits for the device, and in the step
            behind it the layers' outputs are looked at.
        momentum: of the running mean of activations.
        ends: names of the linear maps that end a layer's branches, as suffixes of ``layer.named_modules()``.

    Shapes:
        rates: float32 [L]; activations: float32 [L, D]

    State dict: the small network, activations and rates; loading it sets the stack's schedule.

    Raises:
        ValueError: a number out of range; a layer without such a linear map. TypeError: another kind of stack or number.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3, "Data Driven Pruning"; Molchanov et al. 2017 (arXiv
    1611.06440) for what a factor's derivative says.
    """

    rates: Tensor
    activations: Tensor
    derivatives: Tensor  # of the loss by each layer's density, summed since the last gradient

    def __init__(
        self,
        stack: LayerDropStack,
        target_rate: float,
        *,
        hidden: int = 32,
        every: int = 10,
        momentum: float = 0.9,
        ends: Sequence[str] = ENDS,
    ) -> None:
        super().__init__()
        if not isinstance(stack, LayerDropStack):
            raise TypeError(f"stack: got {type(stack).__name__}, expected a LayerDropStack or TransformerStack")
        self.target_rate = check_rate(target_rate, "target_rate")
        if not 0 < self.target_rate < HIGHEST_RATE:
            raise ValueError(f"target_rate is {target_rate}, expected a number in (0, {HIGHEST_RATE})")
        check_count(hidden, "hidden", 1)
        self.every, self.momentum = check_count(every, "every", 1), check_rate(momentum, "momentum")
        self._stack = (stack,)  # not a part of this module
        self._ends = [_ends_of(layer, index, tuple(ends)) for index, layer in enumerate(stack.layers)]
        weight = self._ends[0][0].weight
        width, layers = weight.shape[0], len(stack.layers)
        self.hidden = nn.Linear(width, hidden, device=weight.device)
        self.score = nn.Linear(hidden, 1, bias=False, device=weight.device)
        nn.init.zeros_(self.score.weight)  # all rates are the same at first
        self.register_buffer("activations", torch.zeros(layers, width, device=weight.device))
        self.register_buffer("rates", torch.full((layers,), self.target_rate, device=weight.device))
        self.register_buffer("derivatives", torch.zeros(layers, device=weight.device), persistent=False)
        self._steps = 0
        self._hooks: list[Any] = []
        self.register_load_state_dict_post_hook(lambda module, _: module._set_rates())
        self._set_rates()
        self._look()

    def forward(self) -> Tensor:
        """The rates as the activations and the parameters are now, float32 [L], differentiable by the parameters."""
        scale = self.activations.norm(dim=1, keepdim=True).clamp_min(1e-12) / self.activations.shape[1] ** 0.5
        scores = self.score(torch.tanh(self.hidden(self.activations / scale)))[:, 0]
        return _rates(scores, self.target_rate)

    def backward(self) -> None:
        """Takes what the gradients of the layers' weights say; every so many steps, adds to this module's gradients.

        To be called between the loss's backward and the optimizer's step, once a step.
        """
        by_factor = torch.stack([self._by_factor(ends) for ends in self._ends])
        self.derivatives += by_factor / (1 - self.rates)
        self._steps += 1
        if self._steps % self.every == 0:
            with torch.enable_grad():
                rates = self()
                (-(self.derivatives / self.every) * rates).sum().backward()  # rho = 1 - p
            self.derivatives.zero_()
            self.rates.copy_(rates.detach())
            self._set_rates()
            self._look()

    def keep(self, kept: int) -> list[int]:
        """The ``kept`` layers with the lowest drop rates, ascending; of equal ones the first."""
        layers = len(self.rates)
        if not 1 <= check_count(kept, "kept", 1) <= layers:
            raise ValueError(f"kept is {kept}, expected 1 to {layers}")
        rates = self.rates.tolist()
        return sorted(sorted(range(layers), key=lambda layer: (rates[layer], layer))[:kept])

    @torch.no_grad()
    def _by_factor(self, ends: Sequence[nn.Linear]) -> Tensor:
        """The derivative of the loss by a factor at the layer's branches; 0 for a layer that did not run."""
        found = torch.zeros((), device=self.rates.device)
        for parameter in (p for end in ends for p in (end.weight, end.bias) if p is not None and p.grad is not None):
            found = found + (parameter.float() * parameter.grad.float()).sum()
        return found

    def _set_rates(self) -> None:
        stack = self._stack[0]
        stack.schedule = DropSchedule(len(self.rates), per_layer(self.rates.tolist()), stack.schedule.time)

    def _look(self) -> None:
        """Takes the activations of the layers that run next, each once."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            layer.register_forward_hook(partial(self._take, index), with_kwargs=True)
            for index, layer in enumerate(self._stack[0].layers)
        ]

    @torch.no_grad()
    def _take(self, index: int, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        self._hooks[index].remove()
        if keywords.get("visit") is not None:  # in a TransformerStack the last branch is still to be added
            before, behind = (inputs[0], keywords["y"]), out
        else:
            before, behind = inputs[:1], out[:1] if isinstance(out, tuple) else (out,)
        added = sum(map(_mean, behind)) - sum(map(_mean, before))
        known = self.activations[index]
        known.copy_(torch.where(known.any(), torch.lerp(added, known, self.momentum), added))


def _mean(x: Tensor | None) -> Any:
    """Over samples and positions."""
    return 0.0 if x is None or not x.numel() else x.float().flatten(0, -2).mean(0)


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


def _ends_of(layer: nn.Module, index: int, ends: tuple[str, ...]) -> list[nn.Linear]:
    found = [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in ends)
    ]
    if not found:
        names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"layer {index} has linear maps {names}, expected one whose name ends in one of {ends}")
    return found
