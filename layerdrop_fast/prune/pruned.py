"""What a checkpoint is cut to, and what the cut was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from layerdrop_fast.prune.state_dict import checked_keep, layer_lists, number_of_layers, renamed

# What to keep of each list of layers; or a function from the lists that were found, {prefix: layers}, to that.
Kept: TypeAlias = Mapping[str, Sequence[int]]
Choose: TypeAlias = Kept | Callable[[dict[str, int]], Kept]


@dataclass(frozen=True)
class Pruned:
    """What was cut."""

    kept: dict[str, list[int]]
    layers: dict[str, int]  # that each list had
    bytes_before: int
    bytes_after: int
    left_as_is: Mapping[str, Any] = field(default_factory=dict)  # of a config: what may number or count layers too


# What the header of a safetensors file is to say, from what was cut and the tensors in the file.
Metadata: TypeAlias = Callable[[Pruned, Mapping[str, Tensor]], Mapping[str, str]]


def planned(sizes: Mapping[str, int], choose: Choose) -> Pruned:
    """What will be cut of a state dict with these entries, in bytes."""
    keep = checked_keep(sizes, choose(layer_lists(sizes)) if callable(choose) else choose)
    after = sum(size for name, size in sizes.items() if renamed(name, keep) is not None)
    return Pruned(keep, {prefix: number_of_layers(sizes, prefix) for prefix in keep}, sum(sizes.values()), after)
