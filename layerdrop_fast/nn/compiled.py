"""What compiled layers need so that no plan compiles them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast.nn.transformer_layer import Visit
from layerdrop_fast.nn.turn import Kept


def is_compiled(layer: nn.Module) -> bool:
    """Whether calling the layer enters a compiled region."""
    return layer._compiled_call_impl is not None or hasattr(layer, "_orig_mod")


@torch._disable_dynamo  # type: ignore[attr-defined]
def outside(function: Callable[..., Any], **keywords: Any) -> Any:
    """Calls a function in plain Python: the graph of a compiled region ends there, and another begins behind."""
    return function(**keywords)


def with_unknown_sizes(kept: list[Kept]) -> list[Kept]:
    """Marks the rows so that a compiled region serves any number of them."""
    # Importing it takes seconds, which those who compile nothing need not wait for.
    from torch._dynamo.decorators import mark_unbacked

    for unit in kept:
        if unit.rows is not None:
            mark_unbacked(unit.rows, 0)
    return kept


def compilable(x: Tensor, y: Tensor | None, visit: Visit) -> tuple[Tensor | None, Visit]:
    """The arguments of a layer so that one graph serves every number of samples, none included, and every layer.

    Where the layer runs on rows, one that has no branch before it gets an empty one; sizes are marked as unknown.
    """
    from torch._dynamo.decorators import mark_unbacked

    steps = [step for step in visit.steps if step is not None]
    if steps[0].rows is None:
        return y, visit
    if y is None:
        none = torch.empty(0, dtype=torch.int32, device=x.device)
        y = x.new_empty(0, *x.shape[1:]).requires_grad_(torch.is_grad_enabled())
        # Tensors of its own: a graph guards on which of its inputs are the same tensor.
        site, scale = (None if value is None else value.clone() for value in (steps[0].site, steps[0].scale))
        visit = visit._replace(before=steps[0]._replace(rows=none, site=site, scale=scale))
    mark_unbacked(y, 0)
    for step in (visit.before, *steps):
        if step is not None and step.rows is not None:
            mark_unbacked(step.rows, 0)
    return y, visit
