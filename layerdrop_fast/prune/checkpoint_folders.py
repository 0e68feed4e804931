"""Cutting folders as transformers saves them: weights, in shards or not, and their config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerdrop_fast._progress import stage
from layerdrop_fast.prune import safetensors_files, torch_files
from layerdrop_fast.prune.config import left_as_is, now_alike, prune_config
from layerdrop_fast.prune.new_output import new_output
from layerdrop_fast.prune.pruned import Choose, Metadata, Pruned, planned

# What goes with a network of any depth: settings, tokenizers, code, and what is written about it.
OTHERS = frozenset(
    {".bpe", ".codes", ".jinja", ".json", ".jsonl", ".md", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
    | {".yaml", ".yml"}
)
LICENSES = ("LICENSE", "NOTICE")
# Of the training of the whole network, and what that was worth.
OF_THE_WHOLE = frozenset(
    {"all_results.json", "eval_results.json", "metrics.json", "train_results.json", "trainer_state.json"}
)


@dataclass(frozen=True)
class Kind:
    """A kind of weights that a folder may have: the name of its file where that is one, and how it is read and cut."""

    single: str
    sizes: Callable[[Path], dict[str, int]]
    write: Callable[[Path, Path, Pruned, Metadata | None], list[str]]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


SAFETENSORS = Kind("model.safetensors", safetensors_files.sizes, safetensors_files.write)
KINDS = (SAFETENSORS, Kind("pytorch_model.bin", torch_files.sizes, torch_files.write))


@dataclass(frozen=True)
class Weights:
    """The files that a folder's weights stand in."""

    kind: Kind
    shards: list[str]
    index: Mapping[str, Any] | None  # None: a single file


def prune_folder(source: Path, out: Path, choose: Choose, progress: bool, metadata: Metadata | None = None) -> Pruned:
    weights = _weights(source)
    cut = planned(_sizes(source, weights), choose)
    config = source / "config.json"
    whole = _json(config) if config.exists() else None
    smaller = prune_config(whole, cut.kept, cut.layers) if whole is not None else None
    cut_files = {*weights.shards, weights.kind.index if weights.index is not None else "", "config.json"}
    others = sorted(path for path in source.iterdir() if path.name not in cut_files)
    with new_output(out) as temporary:
        temporary.mkdir()
        _write(source, temporary, weights, cut, progress, metadata)
        if smaller is not None:
            _write_json(temporary / "config.json", smaller)
        for other in filter(_goes_along, others):
            shutil.copy2(other, temporary / other.name)
    left_out = tuple(f"{other.name}{'/' * other.is_dir()}" for other in others if not _goes_along(other))
    if whole is not None and smaller is not None:
        cut = replace(
            cut,
            left_as_is={**cut.left_as_is, **left_as_is(whole, smaller, cut.layers)},
            now_alike=now_alike(whole, smaller),
        )
    return replace(cut, left_out=left_out)


def _goes_along(path: Path) -> bool:
    """Whether a file is copied; weights of other kinds, optimizers, logs and folders are not."""
    if not path.is_file() or path.name in OF_THE_WHOLE or path.name.endswith(".index.json"):
        return False
    return path.suffix in OTHERS or path.stem in LICENSES


def _weights(source: Path) -> Weights:
    for kind in KINDS:
        if (source / kind.index).exists():
            index = _json(source / kind.index)
            shards = _shards(source / kind.index, index, Path(kind.single).suffix)
            if missing := [shard for shard in shards if not (source / shard).is_file()]:
                raise ValueError(f"{source} has no {missing[0]}, expected all shards that {kind.index} names")
            return Weights(kind, shards, index)
        if (source / kind.single).is_file():
            return Weights(kind, [kind.single], None)
    expected = ", or ".join(f"{kind.single}, or {kind.index} and its shards" for kind in KINDS)
    raise ValueError(f"{source} has no {SAFETENSORS.single}, expected {expected}")


def _shards(path: Path, index: Mapping[str, Any], suffix: str) -> list[str]:
    """The files of an index: names in its folder, which is where they are read and, in ``out``, written."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has no weight_map, expected {{name of a tensor: file}}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
            raise ValueError(f"{path} names {shard!r}, expected the name of a {suffix} file beside it")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{path} has the metadata {index['metadata']!r}, expected an object")
    return sorted(set(weight_map.values()))


def _sizes(source: Path, weights: Weights) -> dict[str, int]:
    """The bytes of every tensor, by name, once it is where the index says, and nowhere else."""
    sizes: dict[str, int] = {}
    places: dict[str, str] = {}
    for shard in weights.shards:
        inside = weights.kind.sizes(source / shard)
        if twice := sorted(set(inside) & set(sizes)):
            raise ValueError(f"{source} has {twice[0]!r} in {places[twice[0]]} and in {shard}, expected it once")
        sizes |= inside
        places |= dict.fromkeys(inside, shard)
    for name, shard in (weights.index or {"weight_map": {}})["weight_map"].items():
        if places.get(name) != shard:
            where = f"it is in {places[name]}" if name in places else "no shard has it"
            raise ValueError(f"{source / weights.kind.index} says that {name!r} is in {shard}, but {where}")
    return sizes


def _write(source: Path, out: Path, weights: Weights, cut: Pruned, progress: bool, metadata: Metadata | None) -> None:
    """Writes what is left of each shard, and an index of those of which something is."""
    single = weights.index is None
    weight_map: dict[str, str] = {}
    with stage("prune", len(weights.shards)) if progress else nullcontext(lambda done, note: None) as show:
        for number, shard in enumerate(weights.shards, 1):
            names = weights.kind.write(source / shard, out / shard, cut, metadata if single else None)
            weight_map |= dict.fromkeys(names, shard)
            show(number, shard)
    if weights.index is not None:
        said = {**weights.index.get("metadata", {}), "total_size": cut.bytes_after}
        said.pop("total_parameters", None)  # of the whole network
        _write_json(out / weights.kind.index, {**weights.index, "metadata": said, "weight_map": weight_map})


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
