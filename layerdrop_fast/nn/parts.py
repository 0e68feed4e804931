"""Parts of a branch that a step keeps: attention heads, and chunks of the feed-forward network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from layerdrop_fast._checks import check_choice, check_count
from layerdrop_fast.ops.blocks import Blocks
from layerdrop_fast.plan import DropPlan, to_device
from layerdrop_fast.schedule import Depth, DropSchedule, FloatArray, per_layer

PARTS = ("head", "ffn_chunk")
TARGETS = ("layer", "branch", *PARTS)
Rates: TypeAlias = "float | Sequence[float] | Depth | DropSchedule"


def targets_of(schedule: Rates | Mapping[str, Rates], target: str) -> tuple[str, dict[str, Rates]]:
    """Whether whole layers or branches are dropped, and the rates of each target, of the whole ones 0 if not given.

    Raises:
        ValueError: a target that does not exist, or both layers and branches.
    """
    check_choice(target, "target", TARGETS)
    given = dict(schedule) if isinstance(schedule, Mapping) else {target: schedule}
    for name in given:
        check_choice(name, "target in schedule", TARGETS)
    if not given or {"layer", "branch"} <= set(given):
        raise ValueError(f"schedule has the targets {list(given)}, expected some, and not both layer and branch")
    whole = "branch" if "branch" in given else "layer"
    return whole, {whole: 0.0, **given}


class Parts(NamedTuple):
    """The parts of a branch that a plan keeps.

    Heads that share a key and value head are one part.
    """

    kept: Sequence[int]  # ascending
    total: int
    scale: float  # the residual scale of what they add

    @property
    def is_whole(self) -> bool:
        """Whether the branch runs as without parts."""
        return len(self.kept) == self.total and self.scale == 1


class PartBlocks(NamedTuple):
    """Parts as blocks of the weights of their branch."""

    inner: tuple[Blocks, ...]  # rows of the first linear map; with cross-attention of its query, and of key and value
    outer: Blocks  # columns of the last one
    number: int  # of parts
    scale: float


@dataclass(frozen=True)
class PartSchedules:
    """The drop rates of heads and chunks of a stack."""

    schedules: Mapping[str, DropSchedule]  # of PARTS, in their order
    ffn_chunks: int

    @classmethod
    def of(cls, schedules: Mapping[str, Any], layers: Iterable[Any], ffn_chunks: int) -> PartSchedules:
        layers = list(layers)
        check_count(ffn_chunks, "ffn_chunks", 1)
        found = {part: DropSchedule.of(schedules[part], len(layers)) for part in PARTS if part in schedules}
        for index, layer in enumerate(layers):
            if "ffn_chunk" in found and layer.dim_feedforward % ffn_chunks:
                raise ValueError(
                    f"ffn_chunks is {ffn_chunks}, expected a divisor of dim_feedforward, {layer.dim_feedforward} in "
                    f"layer {index}"
                )
        return cls(found, ffn_chunks)

    def __bool__(self) -> bool:
        return bool(self.schedules)

    def __str__(self) -> str:
        chunks = f", ffn_chunks={self.ffn_chunks}" if "ffn_chunk" in self.schedules else ""
        return "".join(f", {part}: {schedule}" for part, schedule in self.schedules.items()) + chunks

    def check_depth(self, num_layers: int) -> None:
        """After the list of layers was changed."""
        for part, schedule in self.schedules.items():
            if schedule.num_layers != num_layers:
                raise ValueError(
                    f"the stack has {num_layers} layers and a schedule of {part} for {schedule.num_layers}: set .parts "
                    "when you change .layers, or cut with prune.extract"
                )

    def check(self, granularity: str, scale: str) -> None:
        """What does not go with parts."""
        if self and granularity != "batch":
            raise ValueError(
                f'schedule: got rates of {list(self.schedules)} at granularity {granularity!r}, expected "batch": '
                "samples that keep other parts have no smaller product in common"
            )
        if self and scale == "eval":
            raise ValueError(f'scale is "eval", expected "none" or "inverse" with rates of {list(self.schedules)}')

    def rates(self, layers: Iterable[Any], step: int) -> list[FloatArray]:
        """Of every decision, kind by kind."""
        layers = list(layers)
        return [
            np.repeat(schedule(step), [self._total(layer, part) * len(_branches(layer, part)) for layer in layers])
            for part, schedule in self.schedules.items()
        ]

    def kept(self, layers: Iterable[Any], plan: DropPlan, first: int, scale: str) -> list[Parts | None]:
        """What a plan keeps of every branch, whose decisions begin at ``first``; None: all of it."""
        layers = list(layers)
        counts, branches = plan.kept_counts, layers[0].num_branches
        found: list[Parts | None] = [None] * (len(layers) * branches)
        for part, schedule in self.schedules.items():
            densities = 1.0 - schedule(plan.step)
            for number, layer in enumerate(layers):
                total, density = self._total(layer, part), float(densities[number])
                for branch in _branches(layer, part):
                    kept = [place for place in range(total) if counts[first + place]]
                    inverse = scale == "inverse" and density > 0
                    found[number * branches + branch] = Parts(kept, total, 1.0 / density if inverse else 1.0)
                    first += total
        return found

    def cut(self, keep: Sequence[int]) -> PartSchedules:
        """Of these layers alone."""
        cut = {
            part: DropSchedule(len(keep), per_layer(schedule.depth_rates[list(keep)].tolist()), schedule.time)
            for part, schedule in self.schedules.items()
        }
        return PartSchedules(cut, self.ffn_chunks)

    def without(self, part: str) -> PartSchedules:
        """With all parts of this kind kept."""
        return PartSchedules({name: found for name, found in self.schedules.items() if name != part}, self.ffn_chunks)

    def _total(self, layer: Any, part: str) -> int:
        """How many parts a branch has."""
        return self.ffn_chunks if part == "ffn_chunk" else layer.self_attn.num_kv_heads


def _branches(layer: Any, part: str) -> Sequence[int]:
    """The branches that are kept in such parts."""
    ffn = layer.num_branches - 1
    return [ffn] if part == "ffn_chunk" else range(ffn)


def part_blocks(kept: Sequence[tuple[Any, int, Parts]], device: torch.device) -> list[PartBlocks]:
    """The blocks of many branches (layer, branch, parts), with one copy to the device."""
    wanted = [indices_of(layer, branch, parts) for layer, branch, parts in kept]
    flat = [indices for _, lists in wanted for indices in lists]
    every = to_device(np.array([index for indices in flat for index in indices], dtype=np.int64), device)
    ends = list(accumulate(map(len, flat)))
    tensors = iter([every[end - len(indices) : end] for indices, end in zip(flat, ends, strict=True)])
    found = []
    for (size, lists), (_, _, parts) in zip(wanted, kept, strict=True):
        *inner, outer = (Blocks(next(tensors), size) for _ in lists)
        found.append(PartBlocks(tuple(inner), outer, len(parts.kept), parts.scale))
    return found


def indices_of(layer: Any, branch: int, parts: Parts) -> tuple[int, list[list[int]]]:
    """The size of a block, and the blocks of each of the maps."""
    kept = list(parts.kept)
    if branch == layer.num_branches - 1:
        gated = [parts.total + chunk for chunk in kept] if layer.activation == "swiglu" else []
        return layer.dim_feedforward // parts.total, [kept + gated, kept]
    attention = layer.self_attn if branch == 0 else layer.multihead_attn
    shared = attention.nhead // attention.num_kv_heads
    queries = [group * shared + place for group in kept for place in range(shared)]
    if branch == 0:
        keys, values = attention.nhead, attention.nhead + attention.num_kv_heads
        every = queries + [keys + group for group in kept] + [values + group for group in kept]
        return attention.head_dim, [every, queries]
    return attention.head_dim, [queries, kept + [attention.num_kv_heads + group for group in kept], queries]
