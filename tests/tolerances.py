"""The one tolerance of the numerical tests: never more than twice the error of eager PyTorch in the same dtype."""

import torch
from torch import Tensor

# Relative to the largest exact element: what two right answers may differ by where eager happens to be exact.
FLOOR = {
    torch.float64: 1e-13,  # the yardstick is float64 itself: sums of a few thousand terms in another order
    torch.float32: 2**-22,  # two roundings of 2^-24 on either side of the yardstick
    torch.bfloat16: 2**-8,  # half a unit in the last place of numbers from 1 to 2
    torch.float16: 2**-11,  # as for bfloat16
}


def assert_no_worse_than_eager(ours: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """``max|ours - exact| <= 2 max|eager - exact| + FLOOR * max|exact|``, with the shape and dtype of eager."""
    assert ours.dtype == eager.dtype, f"{what}: got {ours.dtype}, expected {eager.dtype}"
    assert ours.shape == eager.shape, f"{what}: got {list(ours.shape)}, expected {list(eager.shape)}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error, eager_error = (ours.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()
    bound = 2 * eager_error + FLOOR[ours.dtype] * exact.abs().max().item()
    # A NaN on our side makes the comparison false.
    assert error <= bound, f"{what}: error {error:.3g}, eager's {eager_error:.3g}, at most {bound:.3g} allowed"
