"""Evaluates one subset of layers after another, each from the hidden states that it shares with the one before."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.transformer_stack import TransformerStack
from layerdrop_fast.prune.fingerprints import Seen, fingerprint, version
from layerdrop_fast.prune.lists import layers_of, path_to, said, wrapped_in
from layerdrop_fast.prune.skip_layers import only_layers, skip_layers

Evaluate: TypeAlias = Callable[[nn.Module], float]
Forward: TypeAlias = Callable[..., Any]
ROUNDING = 1e-4  # of a score with shared prefixes, or of the largest one
ROUNDING_OF_HALVES = 1e-2  # where states or branches are bfloat16 or float16
CHECKS_GROW_BY = 8


class Held(NamedTuple):
    """What a layer returned, and the version of its tensor then."""

    out: Any
    version: Hashable


class SharedPrefixes:
    """Calls ``evaluate`` with a model that has a subset of its layers, and runs no layer whose result is known.

    A layer's output depends on the layers kept before it, and on nothing else that changes. So the outputs of the
    subset that was evaluated last are held, and the next one of as many layers starts from those of the longest prefix
    that both have: in ascending order of subsets each distinct prefix is computed once. ``evaluate`` may call the model
    any number of times, each time with the same inputs in the same order.

    That it is so is checked: what reaches the first layer and the other arguments of each layer are compared by
    fingerprint; what is held must not have been written to; layers that do not run return NaN, so that a model that
    reads states between layers (sums them, mixes them, returns them) shows it. Evaluations 1, 2, 16, 128, ... and those
    that give NaN are repeated with every layer, and must agree.

    Nothing of it runs compiled but what is within the layers of a stack: each subset would be compiled anew.

    Args:
        model: as for ``extract``.
        name: its list of layers.
        evaluate: called with the model, which it evaluates (``model.eval()``); returns a number.
        max_bytes: of states that are held, at most. Where that is too little for all prefixes of a subset, the longest
            ones are held, which serve most. Of inputs only fingerprints are held.

    Attributes:
        layers_run: layers that ran, counted once an evaluation; without those of repeated evaluations.

    Raises:
        ValueError: when called: other inputs than the first time, other arguments of a layer that does not run, layers
            that return more than x, something that writes into a state, a score that is another without sharing, a
            stack with hidden states or a cache, a model in training. TypeError: layers that take or return no tensor.
    """

    def __init__(self, model: nn.Module, name: str, evaluate: Evaluate, max_bytes: int) -> None:
        self.model, self.name, self.evaluate, self.max_bytes = model, name, evaluate, max_bytes
        self.layers_run = 0
        self._said = said(model, name)
        self._inputs: list[Hashable] = []  # fingerprints of what reaches the first layer, by call
        self._input_bytes = 0  # of x, of all calls
        self._all_inputs_known = False
        self._evaluations, self._next_check = 0, 1
        self._rounding, self._largest = ROUNDING, 0.0  # of scores
        self._seen: Seen = {}  # arguments of this call of the model
        self._before: Held | None = None  # of the layer that ran before, in this call
        self.forget_states()

    def forget_states(self) -> None:
        """Frees what is held. The next subset runs every layer."""
        self._known: tuple[int, ...] = ()  # the subset whose outputs are held
        self._outputs: dict[int, list[Held]] = {}  # by the length of the prefix that they come out of, and by call
        self._arguments: list[list[Hashable]] = []  # fingerprints of each layer's other arguments, by call

    def __call__(self, keep: Sequence[int]) -> float:
        keep = tuple(keep)
        if len(keep) != len(self._known):  # models may scale by how many layers they have
            self.forget_states()
        common = _common(self._known, keep)
        self._outputs = {length: held for length, held in self._outputs.items() if length <= common}
        self._known, self._start = keep, max(self._outputs, default=0)
        self._arguments = [*self._arguments[: self._start], *([] for _ in keep[self._start :])]
        self._calls = [0] * len(keep)
        try:
            with torch.no_grad(), skip_layers(self.model, {self.name: keep}):
                with self._watched():
                    value = number_from(self.evaluate, self.model)
                self._check_calls()
                self._check_score(keep, value)
        except BaseException:
            self.forget_states()  # of some calls only
            if not self._all_inputs_known:
                self._inputs, self._input_bytes = [], 0
            raise
        finally:
            self._seen, self._before = {}, None
        self._all_inputs_known = True
        return value

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Every layer of the subset goes through ``_layer``."""
        module = self.model.get_submodule(self.name)
        with self._eager(), ExitStack() as undo:
            if isinstance(module, LayerDropStack):
                undo.enter_context(_replaced(module, "forward", self._forward_of(module)))
            else:
                layers = every_layer(layers_of(self.model, self.name))
                if len(set(layers)) < len(layers):
                    raise ValueError(
                        f"a layer stands twice in {self._said}, expected each once, or share_prefixes=False"
                    )
                for place, layer in enumerate(layers):
                    undo.enter_context(_replaced(layer, "forward", self._layer(place, layer.forward, layer)))
            yield

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """What would be compiled anew for each subset is not: the list's layers, the stack, and what holds them."""
        last = self.model.get_submodule(self.name)
        modules = [*(module for _, module in path_to(self.model, self.name)), last]
        with ExitStack() as undo:
            if not isinstance(last, LayerDropStack):
                modules += every_layer(layers_of(self.model, self.name))
            elif isinstance(last, TransformerStack):
                undo.enter_context(_replaced(last, "_compiled", None))
            for module in modules:
                undo.enter_context(_replaced(module, "_compiled_call_impl", None))
                for inner in wrapped_in(module):
                    undo.enter_context(_replaced(module, "forward", inner))
            yield

    def _forward_of(self, stack: LayerDropStack) -> Forward:
        """The stack's forward, one layer at a time."""
        if stack.hidden_states:
            raise ValueError(f"{self._said} has hidden_states=True, expected False, or share_prefixes=False")
        forward = stack.forward

        def only(place: int) -> Forward:
            def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                with only_layers(stack, {"": [place]}):
                    return forward(x, *args, **kwargs)

            return run

        layers = [self._layer(place, only(place), stack) for place in range(len(stack.layers))]

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("cache") is not None:
                raise ValueError(f"{self._said} is called with a cache, expected none, or share_prefixes=False")
            for layer in layers:
                x = layer(x, *args, **kwargs)
            return x

        return run

    def _layer(self, place: int, forward: Forward, module: nn.Module) -> Forward:
        """The layer at a place of the subset: run, or its output as it is known."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], Tensor):
                got = type(args[0]).__name__ if args else f"only keywords {list(kwargs)}"
                raise TypeError(
                    f"a layer of {self._said} is called with {got}, expected x, a tensor, as first argument, or "
                    "share_prefixes=False"
                )
            x, *rest = args
            call, length = self._calls[place], place + 1
            self._calls[place] += 1
            if module.training:
                raise ValueError("the model is in training mode, expected evaluate to call model.eval()")
            if place == 0:
                self._seen, self._before = {}, None
                # A stack's other arguments are the same whichever layers it has; a list's may be those of its first.
                inputs = (x, rest, kwargs) if isinstance(module, LayerDropStack) else x
                self._check_input(call, x, fingerprint(inputs, self._seen))
            elif self._calls[place - 1] != call + 1:
                raise ValueError(
                    f"the layers of {self._said} are called in another order than they stand in, expected one after "
                    "the other, or share_prefixes=False"
                )
            elif self._before is not None:
                self._check_unwritten(self._before)
            self._check_arguments(place, call, fingerprint((rest, kwargs), self._seen))
            if length <= self._start:
                self._before = None
                held = self._outputs[self._start][call]
                if length < self._start:  # what comes out of it is not to be used
                    return _with_state(held.out, _unread(x))
                self._check_unwritten(held)
                return held.out
            self.layers_run += call == 0
            before = version(x)
            out = forward(x, *rest, **kwargs)
            if version(x) != before:
                raise ValueError(
                    f"a layer of {self._said} writes into its input, expected a new tensor: share_prefixes=False"
                )
            state = self._state_of(out)
            self._before = Held(out, version(state)) if length < len(self._known) else None
            if self._before is not None and self._shortest() <= length:
                # Never the input's memory, which may be the caller's, for the next batch.
                own = torch._C._is_alias_of(state, x)  # type: ignore[attr-defined]
                state = state.clone() if own else state
                held = Held(_with_state(out, state), version(state)) if own else self._before
                self._outputs.setdefault(length, []).append(held)
            return out

        return run

    def _state_of(self, out: Any) -> Tensor:
        state = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(state, Tensor):
            got = f"a tuple that starts with {type(state).__name__}" if state is not out else type(out).__name__
            raise TypeError(
                f"a layer of {self._said} returns {got}, expected a tensor or a tuple that starts with one, or "
                "share_prefixes=False"
            )
        if isinstance(out, tuple) and any(more is not None for more in out[1:]):
            raise ValueError(
                f"a layer of {self._said} returns more than x, which later layers may take: share_prefixes=False"
            )
        return state

    def _shortest(self) -> int:
        """The length of the shortest prefix that is held. A residual layer's output is as large as its input."""
        return max(1, len(self._known) - self.max_bytes // max(self._input_bytes, 1))

    def _check_input(self, call: int, x: Tensor, print_of_it: Hashable) -> None:
        if not self._all_inputs_known:
            self._inputs.append(print_of_it)
            self._input_bytes += x.nbytes
            if x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type):
                self._rounding = ROUNDING_OF_HALVES
            shortest = self._shortest()
            self._outputs = {length: held for length, held in self._outputs.items() if length >= shortest}
        elif call >= len(self._inputs) or self._inputs[call] != print_of_it:
            raise ValueError(
                f"call {call} of {self._said} has other inputs than in the first evaluation, expected evaluate to "
                "call the model with the same batches in the same order, or share_prefixes=False"
            )

    def _check_arguments(self, place: int, call: int, print_of_them: Hashable) -> None:
        """Of a layer that does not run: they are what they were when it did."""
        if place >= self._start:
            self._arguments[place].append(print_of_them)
        elif self._arguments[place][call] != print_of_them:
            raise ValueError(
                f"layer {self._known[place]} of {self._said} has other arguments beside x in call {call} than when it "
                "ran, expected the same, or share_prefixes=False"
            )

    def _check_unwritten(self, held: Held) -> None:
        if version(self._state_of(held.out)) != held.version:
            raise ValueError(
                f"what a layer of {self._said} returned was written into, expected a new tensor (x = x + y, not "
                "x += y), or share_prefixes=False"
            )

    def _check_calls(self) -> None:
        if not self._inputs:
            raise ValueError(
                f"evaluate called no layer of {self._said}, expected it to call the model that it is given"
            )
        if set(self._calls) != {len(self._inputs)}:
            raise ValueError(
                f"the layers of {self._said} were called {self._calls} times, expected {len(self._inputs)} times "
                "each, or share_prefixes=False"
            )

    def _check_score(self, keep: tuple[int, ...], value: float) -> None:
        """Now and then, and where a layer's NaN may have been read: the score with every layer is the same."""
        self._evaluations += 1
        self._largest = max(self._largest, abs(value)) if math.isfinite(value) else self._largest
        due = self._evaluations >= self._next_check and (self._start > 0 or self._evaluations == 1)
        if not due and not (math.isnan(value) and self._start > 1):
            return
        self._next_check = 2 if self._evaluations == 1 else self._evaluations * CHECKS_GROW_BY
        with self._eager():
            alone = number_from(self.evaluate, self.model)
        same = math.isclose(value, alone, rel_tol=self._rounding, abs_tol=self._rounding * self._largest)
        if not same and not (math.isnan(value) and math.isnan(alone)):
            raise ValueError(
                f"the layers {list(keep)} of {self._said} score {value:.6g} with shared prefixes and {alone:.6g} with "
                "every layer run: expected a model that reads states between layers nowhere, and an evaluate that "
                "gives the same number for the same layers; or share_prefixes=False"
            )


def number_from(evaluate: Evaluate, model: nn.Module) -> float:
    """What ``evaluate`` says of the model."""
    value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # None, a word, a tensor of several numbers
        got = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
        raise TypeError(f"evaluate returned a {type(value).__name__} {got}, expected a number") from None


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest prefix that both have."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _with_state(out: Any, state: Tensor) -> Any:
    """What a layer returned, with another x."""
    if not isinstance(out, tuple):
        return state
    return type(out)(state, *out[1:]) if hasattr(out, "_fields") else (state, *out[1:])


def _unread(x: Tensor) -> Tensor:
    """NaN in the shape of x, without memory."""
    if not x.is_floating_point() and not x.is_complex():
        return x
    return x.new_full((), math.nan).expand_as(x)


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
