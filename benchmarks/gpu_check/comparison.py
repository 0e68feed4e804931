"""One pass of ours beside the same work in plain PyTorch, eager and under torch.compile, and in installed peers.

Before it is timed each way is held to what its own dropout mask makes of the inputs in float32, gradients included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from benchmarks.activation import Act
from benchmarks.gpu_check.check import Check
from layerdrop_fast import ops
from layerdrop_fast.triton.row_work import RowWork
from layerdrop_fast.triton.timing import Device, Disagreement, Replay, check_agreement, spread

P = 0.1
SAMPLES, POSITIONS, ROUNDS = 32, 512, 20
# Roundings on the way to a result: PyTorch's ways round after each op.
ROUNDINGS = 3.0
# Six standard errors of the share that dropout keeps.
ERRORS = 6
PASSES = {"forward": False, "forward and backward": True}

# What another way may fail with, on a GPU or a version that it does not know.
PEER_ERRORS = (Disagreement, TritonError, RuntimeError, TypeError, ImportError)

Way = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Size:
    channels: int
    dtype: torch.dtype
    kept: int  # of the samples
    samples: int = SAMPLES
    positions: int = POSITIONS

    def __str__(self) -> str:
        shape = f"[{self.samples}, {self.positions}, {self.channels}]"
        return f"{shape} {str(self.dtype).removeprefix('torch.')}, {self.kept} kept"


class Branch:
    """Add a branch's output to the kept samples, drop out, normalise them for the next branch."""

    title = "add, dropout, norm"
    op = "scatter_residual_gather_norm"
    p = P

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.width = size, (size.channels,)
        rows = torch.arange(size.kept, device=device) * size.samples // size.kept
        self.index = rows
        self.rows = rows.to(torch.int32) if size.kept < size.samples else None
        self.key = ops.step_key(torch.tensor([1, 2, 3], device=device))
        self.site = torch.full((), 256, dtype=torch.int32, device=device)

    def inputs(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """x, y, then the gradients of the results. A dropped element of y can be told: it is at least 1."""
        stream = (self.size.samples, self.size.positions, *self.width)
        branch = (self.size.kept, *stream[1:])
        x = torch.randint(-1, 2, stream, device=device).to(self.size.dtype)
        y = (1 + torch.rand(branch, device=device)) * (torch.randint(0, 2, branch, device=device) * 2 - 1)
        gradients = [torch.randn(shape, device=device).to(self.size.dtype) for shape in (stream, branch)]
        return [x.requires_grad_(), y.to(self.size.dtype).requires_grad_()], gradients

    def ours(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ops.scatter_residual_gather_norm(x, y, self.rows, self.rows, dropout_p=P, key=self.key, site=self.site)

    def eager(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.after_dropout(x, F.dropout(y, P))

    def after_dropout(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if self.rows is None:
            x = x + y
            return x, F.layer_norm(x, self.width)
        x = x.index_add(0, self.index, y)
        return x, F.layer_norm(x.index_select(0, self.index), self.width)

    def mask(self, inputs: list[Tensor], results: tuple[Tensor, ...]) -> Tensor:
        return ((results[0].float() - inputs[0].float())[self.index] != 0).detach()

    def exact(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return self.after_dropout(x, y * mask / (1 - P))

    def peers(self) -> dict[str, Way]:
        """Of those installed that do the same work: they know of no rows."""
        if self.rows is not None or find_spec("flash_attn") is None:
            return {}
        ones = torch.ones(self.width, dtype=self.size.dtype, device=self.key.device)

        def flash_attn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            from flash_attn.ops.triton.layer_norm import layer_norm_fn

            normalised, stream = layer_norm_fn(y, ones, None, residual=x, eps=1e-5, dropout_p=P, prenorm=True)
            return stream, normalised

        return {"flash-attn": flash_attn}


class Activation(Branch):
    """gelu and dropout of an FFN."""

    title = "gelu, dropout"
    op = "act"

    def inputs(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """u, far enough from 0 for its dropped elements to be told, and the gradient of a."""
        shape = (self.size.kept, self.size.positions, *self.width)
        u = (0.5 + 1.5 * torch.rand(shape, device=device)) * (torch.randint(0, 2, shape, device=device) * 2 - 1)
        gradient = torch.randn(shape, device=device).to(self.size.dtype)
        return [u.to(self.size.dtype).requires_grad_()], [gradient]

    def ours(self, u: Tensor) -> tuple[Tensor, ...]:
        return (Act.apply(u, self.rows, "gelu", P, self.key, self.site),)

    def eager(self, u: Tensor) -> tuple[Tensor, ...]:
        return (F.dropout(F.gelu(u), P),)

    def mask(self, inputs: list[Tensor], results: tuple[Tensor, ...]) -> Tensor:
        return (results[0] != 0).detach()

    def exact(self, u: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (F.gelu(u) * mask / (1 - P),)

    def peers(self) -> dict[str, Way]:
        return {}


class Norm(Branch):
    """The norm alone, of kept samples; the peers' have a weight and a bias, and compute their gradients."""

    title = "norm"
    op = "gather_norm"
    p = 0.0

    def inputs(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """x and the gradient of xhat."""
        shape = (self.size.samples, self.size.positions, *self.width)
        x, gradient = (torch.randn(shape, device=device).to(self.size.dtype) for _ in range(2))
        return [x.requires_grad_()], [gradient[: self.size.kept]]

    def ours(self, x: Tensor) -> tuple[Tensor, ...]:
        return (ops.gather_norm(x, self.rows),)

    def eager(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = x if self.rows is None else x.index_select(0, self.index)
        return (F.layer_norm(kept, self.width),)

    def mask(self, inputs: list[Tensor], results: tuple[Tensor, ...]) -> Tensor:
        return torch.ones((), device=inputs[0].device)

    def exact(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return self.eager(x)

    def peers(self) -> dict[str, Way]:
        if self.rows is not None:
            return {}
        new = {"dtype": self.size.dtype, "device": self.key.device, "requires_grad": True}
        weight, bias = torch.ones(self.width, **new), torch.zeros(self.width, **new)

        def liger(x: Tensor) -> tuple[Tensor, ...]:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return (LigerLayerNormFunction.apply(x, weight, bias, 1e-5),)

        def apex(x: Tensor) -> tuple[Tensor, ...]:
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            return (fused_layer_norm_affine(x, weight, bias, self.width, 1e-5),)

        ways = {"liger_kernel": liger, "apex": apex}
        return {name: way for name, way in ways.items() if find_spec(name)}


def sizes(dry: bool) -> list[tuple[type[Branch], Size]]:
    if dry:
        return [(kind, Size(64, torch.float32, 2, samples=4, positions=3)) for kind in (Branch, Activation, Norm)]
    half, every = SAMPLES // 2, SAMPLES
    return [
        (Branch, Size(4096, torch.bfloat16, half)),
        (Branch, Size(4096, torch.bfloat16, every)),
        (Activation, Size(4 * 4096, torch.bfloat16, half)),
        (Norm, Size(4096, torch.bfloat16, every)),
        (Branch, Size(4096, torch.float32, half)),
        (Branch, Size(1024, torch.bfloat16, half, positions=4 * POSITIONS)),
        (Branch, Size(8192, torch.bfloat16, half)),
        (Activation, Size(4 * 1024, torch.bfloat16, half, positions=4 * POSITIONS)),
        (Branch, Size(1024, torch.float32, half, positions=2 * POSITIONS)),
        (Branch, Size(2048, torch.bfloat16, half, positions=2 * POSITIONS)),
    ]


def run(check: Check) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": [], "left out": {}, "left out for lack of time": 0}
    for kind, size in sizes(check.dry):
        if check.left() < 12:
            result["left out for lack of time"] += 1
            continue
        rounds = 1 if check.dry else ROUNDS
        result["rows"].append(measure(kind, size, check.device, rounds, result["left out"]))
        check.save(result)
    return result


def measure(kind: type[Branch], size: Size, device: Device, rounds: int, left_out: dict[str, str]) -> dict[str, Any]:
    """Milliseconds of each way, and how many times faster ours is. Another way that fails is left out from then on."""
    torch._dynamo.reset()
    branch = kind(size, device.device)
    ways: dict[str, Way] = {
        "ours": branch.ours,
        "eager": branch.eager,
        **branch.peers(),
        "torch.compile": torch.compile(branch.eager, dynamic=False),
    }
    moved = RowWork(kind.op, size.samples, size.positions, size.channels, size.dtype, kept=size.kept).moved()
    times = device.repetitions(moved)
    sets = [branch.inputs(device.device) for _ in range(times)]
    replays: dict[str, dict[str, Replay]] = {what: {} for what in PASSES}
    for name, way in ways.items():
        if name in left_out:
            continue
        try:
            check_way(f"{kind.title}, {size}, {name}", branch, way, *sets[0])
            captured = {what: device.capture(calls(way, sets, backward)) for what, backward in PASSES.items()}
        except PEER_ERRORS as error:
            if name == "ours":
                raise
            left_out[name] = f"{kind.title}, {size}: {type(error).__name__}: {error}"[:1000]
        else:
            for what, replay in captured.items():
                replays[what][name] = replay
    row: dict[str, Any] = {"work": kind.title, "size": str(size), "calls": times}
    for what in PASSES:
        seconds = device.in_turn(replays[what], rounds)
        ours = seconds["ours"]
        row[what] = {
            "milliseconds": {name: spread([1e3 * s / times for s in taken]) for name, taken in seconds.items()},
            "times faster": {
                name: spread([b / a for a, b in zip(ours, taken, strict=True)])
                for name, taken in seconds.items()
                if name != "ours"
            },
        }
    return row


def calls(way: Way, sets: list[tuple[list[Tensor], list[Tensor]]], backward: bool) -> Callable[[], Any]:
    def work() -> list[Any]:
        kept = []
        for inputs, gradients in sets:
            outputs = way(*inputs)
            kept.append([out.detach() for out in outputs])
            if backward:
                kept.append(list(torch.autograd.grad(outputs, inputs, gradients)))
        return kept

    return work


def check_way(what: str, branch: Branch, way: Way, inputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Results and gradients are those of the mask that the results show, and the mask keeps the right share."""
    results = way(*inputs)
    found = [*results, *torch.autograd.grad(results, inputs, gradients)]
    mask = branch.mask(inputs, results)
    wide = [value.detach().float().requires_grad_() for value in inputs]
    exact = branch.exact(*wide, mask)
    expected = [*exact, *torch.autograd.grad(exact, wide, [gradient.float() for gradient in gradients])]
    rounded = [value.to(result.dtype) for value, result in zip(expected, found, strict=True)]
    check_agreement(what, found, rounded, ROUNDINGS)
    share, error = float(mask.float().mean()), (branch.p * (1 - branch.p) / mask.numel()) ** 0.5
    if abs(share - (1 - branch.p)) > ERRORS * error:
        raise Disagreement(f"{what}: dropout keeps {share:.4f}, expected {1 - branch.p}")
