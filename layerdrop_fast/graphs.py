"""``GraphedStep``: a training step as one CUDA graph that draws fresh decisions at each replay.

Forward, backward and optimizers are captured once, with shapes that do not depend on the plan. Granularity "sample":
each layer has room for ceil(rho B) rows, of which a step may leave one spare. Granularity "batch": ceil(sum of rho)
slots, each of which copies the weights of the layer that it runs, chosen by an index on the device. IF nodes would save
those copies, but torch (2.13) has them in private modes for ``torch.cond`` alone. The gradients of dropped layers are
zero; each layer has an optimizer of its own, told to skip the step by the switch (``found_inf``) that fused optimizers
have for gradient scaling.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerdrop_fast._checks import check_count
from layerdrop_fast.nn.fixed import FixedForward, Room, Slots
from layerdrop_fast.nn.graphable import graphable_stack, units_of
from layerdrop_fast.nn.skippable import check_optimizer, load, make_states, step_unless
from layerdrop_fast.nn.steps import Inputs
from layerdrop_fast.nn.turn import Kept, Turn
from layerdrop_fast.plan import to_device
from layerdrop_fast.reference.rows import accumulator
from layerdrop_fast.schedule import FloatArray

WARM_UPS = 3  # before a capture, so that kernels are loaded, and libraries have their workspaces


class _Seen(NamedTuple):
    """The stream as it reaches the stack."""

    shape: torch.Size
    dtype: torch.dtype


class GraphedStep:
    """Training steps of a model that holds one TransformerStack, each one replay of a captured CUDA graph.

        lr = torch.tensor(1e-3, device="cuda")
        step = GraphedStep(
            model, lambda model, x, target: (model(x) - target).square().mean(),
            lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True, capturable=True), x, target)
        for x, target in batches:
            value = step(x, target)  # copied into the graph's own inputs; forward, backward, optimizers

    Every replay draws the decisions and masks of the next step on the device. Losses, weights and states are those of
    eager steps of the same stack, with the same optimizers, which give dropped layers no gradient; ``stack.counters``
    goes on as there, so that eager steps, checkpoints and ``set_step`` may come in between. Nothing waits for the
    device, except where a graph is captured. On other devices than a GPU the same code runs uncaptured.

    Shapes:
        inputs: those of ``example_inputs`` -> [], the loss, in memory that the next call overwrites

    Args:
        model: holds one TransformerStack, in training, with ``sampling="systematic"``, pre-norm, ``accumulation=1``,
            no ``max_kept`` or ``hidden_states``. At granularity "batch" layers are alike, ``target`` is "layer", and
            the layers' parameters become views of one tensor [L, ...] a name; the state dict stays what it was.
        loss: ``loss(model, *inputs) -> [1 element]``, runs the model once. It is captured: Python in it does not run
            again, shapes may not depend on values, and gradients' hooks of parameters do not run.
        optimizer_of: makes a fused Adam, AdamW or SGD of a list of parameters (capturable=True for Adam on a GPU);
            called for each unit of the plan, and once for the parameters outside the layers.
        example_inputs: tensors whose shapes, dtypes and values (for warm-up) the graph is captured with.
        clip_norm: None, or the norm to which ``clip_grad_norm_`` clips all gradients together.
        ahead: a captured graph also has room for what the schedule keeps so many steps later: for schedules that keep
            more as time goes on, which capture anew where the room ends.

    Raises:
        ValueError: a setting that cannot be captured; inputs of other shapes. TypeError: inputs that are no tensors.
        RuntimeError: a loss that does not run the stack once; parameters or settings of an optimizer that were replaced
            since capture (a learning rate that changes is a tensor on the device, as above, set by ``fill_``).
            What modules are set to, such as their dropout, is part of the graph, and is not looked at again.

    Attributes:
        optimizers: of each unit, then of the rest. ``captures``: how many graphs were captured: 1, and one more
        whenever a schedule needs more room than before, or a state is loaded.

    Randomness: plans are ``stack.plan(n)``, masks as in TransformerStack; all else comes from torch's generators.

    Source: contract of ``TransformerStack``; systematic sampling (Madow 1949) bounds what a step keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer_of: Callable[[list[nn.Parameter]], Optimizer],
        *example_inputs: Tensor,
        clip_norm: float | None = None,
        ahead: int = 0,
    ) -> None:
        self._stack = graphable_stack(model)
        self._model, self._loss, self._clip_norm = model, loss, clip_norm
        self._ahead = check_count(ahead, "ahead", 0)
        self._device = next(self._stack.layers.parameters()).device
        check_tensors(example_inputs)
        self._inputs = [given.detach().to(self._device, copy=True) for given in example_inputs]
        self._set_up_optimizers(optimizer_of)
        self._counters = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._hold = torch.zeros((), device=self._device)  # 1: no optimizer moves anything
        self._at: tuple[int, int] | None = None  # the seed and step in ``_counters``
        self._host_rates: FloatArray | None = None
        self._seen = self._look()
        units = len(self._stack.layers) * self._stack.units_per_layer
        self._rates = torch.zeros(units, dtype=torch.float64, device=self._device)
        self._scales = torch.ones(units, dtype=accumulator(self._seen.dtype), device=self._device)
        self._like = torch.empty((), dtype=self._seen.dtype, device=self._device)
        self._slots = Slots(self._stack) if self._stack.granularity == "batch" else None
        self._value: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.captures = 0
        self._capture(self._need())

    def _set_up_optimizers(self, optimizer_of: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        self._units = units_of(self._stack)
        inside = {id(weight) for weight in self._stack.layers.parameters()}
        self._rest = [w for w in self._model.parameters() if w.requires_grad and id(w) not in inside]
        # Of which unit, the last number for the rest.
        groups = [(unit, weights) for unit, weights in enumerate([*self._units, self._rest]) if weights]
        self.optimizers = [check_optimizer(optimizer_of(weights)) for _, weights in groups]
        self._unit_of = [unit for unit, _ in groups]

    @property
    def bytes_of_slots(self) -> int:
        """What a step copies of the layers' weights, and holds until backward; 0 at granularity "sample"."""
        return 0 if self._slots is None else self._forward.room.most[0] * self._slots.bytes_a_slot()

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._check(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        need = self._need()
        if not self._ready or self._forward.room.and_for(need) != self._forward.room:
            self._capture(self._forward.room.and_for(need))
        self._bring_counters()
        self._at = None  # not known if the step fails
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self._count()
        assert self._value is not None
        return self._value

    def _check(self, inputs: Sequence[Tensor]) -> None:
        check_tensors(inputs)
        got, expected = ([(list(x.shape), x.dtype) for x in given] for given in (inputs, self._inputs))
        if got != expected:
            raise ValueError(f"inputs: got {got}, expected {expected} as captured")
        if not self._stack.training:
            raise ValueError("GraphedStep: the stack is in evaluation, expected model.train()")
        if not self._ready:
            return
        if not all(part[name] is weight and weight.data_ptr() == place for part, name, weight, place in self._places):
            raise RuntimeError("parameters are elsewhere than at capture: make a new GraphedStep after .to() and such")
        if not all(is_same(group[name], value) for group, name, value in self._constants):
            raise RuntimeError(
                "the settings of an optimizer are others than at capture: expected the same; give a learning rate that "
                "changes as a tensor, and fill_ it"
            )

    def _remember(self) -> None:
        """What a graph takes as given."""
        parts = [part._parameters for part in self._model.modules()]
        self._places = [(p, name, w, w.data_ptr()) for p in parts for name, w in p.items() if w is not None]
        groups = [(o.defaults, group) for o in self.optimizers for group in o.param_groups]
        self._constants = [(group, name, group[name]) for defaults, group in groups for name in defaults]

    def _rates_at(self, step: int) -> FloatArray:
        return np.repeat(self._stack.schedule(step), self._stack.units_per_layer)

    def _room_at(self, rates: FloatArray) -> Room:
        return Room.at(rates, None if self._stack.granularity == "batch" else self._seen.shape[0])

    def _need(self) -> Room:
        """The room that the next step needs; its rates are on the device."""
        rates = self._rates_at(self._stack.counters.step)
        if self._host_rates is None or not np.array_equal(rates, self._host_rates):
            self._host_rates = rates
            self._rates.copy_(to_device(rates, self._device))
            density = np.where(rates < 1, 1.0 - rates, 1.0)
            dtype = np.float64 if self._scales.dtype == torch.float64 else np.float32
            self._scales.copy_(to_device((1.0 / density).astype(dtype), self._device))
            self._room = self._room_at(rates)
        return self._room

    def _bring_counters(self) -> None:
        counters = self._stack.counters
        if self._at != (counters.seed, counters.step):
            words = np.array([counters.seed, counters.step, 0], dtype=np.uint64)
            self._counters.copy_(to_device(words.view(np.int64), self._device))

    def _count(self) -> None:
        """What an eager forward leaves: counters and statistics, from the host's own draw of the same plan."""
        stack, batch = self._stack, self._seen.shape[0]
        by_batch = stack.granularity == "batch"
        plan = stack.plan(batch_size=None if by_batch else batch)
        kept = [Kept(unit, None, k * batch if by_batch else k, 1.0) for unit, k in enumerate(plan.kept_counts)]
        stack._count(Turn(plan, kept, counts=True), self._like.expand(self._seen.shape), batch)
        stack.counters.forwards += 1
        self._at = stack.counters.seed, stack.counters.step

    def _look(self) -> _Seen:
        """The model without its layers, for the shape in which the stream reaches the stack."""
        seen: list[_Seen] = []

        def look(x: Tensor, batch: int, inputs: Inputs) -> Tensor:
            seen.append(_Seen(x.shape, x.dtype))
            return x.clone()

        with self._nothing_moves(), self._instead(look), torch.no_grad():
            self._loss(self._model, *self._inputs)
        check_runs(len(seen))
        return seen[0]

    @contextlib.contextmanager
    def _instead(self, forward: Callable[[Tensor, int, Inputs], Tensor]) -> Iterator[None]:
        self._stack._replaced = forward
        try:
            yield
        finally:
            self._stack._replaced = None

    @contextlib.contextmanager
    def _nothing_moves(self) -> Iterator[None]:
        """Weights, states, buffers and generators are afterwards what they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        self._hold.fill_(1)
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                yield
        finally:
            self._hold.fill_(0)
            self._at = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _capture(self, room: Room) -> None:
        self._ready, self._graph = False, None
        if self._ahead:
            room = room.and_for(self._room_at(self._rates_at(self._stack.counters.step + self._ahead)))
        self._forward = FixedForward(self._stack, self._counters, self._rates, self._scales, room, self._slots)
        self._bring_counters()
        with self._nothing_moves():
            for optimizer in self.optimizers:
                make_states(optimizer)
            self._warm_up()
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._step()
            self._graph = graph
        self._remember()
        self.captures += 1
        self._ready = True

    def _warm_up(self) -> None:
        if self._device.type != "cuda":
            self._step()
            return
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)

    def _step(self) -> None:
        """Forward, backward and optimizers: what is captured."""
        forward, slots = self._forward, self._slots
        forward.calls = 0
        torch.clear_autocast_cache()  # of weights as they were in the last step
        try:
            with self._instead(forward), torch.enable_grad():
                value = self._loss(self._model, *self._inputs)
                check_runs(forward.calls)
                self._backward(value)
            assert forward.dropped is not None
            skip = [*torch.maximum(forward.dropped, self._hold).unbind(), self._hold]
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            for optimizer, unit in zip(self.optimizers, self._unit_of, strict=True):
                step_unless(optimizer, skip[unit])
            if self._value is None:
                self._value = torch.zeros_like(value.detach()).reshape(())
            self._value.copy_(value.detach().reshape(()))
        finally:
            torch.clear_autocast_cache()
            for weight in self._model.parameters():
                weight.grad = None
            if slots is not None:
                slots.release()

    def _backward(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: got {got}, expected a tensor of one element")
        slots = self._slots
        weights = [*self._rest] if slots is not None else [*self._rest, *(w for unit in self._units for w in unit)]
        leaves: list[Tensor] = [*weights, *([] if slots is None else [slots.anchor])]
        if slots is not None:
            slots.clear()
        set_gradients(weights, torch.autograd.grad(value, leaves, allow_unused=True)[: len(weights)])
        if slots is not None:
            for number, layer in enumerate(self._stack.layers):
                for weight, gradient in zip(layer.parameters(), slots.gradients, strict=True):
                    weight.grad = None if gradient is None else gradient[number]

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimizers; weights and counters are in the model's."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` gave, of as many layers. The next call captures anew.

        Raises:
            ValueError: other optimizers.
        """
        states = state["optimizers"]
        if len(states) != len(self.optimizers):
            raise ValueError(f"state: got {len(states)} optimizers, expected {len(self.optimizers)}")
        self._ready = False
        for optimizer, own in zip(self.optimizers, states, strict=True):
            load(optimizer, own)


def check_tensors(inputs: Sequence[object]) -> None:
    """Inputs that can be copied into others."""
    for number, given in enumerate(inputs):
        if not isinstance(given, Tensor):
            raise TypeError(f"input {number}: got {type(given).__name__}, expected a tensor; others belong into loss")


def check_runs(runs: int) -> None:
    """One plan is drawn a step."""
    if runs != 1:
        raise RuntimeError(f"loss ran the stack {runs} times, expected once")


def set_gradients(weights: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Each in memory of its own, laid out as the weight is, as ``backward()`` leaves them: they may be written."""
    taken: set[int] = set()
    for weight, grad in zip(weights, grads, strict=True):
        if grad is not None and (grad.stride() != weight.stride() or grad.untyped_storage()._cdata in taken):
            grad = torch.empty_like(weight).copy_(grad)
        if grad is not None:
            taken.add(grad.untyped_storage()._cdata)
        weight.grad = grad


def is_same(value: object, other: object) -> bool:
    """Equal numbers, or the same tensor: it may have changed, and is not read."""
    return value is other or not (isinstance(value, Tensor) or isinstance(other, Tensor) or value != other)
