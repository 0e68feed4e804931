"""The schema of every op, once. Searching for an op's name finds its schema here and all of its backends.

``norm_linear`` and ``act_linear`` are compositions in ``ops/`` of torch's matrix products with the halves that are not
matrix products: ``norm_linear_bwd``, ``act`` and ``act_bwd``.

``reference/`` implements each op for every device (CompositeExplicitAutograd), ``csrc/`` takes the CPU key, Triton and
``csrc/cuda/`` the CUDA key; the dispatcher chooses. Gradients stand outside, in the ``autograd.Function``s of ``ops/``.

Every backend keeps to this:

- Inputs may have any strides and are never written; outputs are new and contiguous. An op whose name ends in an
  underscore writes its first tensor, which is contiguous and shares no memory with another argument: a stream, in place
  of returning it, so that kernels read and write only the samples that change; or the counters, whose step it advances.
- B samples, K rows, S positions (the product of the middle dimensions, which may be none), D channels. ``rows`` are
  ascending, without duplicates; None means all samples in order, K = B. K may be 0.
- A row of -1 is a spare row (a captured graph has room for more rows than a step keeps): it reads nothing and writes
  nothing, and its place in every [K, ...] output is 0.
- A sample that is not in ``rows`` has no influence; where it must appear in the output it is copied bit for bit.
- Sites below 256 belong to the plan's own decisions.
- Arithmetic and ``rstd`` are float32, for float64 tensors float64. Dropout masks: ``reference/dropout.py``.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "layerdrop_fast"

SCHEMAS = """
step_key(
    Tensor counters,          # int64 [3]: seed, step, stream
) -> Tensor                   # int32 [4]: the bits of the step's key

draw_plan(
    Tensor counters,          # int64 [3]: seed, step, stream
    Tensor rates,             # float64 [L], drop rates in [0, 1]
    SymInt? batch_size,       # B >= 1; None is batch granularity, B = 1
    bool systematic,          # fixed-size sampling instead of independent decisions
    SymInt min_kept,          # in [0, L] (batch granularity) or [0, B]
) -> (Tensor keep,            # bool [L, B]
      Tensor rows,            # int32 [L, B], the kept samples of each layer, ascending, padded with -1
      Tensor slot,            # int32 [L, B], a sample's place in rows, or -1
      Tensor kept)            # int64 [L], how many samples each layer keeps

draw_plan_(
    Tensor(a!) counters,      # int64 [3]: seed, step, stream; the step becomes the next one, past 2^64 - 1 it is 0
    Tensor rates,             # float64 [L], drop rates in [0, 1]
    SymInt? batch_size,       # B >= 1; None is batch granularity, B = 1
    bool systematic,          # fixed-size sampling instead of independent decisions
    SymInt min_kept,          # in [0, L] (batch granularity) or [0, B]
) -> (Tensor keep,            # bool [L, B]; all as draw_plan draws them at the step that was given
      Tensor rows,            # int32 [L, B]
      Tensor slot,            # int32 [L, B]
      Tensor kept)            # int64 [L]

gather_norm(
    Tensor x,                 # [B, ..., D] f64|f32|bf16|f16
    Tensor? rows,             # int32 [K]
    bool rms,                 # RMSNorm instead of LayerNorm
    float eps,                # >= 0
) -> (Tensor xhat,            # [K, ..., D], dtype of x
      Tensor rstd)            # [K, ...] f32 (f64 for f64)

gather_norm_bwd(
    Tensor grad_xhat,         # [K, ..., D], dtype of x
    Tensor xhat,              # [K, ..., D], dtype of x
    Tensor rstd,              # [K, ...] f32 (f64 for f64)
    Tensor? rows,             # int32 [K]
    SymInt batch_size,        # B
    bool rms,
) -> Tensor                   # grad_x [B, ..., D], 0 for a sample outside rows

scatter_residual(
    Tensor x,                 # [B, ..., D] f64|f32|bf16|f16
    Tensor y,                 # [K, ..., D] f64|f32|bf16|f16, may differ from x
    Tensor? rows,             # int32 [K]
    Tensor? scale,            # [] f32 (f64 where x is f64); None is 1
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]; None where dropout_p is 0
    Tensor? site,             # int32 [], in [256, 2^24); None where dropout_p is 0
) -> Tensor                   # [B, ..., D], dtype of x

scatter_residual_(
    Tensor(a!) x,             # [B, ..., D] f64|f32|bf16|f16
    Tensor y,                 # [K, ..., D] f64|f32|bf16|f16, may differ from x
    Tensor? rows,             # int32 [K]
    Tensor? scale,            # [] f32 (f64 where x is f64); None is 1
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]; None where dropout_p is 0
    Tensor? site,             # int32 [], in [256, 2^24); None where dropout_p is 0
) -> ()

scatter_residual_bwd(
    Tensor grad_out,          # [B, ..., D], dtype of x
    Tensor? rows,             # int32 [K]
    Tensor? scale,            # [] f32 (f64 for f64)
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]
    Tensor? site,             # int32 []
    ScalarType dtype,         # of y
) -> Tensor                   # grad_y [K, ..., D]; the gradient of x is grad_out itself

