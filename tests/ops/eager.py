"""What the public functions compute, as a user of plain PyTorch writes it, and how the two are compared.

Below that the raw ops: arguments for any of them, and the comparison with the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdrop_fast.reference import act_linear as _act_linear
from layerdrop_fast.reference import gather_norm as _gather_norm
from layerdrop_fast.reference import scatter_residual as _scatter_residual
from layerdrop_fast.reference import scatter_residual_gather_norm as _scatter_residual_gather_norm
from layerdrop_fast.reference.dropout import keep_mask
from layerdrop_fast.reference.philox import step_key
from layerdrop_fast.reference.rows import accumulator, take
from tests.tolerances import assert_no_worse_than_eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KEY = step_key(torch.tensor([11, 5, 2]))
SITE = torch.tensor(260, dtype=torch.int32)
SCALE = torch.tensor(1.25, dtype=torch.float64)

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": lambda u: F.silu(u.chunk(2, -1)[0]) * u.chunk(2, -1)[1],
    "identity": lambda u: u.clone(),
}


def tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values, rounded to ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(*indices: int) -> Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def gather_norm(x: Tensor, rows: Tensor | None = None, norm: str = "layernorm", eps: float = 1e-5) -> Tensor:
    kept = x if rows is None else x[rows.long()]
    normalise = F.layer_norm if norm == "layernorm" else F.rms_norm
    return normalise(kept, kept.shape[-1:], eps=eps)


def dropout(values: Tensor, rows: Tensor | None, p: float) -> Tensor:
    return values * keep_mask(values.shape, rows, p, KEY, SITE) / (1 - p) if p else values


def scatter_residual(
    x: Tensor, y: Tensor, rows: Tensor | None = None, scale: float = 1.0, dropout_p: float = 0.0
) -> Tensor:
    branch = (scale * dropout(y, rows, dropout_p)).to(x.dtype)
    return x + branch if rows is None else x.index_add(0, rows, branch)


def norm_linear(
    xhat: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    h = xhat if gamma is None else xhat * gamma
    return F.linear(h if beta is None else h + beta, weight, bias)


def act_linear(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    rows: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    return F.linear(dropout(ACTIVATIONS[activation](u), rows, dropout_p), weight, bias)


Outputs = dict[str, Tensor]


def run(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> Outputs:
    """Outputs and the gradients of all inputs, for fixed gradients of the outputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [tensor(*out.shape, dtype=out.dtype, seed=90 + i) for i, out in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    eager: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
) -> None:
    """Forward and every gradient, ours and eager in the inputs' dtypes, against eager in float64."""
    exact = run(eager, {name: value.double() for name, value in inputs.items()})
    got, expected = run(ours, inputs), run(eager, inputs)
    for what in exact:
        assert_no_worse_than_eager(got[what], expected[what], exact[what], what)


def with_nan_payloads(x: Tensor, samples: list[int]) -> Tensor:
    """``x`` with quiet and signalling NaNs, each with a payload, in all of ``samples``."""
    bits = {torch.float64: 0x7FF4000000012345, torch.float32: 0x7FA12345, torch.bfloat16: 0x7FA1, torch.float16: 0x7D23}
    quiet = {torch.float64: 1 << 51, torch.float32: 1 << 22, torch.bfloat16: 1 << 6, torch.float16: 1 << 9}
    poisoned = x.clone()
    words = as_bits(poisoned)
    words[samples] = bits[x.dtype]
    words[samples, ..., ::2] |= quiet[x.dtype]
    return poisoned


def as_bits(x: Tensor) -> Tensor:
    """A view that tells NaNs, and zeros, apart."""
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_bits(a), as_bits(b))


