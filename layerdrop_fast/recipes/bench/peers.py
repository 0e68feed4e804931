"""The rules that other libraries drop layers by, restated so that they can be timed beside ours.

Each keeps to the published rule, in what it draws, what it computes and what it saves. ``outcome`` or ``keep`` then
overrides what was drawn, at the cost of one small copy, so that several rules can be measured on the same decisions.

    Masked          timm, torchvision   runs all, multiplies each branch by a mask
    Skip            fairseq             runs the kept layers
    RunAndDiscard   fairseq2            runs all, discards the outputs of dropped layers
    SampleSkip      torchtune           runs a layer on the kept samples
    Subset          DINOv2              runs a branch on a fixed number of samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_integer, check_rate, check_word

MODES = ("row", "batch")

# Stands for the uniform number of a kept layer: above every drop rate, 1 too.
KEPT = 2.0


def _indices(given: Tensor | Sequence[int], name: str) -> Tensor:
    """Distinct indices, as an int64 tensor [k] in the order given; a tensor stays on its device."""
    if isinstance(given, Tensor):
        if given.dtype != torch.int64:
            raise TypeError(f"{name}: got {given.dtype}, expected torch.int64")
        if given.dim() != 1:
            raise ValueError(f"{name}: got {list(given.shape)}, expected [k]")
        indices = given.detach().clone()
    else:
        indices = torch.tensor([check_integer(index, f"an index in {name}") for index in given], dtype=torch.int64)
    values = indices.tolist()
    if len(set(values)) < len(values) or min(values, default=0) < 0:
        raise ValueError(f"{name}: got {values}, expected distinct indices from 0 on")
    return indices


def _check_last(indices: list[int], name: str, count: int) -> None:
    if indices and max(indices) >= count:
        raise ValueError(f"{name}: got index {max(indices)}, expected indices below {count}")


def _numbers(layers: Tensor | Sequence[int], count: int) -> Tensor:
    """In place of ``count`` uniform numbers: float32 [count] that keep exactly ``layers``."""
    kept = _indices(layers, "layers").cpu()
    _check_last(kept.tolist(), "layers", count)
    return torch.zeros(count, device="cpu").index_fill_(0, kept, KEPT)


def _check_drawn(p: float) -> None:
    if p == 0:
        raise ValueError("p is 0, where nothing is drawn, expected p in (0, 1] to override what is drawn")


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
        self.outcome: Tensor | None = None  # bool [B or 1]: the mask in place of the one drawn

    def mask(self, branch: Tensor) -> Tensor:
        """m for this branch, [B or 1, 1, ...]."""
        density = 1.0 - self.p
        samples = branch.shape[0] if self.mode == "row" else 1
        mask = branch.new_empty([samples] + [1] * (branch.dim() - 1)).bernoulli_(density)
        if self.outcome is not None:
            mask.copy_(self.outcome.view_as(mask))
        return mask.div_(density) if self.scale_by_keep and density > 0 else mask

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.mask(branch) if self.training and self.p > 0 else branch

    def keep(self, samples: Tensor | None) -> None:
        """Makes training calls keep the samples where bool [B] (mode "batch": [1]) is true; None: those drawn.

        Needs p > 0.
        """
        if samples is not None:
            _check_drawn(self.p)
        self.outcome = samples


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

    def keep(self, layers: Tensor | Sequence[int] | None) -> None:
        """Makes iterations yield exactly ``layers``, int64 [k] or a sequence, while training; None: those drawn."""
        self.outcome = None if layers is None else _numbers(layers, len(self))


class _Discard(torch.autograd.Function):
    """x, with ``dropped`` in the graph all the same: its gradient is zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class RunAndDiscard(nn.ModuleList):
    """fairseq2's ``layer_drop_p``: run every layer, and pass on the input of a dropped one in place of its output.

        x[l + 1] = layer_l(x[l])   if u[l] > p
                   x[l]            otherwise, with gradient 0 for layer_l(x[l])

    The graph is that of the dense model, whatever is drawn: each layer saves what it always saves, its backward runs
    on zeros, and every weight gets a gradient. Nothing is scaled.

    Shapes:
        x: [B, ...] -> the same shape, as the layers have it.

    Args:
        p: drop rate in [0, 1].
        layers: the layers.
        generator: a CPU generator to draw from; None: torch's.

    Randomness: one vector of L uniform numbers a call on the CPU, while training and at p > 0. Each becomes a Python
    float before it is compared with p, so that p is not rounded to float32, as it is in ``Skip``.

    Source: Fan, Grave, Joulin 2019; fairseq2's ``models/transformer/encoder.py`` (decoder alike).
    """

    def __init__(self, p: float, layers: Iterable[nn.Module], generator: torch.Generator | None = None) -> None:
        super().__init__(layers)
        self.p = check_rate(p, "drop rate p")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator is on {generator.device}, expected one on cpu")
        self.generator = generator
        self.outcome: Tensor | None = None  # float32 [L]: numbers in place of those drawn

    def forward(self, x: Tensor) -> Tensor:
        uniform = None
        if self.training and self.p > 0:
            uniform = torch.rand(len(self), generator=self.generator, device="cpu")
            if self.outcome is not None:
                uniform.copy_(self.outcome)
        for index, layer in enumerate(self):
            dropped = uniform is not None and float(uniform[index]) <= self.p
            out = layer(x)
            x = _Discard.apply(x, out) if dropped else out  # type: ignore[no-untyped-call]
        return x

    def keep(self, layers: Tensor | Sequence[int] | None) -> None:
        """Makes training calls keep exactly ``layers``, int64 [k] or a sequence; None: those drawn. Needs p > 0."""
        if layers is not None:
            _check_drawn(self.p)
        self.outcome = None if layers is None else _numbers(layers, len(self))


