"""Evaluates one subset of layers after another, each from the hidden states that it shares with the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.prune.lists import layers_of
from layerdrop_fast.prune.skip_layers import skip_layers

Evaluate: TypeAlias = Callable[[nn.Module], float]
Forward: TypeAlias = Callable[..., Any]


class SharedPrefixes:
    """Calls ``evaluate`` with a model that has a subset of its layers, and runs no layer whose result is known.

    A layer's output depends on the layers kept before it, and on nothing else that changes. So the outputs of the
    subset that was evaluated last are held, and the next one starts from those of the longest prefix that both have: in
    ascending order of subsets each distinct prefix is computed once. ``evaluate`` may call the model any number of
    times, each time with the same inputs in the same order; what reaches the first layer is compared.

    Args:
        model: as for ``extract``.
        name: its list of layers.
        evaluate: called with the model, which it evaluates (``model.eval()``); returns a number.
        max_bytes: what is held at most. Where that is too little for all prefixes of a subset, the longest ones are
            held, which serve most.

    Attributes:
        layers_run: layers that ran, counted once an evaluation.

    Raises:
        ValueError: when called: other inputs than the first time, layers that return more than x, a stack with hidden
            states or a cache, a model in training.
    """

    def __init__(self, model: nn.Module, name: str, evaluate: Evaluate, max_bytes: int) -> None:
        self.model, self.name, self.evaluate, self.max_bytes = model, name, evaluate, max_bytes
        self.layers_run = 0
        self._inputs: list[list[Tensor]] = []  # of the first layer, by call
        self._all_inputs_known = False
        self._known: tuple[int, ...] = ()  # the subset whose outputs are held
        self._outputs: dict[int, list[Any]] = {}  # by the length of the prefix that they come out of, and by call

    def __call__(self, keep: Sequence[int]) -> float:
        keep = tuple(keep)
        common = _common(self._known, keep)
        self._outputs = {length: held for length, held in self._outputs.items() if length <= common}
        self._known, self._start = keep, max(self._outputs, default=0)
        self._calls = [0] * len(keep)
        try:
            with torch.no_grad(), skip_layers(self.model, {self.name: keep}), self._watched():
                value = float(self.evaluate(self.model))
            self._check_calls()
        except BaseException:
            self._known, self._outputs = (), {}  # of some calls only
            if not self._all_inputs_known:
                self._inputs = []
            raise
        self._all_inputs_known = True
        return value

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Every layer of the subset goes through ``_layer``."""
        module = self.model.get_submodule(self.name)
        with ExitStack() as undo:
            if isinstance(module, LayerDropStack):
                undo.enter_context(_replaced(module, "forward", self._forward_of(module)))
                if isinstance(module, TransformerStack):
                    undo.enter_context(_replaced(module, "_compiled", None))  # each subset would be compiled anew
            else:
                layers = every_layer(layers_of(self.model, self.name))
                if len(set(layers)) < len(layers):
                    raise ValueError(
                        f"a layer stands twice in {self.name!r}, expected each once, or share_prefixes=False"
                    )
                for place, layer in enumerate(layers):
                    undo.enter_context(_replaced(layer, "forward", self._layer(place, layer, layer.forward)))
            yield

    def _forward_of(self, stack: LayerDropStack) -> Forward:
        """The stack's forward, one layer at a time."""
        if stack.hidden_states:
            raise ValueError(f"{self.name!r} has hidden_states=True, expected False, or share_prefixes=False")
        forward = stack.forward

        def only(place: int) -> Forward:
            def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                with skip_layers(stack, {"": [place]}):
                    return forward(x, *args, **kwargs)

            return run

        layers = [self._layer(place, stack, only(place)) for place in range(len(stack.layers))]

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("cache") is not None:
                raise ValueError(f"{self.name!r} is called with a cache, expected none, or share_prefixes=False")
            for layer in layers:
                x = layer(x, *args, **kwargs)
            return x

        return run

    def _layer(self, place: int, module: nn.Module, forward: Forward) -> Forward:
        """The layer at a place of the subset: run, or its output as it is known."""

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            call, length = self._calls[place], place + 1
            self._calls[place] += 1
            if module.training:
                raise ValueError("the model is in training mode, expected evaluate to call model.eval()")
            if place == 0:
                self._check_input(
                    call, [x, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))]
                )
            if length == self._start:
                return self._outputs[length][call]
            if length < self._start:  # what comes out of it is not used
                return (x,) if isinstance(self._outputs[self._start][0], tuple) else x
            self.layers_run += call == 0
            version = 0 if x.is_inference() else x._version
            out = forward(x, *args, **kwargs)
            if not x.is_inference() and x._version != version:
                raise ValueError(
                    f"a layer of {self.name!r} writes into its input, expected a new tensor: share_prefixes=False"
                )
            if isinstance(out, tuple) and any(more is not None for more in out[1:]):
                raise ValueError(
                    f"a layer of {self.name!r} returns more than x, which later layers may take: share_prefixes=False"
                )
            if self._shortest() <= length < len(self._known):
                self._outputs.setdefault(length, []).append(out)
            return out

        return run

    def _shortest(self) -> int:
        """The length of the shortest prefix that is held. A residual layer's output is as large as its input."""
        states = sum(inputs[0].nbytes for inputs in self._inputs)
        inputs = sum(tensor.nbytes for tensors in self._inputs for tensor in tensors)
        return max(1, len(self._known) - max(0, self.max_bytes - inputs) // max(states, 1))

    def _check_input(self, call: int, tensors: list[Tensor]) -> None:
        if not self._all_inputs_known:
            self._inputs.append(tensors)
            shortest = self._shortest()
            self._outputs = {length: held for length, held in self._outputs.items() if length >= shortest}
            return
        known = self._inputs[call] if call < len(self._inputs) else []
        if len(known) != len(tensors) or not all(map(torch.equal, known, tensors)):
            raise ValueError(
                f"call {call} of {self.name!r} has other inputs than in the first evaluation, expected evaluate to "
                "call the model with the same batches in the same order, or share_prefixes=False"
            )

    def _check_calls(self) -> None:
        if set(self._calls) != {len(self._inputs)}:
            raise ValueError(
                f"the layers of {self.name!r} were called {self._calls} times, expected {len(self._inputs)} times "
                "each, or share_prefixes=False"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest prefix that both have."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


@contextmanager
def _replaced(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """An attribute of this instance that is another for a while."""
    attributes = vars(module)
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]
