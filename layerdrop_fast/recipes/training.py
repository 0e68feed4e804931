"""Trains a TransformerLM so that an interrupted run ends with the same bits as an unbroken one.

Everything a step does follows from integers (seed and step) and from the state that a checkpoint holds: weights, the
optimizer's moments, the stack's counters, learned drop rates, and the losses so far. torch's generator, from which some
masks come, is seeded anew for every step.
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

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import DataDriven
from layerdrop_fast.recipes.checkpoint import check_same_settings, load_checkpoint, load_weights, save_checkpoint
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.text import Tokens, batch_of_step
from layerdrop_fast.schedule import Depth, DropSchedule, constant, decreasing, uniform

CHECKPOINT_SECONDS = 20.0  # from one to the next, at least
TRAINING_PER_SAVING = 50  # seconds of training for each second that the last checkpoint took
CURVE_POINTS = 100  # of the training curve that is kept, at most


class Stopped(Exception):
    """The user asked to stop; what was done so far is saved."""


@dataclass(frozen=True)
class Recipe:
    """What is dropped: a depth profile, whether it fades to 0 over the run, and LayerDropStack's keywords."""

    depth: Depth
    fade: bool = False  # rates decrease to 0 over the run (``decreasing``)
    scale: str = "none"
    sampling: str = "bernoulli"
    granularity: str = "batch"
    target: str = "layer"  # or "branch": what ``depth`` is the rate of
    heads: float = 0.0  # drop rate of attention heads
    chunks: float = 0.0  # of chunks of the feed-forward network
    learned: bool = False  # the rates are learned, with the mean of ``depth`` (``prune.DataDriven``)

    def schedule(self, num_layers: int, steps: int) -> dict[str, DropSchedule]:
        """As TransformerStack takes it, by target."""
        time = decreasing(steps) if self.fade else constant()
        parts = {name: uniform(rate) for name, rate in (("head", self.heads), ("ffn_chunk", self.chunks)) if rate}
        return {
            name: DropSchedule(num_layers, depth, time) for name, depth in {self.target: self.depth, **parts}.items()
        }

    def density(self, num_layers: int) -> float:
        """The expected share of the layers that run, over a whole run; heads and chunks left out."""
        rate = float(np.mean(self.depth(num_layers)))
        return 1.0 - rate * (0.5 if self.fade else 1.0)  # the mean of 1 - t / (T - 1) over t is 1/2

    def steps_of_equal_work(self, num_layers: int, dense_steps: int) -> int:
        """The steps in which as many layers are expected to run as in ``dense_steps`` steps without dropping.

        Raises:
            ValueError: no layer ever runs; layers run without some of their heads or chunks.
        """
        if self.heads or self.chunks:
            raise ValueError(
                f"heads are dropped at rate {self.heads}, chunks at {self.chunks}: expected neither, since equal work "
                "is counted in layers"
            )
        if not self.density(num_layers):
            raise ValueError(f"{self.depth} runs no layer, expected some to run where work is to be equal")
        return round(dense_steps / self.density(num_layers))


DENSE = Recipe(uniform(0.0))


@dataclass(frozen=True)
class ModelSize:
    """The shape of a TransformerLM; by default it reads bytes."""

    num_layers: int = 16
    d_model: int = 64
    nhead: int = 2
    dim_feedforward: int = 256
    context: int = 64  # tokens of a window that are predicted
    vocab_size: int = 256
    cutoffs: tuple[int, ...] | None = None  # of the adaptive softmax
    positions: str = "learned"
    final_norm: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: str = "gelu"


