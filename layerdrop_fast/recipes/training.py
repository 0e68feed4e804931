"""Trains a byte-level TransformerLM so that an interrupted run ends with the same bits as an unbroken one.

Everything a step does follows from integers (seed and step) and from the state that a checkpoint holds: weights,
AdamW's moments, the stack's counters, and the losses so far. The model has no ordinary dropout, so that no random state
is left to save.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.recipes.checkpoint import check_same_settings, load_checkpoint, load_weights, save_checkpoint
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.text import Bytes, batch_of_step
from layerdrop_fast.schedule import Depth, DropSchedule, constant, decreasing, uniform

CHECKPOINT_SECONDS = 20.0
CURVE_POINTS = 100  # of the training curve that is kept


class Stopped(Exception):
    """The user asked to stop; what was done so far is saved."""


@dataclass(frozen=True)
class Recipe:
    """How layers are dropped: a depth profile, whether it fades to 0 over the run, and LayerDropStack's keywords."""

    depth: Depth
    fade: bool = False  # rates decrease to 0 over the run (``decreasing``)
    scale: str = "none"
    sampling: str = "bernoulli"

    def schedule(self, num_layers: int, steps: int) -> DropSchedule:
        return DropSchedule(num_layers, self.depth, decreasing(steps) if self.fade else constant())

    def density(self, num_layers: int) -> float:
        """The expected share of the layers that run, over a whole run."""
        rate = float(np.mean(self.depth(num_layers)))
        return 1.0 - rate * (0.5 if self.fade else 1.0)  # the mean of 1 - t / (T - 1) over t is 1/2

    def steps_of_equal_work(self, num_layers: int, dense_steps: int) -> int:
        """The steps in which as many layers are expected to run as in ``dense_steps`` steps without dropping."""
        return round(dense_steps / self.density(num_layers))


DENSE = Recipe(uniform(0.0))


@dataclass(frozen=True)
class ModelSize:
    """The shape of a byte-level TransformerLM."""

    num_layers: int = 16
    d_model: int = 64
    nhead: int = 2
    dim_feedforward: int = 256
    context: int = 64  # bytes of a window that are predicted


@dataclass(frozen=True)
class Training:
    """A training run: everything that its result depends on, the text, the device and the versions apart."""

    size: ModelSize
    recipe: Recipe
    steps: int
    batch: int = 12  # windows a step
    learning_rate: float = 4e-3  # at its peak
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    weight_decay: float = 0.1
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The same as flat JSON."""
        size, recipe = dataclasses.asdict(self.size), self.recipe
        others = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("size", "recipe")}
        drop = {"depth": str(recipe.depth), "fade": recipe.fade, "scale": recipe.scale, "sampling": recipe.sampling}
        return {**size, **drop, **others}

    def learning_rate_at(self, step: int) -> float:
        """A linear rise, then half a cosine down to 2 % of the peak."""
        rise = self.warmup * self.steps
        if step + 1 < rise:
            return self.learning_rate * (step + 1) / rise
        share = (step - rise) / max(self.steps - rise, 1.0)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))))

    def model(self) -> TransformerLM:
        """The model at step 0, drawn from the seed; torch's generator stands where that left it."""
        torch.manual_seed(self.seed)
        size = self.size
        return TransformerLM(
            256,
            size.d_model,
            size.nhead,
            size.num_layers,
            size.dim_feedforward,
            max_len=size.context,
            dropout=0.0,
            schedule=self.recipe.schedule(size.num_layers, self.steps),
            scale=self.recipe.scale,
            sampling=self.recipe.sampling,
            seed=self.seed,
        )


@dataclass
class Progress:
    """Where a run is, for whoever shows it."""

    step: int
    steps: int
    bits_per_byte: float  # of the training bytes, smoothed
    kept: int  # layers that the last step ran
    num_layers: int
    bytes_per_second: float  # since the run was started or taken up again


@dataclass
class Trained:
    """A finished run."""

    model: TransformerLM
    layers_run: int  # over all steps
    curve: list[tuple[int, float, float]]  # (last step, mean training bits/byte, mean kept layers) of equal spans
    seconds: float  # training, pauses left out


