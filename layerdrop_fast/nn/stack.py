"""``LayerDropStack``: any residual layers, run with one plan a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_choice
from layerdrop_fast.nn.counters import StepCounters
from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.plan import SAMPLINGS, DropPlan, draw_plan
from layerdrop_fast.schedule import DropSchedule, FloatArray

SCALES = ("none", "inverse", "eval")


@dataclass(frozen=True)
class StackStats:
    """What a stack dropped so far, over all its training forwards since it was made or ``reset_stats`` was called."""

    forwards: int
    layers_run: int
    layers_skipped: int
    realized_rates: FloatArray  # [L], the share of forwards in which each layer was dropped
    # Forward and backward products with the matrices among the skipped layers' parameters, 6 * elements * tokens, for
    # x of shape [..., D] and matrices that meet each token once; products of activations with each other not counted.
    flops_skipped: float


class LayerDropStack(nn.Module):
    """Runs residual layers ``x -> x + f_l(x)`` and drops whole layers while training.

    All decisions of a forward are drawn in one plan before its first layer runs. A dropped layer is not called: it
    costs no kernel, saves no tensor, and its parameters' gradients stay ``None``.

    With residual scale r the layer computes ``x + r * (layer(x) - x)``:

        scale       training    evaluation   source
        "none"      1           1            Fan, Grave, Joulin 2019; fairseq, torchtune
        "inverse"   1 / rho_l   1            torchvision, timm; arXiv 2609.05275
        "eval"      1           rho_l        Huang et al. 2016

    Shapes:
        x: [B, ...], whatever the layers take; -> the same shape.

    Args:
        layers: modules called as ``layer(x, *args, **kwargs)`` that return x's successor or a tuple that starts with
            it. They stand in ``.layers``.
        schedule: one drop rate, one a layer, or a DropSchedule.
        granularity: ``"batch"``, one decision a layer for the whole batch.
        sampling: ``"bernoulli"`` or ``"systematic"`` (see ``draw_plan``).
        scale: the residual scale, see above.
        seed: an integer in [0, 2**64); None draws one from torch's generator now.
        accumulation: microbatches (training forwards) a step.

    Raises:
        ValueError: a value that is not among those above. TypeError: a value of another kind.

    With ``torch.compile``, compile the layers (``for layer in stack.layers: layer.compile()``), not the stack, whose
    decisions would be compiled anew for each plan. With DistributedDataParallel
    or FSDP give all ranks the same ``seed``: at batch granularity they must keep the same layers. A second backward
    through one graph (``retain_graph``) with a checkpoint round the stack works until the next training forward.

    Weights saved without counters load, and leave the counters as they are; ``set_step(model, 0)`` starts a loaded
    model's schedule anew.

    Randomness: training forward n uses exactly ``draw_plan(schedule(step), None, seed=seed, step=n // accumulation,
    stream=n % accumulation, sampling=sampling)``. Nothing else is read, so (seed, n), which the state dict holds under
    ``counters._extra_state``, resumes a run. Evaluation drops nothing and advances nothing. A recompute under
    activation checkpointing sees the plan of its forward.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        schedule: float | Sequence[float] | DropSchedule = 0.2,
        *,
        granularity: str = "batch",
        sampling: str = "bernoulli",
        scale: str = "none",
        seed: int | None = None,
        accumulation: int = 1,
    ) -> None:
        super().__init__()
        check_choice(granularity, "granularity", ("batch",))
        self.layers = nn.ModuleList(every_layer(layers))
        self.schedule = DropSchedule.of(schedule, len(self.layers))
        self.sampling = check_choice(sampling, "sampling", SAMPLINGS)
        self.scale = check_choice(scale, "scale", SCALES)
        self.counters = StepCounters(seed, accumulation)
        self.reset_stats()

    def plan(self, forward: int | None = None) -> DropPlan:
        """The plan of training forward number ``forward``; None: of the next one."""
        forward = self.counters.forwards if forward is None else forward
        step, microbatch = divmod(forward, self.counters.accumulation)
        return draw_plan(
            self.schedule(step), seed=self.counters.seed, step=step, stream=microbatch, sampling=self.sampling
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check()
        if not self.training:
            return self._run(x, range(len(self.layers)), self._scales(self.counters.step), args, kwargs)
        repeated = self.counters.recomputing
        plan = self.counters.plan_to_repeat() if repeated else self.plan()
        layers = plan.layers
        out = self._run(x, layers, self._scales(plan.step), args, kwargs)
        if not repeated:
            self.counters.advance(plan, x, out)
            self._count(layers, x)
        return out

    def _check(self) -> None:
        if len(self.layers) != self.schedule.num_layers:
            raise ValueError(
                f"the stack has {len(self.layers)} layers and a schedule for {self.schedule.num_layers}: set .schedule "
                "and call reset_stats() when you change .layers, or cut with prune.extract"
            )
        # torch sets it on the copies that nn.DataParallel makes; what they count is lost with them.
        if self.training and getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel would draw the same plan for ever: use DistributedDataParallel")

    def _run(
        self,
        x: Tensor,
        layers: Iterable[int],
        scales: list[float] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        out = x
        for layer in layers:
            y = self.layers[layer](out, *args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y
            # Not lerp: under autocast the two may differ in dtype.
            out = y if scales is None else torch.add(out, y - out, alpha=scales[layer])
        # Never the caller's own tensor: what is done to the result in place is not done to the input.
        return out.clone() if out is x else out

    def _scales(self, step: int) -> list[float] | None:
        """The residual scale of every layer, or None where all are 1."""
        if self.scale == ("inverse" if self.training else "eval"):
            density = 1.0 - self.schedule(step)
            # A layer with density 0 is never kept; its scale is not used.
            scales = (
                np.divide(1.0, density, where=density > 0, out=np.zeros_like(density)) if self.training else density
            )
            return scales.tolist()  # type: ignore[no-any-return]
        return None

    def _count(self, layers: list[int], x: Tensor) -> None:
        tokens = x.numel() // x.shape[-1] if x.numel() else 0
        self._forwards += 1
        self._tokens += tokens
        self._runs[layers] += 1
        self._tokens_run[layers] += tokens

    def reset_stats(self) -> None:
        """Starts the statistics anew."""
        self._forwards, self._tokens = 0, 0
        self._runs = np.zeros(len(self.layers), dtype=np.int64)
        self._tokens_run = np.zeros(len(self.layers), dtype=np.int64)

    def stats(self) -> StackStats:
        """What was dropped so far; recomputes are not counted. Not part of the state dict."""
        weights = [sum(w.numel() for w in layer.parameters() if w.dim() == 2) for layer in self.layers]
        run, all_runs = int(self._runs.sum()), self._forwards * len(self.layers)
        return StackStats(
            forwards=self._forwards,
            layers_run=run,
            layers_skipped=all_runs - run,
            realized_rates=1.0 - self._runs / max(self._forwards, 1),
            flops_skipped=6.0 * float(np.dot(weights, self._tokens - self._tokens_run)),
        )

    def extra_repr(self) -> str:
        return f"{self.schedule}, sampling={self.sampling!r}, scale={self.scale!r}, seed={self.counters.seed}"
