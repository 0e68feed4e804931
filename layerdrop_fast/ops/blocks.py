"""Blocks: some rows or columns of a weight, such as those of the heads that a step keeps."""

from typing import NamedTuple

from torch import Tensor


class Blocks(NamedTuple):
    """Which blocks of consecutive rows (or columns) of a weight are used.

    Shapes:
        kept: int64 [k], ascending, without repetition; size: rows of a block
    """

    kept: Tensor
    size: int


def apart(blocks: Blocks | None) -> tuple[Tensor | None, int]:
    """As an autograd.Function takes them."""
    return (None, 0) if blocks is None else blocks


def together(kept: Tensor | None, size: int) -> Blocks | None:
    """The inverse of ``apart``."""
    return None if kept is None else Blocks(kept, size)


def take(whole: Tensor, blocks: Blocks | None, dim: int) -> Tensor:
    """The blocks of a weight, behind one another."""
    if blocks is None:
        return whole
    return whole.unflatten(dim, (-1, blocks.size)).index_select(dim, blocks.kept).flatten(dim, dim + 1)  # type: ignore[no-any-return]


def put(part: Tensor, blocks: Blocks | None, dim: int, length: int) -> Tensor:
    """The gradient of a weight with so many rows (or columns), from that of its blocks: 0 elsewhere."""
    if blocks is None:
        return part
    shape = list(part.shape)
    shape[dim] = length
    whole = part.new_zeros(shape).unflatten(dim, (-1, blocks.size))
    whole.index_copy_(dim, blocks.kept, part.unflatten(dim, (-1, blocks.size)))
    return whole.flatten(dim, dim + 1)  # type: ignore[no-any-return]