scatter_residual_gather_norm(
    Tensor x,                 # [B, ..., D] f64|f32|bf16|f16
    Tensor y,                 # [K, ..., D] f64|f32|bf16|f16, may differ from x
    Tensor? rows,             # int32 [K], of this branch
    Tensor? next_rows,        # int32 [N], of the next kept branch; may be the same tensor as rows
    Tensor? scale,            # [] f32 (f64 where x is f64); None is 1
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]; None where dropout_p is 0
    Tensor? site,             # int32 [], in [256, 2^24); None where dropout_p is 0
    bool rms,                 # RMSNorm instead of LayerNorm
    float eps,                # >= 0
) -> (Tensor x_out,           # [B, ..., D], dtype of x
      Tensor xhat,            # [N, ..., D], dtype of x: x_out, as rounded to its dtype, normalised
      Tensor rstd)            # [N, ...] f32 (f64 for f64)

scatter_residual_gather_norm_(
    Tensor(a!) x,             # [B, ..., D] f64|f32|bf16|f16; becomes x_out
    Tensor y,                 # [K, ..., D] f64|f32|bf16|f16, may differ from x
    Tensor? rows,             # int32 [K], of this branch
    Tensor? next_rows,        # int32 [N], of the next kept branch; may be the same tensor as rows
    Tensor? scale,            # [] f32 (f64 where x is f64); None is 1
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]; None where dropout_p is 0
    Tensor? site,             # int32 [], in [256, 2^24); None where dropout_p is 0
    bool rms,                 # RMSNorm instead of LayerNorm
    float eps,                # >= 0
) -> (Tensor xhat,            # [N, ..., D], dtype of x
      Tensor rstd)            # [N, ...] f32 (f64 for f64)

scatter_residual_gather_norm_bwd(
    Tensor grad_x_out,        # [B, ..., D], dtype of x
    Tensor grad_xhat,         # [N, ..., D], dtype of x
    Tensor xhat,              # [N, ..., D], dtype of x
    Tensor rstd,              # [N, ...] f32 (f64 for f64)
    Tensor? rows,             # int32 [K]
    Tensor? next_rows,        # int32 [N]
    Tensor? scale,            # [] f32 (f64 for f64)
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]
    Tensor? site,             # int32 []
    bool rms,
    ScalarType dtype,         # of y
) -> (Tensor grad_x,          # [B, ..., D], dtype of x
      Tensor grad_y)          # [K, ..., D]: scatter_residual_bwd of grad_x, as rounded to its dtype

scatter_residual_gather_norm_bwd_(
    Tensor(a!) grad_x,        # [B, ..., D], dtype of x; comes as grad_x_out
    Tensor grad_xhat,         # [N, ..., D], dtype of x
    Tensor xhat,              # [N, ..., D], dtype of x
    Tensor rstd,              # [N, ...] f32 (f64 for f64)
    Tensor? rows,             # int32 [K]
    Tensor? next_rows,        # int32 [N]
    Tensor? scale,            # [] f32 (f64 for f64)
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]
    Tensor? site,             # int32 []
    bool rms,
    ScalarType dtype,         # of y
) -> Tensor                   # grad_y [K, ..., D]

norm_linear_bwd(
    Tensor product,           # [O, D] f64|f32|bf16|f16: g^T xhat, g the gradient of the output
    Tensor? total,            # [O] f32 (f64 for f64), the sum of g over rows; None only where beta is None
    Tensor weight,            # [O, D] f64|f32|bf16|f16
    Tensor? gamma,            # [D] f64|f32|bf16|f16
    Tensor? beta,             # [D] f64|f32|bf16|f16
) -> (Tensor grad_weight,     # [O, D], dtype of weight
      Tensor grad_gamma,      # [D] f32 (f64 for f64)
      Tensor grad_beta)       # [D] f32 (f64 for f64), 0 where total is None

act(
    Tensor u,                 # [K, ..., F] f64|f32|bf16|f16; swiglu: [K, ..., 2F]
    Tensor? rows,             # int32 [K], number the elements of the dropout mask
    str activation,           # gelu | gelu_tanh | relu | silu | swiglu | identity
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]; None where dropout_p is 0
    Tensor? site,             # int32 [], in [256, 2^24); None where dropout_p is 0
) -> Tensor                   # a [K, ..., F], dtype of u

act_bwd(
    Tensor u,                 # [K, ..., F] or [K, ..., 2F] f64|f32|bf16|f16
    Tensor grad_a,            # [K, ..., F], may differ from u in dtype
    Tensor? rows,             # int32 [K]
    str activation,
    float dropout_p,          # in [0, 1]
    Tensor? key,              # int32 [4]
    Tensor? site,             # int32 []
) -> (Tensor grad_u,          # shape and dtype of u
      Tensor a)               # [K, ..., F], dtype of u: what act returned
"""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _schema in re.sub(r"#.*", "", SCHEMAS).strip().split("\n\n"):
    # The parser of schemas takes no trailing comma.
    LIBRARY.define(re.sub(r",\s*\)", ")", " ".join(_schema.split())))


def implement(op: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give an op its meaning on every device without a kernel of its own, and the shapes it returns.

    Args:
        op: a name in SCHEMAS.
        reference: plain PyTorch, called with the op's arguments.
        fake: called with the same arguments, returns new tensors of the right shapes, dtypes and device.
    """
    LIBRARY.impl(op, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=LIBRARY)


def op_names() -> list[str]:
    """The ops of SCHEMAS, in its order."""
    return re.findall(r"^(\w+)\(", SCHEMAS, flags=re.MULTILINE)
