"""What compiled kernels have to keep to, on every architecture, before anyone times them on a GPU."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from layerdrop_fast.triton import KERNELS
from layerdrop_fast.triton.launch import UNSPECIALISED
from layerdrop_fast.triton.row_work import RowWork
from tests.gates.aot import ARCHS, Code, Launch, compiled, launch_of, specialised

# Registers of a thread: with 256 threads a program, NVIDIA's 65,536 hold two programs and more, AMD's 512 a lane four.
MOST_REGISTERS = {"sm": 128, "gfx": 128}
MOST_SHARED = 48 << 10  # bytes, without asking for more

# The tensors of a tile that a program reads and writes, each once.
READ = {
    "gather_norm_fwd_kernel": ("p_x",),
    "gather_norm_bwd_kernel": ("p_grad_xhat", "p_xhat"),
    "scatter_residual_fwd_kernel": ("p_x", "p_y"),
    "scatter_residual_bwd_kernel": ("p_grad_out",),
    "scatter_residual_gather_norm_fwd_kernel": ("p_x", "p_y"),
    "scatter_residual_gather_norm_bwd_kernel": ("p_grad_x_out", "p_grad_xhat", "p_xhat"),
    "norm_linear_bwd_kernel": ("p_product", "p_weight"),
    "act_fwd_kernel": ("p_u",),
    "act_bwd_kernel": ("p_u", "p_grad_a"),
}
WRITTEN = {
    "gather_norm_fwd_kernel": ("p_xhat",),
    "gather_norm_bwd_kernel": ("p_grad_x",),
    "scatter_residual_fwd_kernel": ("p_x_out",),
    "scatter_residual_bwd_kernel": ("p_grad_y",),
    "scatter_residual_gather_norm_fwd_kernel": ("p_x_out", "p_xhat"),
    "scatter_residual_gather_norm_bwd_kernel": ("p_grad_x", "p_grad_y"),
    "norm_linear_bwd_kernel": ("p_grad_weight",),
    "act_fwd_kernel": ("p_a",),
    "act_bwd_kernel": ("p_grad_u", "p_a"),
}


@dataclass(frozen=True)
class Gate:
    """A kernel in one configuration on one architecture."""

    op: str
    channels: int
    dtype: torch.dtype
    arch: str
    dropout_p: float = 0.1
    kept: int = 16  # of 32 samples
    activation: str = "gelu"

    def launch(self, device: str = "meta") -> Launch:
        work = RowWork(self.op, 32, 128, self.channels, self.dtype, self.kept, self.dropout_p, self.activation)
        return launch_of(lambda: KERNELS[self.op](*work.arguments(device)), self.arch)

    def __str__(self) -> str:
        name = f"{self.op}, D {self.channels}, {str(self.dtype).removeprefix('torch.')}, {self.arch}"
        return f"{name}, p {self.dropout_p}, {self.kept} of 32 samples, {self.activation}"


def faults(gate: Gate, launch: Launch, code: Code) -> list[str]:
    """What the code of a kernel does not keep to."""
    found = []
    if code.spills:
        found.append(f"{code.spills} of stack, spills or local memory, none is allowed")
    most = MOST_REGISTERS["gfx" if gate.arch.startswith("gfx") else "sm"]
    if code.registers > most:
        found.append(f"{code.registers} registers, at most {most} are allowed")
    if code.shared > MOST_SHARED:
        found.append(f"{code.shared} bytes of shared memory, at most {MOST_SHARED} are allowed")
    for what, got, names in (("loads", code.wide_loads, READ), ("stores", code.wide_stores, WRITTEN)):
        wanted = sum(_wide(gate, launch, name) for name in names[launch.kernel.__name__])
        if got < wanted:
            found.append(f"a thread's {what} of 16 bytes and more move {got} bytes, {wanted} are due")
    return found


def _wide(gate: Gate, launch: Launch, name: str) -> int:
    """The bytes of one tensor's tile that a thread moves, if rows are aligned and there is enough for every thread."""
    size = launch.arguments[name].element_size()
    tile = launch.arguments["ROWS"] * launch.arguments["BLOCK_D"] * size // launch.threads
    halves = 2 if gate.activation == "swiglu" and name in ("p_u", "p_grad_u") else 1
    return tile * halves if gate.channels * size % 16 == 0 and tile >= 16 else 0


def check(gate: Gate, *, aligned: bool = True) -> tuple[Code, list[str]]:
    launch = gate.launch()
    code = compiled(launch, aligned=aligned)
    return code, faults(gate, launch, code)


def compiled_again() -> list[str]:
    """Ops that Triton would compile again for another plan, dropout rate, or place of a small tensor in memory."""
    found = []
    for op in KERNELS:
        first = Gate(op, 64, FULL, "sm_90")
        others = [replace(first, kept=kept) for kept in (1, 2, 15)] + [replace(first, dropout_p=0.6)]
        kinds = {str(specialised(gate.launch("cpu"))[1:]) for gate in (first, *others)}
        launch = first.launch("cpu")
        moved = {name: _moved(value) for name, value in launch.arguments.items() if name in UNSPECIALISED}
        kinds.add(str(specialised(replace(launch, arguments=launch.arguments | moved))[1:]))
        if len(kinds) > 1:
            found.append(f"{op}: compiled {len(kinds)} times")
    return found


def _moved(value: object) -> object:
    """A tensor that begins four bytes further on than torch's own."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.new_empty(value.numel() + 1)[1:].view(value.shape)


ACTIVATIONS = ("gelu_tanh", "relu", "silu", "swiglu", "identity")
WIDTHS = (64, 512, 768, 1000, 1024, 1025, 2048, 4096, 8192, 16384, 65536)
HALF, FULL = torch.bfloat16, torch.float32


def representative() -> Iterator[Gate]:
    """Each kernel on each architecture; on one all ways that its code differs."""
    for op in KERNELS:
        yield from (Gate(op, 1024, HALF, arch) for arch in ARCHS)
        yield Gate(op, 4096, FULL, "sm_90")
        yield Gate(op, 65536, HALF, "sm_90", kept=32)
        yield Gate(op, 1025, HALF, "sm_90")
    yield from (Gate(op, 1024, HALF, "sm_90", activation=a) for op in ("act", "act_bwd") for a in ACTIVATIONS)


def every() -> Iterator[Gate]:
    """Kernels x widths x dtypes x architectures, with and without dropout and dropped samples."""
    for op, channels, arch in itertools.product(KERNELS, WIDTHS, ARCHS):
        for dtype in (HALF, FULL):
            yield Gate(op, channels, dtype, arch)
            yield Gate(op, channels, dtype, arch, dropout_p=0.0, kept=32)
    for op, arch in itertools.product(KERNELS, ARCHS):
        yield from (Gate(op, 1024, dtype, arch) for dtype in (torch.float16, torch.float64))
    for op, activation, arch in itertools.product(("act", "act_bwd"), ACTIVATIONS, ARCHS):
        yield from (Gate(op, 4096, dtype, arch, activation=activation) for dtype in (HALF, FULL))
