"""gather_norm: kept samples, normalised without affine (Ba, Kiros, Hinton 2016; Zhang, Sennrich 2019)."""

from torch import Tensor

from layerdrop_fast.reference.rows import accumulator, clear_spare, put, take


def gather_norm(x: Tensor, rows: Tensor | None, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    """``xhat = (x - mean) * rstd``, ``rstd = 1 / sqrt(mean((x - mean)^2) + eps)``; RMSNorm has no mean."""
    centred = take(x, rows).to(accumulator(x.dtype))
    if not rms:
        centred = centred - centred.mean(-1, keepdim=True)
    rstd = clear_spare((centred.square().mean(-1, keepdim=True) + eps).rsqrt(), rows)
    return (centred * rstd).to(x.dtype).contiguous(), rstd.squeeze(-1).contiguous()


def norm_gradient(grad_xhat: Tensor, xhat: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """``rstd * (g - mean(g) - xhat * mean(g * xhat))``, RMSNorm without mean(g); dtype of rstd."""
    g, xhat = grad_xhat.to(rstd.dtype), xhat.to(rstd.dtype)
    projected = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not rms:
        projected = projected - g.mean(-1, keepdim=True)
    return rstd.unsqueeze(-1) * projected


def gather_norm_bwd(
    grad_xhat: Tensor, xhat: Tensor, rstd: Tensor, rows: Tensor | None, batch_size: int, rms: bool
) -> Tensor:
    """The gradient of x: the norm's gradient in the kept samples, 0 in the others."""
    grad = norm_gradient(grad_xhat, xhat, rstd, rms).to(xhat.dtype)
    return put(grad.new_zeros(batch_size, *grad.shape[1:]), rows, grad).contiguous()
