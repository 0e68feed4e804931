"""What a checkpoint is cut to, and what the cut was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from layerdrop_fast.prune.state_dict import checked_against, layer_lists, layer_of, number_of_layers, renamed

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
    # What may be of layers too: settings that number or count them, {name: value}, and tensors, {place: how many}.
    left_as_is: Mapping[str, Any] = field(default_factory=dict)
    # Kinds of layers of which one is left, by the name in the config: (all kinds, that one).
    now_alike: Mapping[str, tuple[Sequence[Any], Any]] = field(default_factory=dict)
    left_out: Sequence[str] = ()  # what a folder has and ``out`` has not, folders with a slash


# What the header of a safetensors file is to say, from what was cut and the tensors in the file.
Metadata: TypeAlias = Callable[[Pruned, Mapping[str, Tensor]], Mapping[str, str]]


def planned(sizes: Mapping[str, int], choose: Choose) -> Pruned:
    """What will be cut of a state dict with these entries, in bytes."""
    keep = checked_against(sizes, choose(layer_lists(sizes)) if callable(choose) else choose)
    after = sum(size for name, size in sizes.items() if renamed(name, keep) is not None)
    layers = {prefix: number_of_layers(sizes, prefix) for prefix in keep}
    return Pruned(keep, layers, sum(sizes.values()), after, _without_dots(sizes, keep))


def _without_dots(names: Iterable[str], keep: Iterable[str]) -> dict[str, str]:
    """Averages of layers, kept by modules that write the layers' names without dots: where, and how many."""
    joined = set()
    for name in names:
        for prefix in keep:
            if layer_of(name, prefix)[0] is not None:
                parts = name.split(".")
                joined |= {"".join(parts[start:]) for start in range(prefix.count(".") + 1)}
    found = Counter(place for place, _, last in (name.rpartition(".") for name in names) if last in joined)
    return {place or "names without dots": f"{count} tensors" for place, count in found.items()}