class Saved:
    """What autograd saves in a with block, by storage."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value)

    def _pack(self, value: Tensor) -> Tensor:
        self.tensors.append(value)
        return value

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def beyond(self, *known: Tensor | None) -> list[Tensor]:
        """The saved tensors that are none of ``known``."""
        storages = {value.untyped_storage().data_ptr() for value in known if value is not None}
        return [value for value in self.tensors if value.untyped_storage().data_ptr() not in storages]


# What leads each result of a raw op: B samples, K rows or N next rows. The first result of an op in place is what it
# has made of its first argument.
RESULTS = {
    "gather_norm": "NN",
    "gather_norm_bwd": "B",
    "scatter_residual": "B",
    "scatter_residual_": "B",
    "scatter_residual_bwd": "K",
    "scatter_residual_gather_norm": "BNN",
    "scatter_residual_gather_norm_": "BNN",
    "scatter_residual_gather_norm_bwd": "BK",
    "scatter_residual_gather_norm_bwd_": "BK",
    "act": "K",
    "act_bwd": "KK",
}
NAMES = list(RESULTS)
REFERENCE: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in (_gather_norm, _scatter_residual, _scatter_residual_gather_norm, _act_linear)
    for name in NAMES
    if hasattr(module, name)
}


def op(name: str) -> Any:
    return getattr(torch.ops.layerdrop_fast, name).default


def parameters(name: str) -> list[str]:
    return [argument.name for argument in op(name)._schema.arguments]


def has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"layerdrop_fast::{name}", "CPU")


@dataclass(frozen=True)
class Case:
    """Arguments of any raw op for one stream."""

    shape: tuple[int, ...] = (5, 3, 17)  # of the stream, [B, ..., D]
    dtype: torch.dtype = torch.float32
    branch: torch.dtype | None = None  # of y, grad_y and grad_a, where it is not dtype
    rows: tuple[int, ...] | None = None  # of gather_norm and its backward: next_rows
    next_rows: tuple[int, ...] | None = None
    p: float = 0.0
    scale: float | None = None
    rms: bool = False
    eps: float = 1e-5
    activation: str = "relu"
    seed: int = 0

    def leading(self, kind: str) -> tuple[int, ...]:
        """The rows that lead a result, or an argument, of this kind."""
        rows = {"B": None, "K": self.rows, "N": self.next_rows}[kind]
        return tuple(range(self.shape[0])) if rows is None else rows

    def arguments(self, name: str) -> tuple[Any, ...]:
        rows = self.next_rows if name.startswith("gather_norm") else self.rows
        return tuple(self._argument(parameter, rows) for parameter in parameters(name))

    def _argument(self, parameter: str, rows: tuple[int, ...] | None) -> Any:
        if parameter in _TENSORS:
            return self._tensor(*_TENSORS[parameter])
        return {
            "rows": None if rows is None else rows_of(*rows),
            "next_rows": None if self.next_rows is None else rows_of(*self.next_rows),
            "scale": None if self.scale is None else torch.tensor(self.scale, dtype=accumulator(self.dtype)),
            "dropout_p": self.p,
            "key": KEY.clone() if self.p else None,
            "site": SITE.clone() if self.p else None,
            "dtype": self.branch or self.dtype,
            "batch_size": self.shape[0],
            **{field: getattr(self, field) for field in ("rms", "eps", "activation")},
        }[parameter]

    def _tensor(self, kind: str, which: str, seed: int) -> Tensor:
        dtype = {"stream": self.dtype, "u": self.dtype, "branch": self.branch or self.dtype}.get(which)
        double = which == "u" and self.activation == "swiglu"
        channels = () if which == "rstd" else (self.shape[-1] * (2 if double else 1),)
        values = tensor(len(self.leading(kind)), *self.shape[1:-1], *channels, seed=16 * self.seed + seed)
        return values.abs().add(0.1).to(accumulator(self.dtype)) if which == "rstd" else values.to(dtype)


# What leads it, what it is, its seed.
_TENSORS = {
    **dict.fromkeys(("x", "grad_out", "grad_x_out", "grad_x"), ("B", "stream", 0)),
    "y": ("K", "branch", 1),
    "xhat": ("N", "stream", 2),
    "grad_xhat": ("N", "stream", 3),
    "rstd": ("N", "rstd", 4),
    "u": ("K", "u", 5),
    "grad_a": ("K", "branch", 6),
}


# What leads the arguments.
KINDS = {parameter: kind for parameter, (kind, _, _) in _TENSORS.items()}


def listed(returned: Any) -> list[Tensor]:
    """What an op returns, however many there are."""
    return [] if returned is None else [returned] if torch.is_tensor(returned) else list(returned)


def results(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What an op returns, after what it writes; its arguments are left alone."""
    written = [arguments[0].clone()] if name.endswith("_") else []
    return written + listed(function(*written, *arguments[len(written) :]))


