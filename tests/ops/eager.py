"""What the public functions compute, as a user of plain PyTorch writes it, and how the two are compared."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layerdrop_fast.reference.dropout import keep_mask
from layerdrop_fast.reference.philox import step_key
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
