"""gather_norm: the kept samples of a stream, normalised for their branch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast._library import implement
from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.reference import gather_norm as reference
from layerdrop_fast.reference.rows import accumulator

_ops = torch.ops.layerdrop_fast


def gather_norm(x: Tensor, rows: Tensor | None = None, *, norm: str = "layernorm", eps: float = 1e-5) -> Tensor:
    """Normalise the kept samples of ``x`` over channels, without affine: ``xhat[k] = normalise(x[rows[k]])``.

    ``normalise(v) = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps)``; RMSNorm takes the mean as 0. Saves xhat and
    1/sqrt(...) for backward, never x. Samples outside ``rows`` are not read; their gradient is 0.

    Shapes:
        x: [B, ..., D] f64|f32|bf16|f16; rows: int32 [K] -> [K, ..., D], dtype of x

    Args:
        x: the residual stream.
        rows: the kept samples, ascending and without duplicates; -1 is a spare row and gives 0; None keeps all.
        norm: "layernorm" or "rmsnorm".
        eps: added to the variance (the mean square), >= 0.

    Returns:
        xhat. K = 0 gives a tensor without rows.

    Raises:
        TypeError: a dtype is not among those above.
        ValueError: a shape, device, name or eps is wrong; on the CPU also row values out of range or not ascending.

    Source: Ba, Kiros, Hinton 2016 (layer normalisation); Zhang, Sennrich 2019 (RMSNorm). Uses no randomness.
    """
    _checks.check_tensor("x", x, *_checks.FLOATING)
    _checks.check_rank("x", x, "[B, ..., D]")
    _checks.check_rows("rows", rows, x, x.shape[0])
    rms = _checks.check_norm(norm, eps)
    xhat, _ = _GatherNorm.apply(x, rows, rms, eps)  # type: ignore[no-untyped-call]
    return xhat  # type: ignore[no-any-return]


class _GatherNorm(Function):
    @staticmethod
    def forward(x: Tensor, rows: Tensor | None, rms: bool, eps: float) -> Any:
        return _ops.gather_norm(x, rows, rms, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, rows, ctx.rms, _ = inputs
        xhat, rstd = output
        ctx.batch_size = x.shape[0]
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(xhat, rstd, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_xhat: Tensor, _: Tensor | None) -> Any:
        xhat, rstd, rows = ctx.saved_tensors
        return _ops.gather_norm_bwd(grad_xhat, xhat, rstd, rows, ctx.batch_size, ctx.rms), None, None, None


def _fake_gather_norm(x: Tensor, rows: Tensor | None, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    kept = x.shape[0] if rows is None else rows.shape[0]
    return (
        x.new_empty(kept, *x.shape[1:]),
        x.new_empty(kept, *x.shape[1:-1], dtype=accumulator(x.dtype)),
    )


def _fake_gather_norm_bwd(
    grad_xhat: Tensor, xhat: Tensor, rstd: Tensor, rows: Tensor | None, batch_size: int, rms: bool
) -> Tensor:
    return xhat.new_empty(batch_size, *xhat.shape[1:])


implement("gather_norm", reference=reference.gather_norm, fake=_fake_gather_norm)
implement("gather_norm_bwd", reference=reference.gather_norm_bwd, fake=_fake_gather_norm_bwd)
