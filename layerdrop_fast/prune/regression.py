"""What the loss of a step says of its decisions: a linear regression whose memory fades."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FadingRegression(nn.Module):
    """Ridge regression ``y = c + e . x``, in which what was seen earlier counts less and less.

    Losses are read from the device where they are needed only, all that are new at once; one that is not finite (a step
    that GradScaler skips) is left out.

    Shapes:
        x: float64 [L, n], on the host; y: float [n] -> slopes e: float64 [L]

    State dict: normal, new: float64 [L + 1, L + 2], ``[X^T X | X^T y]`` with X = [1, x], of all that was faded and of
    what is new since.
    """

    normal: Tensor
    new: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("normal", torch.zeros(size + 1, size + 2, dtype=torch.float64))
        self.register_buffer("new", torch.zeros(size + 1, size + 2, dtype=torch.float64))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.register_state_dict_pre_hook(lambda module, *_: module._settle())  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(lambda module, _: module._waiting.clear())  # type: ignore[no-untyped-call]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes n observations; does not wait for y."""
        self._waiting.append((x, y.detach().flatten()))

    def fade(self, share: float, common: Callable[[Tensor], Tensor]) -> None:
        """Weighs what was seen before with ``share`` and adds what is new, as ``common`` makes it of all ranks'."""
        self._settle()
        self.normal.mul_(share).add_(common(self.new))
        self.new.zero_()

    @property
    def slopes(self) -> Tensor:
        """e, drawn to 0 as one observation of variance 1 would; on the host."""
        normal = self.normal.cpu()
        ridge = torch.eye(len(normal), dtype=torch.float64)
        ridge[0, 0] = 1e-12  # the mean is not drawn to 0
        return torch.linalg.solve(normal[:, :-1] + ridge, normal[:, -1])[1:]  # type: ignore[no-any-return]

    def _settle(self) -> None:
        if not self._waiting:
            return
        x = torch.cat([x for x, _ in self._waiting], dim=1)
        y = torch.cat([y.to(torch.float64) for _, y in self._waiting]).cpu()
        self._waiting.clear()
        finite = y.isfinite()
        every = torch.cat((torch.ones_like(y)[None], x, y[None]))[:, finite]
        self.new += (every[:-1] @ every.t()).to(self.new.device)
