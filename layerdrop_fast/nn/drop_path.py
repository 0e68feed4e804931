"""timm's ``DropPath`` and torchvision's ``StochasticDepth``: masks behind a branch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from layerdrop_fast._checks import check_choice, check_rate

MODES = ("batch", "row")


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """timm's ``drop_path``: zeroes whole samples of a branch.

        y[b] = x[b] * m[b],   m[b] = Bernoulli(1 - p) / (1 - p)

    Saves m, one number a sample, and nothing else. The branch has been computed by then: ``LayerDropStack(...,
    schedule="from_layers")`` skips it.

    Shapes:
        x: [B, ...] -> the same shape; x itself where nothing is dropped.

    Args:
        drop_prob: p in [0, 1].
        training: nothing is dropped otherwise.
        scale_by_keep: divide by 1 - p, so that the mean stays (at p = 1 there is nothing to divide).

    Raises:
        ValueError: p outside [0, 1]. TypeError: p that is no number.

    Randomness: torch's generator of x's device, B numbers, a sample is kept iff its number is below 1 - p: after the
    same ``torch.manual_seed`` timm's function drops the same samples.

    Source: Huang et al. 2016; timm's ``layers/drop.py``.
    """
    density = 1.0 - check_rate(drop_prob, "drop_prob")
    if not training or density == 1.0:
        return x
    return x * _mask(x, "row", density, scale_by_keep)


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """torchvision's ``stochastic_depth``: zeroes a branch for some samples (mode ``"row"``) or all (``"batch"``).

    As ``drop_path`` with ``scale_by_keep``; mode ``"batch"`` draws one number for the batch.

    Shapes:
        input: [B, ...] -> the same shape; the input itself where nothing is dropped.

    Args:
        p: drop rate in [0, 1].
        mode: ``"batch"`` or ``"row"``.
        training: nothing is dropped otherwise.

    Raises:
        ValueError: p outside [0, 1], another mode. TypeError: p that is no number.

    Randomness: torch's generator of the input's device, as torchvision's function.

    Source: Huang et al. 2016; torchvision's ``ops/stochastic_depth.py``.
    """
    density = 1.0 - check_rate(p, "p")
    check_choice(mode, "mode", MODES)
    if not training or density == 1.0:
        return input
    return input * _mask(input, mode, density, True)


def _mask(x: Tensor, mode: str, density: float, scale: bool) -> Tensor:
    samples = x.shape[0] if mode == "row" else 1
    mask = x.new_empty([samples] + [1] * (x.dim() - 1)).bernoulli_(density)
    return mask.div_(density) if scale and density > 0 else mask


class DropPath(nn.Module):
    """``drop_path`` as a module, in place of timm's: ``DropPath(drop_prob=0.0, scale_by_keep=True)``.

    Shapes, Raises, Randomness, Source: as ``drop_path``. The module has no state.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = check_rate(drop_prob, "drop_prob")
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


class StochasticDepth(nn.Module):
    """``stochastic_depth`` as a module, in place of torchvision's: ``StochasticDepth(p, mode)``.

    Shapes, Raises, Randomness, Source: as ``stochastic_depth``. The module has no state.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = check_rate(p, "p")
        self.mode = check_choice(mode, "mode", MODES)

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"


class _Place(NamedTuple):
    """Where a DropPath or StochasticDepth is registered. The same module may stand in several places."""

    layer: int
    parent: nn.Module
    name: str
    module: nn.Module
    rate: float


def take_rates(layers: nn.ModuleList, granularity: str, scale: str | None) -> tuple[list[float], str]:
    """The drop rates of the layers and the residual scale, from the DropPath and StochasticDepth modules in them.

    Afterwards these are ``nn.Identity``. A layer without any, or with ``nn.Identity`` in its place, has rate 0.

    Args:
        granularity: of the stack that is to drop in their place: ``"sample"`` for DropPath and mode ``"row"``,
            ``"batch"`` for mode ``"batch"``.
        scale: None for what the modules do: ``"inverse"`` where they divide by 1 - p, else ``"none"``.

    Raises:
        ValueError: modules of one layer have different rates, none is found in any layer, or their mode or scaling is
            not one and the same and the stack's; nothing is changed then.
    """
    places = _places(layers)
    if not places:
        raise ValueError(
            f'schedule is "from_layers", but none of the {len(layers)} layers holds a DropPath or StochasticDepth, '
            "expected at least one: pass drop rates"
        )
    rates = [_rate_of(layer, [place.rate for place in places if place.layer == layer]) for layer in range(len(layers))]
    dropping = [place for place in places if place.rate > 0]
    for place in dropping:
        needed = "batch" if getattr(place.module, "mode", "row") == "batch" else "sample"
        if needed != granularity:
            raise ValueError(
                f"granularity is {granularity!r}, but {_described(place)} decides for each {needed}, "
                f"expected {needed!r}"
            )
    if scale is None:
        scaled = {bool(getattr(place.module, "scale_by_keep", True)) for place in dropping}
        if len(scaled) > 1:
            raise ValueError("some layers' DropPath have scale_by_keep=True and some False, expected one: pass scale=")
        scale = "none" if scaled == {False} else "inverse"
    for place in places:
        setattr(place.parent, place.name, nn.Identity().train(place.module.training))
    return rates, scale


def refuse_rates(layers: nn.ModuleList) -> None:
    """Where a stack has drop rates of its own, those of DropPath and StochasticDepth modules would come on top.

    Raises:
        ValueError: a layer holds one with a rate above 0.
    """
    for place in _places(layers):
        if place.rate > 0:
            raise ValueError(
                f"schedule sets drop rates, and so does {_described(place)} with rate {place.rate}: expected "
                'schedule="from_layers", or rate 0 there'
            )


def _places(layers: nn.ModuleList) -> list[_Place]:
    """All DropPath and StochasticDepth modules in the layers: this package's, timm's, torchvision's, transformers'."""
    found = []
    for owner, parent in layers.named_modules(remove_duplicate=False):
        for name, module in parent._modules.items():
            attribute = None if module is None else _rate_attribute(module)
            if module is not None and attribute is not None:
                layer = int((owner or name).partition(".")[0])
                rate = check_rate(getattr(module, attribute) or 0.0, f"layer {layer}: {attribute}")
                found.append(_Place(layer, parent, name, module, rate))
    return found


def _rate_attribute(module: nn.Module) -> str | None:
    """The attribute with the drop rate, known by the name of the class, so that no other library is imported."""
    for kind in type(module).__mro__:
        # transformers puts the model's name before it.
        if kind.__name__.endswith("DropPath") and hasattr(module, "drop_prob"):
            return "drop_prob"
        if kind.__name__ == "StochasticDepth" and hasattr(module, "p"):
            return "p"
    return None


def _rate_of(layer: int, rates: list[float]) -> float:
    if len(set(rates)) > 1:
        raise ValueError(f"layer {layer} holds drop rates {rates}, expected one rate: it is dropped as a whole")
    return rates[0] if rates else 0.0


def _described(place: _Place) -> str:
    mode = getattr(place.module, "mode", None)
    return f"layer {place.layer}'s {type(place.module).__name__}" + (f" of mode {mode!r}" if mode else "")