def assert_agrees(name: str, case: Case, given: tuple[Any, ...] | None = None, *, from_terms: bool = False) -> None:
    """The reference's bits where the op adds and multiplies only, else its accuracy; 0 in the place of spare rows.

    ``from_terms``: the accuracy is relative to the largest term of a sum, where that is more than any of its results.
    """
    given = case.arguments(name) if given is None else given
    got, expected = results(name, op(name), given), results(name, REFERENCE[name], given)
    linear = _linear(name, case)
    if "_norm_bwd" in name and len(got) == 2:  # grad_y is that of grad_x, as rounded
        of_grad_y = [given[parameters(name).index(p)] for p in parameters("scatter_residual_bwd")[1:]]
        expected[1] = REFERENCE["scatter_residual_bwd"](got[0], *of_grad_y)
    in_float64 = tuple(map(_in_float64, given))
    exact = None if all(linear) else results(name, REFERENCE[name], in_float64)
    for i, kind in enumerate(RESULTS[name]):
        what = f"{name}, result {i} of {case}"
        assert (got[i].shape, got[i].dtype) == (expected[i].shape, expected[i].dtype), what
        spare = [place for place, row in enumerate(case.leading(kind)) if row == -1]
        used = [place for place, row in enumerate(case.leading(kind)) if row != -1]
        assert not got[i][spare].any(), what
        if linear[i]:
            assert same_bits(got[i][used], expected[i][used]), what
        elif exact is not None:
            values = got[i], expected[i], exact[i]
            if from_terms and got[i].numel():
                term = _largest_term(name, i, dict(zip(parameters(name), in_float64, strict=True)), exact)
                values = tuple(torch.cat([v.flatten(), term.to(got[i].dtype).to(v.dtype).view(1)]) for v in values)
            assert_no_worse_than_eager(*values, what)
        if kind == "B" and not linear[i]:
            outside = [sample for sample in range(case.shape[0]) if sample not in case.leading("N")]
            assert same_bits(got[i][outside], expected[i][outside]), what


def _largest_term(name: str, i: int, given: dict[str, Any], exact: list[Tensor]) -> Tensor:
    if name.startswith("act"):
        p, u = given["dropout_p"], given["u"].abs().max()
        is_value = i == 1 or name == "act"
        term = u if is_value else given["grad_a"].abs().max()
        if given["activation"] == "gelu_tanh" and not is_value:  # 1 - tanh(...)^2, times this
            term = term * (1 + u * (1 + 0.134 * u**2))
        return term * (u if given["activation"] == "swiglu" else 1) / (1 - p if p < 1 else 1)
    if "norm_bwd" in name:
        grad, xhat, rstd = given["grad_xhat"].abs(), given["xhat"].abs(), given["rstd"].unsqueeze(-1)
        term = (rstd * (grad + xhat * (grad * xhat).mean(-1, keepdim=True))).max() if grad.numel() else torch.zeros(())
        return term + given.get("grad_x_out", given.get("grad_x", term)).abs().max()
    normalised = given["x"] if name == "gather_norm" else exact[0]
    rows, rstd = given.get("next_rows", given["rows"]), exact[-1]
    terms = take(normalised, rows).abs().amax(-1) * rstd
    return terms.max() if i == len(exact) - 2 else ((1 + terms) * rstd).max()


def _linear(name: str, case: Case) -> list[bool]:
    """Which results come of additions and multiplications of single elements."""
    if name.startswith("act"):
        return [case.activation == "relu"] * len(RESULTS[name])
    if "_norm_bwd" in name:
        return [False, True][: len(RESULTS[name])]
    return [name.startswith("scatter"), False, False] if "norm" in name else [True]


def _in_float64(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if torch.is_tensor(argument) and argument.is_floating_point() else argument


def _within(values: Tensor, shape: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    """``values`` in a view of a larger tensor of what no kernel may read."""
    junk = torch.nan if values.is_floating_point() else 2**31 - 1
    return view(torch.full(shape, junk, dtype=values.dtype)).copy_(values)


def _permuted(values: Tensor, *order: int) -> Tensor:
    """``values`` that lie in memory in this order of dimensions, its own inverse."""
    return values.permute(order).contiguous().permute(order)


# The same values in other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence first": lambda v: _permuted(v, 1, 0, *range(2, v.dim())) if v.dim() > 1 else v,
    "channels first": lambda v: _permuted(v, *reversed(range(v.dim()))),
    "every other channel": lambda v: _within(v, (*v.shape, 2), lambda junk: junk[..., 1]),
    "every other sample": lambda v: _within(
        v, (*v.shape[:1], 2, *v.shape[1:]), lambda junk: junk.select(min(v.dim(), 1), 1)
    ),
    "wider rows": lambda v: _within(v, (*v.shape[:-1], v.shape[-1] + 3), lambda junk: junk[..., :-3]) if v.dim() else v,
    "one element on": lambda v: _within(v, (v.numel() + 1,), lambda junk: junk[1:].view(v.shape)),
}