@dataclass(frozen=True)
class Training:
    """A training run: everything that its result depends on, the text, the device and the versions apart."""

    size: ModelSize
    recipe: Recipe
    steps: int
    batch: int = 12  # windows of a microbatch
    accumulation: int = 1  # microbatches a step
    optimizer: str = "adamw"  # or "nag": Nesterov's accelerated gradient, without weight decay
    learning_rate: float = 4e-3  # at its peak
    last_learning_rate: float = 0.02  # share of the peak
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    weight_decay: float = 0.1
    momentum: float = 0.9  # AdamW's first beta, or Nesterov's
    clip: float = 1.0  # bound of the gradients' norm
    dtype: str = "float32"  # of autocast
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The same as flat JSON."""
        size, recipe = dataclasses.asdict(self.size), self.recipe
        others = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("size", "recipe")}
        drop = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)} | {"depth": str(recipe.depth)}
        return {**size, **drop, **others}

    def learning_rate_at(self, step: int) -> float:
        """A linear rise, then half a cosine down to ``last_learning_rate``."""
        rise = self.warmup * self.steps
        if step + 1 < rise:
            return self.learning_rate * (step + 1) / rise
        share = (step - rise) / max(self.steps - rise, 1.0)
        last = self.last_learning_rate
        return self.learning_rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))))

    def model(self) -> TransformerLM:
        """The model at step 0, drawn from the seed; torch's generator stands where that left it."""
        torch.manual_seed(self.seed)
        return self.drawn()

    def drawn(self) -> TransformerLM:
        """The model with weights from torch's generator as it stands."""
        size = dataclasses.asdict(self.size)
        shape = [size.pop(name) for name in ("vocab_size", "d_model", "nhead", "num_layers", "dim_feedforward")]
        recipe = self.recipe
        return TransformerLM(
            *shape,
            max_len=size.pop("context"),
            **size,
            schedule=recipe.schedule(self.size.num_layers, self.steps),
            scale=recipe.scale,
            sampling=recipe.sampling,
            granularity=recipe.granularity,
            target=recipe.target,
            seed=self.seed,
            accumulation=self.accumulation,
        )

    @property
    def mean_rate(self) -> float:
        """The mean of the depth profile."""
        return float(np.mean(self.recipe.depth(self.size.num_layers)))


@dataclass
class Progress:
    """Where a run is, for whoever shows it."""

    step: int
    steps: int
    bits: float  # per training token, smoothed
    kept: float  # layers that the last step ran, the mean of its microbatches and samples
    num_layers: int
    tokens_per_second: float  # since the run was started or taken up again


@dataclass
class Trained:
    """A finished run."""

    model: TransformerLM
    layers_run: float  # over all steps, each the mean of its microbatches and samples
    share_run: float  # of the products with the layers' matrices
    curve: list[tuple[int, float, float]]  # (last step, mean training bits/token, mean kept layers) of equal spans
    seconds: float  # training, pauses left out
    learned: DataDriven | None = None


