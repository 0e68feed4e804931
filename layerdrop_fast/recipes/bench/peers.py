"""The rules that other libraries drop layers by, restated so that they can be timed beside ours.

Each keeps to the published rule, in what it draws, what it computes and what it saves. ``outcome`` then overrides what
was drawn, at the cost of one small copy, so that several rules can be measured on the same kept layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_rate

MODES = ("row", "batch")


class Masked(nn.Module):
    """timm's ``DropPath`` and torchvision's ``StochasticDepth``: run the branch, then multiply it by a mask.

        y = branch * m,   m = Bernoulli(1 - p) / (1 - p)

    One m a sample (mode ``"row"``: timm, torchvision) or one for the whole batch (mode ``"batch"``: torchvision). It
    stands behind the branch, so that a dropped branch is computed and saved like any other; its gradients are zeros.

    Shapes:
        branch: [B, ...] -> the same shape.

    Args:
        p: drop rate in [0, 1].
        mode: ``"row"`` or ``"batch"``.
        scale_by_keep: divide by 1 - p (torchvision always does; at p = 1 there is nothing to divide).

    Randomness: torch's generator of the branch's device, B or 1 numbers a call while training; none at p = 0.

    Source: Huang et al. 2016; timm's ``layers/drop.py``; torchvision's ``ops/stochastic_depth.py``.
    """

    def __init__(self, p: float, mode: str = "row", scale_by_keep: bool = True) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {MODES}")
        self.p, self.mode, self.scale_by_keep = check_rate(p, "drop rate p"), mode, scale_by_keep
        self.outcome: bool | None = None  # whether all samples are kept, whatever is drawn

    def mask(self, branch: Tensor) -> Tensor:
        """m for this branch, [B or 1, 1, ...]."""
        density = 1.0 - self.p
        samples = branch.shape[0] if self.mode == "row" else 1
        mask = branch.new_empty([samples] + [1] * (branch.dim() - 1)).bernoulli_(density)
        if self.outcome is not None:
            mask.fill_(self.outcome)
        return mask.div_(density) if self.scale_by_keep and density > 0 else mask

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.mask(branch) if self.training and self.p > 0 else branch


class Skip(nn.ModuleList):
    """fairseq's ``LayerDropModuleList``: iterating yields each layer with probability 1 - p while training.

    One uniform number a layer is drawn from torch's CPU generator when an iteration starts, in evaluation too; layer l
    is yielded iff ``u[l] > p``, an element of a tensor that is compared when the loop gets there. Nothing is scaled.

    ``nn.LayerDropModuleList`` has the same semantics and reads the numbers in one go; this class keeps fairseq's
    comparisons, since they are what is timed.

    Args:
        p: drop rate in [0, 1].
        layers: the layers.

    Source: Fan, Grave, Joulin 2019; fairseq's ``modules/layer_drop.py``.
    """

    def __init__(self, p: float, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self.p = check_rate(p, "drop rate p")
        self.outcome: Tensor | None = None  # float32 [L]: numbers in place of those drawn

    def __iter__(self) -> Iterator[nn.Module]:
        uniform = torch.empty(len(self)).uniform_()
        if self.outcome is not None:
            uniform.copy_(self.outcome)
        for index, layer in enumerate(super().__iter__()):
            if not self.training or uniform[index] > self.p:
                yield layer

    def keep(self, layers: Sequence[int] | None) -> None:
        """Makes iterations yield exactly ``layers``, at any p below 1; None: those drawn."""
        if layers is None:
            self.outcome = None
        else:
            self.outcome = torch.zeros(len(self)).index_fill_(0, torch.tensor(layers, dtype=torch.int64), 1.0)
