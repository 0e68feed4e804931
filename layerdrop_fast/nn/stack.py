"""``LayerDropStack``: any residual layers, run with one plan a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import ops
from layerdrop_fast._checks import check_choice, check_count
from layerdrop_fast.nn import distributed
from layerdrop_fast.nn.counters import StepCounters
from layerdrop_fast.nn.drop_path import refuse_rates, take_rates
from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.nn.samples import BatchDims, PutBack, Samples, check_batch_dims, check_batch_first
from layerdrop_fast.nn.statistics import StackStats, Statistics
from layerdrop_fast.nn.turn import Kept, Turn, pieces
from layerdrop_fast.ops._checks import FLOATING
from layerdrop_fast.plan import KIND_BIT, SAMPLINGS, DropPlan, draw_plan, joined
from layerdrop_fast.schedule import Depth, DropSchedule, FloatArray

GRANULARITIES = ("batch", "sample")
SCALES = ("none", "inverse", "realized", "eval")


class LayerDropStack(nn.Module):
    """Runs residual layers ``x -> x + f_l(x)`` and drops layers while training, for whole batches or sample by sample.

    All decisions of a forward are drawn in one plan before its first layer runs. A dropped layer is not called: it
    costs no kernel, saves no tensor, and its parameters' gradients stay ``None``. At granularity ``"sample"`` a layer
    is called with the samples that keep it, and its result is put back in one op.

    With residual scale r the layer computes ``x + r * (layer(x) - x)``, for the k of B samples that keep it:

        scale        training    evaluation   source
        "none"       1           1            Fan, Grave, Joulin 2019; fairseq, torchtune
        "inverse"    1 / rho_l   1            torchvision, timm; arXiv 2609.05275
        "realized"   B / k       1            DINOv2 (granularity "sample" only)
        "eval"       1           rho_l        Huang et al. 2016

    Shapes:
        x: [B, ...], whatever the layers take; -> the same shape, a new tensor. With ``hidden_states``: (out, L tensors,
        x as it is behind each layer; behind a dropped layer that is the very tensor before it, x itself at first).

    Args:
        layers: modules called as ``layer(x, *args, **kwargs)`` that return x's successor or a tuple that starts with
            it. They stand in ``.layers``.
        schedule: one drop rate, one a layer, a profile over depth such as ``linear(0.4)``, or a DropSchedule, which has
            a multiplier over time too. ``"from_layers"`` takes the rates of the DropPath and StochasticDepth modules
            inside each layer (also timm's and torchvision's), which must agree, and makes those identities: they act
            behind their branch and can only mask what was computed. Where a layer has several, one decision takes the
            place of theirs. DropPath and mode "row" need granularity ``"sample"``, mode "batch" needs ``"batch"``.
        granularity: ``"batch"``, one decision a layer for the whole batch; ``"sample"``, one a layer and sample.
        sampling: ``"bernoulli"`` or ``"systematic"`` (see ``draw_plan``).
        scale: the residual scale, see above. None is "none"; with ``"from_layers"`` it is what the modules did, for
            most "inverse".
        seed: an integer in [0, 2**64); None draws one from torch's generator now.
        accumulation: microbatches (training forwards) a step.
        max_kept: None, or at most so many layers (of all samples) are held for backward. Of a forward that keeps more,
            the first ones are recomputed in backward, in pieces of at most so many: one copy of x a piece instead. As
            with ``torch.utils.checkpoint``, they read their weights again: those must be what they were in forward, so
            it does not go with ``torch.func.functional_call``.
        batch_dims: granularity "sample" gives a layer the kept samples of every argument too: of tensors, also inside
            tuples, lists and dicts, whose first dimension has B elements. ``{"bias": None, 0: 1}`` overrides that, by
            keyword or number of the argument after x: which dimension counts samples, None for none.
        hidden_states: also return x behind every layer.

    Raises:
        ValueError: a value that is not among those above; when called, an argument that may have samples or not, a
            layer that changes the shape of x. RuntimeError: a layer that writes into its input, several ranks that do
            not keep the same. TypeError: a value of another kind.

    With ``torch.compile``, compile the layers (``for layer in stack.layers: layer.compile()``; torch's own classes, for
    which that does nothing, by ``torch.compile(layer)``), not the stack, whose decisions would be compiled anew for
    each plan. At granularity "sample" that makes a few graphs, whatever is drawn: for all samples, one, none and any
    other number.

    On several ranks give all the same ``seed``: at batch granularity they must keep the same layers.
    DistributedDataParallel needs ``find_unused_parameters=True``. Outside of it (FSDP), granularity "sample" calls a
    layer that no sample keeps with none, as other ranks may wait for it; its gradients are then zeros.

    A second backward through one graph (``retain_graph``) with a checkpoint round the stack works until the next
    training forward.

    Weights saved without counters load, and leave the counters as they are; ``set_step(model, 0)`` starts a loaded
    model's schedule anew.

    Randomness: training forward n uses exactly ``draw_plan(schedule(step), B or None, seed=seed, step=n //
    accumulation, stream=stream, sampling=sampling)``; stream is ``n % accumulation``, at granularity "sample"
    ``rank << 32 | n % accumulation``. Nothing else is read, so (seed, n), which the state dict holds under
    ``counters._extra_state``, resumes a run. Evaluation drops nothing and advances nothing. A recompute under
    activation checkpointing sees the plan of its forward.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        schedule: float | Sequence[float] | Depth | DropSchedule | str = 0.2,
        *,
        granularity: str = "batch",
        sampling: str = "bernoulli",
        scale: str | None = None,
        seed: int | None = None,
        accumulation: int = 1,
        max_kept: int | None = None,
        batch_dims: BatchDims | None = None,
        hidden_states: bool = False,
    ) -> None:
        super().__init__()
        self.granularity = check_choice(granularity, "granularity", GRANULARITIES)
        self.sampling = check_choice(sampling, "sampling", SAMPLINGS)
        scale = scale if scale is None else check_choice(scale, "scale", SCALES)
        if scale == "realized" and granularity != "sample":
            raise ValueError(
                'scale is "realized", the number of samples over that of kept ones: expected "sample" as '
                f"granularity, got {granularity!r}"
            )
        self.max_kept = None if max_kept is None else check_count(max_kept, "max_kept", 1)
        self.batch_dims = check_batch_dims(batch_dims)
        self.hidden_states = hidden_states
        counters = StepCounters(seed, accumulation)
        self.layers = nn.ModuleList(every_layer(layers))
        if granularity == "sample":
            check_batch_first(self.layers)
        if isinstance(schedule, str):
            check_choice(schedule, "schedule", ("from_layers",))
            schedule, scale = take_rates(self.layers, self.granularity, scale)
        else:
            refuse_rates(self.layers)
        self.schedule = DropSchedule.of(schedule, len(self.layers))
        self.scale = scale or "none"
        self.counters = counters
        self._calls_every_layer = False
        self._proven: set[int] = set()  # layers that are known to leave their input alone
        self.reset_stats()

    @property
    def units_per_layer(self) -> int:
        """How many decisions are drawn for each layer."""
        return 1

    def rates_by_kind(self, step: int) -> list[FloatArray]:
        """The drop rates of a plan's decisions, by what they drop."""
        return [np.repeat(self.schedule(step), self.units_per_layer)]

    def rates(self, step: int) -> FloatArray:
        """The drop rate of every decision of a plan."""
        return np.concatenate(self.rates_by_kind(step))

    def plan(self, forward: int | None = None, *, batch_size: int | None = None) -> DropPlan:
        """The plan of training forward number ``forward``; None: of the next one.

        Args:
            batch_size: B; granularity "sample" needs it.
        """
        if (batch_size is None) != (self.granularity == "batch"):
            expected = "None" if self.granularity == "batch" else "the number of samples"
            raise ValueError(f"batch_size is {batch_size}, expected {expected} at granularity {self.granularity!r}")
        forward = self.counters.forwards if forward is None else forward
        step, microbatch = divmod(forward, self.counters.accumulation)
        stream = microbatch if batch_size is None else distributed.rank() << 32 | microbatch
        # A fixed number of each kind, where the number is fixed.
        kinds = self.rates_by_kind(step) if self.sampling == "systematic" else [self.rates(step)]
        return joined(
            draw_plan(
                rates,
                batch_size,
                seed=self.counters.seed,
                step=step,
                stream=kind << KIND_BIT | stream,
                sampling=self.sampling,
            )
            for kind, rates in enumerate(kinds)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
        if self.training and self.granularity == "sample" and x.dim():
            # Whatever this plan keeps: an argument that is wrong is wrong at once.
            Samples(x, self.batch_dims).of_arguments(args, kwargs, None)
        return self._forward(x, x.shape[0] if x.dim() else 0, args, kwargs)

    def _forward(self, x: Tensor, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``forward`` with the number of samples told."""
        self._check(x, batch)
        turn = self._turn(x, batch)
        out, states = self._run(x, turn, batch, args, kwargs)
        if turn.counts:
            assert turn.plan is not None
            self.counters.advance(turn.plan, x, out)
            self._count(turn, x, batch)
        return (out, states) if self.hidden_states else out

    def _check(self, x: Tensor, batch: int) -> None:
        if not isinstance(self.schedule, DropSchedule):
            raise TypeError(f"stack.schedule is {self.schedule!r}, expected a DropSchedule")
        if len(self.layers) != self.schedule.num_layers:
            raise ValueError(
                f"the stack has {len(self.layers)} layers and a schedule for {self.schedule.num_layers}: set .schedule "
                "and call reset_stats() when you change .layers, or cut with prune.extract"
            )
        if not self.training:
            return
        if self.granularity == "sample" and batch < 1:
            raise ValueError(f'x: got {list(x.shape)}, expected at least one sample at granularity "sample"')
        # torch sets it on the copies that nn.DataParallel makes; what they count is lost with them.
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel would draw the same plan for ever: use DistributedDataParallel")
        distributed.check_ranks(self.granularity, self.counters.seed_was_drawn)

    def _turn(self, x: Tensor, batch: int) -> Turn:
        if not self.training:
            scales = self._eval_scales()
            return Turn(None, [Kept(unit, None, batch, scale) for unit, scale in enumerate(scales)], counts=False)
        repeated = self.counters.recomputing
        size = None if self.granularity == "batch" else batch
        plan = self.counters.plan_to_repeat() if repeated else self.plan(batch_size=size)
        return Turn(plan, self._kept(plan.to(x.device), batch), counts=not repeated)

    def _kept(self, plan: DropPlan, batch: int) -> list[Kept]:
        density, counts = 1.0 - self.rates(plan.step), plan.kept_counts
        every = len(self.layers) * self.units_per_layer
        units = range(every) if self.calls_every_layer else [unit for unit in plan.layers if unit < every]
        kept = []
        for unit in units:
            count, rows, scale = counts[unit], None, 1.0
            if plan.batch_size is None:
                count *= batch
            elif count < batch or self.always_rows:
                rows = plan.rows(unit)
            if self.scale == "inverse" and density[unit] > 0:
                scale = 1.0 / float(density[unit])
            elif self.scale == "realized" and count:
                scale = batch / count
            kept.append(Kept(unit, rows, count, scale))
        return kept

    def _eval_scales(self) -> list[float]:
        units = len(self.layers) * self.units_per_layer
        if self.scale != "eval":
            return [1.0] * units
        return np.repeat(1.0 - self.schedule(self.counters.step), self.units_per_layer).tolist()  # type: ignore[no-any-return]

    def _run(
        self, x: Tensor, turn: Turn, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        bound = None
        if self.max_kept is not None and turn.plan is not None and torch.is_grad_enabled():
            bound = self.max_kept * self.units_per_layer * batch
        out = x
        behind: dict[int, Tensor] = {}  # layer -> x behind it
        for kept, recomputed in pieces(turn.kept, bound):
            if recomputed:
                out, *new = checkpoint(self._run_piece, out, kept, args, kwargs, use_reentrant=False)
            else:
                out, *new = self._run_piece(out, kept, args, kwargs)
            behind.update(zip(self._layers_of(kept), new, strict=self.hidden_states))
        # Never the caller's own memory: what is done to the result in place is not done to the input.
        out = out.clone() if torch._C._is_alias_of(out, x) else out  # type: ignore[attr-defined]
        return out, self._every_state(x, behind) if self.hidden_states else []

    def _layers_of(self, kept: Sequence[Kept]) -> list[int]:
        return list(dict.fromkeys(unit.unit // self.units_per_layer for unit in kept))

    def _every_state(self, x: Tensor, behind: dict[int, Tensor]) -> list[Tensor]:
        """x behind every layer: behind one that did not run it is what it was before."""
        every = []
        for layer in range(len(self.layers)):
            x = behind.get(layer, x)
            every.append(x)
        return every

    def _run_piece(
        self, x: Tensor, kept: Sequence[Kept], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """x behind these units and, if hidden states are wanted, behind each of their layers."""
        states: list[Tensor] = []
        for unit in kept:
            x = self._run_layer(x, unit, args, kwargs)
            if self.hidden_states:
                states.append(x)
        return x, *states

    def _run_layer(self, x: Tensor, unit: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layer, rows = self.layers[unit.unit], unit.rows
        if rows is None:
            part = x
        else:
            args, kwargs = Samples(x, self.batch_dims).of_arguments(args, kwargs, rows)
            part = x.index_select(0, rows)
        # Until a layer has shown that it leaves its input alone, which may be the caller's.
        before = part.detach().clone() if rows is None and unit.unit not in self._proven else None
        version = 0 if part.is_inference() else part._version
        y = layer(part, *args, **kwargs)
        y = y[0] if isinstance(y, tuple) and y else y
        if not part.is_inference() and part._version != version:
            if before is not None:
                part.detach().copy_(before)
            raise RuntimeError(
                f"layer {unit.unit} wrote into its input, which the stack and its caller still need: expected x + f(x) "
                "as a new tensor (no inplace=True, no +=)"
            )
        self._check_result(unit.unit, part, y)
        self._proven.add(unit.unit)
        if rows is None:
            # Not lerp: under autocast the two may differ in dtype.
            return y if unit.scale == 1 else torch.add(x, y - x, alpha=unit.scale)
        if not torch.can_cast(y.dtype, x.dtype):
            raise TypeError(f"layer {unit.unit} returned {y.dtype}, which cannot be put back into x of {x.dtype}")
        if unit.scale == 1:
            return PutBack.apply(x, y, rows)  # type: ignore[no-any-return, no-untyped-call]
        if x.dim() < 2 or x.numel() == 0 or x.dtype not in FLOATING:
            return x.index_add(0, rows, (y - part).to(x.dtype), alpha=unit.scale)
        return ops.scatter_residual(x, y - part, rows, scale=unit.scale)

    def _check_result(self, index: int, part: Tensor, y: Any) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(f"layer {index} returned {type(y).__name__}, expected a tensor, or a tuple that starts so")
        if y.shape != part.shape:
            raise ValueError(f"layer {index} returned {list(y.shape)} for {list(part.shape)}, expected the same shape")

    @property
    def calls_every_layer(self) -> bool:
        """Whether layers that no sample keeps are called too, with none: other ranks may wait for them."""
        # A recompute runs inside backward, where DistributedDataParallel no longer shows: it does as its forward did.
        if not self.counters.recomputing:
            self._calls_every_layer = self.granularity == "sample" and distributed.may_be_sharded()
        return self._calls_every_layer

    @property
    def always_rows(self) -> bool:
        """Whether rows are given to a layer that all samples keep."""
        return False

    def _count(self, turn: Turn, x: Tensor, batch: int) -> None:
        tokens = x.numel() // x.shape[-1] if x.numel() else 0
        self._statistics.count(self._shares(turn, max(batch, 1)), batch, tokens, x)

    def _shares(self, turn: Turn, batch: int) -> FloatArray:
        """How much of each layer runs, [L, W]."""
        shares = np.zeros((len(self.layers), 1))
        for unit in turn.kept:
            shares[unit.unit] = unit.num_rows / batch
        return shares

    def _weights(self) -> FloatArray:
        """Elements of the matrices of each layer, [L, W]."""
        found = [[sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)] for layer in self.layers]
        return np.array(found, dtype=np.float64)

    def _bytes_per_token(self, x_dtype: torch.dtype, autocast: torch.dtype | None) -> FloatArray | None:
        """What each layer holds for backward, [L, W]; None: unknown."""
        return None

    def reset_stats(self) -> None:
        """Starts the statistics anew."""
        self._statistics = Statistics(len(self.layers))

    def stats(self) -> StackStats:
        """What was dropped so far; recomputes are not counted. Not part of the state dict."""
        return self._statistics.of(self._weights(), self._bytes_per_token)

    def extra_repr(self) -> str:
        return (
            f"{self.schedule}, granularity={self.granularity!r}, sampling={self.sampling!r}, scale={self.scale!r}, "
            f"seed={self.counters.seed}"
        )
