"""Cutting configs: the number of layers, and whatever a config says of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerdrop_fast._checks import check_indices
from layerdrop_fast.prune.state_dict import check_mapping

# T5 calls the encoder's num_layers. BART repeats it as num_hidden_layers.
ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER = ("decoder_layers", "num_decoder_layers")
ONLY = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
SIDES = ("encoder", "decoder")
# In names of what may number or count layers; GPT-Neo repeats kinds of layers in attention_types.
OF_LAYERS = ("layer", "pattern", "idxs", "indices", "first_k", "attention_types", "pruned_heads")


def prune_config(
    config: Mapping[str, Any], keep: Mapping[str, Sequence[int]], num_layers: Mapping[str, int]
) -> dict[str, Any]:
    """A config, for instance transformers' ``config.json``, of a network cut to ``keep``.

    The number of layers stands under ``num_hidden_layers``, ``n_layer``, ...; in a config that has ``decoder_layers``
    or ``num_decoder_layers``, under that for a prefix with "decoder" in it, and under ``encoder_layers``,
    ``num_layers``, ... for one with "encoder"; of both, the first in the prefix counts. It may stand in an inner
    config, such as ``text_config``, whose name is part of the prefix where there are several. T5's decoder has as many
    layers as ``num_layers`` says where the config has no ``num_decoder_layers``, which is written then.

    Lists beside the number that have "layer" in their names and one entry a layer, such as ``layer_types``, are cut
    too. A list of the numbers of all layers, as ``mlp_only_layers`` may be, has no entry for each and stays.

    Args:
        config: is left as it is.
        keep: as for ``prune_state_dict``.
        num_layers: how many layers each list has, by the same prefixes.

    Raises:
        ValueError: no number of layers, or another than ``num_layers``; indices out of range, unsorted or repeated.
            TypeError: a value of another kind.
    """
    check_mapping(keep)
    pruned = _with_decoder(config)
    for prefix, kept in keep.items():
        if prefix not in num_layers:
            raise ValueError(f"num_layers has {list(num_layers)}, expected {prefix!r} too, as in keep")
        total = num_layers[prefix]
        indices = check_indices(kept, f"layers to keep of {prefix!r}", total)
        part, names = _counts(pruned, prefix, total)
        for name in names:
            part[name] = len(indices)
        for name, value in part.items():
            if _one_a_layer(str(name), value, total) and _belongs(str(name), prefix):
                part[name] = [value[index] for index in indices]
    return pruned


def says_layers(config: Mapping[str, Any], prefix: str) -> bool:
    """Whether a config has a number of layers for such a list, right or wrong."""
    return any(True for _ in _said(_with_decoder(config), prefix))


def left_as_is(config: Mapping[str, Any], pruned: Mapping[str, Any], num_layers: Mapping[str, int]) -> dict[str, Any]:
    """What may number or count layers, by its name, and ``prune_config`` does not know the meaning of.

    Args:
        num_layers: how many layers each list had, by the prefixes of those that were cut.
    """
    return {
        place: value
        for place, name, value, cut in _entries(config, pruned)
        if any(_may_be_of_layers(name, value, *of) and _belongs(name, of[0]) for of in num_layers.items())
        if cut == value
    }


def now_alike(config: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """Lists with an entry for each layer that had several values and have one: {name: (the values, that one)}."""
    return {
        place: (several, cut[0])
        for place, _, value, cut in _entries(config, pruned)
        if isinstance(value, list) and 1 < len(cut) < len(value)
        if len(several := _different(value)) > len(_different(cut)) == 1
    }


def _entries(config: Mapping[str, Any], pruned: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Everything that a config says: where, by which name, before and after it was cut."""
    for (place, part), (_, cut) in zip(_parts(dict(config), ""), _parts(dict(pruned), ""), strict=True):
        for name, value in part.items():
            yield f"{place}.{name}".lstrip("."), str(name), value, cut[name]


def _different(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def _may_be_of_layers(name: str, value: Any, prefix: str, total: int) -> bool:
    said = any(word in name for word in OF_LAYERS)
    if _is_count(value):
        return said and value != 0 and name not in (*ENCODER, *DECODER, *ONLY)
    if not isinstance(value, list | dict) or not value:
        return False
    if isinstance(value, list) and (said or len(value) == total):
        return True
    # Settings of single layers: pruned_heads by their numbers, modules_to_not_convert by the names of modules.
    number = re.compile(rf"{re.escape(prefix.rpartition('.')[2])}\\?\.\d")
    return name == "pruned_heads" or any(number.search(inner) for inner in value if isinstance(inner, str))


def _one_a_layer(name: str, value: Any, total: int) -> bool:
    """Whether a list has an entry for each layer; one of the layers' numbers says something else."""
    if not isinstance(value, list) or len(value) != total or "layer" not in name:
        return False
    return not (all(map(_is_count, value)) and sorted(value) == list(range(total)))


def _with_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config in which the decoder's number of layers is not left to its default, T5's ``num_layers``."""
    filled: dict[str, Any] = _copied(dict(config))
    for _, part in _parts(filled, ""):
        said = any(_is_count(part.get(name)) for name in DECODER)
        if part.get("is_encoder_decoder") and not said and _is_count(part.get("num_layers")):
            part["num_decoder_layers"] = part["num_layers"]
    return filled


def _copied(value: Any) -> Any:
    """A copy of the dicts and lists in a config; of tensors, which options may hold, there is none."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(config: dict[str, Any], prefix: str, total: int) -> tuple[dict[str, Any], list[str]]:
    """The part of a config that has the number of layers of a list, and the names it has there."""
    found = list(_said(config, prefix))
    right = [(place, part, names) for place, part, names in found if part[names[0]] == total]
    if len(right) > 1:
        right = [row for row in right if row[0].removesuffix("_config") in prefix] or right
    if len(right) != 1:
        said = {f"{place}.{name}".lstrip("."): part[name] for place, part, names in found for name in names}
        raise ValueError(f"the config says {said}, expected the {total} layers of {prefix!r} in one place of it")
    _, part, names = right[0]
    return part, [name for name in names if part[name] == total]


def _said(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """The parts of a config that have a number of layers for such a list, right or wrong, and its names there."""
    for place, part in _parts(config, ""):
        if {_side(place), _side(prefix)} >= set(SIDES):  # the other half of an EncoderDecoder
            continue
        if names := [name for name in _names(part, _side(prefix)) if _is_count(part.get(name))]:
            yield place, part, names


def _names(part: Mapping[str, Any], side: str) -> Sequence[str]:
    if any(name in part for name in DECODER):
        return DECODER if side == "decoder" else ENCODER
    if part.get("is_encoder_decoder") and side == "decoder":
        return DECODER
    return ENCODER[:2] + ONLY if side == "encoder" else ONLY


def _side(prefix: str) -> str:
    """The side that a list of layers is of: what its name says first, as a BERT's encoder may be a decoder."""
    for part in prefix.split("."):
        said = [side for side in SIDES if side in part]
        if len(said) == 1:
            return said[0]
    return ""


def _parts(config: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A config and the configs in it, by their names."""
    yield place, config
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _parts(value, str(name))


def _belongs(name: str, prefix: str) -> bool:
    """Whether a list is of this side, where its name says one."""
    return all(side not in name or side == _side(prefix) for side in SIDES)
