"""The residual stream of an eager stack, written in place: only the samples of a branch are read and written.

    stream, xhat = enter(x, rows)                                            # a copy, so that x stays as it is
    stream, xhat = scatter_residual_gather_norm_(stream, y, rows, next_rows)  # once a branch, y from its xhat
    out = scatter_residual_(stream, y, rows)                                  # the last branch

The results and the gradients are those of the functional ops, bit for bit; saved bytes are the same.

Forward overwrites the stream. Backward overwrites its gradient, but only one that an op of this module made: the first
to go backward makes it, those before it write it. Between ``enter`` and the result the stream is the stack's alone: it
is not given to modules, hooks or users, who would see it change (a copy may be), it does not cross an activation
checkpoint (a checkpoint round the whole stack or inside one branch is right), and it does not enter ``torch.compile``,
where the functional ops do the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerdrop_fast.ops import _checks
from layerdrop_fast.ops._function import Function
from layerdrop_fast.ops.scatter_residual import check_branch

_ops = torch.ops.layerdrop_fast


def enter(
    x: Tensor, next_rows: Tensor | None = None, *, norm: str = "layernorm", eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A stream that is a copy of ``x``, and ``gather_norm`` of it for the first kept branch.

    Shapes, Args, Raises: as ``gather_norm``. Returns: (stream, xhat).
    """
    _checks.check_tensor("x", x, *_checks.FLOATING)
    _checks.check_rank("x", x, "[B, ..., D]")
    nothing = x.new_empty(0, *x.shape[1:])
    return scatter_residual_gather_norm_(_Enter.apply(x), nothing, _no_rows(x), next_rows, norm=norm, eps=eps)  # type: ignore[no-untyped-call]


def scatter_residual_(
    stream: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    site: Tensor | None = None,
) -> Tensor:
    """``scatter_residual`` in place. Shapes, Args: as there, ``stream`` for x. Returns: the stream.

    Raises: as there; ValueError: a stream that is not contiguous, or that shares memory with y. RuntimeError: in a
    compiled region.
    """
    _check_stream(stream, y, rows, scale, key, site)
    _checks.check_dropout(dropout_p, key, site, stream)
    scale_tensor = _checks.check_scale(scale, stream)
    return _ScatterResidual.apply(stream, y, rows, scale_tensor, dropout_p, key, site)  # type: ignore[no-any-return, no-untyped-call]


def scatter_residual_gather_norm_(
    stream: Tensor,
    y: Tensor,
    rows: Tensor | None = None,
    next_rows: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    site: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``scatter_residual_gather_norm`` in place. Shapes, Args: as there, ``stream`` for x. Returns: (stream, xhat).

    Raises: as there; ValueError: a stream that is not contiguous, or that shares memory with y. RuntimeError: in a
    compiled region.
    """
    _check_stream(stream, y, rows, next_rows, scale, key, site)
    if next_rows is not rows:
        _checks.check_rows("next_rows", next_rows, stream, stream.shape[0])
    _checks.check_dropout(dropout_p, key, site, stream)
    rms = _checks.check_norm(norm, eps)
    scale_tensor = _checks.check_scale(scale, stream)
    stream, xhat, _ = _ScatterResidualGatherNorm.apply(  # type: ignore[no-untyped-call]
        stream, y, rows, next_rows, scale_tensor, dropout_p, key, site, rms, eps
    )
    return stream, xhat


def _no_rows(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=like.device)


def _check_stream(stream: Tensor, y: Tensor, rows: Tensor | None, *others: object) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("a stream that is written in place cannot be compiled: use the functional ops there")
    check_branch(stream, y, rows)
    if not stream.is_contiguous():
        raise ValueError(f"stream: got strides {list(stream.stride())} for {list(stream.shape)}, expected contiguous")
    if y.numel() and y.untyped_storage()._cdata == stream.untyped_storage()._cdata:
        raise ValueError("y: got a tensor in the stream's own memory, expected one in memory of its own")
    # Autograd would find out after the stream is written.
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.is_inference() for v in (rows, *others)):
        raise ValueError("rows, scale, key, site: got a tensor of inference mode, expected one that can be saved")


# A mark on the tensor itself, which autograd hands on as it is; a sum or a copy of it has none.
_OWN = "_layerdrop_fast_own_gradient"


def _is_own(grad: Tensor) -> bool:
    return getattr(grad, _OWN, False)


def _set_own(grad: Tensor, own: bool) -> None:
    setattr(grad, _OWN, own)


class _Enter(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stream: Tensor) -> Tensor:
        _set_own(grad_stream, False)
        return grad_stream


class _ScatterResidual(Function):
    @staticmethod
    def forward(stream: Tensor, y: Tensor, *others: Any) -> Tensor:
        _ops.scatter_residual_(stream, y, *others)
        return stream

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        stream, y, rows, scale, ctx.dropout_p, key, site = inputs
        ctx.y_dtype = y.dtype
        ctx.mark_dirty(stream)
        ctx.save_for_backward(rows, scale, key, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stream: Tensor) -> Any:
        rows, scale, key, site = ctx.saved_tensors
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = _ops.scatter_residual_bwd(grad_stream, rows, scale, ctx.dropout_p, key, site, ctx.y_dtype)
        return grad_stream, grad_y, None, None, None, None, None


class _ScatterResidualGatherNorm(Function):
    @staticmethod
    def forward(stream: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return stream, *_ops.scatter_residual_gather_norm_(stream, y, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        stream, y, rows, next_rows, scale, ctx.dropout_p, key, site, ctx.rms, _ = inputs
        _, xhat, rstd = output
        ctx.y_dtype = y.dtype
        ctx.mark_dirty(stream)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(xhat, rstd, rows, next_rows, scale, key, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stream: Tensor, grad_xhat: Tensor, _: Tensor | None) -> Any:
        xhat, rstd, rows, next_rows, scale, key, site = ctx.saved_tensors
        need_y = ctx.needs_input_grad[1]
        branch = (rows if need_y else _no_rows(xhat), next_rows, scale, ctx.dropout_p, key, site, ctx.rms, ctx.y_dtype)
        if _is_own(grad_stream):
            grad_y = _ops.scatter_residual_gather_norm_bwd_(grad_stream, grad_xhat, xhat, rstd, *branch)
        else:
            grad_stream, grad_y = _ops.scatter_residual_gather_norm_bwd(grad_stream, grad_xhat, xhat, rstd, *branch)
            _set_own(grad_stream, True)
        return grad_stream, grad_y if need_y else None, *[None] * 8
