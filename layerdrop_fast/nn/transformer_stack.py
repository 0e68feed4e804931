"""``TransformerStack``: Transformer layers that run at the price of what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_count
from layerdrop_fast.nn.alike import alike
from layerdrop_fast.nn.attention import Attend, KVCache, positions_read
from layerdrop_fast.nn.compiled import compilable, is_compiled, outside, with_unknown_sizes
from layerdrop_fast.nn.enclosed import is_enclosed
from layerdrop_fast.nn.held_bytes import branch_weights, bytes_per_token
from layerdrop_fast.nn.packed import Packed
from layerdrop_fast.nn.parts import PartSchedules, Rates, targets_of
from layerdrop_fast.nn.residual import Step, add
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.steps import Inputs, steps_of
from layerdrop_fast.nn.transformer_layer import TransformerLayer, Visit
from layerdrop_fast.nn.turn import Kept, Turn, branch_shares
from layerdrop_fast.plan import DropPlan
from layerdrop_fast.schedule import FloatArray


class TransformerStack(LayerDropStack):
    """``num_layers`` TransformerLayers, of which a training step runs and holds only what its plan keeps.

    All decisions are drawn before the first layer runs. Adding a kept branch to the stream and normalising for the next
    kept one is one op, over whatever was dropped in between. Per kept layer and token 10 D numbers are held for
    backward, neither masks nor the stream among them; what is dropped costs nothing.

        stack = TransformerStack(24, 1024, 16, 4096, schedule=DropSchedule(24, linear(0.5)), granularity="sample",
                                 scale="inverse", seed=0)
        out = stack(x, is_causal=True)

    Shapes:
        x: [B, S, D]; memory: [B, T, D] -> [B, S, D], a new tensor; x is not written. Packed, x is [1, N, D].

    Args:
        num_layers: layers; they stand in ``.layers``.
        d_model ... dtype: of each TransformerLayer. There is no norm behind the last layer.
        schedule: as in LayerDropStack, of what ``target`` says; or one for each of several targets, for instance
            ``{"layer": 0.2, "head": 0.1, "ffn_chunk": linear(0.3)}``.
        granularity, sampling, scale, seed, accumulation, max_kept, hidden_states: as in LayerDropStack. The residual
            scale multiplies what a branch adds.
        target: ``"layer"``, one decision for all branches of a layer; ``"branch"``, one for each; ``"head"``, one for
            each attention head (those that share a key and value head are one); ``"ffn_chunk"``, one for each chunk of
            the feed-forward network. Products and what is held for backward are those of the kept heads and chunks.
            Granularity "batch" only, eager, scale "none" or "inverse".
        ffn_chunks: chunks of a feed-forward network, a divisor of its width.

    Raises:
        ValueError, TypeError: as TransformerLayer and LayerDropStack.

    State dict: that of TransformerLayer under ``layers.N.``, and ``counters._extra_state``.

    ``stack.compile()`` compiles all layers as one graph, ``for layer in stack.layers: layer.compile()`` each by itself,
    the same graph for all.

    Randomness: the plans are ``draw_plan(rates, ...)`` as in LayerDropStack, for target "branch" with each layer's rate
    once a branch; behind these come the decisions of heads, then those of chunks, layer by layer (with systematic
    sampling in draws of their own, of streams ``1 << 60 | microbatch`` and, where both are dropped, ``2 << 60 | ...``).
    A dropout mask is a function of (seed, step, rank << 32 | microbatch), the site, ``256 + 2 b + (0 behind the branch,
    1 inside)`` for branch b numbered through the stack, and an element's number in [B, S, D]; inside a branch that runs
    in chunks, in [B, S, F'] with the kept channels F' alone.

    Source: Fan, Grave, Joulin 2019, section 3.2; arXiv 2609.05275 (per sample).
    """

    # What runs instead of a forward, given (x, B, inputs), while a GraphedStep is under way.
    _replaced: Callable[[Tensor, int, Inputs], Tensor] | None = None

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = True,
        bias: bool = True,
        norm: str = "layernorm",
        *,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        num_kv_heads: int | None = None,
        rope_theta: float | None = None,
        cross_attention: bool = False,
        layer_scale: float | None = None,
        recompute: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        check_count(num_layers, "num_layers", 1)
        layers = [
            TransformerLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps,
                norm_first,
                bias,
                norm,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                num_kv_heads=num_kv_heads,
                rope_theta=rope_theta,
                cross_attention=cross_attention,
                layer_scale=layer_scale,
                recompute=recompute,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        ]
        self._set_up(layers, **keywords)

    def _set_up(
        self,
        layers: Sequence[TransformerLayer],
        *,
        schedule: Rates | Mapping[str, Rates] = 0.2,
        granularity: str = "batch",
        target: str = "layer",
        ffn_chunks: int = 8,
        sampling: str = "bernoulli",
        scale: str = "none",
        seed: int | None = None,
        accumulation: int = 1,
        max_kept: int | None = None,
        hidden_states: bool = False,
    ) -> None:
        whole, schedules = targets_of(schedule, target)
        super().__init__(
            layers,
            schedules[whole],
            granularity=granularity,
            sampling=sampling,
            scale=scale,
            seed=seed,
            accumulation=accumulation,
            max_kept=max_kept,
            hidden_states=hidden_states,
        )
        self.target = whole
        self.parts = PartSchedules.of(schedules, self._each, ffn_chunks)
        self.parts.check(self.granularity, self.scale)
        self._known_sites: Tensor | None = None
        self._compiled: Callable[..., tuple[Tensor, ...]] | None = None

    @classmethod
    def from_layers(
        cls, layers: Iterable[nn.Module], schedule: Rates | Mapping[str, Rates] = 0.2, **keywords: Any
    ) -> TransformerStack:
        """A stack of given layers: TransformerLayers, or torch's, whose parameters are shared, not copied.

        Args:
            layers: at least one; activations, epsilons, dropouts and feed-forward widths may differ, the rest may not.
            schedule: as in LayerDropStack. keywords: granularity, target, ..., hidden_states.

        Raises:
            TypeError, ValueError: a layer that cannot be converted, or differs from the first; it is named.
        """
        stack = cls.__new__(cls)
        stack._set_up(alike(layers), schedule=schedule, **keywords)
        return stack

    @property
    def units_per_layer(self) -> int:
        return self._branches if self.target == "branch" else 1

    def rates_by_kind(self, step: int) -> list[FloatArray]:
        """The drop rates of a plan's decisions: of layers or branches, of heads, of chunks, each layer by layer."""
        return [*super().rates_by_kind(step), *self.parts.rates(self._each, step)]

    @property
    def _each(self) -> Iterable[TransformerLayer]:
        return self.layers  # type: ignore[return-value]

    @property
    def _first(self) -> TransformerLayer:
        return self.layers[0]  # type: ignore[return-value]

    @property
    def _branches(self) -> int:
        return self._first.num_branches

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """The stack on a batch.

        Args:
            attn_mask: [S, T], [B, S, T] or [B or 1, nhead or 1, S, T], T = S; bool, True where NOT attended (as in
                ``nn.MultiheadAttention``), or float, added to the scores.
            key_padding_mask: [B, T], the same: True at padding.
            is_causal: position s attends to 0..s.
            memory_mask, memory_key_padding_mask: the same for ``memory``.
            position_ids: int64 [S] or [B, S] (packed [N]), for rotary positions; None: 0..S - 1 in each sample, behind
                what a cache has read. Without ``rope_theta`` it has no effect.
            cu_seqlens: int [B + 1], on the host: x is [1, N, D], the tokens of B sequences behind one another, and
                sequence b has those from cu_seqlens[b] up to cu_seqlens[b + 1]. Decisions are one a sequence; results
                and masks are those of the padded batch.
            max_seqlen: length of that padded batch, which numbers the masks; None: of the longest sequence.
            cache: evaluation only: x continues what the cache has read; x is read into it too. Masks are then those of
                all T = ``cache.length`` + S positions, and x attends to all of them that they leave.

        Returns:
            The stream behind the last layer; with ``hidden_states`` (stream, L tensors).

        Raises:
            ValueError, TypeError: a shape, dtype or device is wrong, or arguments exclude each other; nothing has
                changed then.
        """
        if torch.compiler.is_compiling():
            given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
            return outside(self.forward, **given)
        self._first.check(x, memory)
        masks: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
        masks |= {"memory_mask": memory_mask, "memory_key_padding_mask": memory_key_padding_mask}
        if cu_seqlens is not None:
            excluded = {**masks, "memory": memory, "cache": cache, "is_causal": None}
            return self._packed(x, Packed(cu_seqlens, x.shape[1], max_seqlen), is_causal, position_ids, excluded)
        past = 0 if cache is None else positions_read(cache, self, x)
        attend, memory_attend = self._first.attention(x, memory, **masks, position_ids=position_ids, past=past)
        inputs = Inputs(memory, attend, memory_attend, None, cache, {})
        out = self._forward(x, x.shape[0], (), {"inputs": inputs})
        if cache is not None:
            cache.length += x.shape[1]
        return out

    def _forward(self, x: Tensor, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._replaced is not None:
            return self._replaced(x, batch, kwargs["inputs"])
        return super()._forward(x, batch, args, kwargs)

    def _packed(
        self, x: Tensor, packed: Packed, is_causal: bool, position_ids: Tensor | None, excluded: dict[str, Any]
    ) -> Any:
        given = [name for name, value in excluded.items() if value is not None]
        if x.shape[0] != 1 or given:
            raise ValueError(f"cu_seqlens: got x {list(x.shape)} and {given}, expected x [1, N, D] and none of these")
        if position_ids is None:
            position_ids = packed.positions(x.device)
        attend, memory_attend = self._first.attention(x, None, position_ids=position_ids.flatten())
        attend = attend._replace(is_causal=is_causal, lengths=packed.lengths.tolist())
        inputs = Inputs(None, attend, memory_attend, packed, None, {})
        out = self._forward(x[0], packed.batch, (), {"inputs": inputs})
        if self.hidden_states:
            return out[0][None], [state[None] for state in out[1]]
        return out[None]

    def _run(
        self, x: Tensor, turn: Turn, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        inputs: Inputs = kwargs["inputs"]
        steps = steps_of(self, x, turn, inputs.packed)
        if inputs.packed is not None and self.max_kept is not None:
            # Sequences differ in length: a bound on what is held for backward counts tokens.
            turn, batch = inputs.packed.in_tokens(turn), x.shape[0]
        return super()._run(x, turn, batch, args, {"inputs": dataclasses.replace(inputs, steps=steps)})

    def _run_piece(
        self, x: Tensor, kept: Sequence[Kept], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        inputs: Inputs = kwargs["inputs"]
        layers = list(self._by_layer(kept, inputs.steps))
        run = self._run_layers if self._compiled is None or inputs.cache is not None else self._compiled
        return run(x, layers, inputs.memory, inputs.attend, inputs.memory_attend, inputs.cache)

    def _run_layers(
        self,
        x: Tensor,
        layers: Sequence[tuple[int, list[Step | None]]],
        memory: Tensor | None,
        attend: Attend,
        memory_attend: Attend,
        cache: KVCache | None,
    ) -> tuple[Tensor, ...]:
        """x behind these layers and, if hidden states are wanted, behind each of them."""
        in_place, states = self._owns_stream, []
        y: Tensor | None = None
        before: Step | None = None
        for number, steps in layers:
            layer = self.layers[number]
            visit = Visit(before, steps, attend, memory_attend, in_place, None if cache is None else (cache, number))
            if is_compiled(layer):
                y, visit = compilable(x, y, visit)
            x, y = layer(x, memory, y=y, visit=visit)
            before = [step for step in steps if step is not None][-1]
            if self.hidden_states:
                x, y = x if y is None else add(x, y, before, in_place=False), None
                states.append(x)
        if y is not None and before is not None:
            x = add(x, y, before, in_place=in_place)
        return x, *states

    def compile(self, *args: Any, **keywords: Any) -> None:
        """Compiles all layers as one graph, which serves every plan; its compile time grows with the depth.

        The decisions stay outside. A layer that is dropped for the whole batch is then part of the graph, with no
        samples: its gradients are zeros, not None, so that an optimizer with momentum or weight decay moves it.

        Args:
            args, keywords: of ``torch.compile``.

        Raises:
            ValueError: with ``max_kept``, whose pieces change from step to step.
        """
        if self.max_kept is not None:
            raise ValueError(f"max_kept is {self.max_kept}, expected None: compile the layers, each by itself")
        self._compiled = torch.compile(self._run_layers, *args, **({"fullgraph": True} | keywords))

    def __getstate__(self) -> dict[str, Any]:
        # A copy would run the layers of this stack. As with ``nn.Module.compile``, it is not compiled.
        return super().__getstate__() | {"_compiled": None}  # type: ignore[no-untyped-call, no-any-return]

    @property
    def _owns_stream(self) -> bool:
        """Whether the stream may be written in place, since nobody but the layers sees it."""
        if self._compiled is not None or self.hidden_states or any(is_enclosed(layer) for layer in self.layers):
            return False
        return torch._C._functorch.peek_interpreter_stack() is None  # torch.func

    @property
    def always_rows(self) -> bool:
        return self._compiled is not None or any(is_compiled(layer) for layer in self.layers)

    @property
    def calls_every_layer(self) -> bool:
        return self._compiled is not None or super().calls_every_layer

    def _kept(self, plan: DropPlan, batch: int) -> list[Kept]:
        kept = super()._kept(plan, batch)
        if self.parts:
            return self.in_parts(plan, kept)
        if self._compiled is None:
            return kept
        if plan.batch_size is None:
            everyone = torch.arange(batch, dtype=torch.int32, device=plan.device)
            kept = [unit._replace(rows=everyone[: unit.num_rows]) for unit in kept]
        return with_unknown_sizes(kept)

    def in_parts(self, plan: DropPlan, kept: list[Kept]) -> list[Kept]:
        """The units with the heads and chunks that are kept of them; those of which none is kept do not run."""
        if self.always_rows:
            raise ValueError("the layers are compiled, expected them eager where heads or chunks are dropped")
        parts = self.parts.kept(self._each, plan, len(self.layers) * self.units_per_layer, self.scale)
        per_unit = self._branches // self.units_per_layer
        kept = [unit._replace(parts=parts[unit.unit * per_unit : (unit.unit + 1) * per_unit]) for unit in kept]
        return [unit for unit in kept if any(part is None or part.kept for part in unit.parts)]

    def _check(self, x: Tensor, batch: int) -> None:
        super()._check(x, batch)
        self.parts.check_depth(len(self.layers))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, target={self.target!r}{self.parts}"

    def _shares(self, turn: Turn, batch: int) -> FloatArray:
        return branch_shares(turn.kept, len(self.layers), self._branches, self.units_per_layer, batch)

    def _weights(self) -> FloatArray:
        return np.array([branch_weights(layer) for layer in self._each], dtype=np.float64)

    def _bytes_per_token(self, x_dtype: torch.dtype, autocast: torch.dtype | None) -> FloatArray:
        return bytes_per_token(self._each, x_dtype, autocast)

    def _by_layer(self, kept: Sequence[Kept], steps: dict[int, Step]) -> Iterator[tuple[int, list[Step | None]]]:
        """The layers that run, and how each of their branches does."""
        branches = self._branches
        for layer, units in groupby(kept, lambda unit: unit.unit // self.units_per_layer):
            ran = {unit.unit for unit in units}
            numbers = range(layer * branches, (layer + 1) * branches)
            yield layer, [steps.get(b) if self.units_per_layer == 1 or b in ran else None for b in numbers]
