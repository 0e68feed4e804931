"""Short stand-ins for tensors and arguments: equal where those are equal, and otherwise almost surely not."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

CHUNK = 1 << 18  # words of 4 bytes
PER_TENSOR = 64  # elements of a parameter that are looked at
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

Seen = dict[int, tuple[Tensor, int, Hashable]]


def fingerprint(tree: Any, seen: Seen | None = None) -> Hashable:
    """Of every tensor, array and plain value in nested tuples, lists and dicts.

    Of two tensors that differ the fingerprints are equal with a probability of 2**-32. Of a DTensor this rank's part
    counts, of other objects only the type, as they may be made anew for each call.

    Args:
        seen: tensors whose fingerprints are known, by id; those that are looked at are added. None: none.
    """
    leaves, structure = tree_flatten(tree)
    return str(structure), tuple(_of_leaf(leaf, {} if seen is None else seen) for leaf in leaves)


def version(x: Tensor) -> Hashable:
    """What changes when ``x`` is written to: torch's count, or of inference tensors, which have none, the content."""
    return fingerprint(x) if x.is_inference() else x._version


def of_weights(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and up to 64 elements of every parameter of a model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype};".encode())
        flat = _local(parameter.detach()).reshape(-1)
        if flat.numel() and not flat.is_meta:
            places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), PER_TENSOR), dtype=torch.float64)
            sample = flat[places.round().long().to(flat.device)].cpu()
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_leaf(leaf: Any, seen: Seen) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.is_inference():
            return _of_tensor(leaf)
        known = seen.get(id(leaf))
        if known is None or known[0] is not leaf or known[1] != leaf._version:
            known = seen[id(leaf)] = (leaf, leaf._version, _of_tensor(leaf))
        return known[2]
    if isinstance(leaf, PLAIN):
        return type(leaf).__qualname__, repr(leaf)
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return leaf.shape, str(leaf.dtype), hashlib.sha256(leaf.tobytes()).digest()
    return type(leaf).__qualname__


def _of_tensor(x: Tensor) -> Hashable:
    kind = (tuple(x.shape), x.dtype, x.layout, x.device)
    if x.layout is not torch.strided or x.is_meta or x.is_quantized:
        return kind
    raw = _local(x.detach()).resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 4 or raw.storage_offset() % 4:
        padded = raw.new_zeros(-(-raw.numel() // 4) * 4)
        padded[: raw.numel()] = raw
        raw = padded
    # The product of a difference of words, below 2**32, and a random number of 64 bits is no multiple of 2**64.
    sums = [(part.long() * _numbers(x.device)[: part.numel()]).sum() for part in raw.view(torch.int32).split(CHUNK)]
    return *kind, *(torch.stack(sums).tolist() if sums else [])


def _local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


@lru_cache
def _numbers(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (CHUNK,), generator=generator, dtype=torch.int64).to(device)
