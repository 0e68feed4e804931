"""From branch to branch: adding one to the stream and normalising for the next, in place or not."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from layerdrop_fast import ops
from layerdrop_fast.nn.parts import PartBlocks
from layerdrop_fast.ops import owned_stream


class Step(NamedTuple):
    """How one branch runs in one step."""

    rows: Tensor | None = None  # int32 [K], the samples (packed: tokens) that run it; None: all
    samples: list[int] | None = None  # packed: those samples, on the host
    scale: Tensor | None = None  # []; None: 1
    dropout_p: float = 0.0  # of what the branch adds
    key: Tensor | None = None  # int32 [4], of the step's masks
    site: Tensor | None = None  # int32 [], of the dropout behind the branch
    inner_site: Tensor | None = None  # int32 [], of the dropout inside the branch
    # int32 [K]: where K rows are not numbered by ``rows`` in the masks: packed tokens by their place in a padded batch.
    numbers: Tensor | None = None
    training: bool = False  # whether the layer was in training mode: a recompute may come after stack.eval()
    parts: PartBlocks | None = None  # the heads or chunks that run; None: all

    @property
    def mask_rows(self) -> Tensor | None:
        """What numbers the elements of the masks inside the branch."""
        return self.rows if self.numbers is None else self.numbers

    def added(self) -> dict[str, Any]:
        """The keywords of ``scatter_residual``."""
        rate = self.dropout_p if self.numbers is None else 0.0  # else ``drop_out`` has done it
        scale = 1.0 if self.scale is None else self.scale
        return {"rows": self.rows, "scale": scale, "dropout_p": rate, "key": self.key, "site": self.site}

    def drop_out(self, y: Tensor) -> Tensor:
        """Dropout of the branch, where the op that adds it can't number its masks."""
        if self.numbers is None or not self.dropout_p:
            return y
        return ops.dropout(y, self.numbers, dropout_p=self.dropout_p, key=self.key, site=self.site)


def add(x: Tensor, y: Tensor, step: Step, *, in_place: bool) -> Tensor:
    """The stream with a branch added."""
    function = owned_stream.scatter_residual_ if in_place else ops.scatter_residual
    return function(x, y, **step.added())


def add_and_norm(
    x: Tensor, y: Tensor | None, before: Step | None, rows: Tensor | None, norm: nn.Module, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """The stream with the previous branch added, if there is one, and normalised for the next.

    In place, the first call of a forward (y is None) copies x, and every other writes the stream that came from it.
    """
    kind: dict[str, Any] = {"norm": "rmsnorm" if isinstance(norm, nn.RMSNorm) else "layernorm", "eps": norm.eps}
    if y is None or before is None:
        return owned_stream.enter(x, rows, **kind) if in_place else (x, ops.gather_norm(x, rows, **kind))
    function = owned_stream.scatter_residual_gather_norm_ if in_place else ops.scatter_residual_gather_norm
    return function(x, y, next_rows=rows, **before.added(), **kind)