class _State:
    """Model, optimizer and losses of a run, saved and restored together."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training, self.device = training, device
        self.model = training.model().to(device)
        self.optimizer = _optimizer(self.model, training)
        self.step, self.seconds = 0, 0.0
        self.bits = torch.zeros(training.steps, dtype=torch.float64)
        self.kept = torch.zeros(training.steps, dtype=torch.int64)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors |= {"bits": self.bits, "kept": self.kept}
        save_checkpoint(path, tensors, {"settings": settings, "step": self.step, "seconds": self.seconds})

    def restore(self, path: Path, settings: dict[str, Any]) -> None:
        tensors, record = load_checkpoint(path)
        check_same_settings(path, record.get("settings"), settings)
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, kind = name.split(".")
            moments.setdefault(int(index), {})[kind] = tensors.pop(name)
        self.bits, self.kept = tensors.pop("bits"), tensors.pop("kept")
        load_weights(path, self.model, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.seconds = record["step"], record["seconds"]

    def train_step(self, text: Bytes) -> None:
        training, step = self.training, self.step
        length = training.size.context + 1
        window = batch_of_step(text, seed=training.seed, step=step, batch=training.batch, length=length)
        tokens = torch.from_numpy(window).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        kept = len(self.model.stack.plan().layers)
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.bits[step], self.kept[step] = loss.item() / math.log(2), kept
        self.step += 1

    def finished(self) -> Trained:
        spans = np.array_split(np.arange(self.training.steps), min(CURVE_POINTS, self.training.steps))
        curve = [
            (int(span[-1]) + 1, float(self.bits[span].mean()), float(self.kept[span].double().mean())) for span in spans
        ]
        return Trained(self.model, int(self.kept.sum()), curve, self.seconds)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=training.weight_decay, fused=True
    )


def train(
    training: Training,
    text: Bytes,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    environment: dict[str, Any] | None = None,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains from the start, or from ``checkpoint`` where that file exists.

    Every 20 seconds, at the end and on a stop the whole state goes to ``checkpoint``, in one move, so that the process
    may be killed at any moment.

    Args:
        training: what to train.
        text: uint8 [N], the bytes to learn from.
        device: where to train.
        checkpoint: the file to go on from and to save to; None saves nothing.
        environment: further JSON values that the result depends on; a checkpoint made with others is refused.
        on_step: called after each step.
        should_stop: asked after each step.

    Raises:
        Stopped: ``should_stop`` said so; the state is saved.
        RecipeError: a checkpoint that is damaged, made with other settings, or cannot be written; a loss that is no
            number.
    """
    settings = {**training.settings(), **(environment or {})}
    state = _State(training, torch.device(device))
    state.model.train()
    if checkpoint is not None and checkpoint.exists():
        state.restore(checkpoint, settings)

    begun_at, begun, saved, earlier = state.step, time.monotonic(), time.monotonic(), state.seconds
    while state.step < training.steps:
        state.train_step(text)
        now = time.monotonic()
        state.seconds = earlier + now - begun
        if not math.isfinite(state.bits[state.step - 1]):
            raise RecipeError(f"the loss of step {state.step - 1} is not finite: choose another --seed or fewer layers")
        stop = should_stop()
        if checkpoint is not None and (stop or now - saved > CHECKPOINT_SECONDS or state.step == training.steps):
            state.save(checkpoint, settings)
            saved = time.monotonic()
        if on_step is not None:
            rate = (state.step - begun_at) * training.batch * training.size.context / (now - begun)
            on_step(_progress(state, rate))
        if stop:
            raise Stopped
    return state.finished()


def _progress(state: _State, bytes_per_second: float) -> Progress:
    recent = state.bits[max(0, state.step - 30) : state.step]
    return Progress(
        step=state.step,
        steps=state.training.steps,
        bits_per_byte=float(recent.mean()),
        kept=int(state.kept[state.step - 1]),
        num_layers=state.training.size.num_layers,
        bytes_per_second=bytes_per_second,
    )
