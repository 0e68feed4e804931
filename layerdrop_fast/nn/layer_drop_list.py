"""fairseq's ``LayerDropModuleList``: the swap-in for models that iterate over their layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_rate

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerDropModuleList(nn.ModuleList):
    """A ModuleList whose iteration drops layers at random while training.

    Each iteration draws one uniform number a layer from torch's CPU generator, in evaluation too, and yields layer l
    iff the list is evaluating or ``u_l > p``: after the same ``torch.manual_seed`` it yields the layers that fairseq's
    class yields. All may be dropped; nothing is rescaled. ``len``, indexing, ``children()`` and the state dict (plain
    ``"0.weight"`` names, no state of its own) see every layer. So do slices, which keep p, ``repr``, ``in`` and ``+``;
    in fairseq's class these draw numbers and miss layers.

    Called, it runs the kept layers with one draw: ``x`` goes through each, a tuple's first element feeds the next
    layer, other arguments are repeated.

        layers = LayerDropModuleList(0.2, [Block() for _ in range(16)])
        for layer in layers:
            x = layer(x)
        x = layers(x)  # the same

    Shapes:
        x: whatever the layers take; -> the last kept layer's first output, or x itself if all were dropped.

    Args:
        p: drop rate in [0, 1]; may be assigned between iterations.
        modules: the layers.

    Raises:
        ValueError: p outside [0, 1] or NaN.
        TypeError: p that is no number.

    Randomness: torch's CPU generator, ``len(self)`` float32 numbers an iteration.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.2; fairseq's ``modules/layer_drop.py``.
    """

    def __init__(self, p: float, modules: Iterable[nn.Module] | None = None) -> None:
        super().__init__(None if modules is None else every_layer(modules))
        self.p = p

    @property
    def p(self) -> float:
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_rate(value, "drop rate p")

    def __iter__(self) -> Iterator[nn.Module]:
        uniform = torch.empty(len(self), device="cpu").uniform_().tolist()
        # In float32, as torch compares a float32 tensor with a Python number.
        p = float(np.float32(self.p))
        for layer, u in zip(every_layer(self), uniform, strict=True):
            if not self.training or u > p:
                yield layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self:
            x = layer(x, *args, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return type(self)(self.p, every_layer(self)[index])
        return super().__getitem__(index)

    def __contains__(self, module: object) -> bool:
        return any(layer is module for layer in every_layer(self))

    def __add__(self, other: Iterable[nn.Module]) -> LayerDropModuleList:
        return type(self)(self.p, chain(every_layer(self), every_layer(other)))

    def extend(self, modules: Iterable[nn.Module]) -> Self:
        return super().extend(every_layer(modules))

    def __repr__(self) -> str:
        _, layers, tail = repr(nn.ModuleList(every_layer(self))).partition("\n")
        return f"{type(self).__name__}(p={self.p}{',' if layers else ')'}{layers}{tail}"


def every_layer(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """All layers of a list, a LayerDropModuleList's too, with none dropped and no number drawn.

    Raises:
        TypeError: torch's encoder or decoder, which holds a list.
    """
    if isinstance(modules, nn.TransformerEncoder | nn.TransformerDecoder):
        raise TypeError(
            f"layers: got a {type(modules).__name__}, expected its list, .layers; its .norm comes after them"
        )
    if isinstance(modules, nn.ModuleList):
        return [modules[index] for index in range(len(modules))]
    return list(modules)