class _State:
    """Model, optimizer and losses of a run, saved and restored together."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training, self.device = training, device
        self.model = training.model().to(device)
        self.learned = DataDriven(self.model.stack, training.mean_rate) if training.recipe.learned else None
        self.optimizer = _optimizer(self.model, self.learned, training)
        self.step, self.seconds = 0, 0.0
        self.bits = torch.zeros(training.steps, dtype=torch.float64)
        self.kept = torch.zeros(training.steps, dtype=torch.float64)
        self.shares_run = torch.zeros(training.steps, dtype=torch.float64)  # of the layers' products

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.learned is not None:
            tensors |= {f"learned.{name}": tensor for name, tensor in self.learned.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items() if tensor is not None}
        tensors |= {"bits": self.bits, "kept": self.kept, "shares_run": self.shares_run}
        save_checkpoint(path, tensors, {"settings": settings, "step": self.step, "seconds": self.seconds})

    def restore(self, path: Path, settings: dict[str, Any]) -> None:
        tensors, record = load_checkpoint(path)
        check_same_settings(path, record.get("settings"), settings)
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            _, index, kind = name.split(".")
            moments.setdefault(int(index), {})[kind] = tensors.pop(name)
        if missing := {"bits", "kept", "shares_run"} - set(tensors):
            raise RecipeError(
                f"{path} has no {', '.join(sorted(missing))}, expected a run of this version: choose another folder "
                "with --out, or give --restart to begin anew"
            )
        self.bits, self.kept, self.shares_run = (tensors.pop(name) for name in ("bits", "kept", "shares_run"))
        for kind, module in (("model.", self.model), ("learned.", self.learned)):
            if module is not None:
                found = {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
                load_weights(path, module, found)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.seconds = record["step"], record["seconds"]

    def train_step(self, text: Tokens) -> None:
        training, step = self.training, self.step
        length, windows = training.size.context + 1, training.batch * training.accumulation
        window = batch_of_step(text, seed=training.seed, step=step, batch=windows, length=length)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        if training.size.dropout or training.size.attention_dropout:
            torch.manual_seed((training.seed << 32 | step) % (1 << 63))
        self.optimizer.zero_grad()
        self.model.stack.reset_stats()
        total, kept = torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        for tokens in torch.from_numpy(window).to(self.device).chunk(training.accumulation):
            kept += self._kept_next(len(tokens))
            total += self._microbatch(tokens)
        nn.utils.clip_grad_norm_(self.model.parameters(), training.clip)
        self.optimizer.step()
        self.bits[step] = total.item() / training.accumulation / math.log(2)
        self.kept[step] = kept / training.accumulation
        self.shares_run[step] = self.model.stack.stats().share_run
        self.step += 1

    def _kept_next(self, samples: int) -> float:
        """Layers that the next forward runs; one that runs for half of the samples is half a layer."""
        stack = self.model.stack
        plan = stack.plan(batch_size=samples if stack.granularity == "sample" else None)
        kept = plan.keep[: len(stack.layers) * stack.units_per_layer]
        return float(kept.double().mean(1).sum()) / stack.units_per_layer

    def _microbatch(self, tokens: Tensor) -> Tensor:
        """Adds its gradients; returns its loss in nats."""
        training = self.training
        autocast = training.dtype != "float32"
        with torch.autocast(self.device.type, getattr(torch, training.dtype) if autocast else None, enabled=autocast):
            per_sample = self.learned is not None and training.recipe.granularity == "sample"
            losses = self.model.loss(tokens[:, :-1], tokens[:, 1:], per_sample=per_sample)
        loss = losses.mean()
        (loss / training.accumulation).backward()
        if self.learned is not None:
            self.learned.backward(losses)
        return loss.detach()

    def finished(self) -> Trained:
        steps = self.training.steps
        length = -(-steps // CURVE_POINTS)  # of each span but the last
        spans = [slice(first, min(first + length, steps)) for first in range(0, steps, length)]
        curve = [(span.stop, float(self.bits[span].mean()), float(self.kept[span].mean())) for span in spans]
        share_run = float(self.shares_run.mean())
        return Trained(self.model, float(self.kept.sum()), share_run, curve, self.seconds, self.learned)


def _optimizer(model: nn.Module, learned: nn.Module | None, training: Training) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    others = [] if learned is None else list(learned.parameters())
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": [*vectors, *others], "weight_decay": 0.0}]
    rate, momentum = training.learning_rate, training.momentum
    if training.optimizer == "nag":
        return torch.optim.SGD([*matrices, *vectors, *others], lr=rate, momentum=momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.99), weight_decay=training.weight_decay, fused=True)


def train(
    training: Training,
    text: Tokens,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    environment: dict[str, Any] | None = None,
    on_resume: Callable[[int], None] | None = None,
    on_step: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Trains from the start, or from ``checkpoint`` where that file exists.

    Every 20 seconds (of a large model less often, so that it takes at most a fiftieth of the time), at the end and on a
    stop the whole state goes to ``checkpoint``, in one move, so that the process may be killed at any moment.

    Args:
        training: what to train.
        text: integers [N], the tokens to learn from.
        device: where to train.
        checkpoint: the file to go on from and to save to; None saves nothing.
        environment: further JSON values that the result depends on; a checkpoint made with others is refused.
        on_resume: called with the number of steps that a checkpoint has, before the next one.
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
        if on_resume is not None:
            on_resume(state.step)

    begun_at, begun, earlier = state.step, time.monotonic(), state.seconds
    due = begun + CHECKPOINT_SECONDS
    while state.step < training.steps:
        state.train_step(text)
        now = time.monotonic()
        state.seconds = earlier + now - begun
        if not math.isfinite(state.bits[state.step - 1]):
            raise RecipeError(f"the loss of step {state.step - 1} is not finite: choose another --seed or fewer layers")
        stop = should_stop()
        if checkpoint is not None and (stop or now > due or state.step == training.steps):
            state.save(checkpoint, settings)
            saved = time.monotonic()
            due = saved + max(CHECKPOINT_SECONDS, TRAINING_PER_SAVING * (saved - now))
        if on_step is not None:
            tokens = training.batch * training.accumulation * training.size.context
            rate = (state.step - begun_at) * tokens / (now - begun)
            on_step(_progress(state, rate))
        if stop:
            raise Stopped
    return state.finished()


def _progress(state: _State, tokens_per_second: float) -> Progress:
    recent = state.bits[max(0, state.step - 30) : state.step]
    return Progress(
        step=state.step,
        steps=state.training.steps,
        bits=float(recent.mean()),
        kept=float(state.kept[state.step - 1]),
        num_layers=state.training.size.num_layers,
        tokens_per_second=tokens_per_second,
    )