class SampleSkip(nn.Module):
    """torchtune's ``LayerDropout``: call the layer on the kept samples only, and write the result into a copy of x.

        y = clone of x,   y[kept] = function(x[kept]),   kept = {i : m[i] = 0},   m[i] ~ Bernoulli(p)

    m is drawn on the CPU, moved to x's device and dtype, and the host then waits for the number of kept samples. Where
    none is kept, the function is not called and y is the copy of x. In evaluation and at p = 0, y = function(x).
    Nothing is scaled. ``inferred`` is the share that the last call kept, a tensor on x's device.

    Shapes:
        x: [B, ...] -> the same shape; the function takes and returns [k, ...] for any k from 1 to B.

    Args:
        p: drop rate in [0, 1].
        seed: of this module's generator, an integer in [0, 2**64) (torchtune gives layer l the seed l); None: torch's
            default seed, the same for all modules.

    Randomness: B numbers a call from a private CPU generator, while training and at p > 0; a state dict does not hold
    its state.

    Source: Elhoushi et al. 2024 (LayerSkip), section 4.1; torchtune's ``modules/layer_dropout.py``.
    """

    def __init__(self, p: float, seed: int | None = None) -> None:
        super().__init__()
        self.p = check_rate(p, "drop rate p")
        self.generator = torch.Generator(device="cpu")
        if seed is not None:
            self.generator.manual_seed(check_word(seed, "seed"))
        self.inferred: float | Tensor = 1.0
        self.kept: Tensor | None = None  # int64 [k], on the CPU: rows in place of those drawn
        self.outcome: Tensor | None = None  # float32 [B]: the mask that keeps them

    def mask(self, samples: int) -> Tensor:
        """m, float32 [samples] on the CPU: 1 drops."""
        mask = torch.bernoulli(torch.full([samples], self.p, device="cpu"), generator=self.generator)
        if self.kept is not None:
            if self.outcome is None or len(self.outcome) != samples:
                _check_last(self.kept.tolist(), "rows", samples)
                self.outcome = torch.ones(samples, device="cpu").index_fill_(0, self.kept, 0.0)
            mask.copy_(self.outcome)
        return mask

    def forward(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            self.inferred = 1.0
            return function(x)
        mask = self.mask(x.shape[0]).to(x.device).to(x.dtype)
        self.inferred = 1 - mask.mean()
        # Of a single sample an index without dimensions, as published.
        rows = (mask == 0).nonzero().squeeze()
        if rows.numel() == 0:
            return x.clone()
        out = function(x.index_select(0, rows))
        y = x.clone()
        y[rows] = out
        return y

    def keep(self, rows: Tensor | Sequence[int] | None) -> None:
        """Makes training calls keep exactly ``rows``, int64 [k] or a sequence; None: those drawn. Needs p > 0.

        The numbers are still drawn, the mask still moves to the device, and its kept rows are still looked for there:
        they are called in ascending order.
        """
        if rows is not None:
            _check_drawn(self.p)
        self.kept = None if rows is None else _indices(rows, "rows").cpu()
        self.outcome = None


class Subset(nn.Module):
    """DINOv2's ``drop_add_residual_stochastic_depth``: run the branch on k of the B samples, add what it returns.

        y = x,   y[r] += (B / k) branch(x[r]),   k = max(floor(B (1 - p)), 1),   r = the first k of a permutation of B

    k is fixed, so that shapes are static and the host waits for nothing; with few samples the rate is not p (B = 1
    never drops, B = 2 drops half for every p above 0). y is a copy, one for each branch. Each call draws anew, so
    attention and feed-forward of one layer run on different samples. In evaluation and at p = 0, y = x + branch(x).

    DINOv2's ``Block`` takes this rule only at p > 0.1, and ``DropPath`` (here: ``Masked``) at 0 < p <= 0.1; its list of
    crops takes it at every p > 0. This class is the subset rule, at every p.

    Shapes:
        x: [B, ...] -> the same shape; the branch takes and returns [k, ...], B where nothing is dropped.

    Args:
        p: drop rate in [0, 1].

    Randomness: a permutation of B from torch's generator of x's device a call, while training and at p > 0.

    Source: Oquab et al. 2023 (DINOv2), section 5; its ``layers/block.py``.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = check_rate(p, "drop rate p")
        self.kept: Tensor | None = None  # int64 [k]: rows in place of those drawn

    def count(self, samples: int) -> int:
        """k for a batch of ``samples``."""
        return max(int(samples * (1.0 - self.p)), 1)

    def rows(self, x: Tensor) -> Tensor:
        """r for x, int64 [k] on its device."""
        samples = x.shape[0]
        rows = torch.randperm(samples, device=x.device)[: self.count(samples)]
        return rows if self.kept is None else rows.copy_(self.kept)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.training or self.p == 0:
            return x + branch(x)
        rows, samples = self.rows(x), x.shape[0]
        residual = branch(x[rows]).flatten(1).to(x.dtype)
        return x.flatten(1).index_add(0, rows, residual, alpha=samples / self.count(samples)).view_as(x)

    def keep(self, rows: Tensor | Sequence[int] | None, samples: int = 0) -> None:
        """Makes training calls on B = ``samples`` take exactly ``rows``, in this order; None: those drawn.

        The permutation is still drawn. Needs p > 0.

        Args:
            rows: int64 [k], best on x's device, or a sequence.

        Raises:
            ValueError: rows that are not exactly k, or beyond the batch.
        """
        if rows is None:
            self.kept = None
            return
        _check_drawn(self.p)
        indices = _indices(rows, "rows")
        if len(indices) != self.count(samples):
            raise ValueError(f"rows: got {len(indices)}, expected k = {self.count(samples)} of {samples} samples")
        _check_last(indices.tolist(), "rows", samples)
        self.kept = indices
