"""All ways on one set of weights: one training step of each, and the proof that they compute what they say."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerdrop_fast.nn import TransformerLayer, TransformerStack
from layerdrop_fast.plan import DropPlan
from layerdrop_fast.recipes.bench.setting import DTYPES, Setting
from layerdrop_fast.recipes.bench.way import Layers, Way
from layerdrop_fast.reference.transformer_stack import transformer_stack

# Largest relative error, in the Euclidean norm, of an output or a gradient against float64. The rounding of some
# hundred layers is smaller; a wrong scale, layer, sample or gradient is far larger.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}

# The corner of the batch that is compared: positions.
CORNER = 8

Makers = Mapping[str, Callable[[Layers, Setting], Way]]


class Disagreement(RuntimeError):
    """A way does not compute what its rule says: nothing is measured then."""


class Contest:
    """The ways, their weights, their data, one optimizer.

    Args:
        makers: what makes the ways of layers and a setting, by name.
    """

    def __init__(self, setting: Setting, makers: Makers) -> None:
        self.setting = setting
        device, dtype = torch.device(setting.device), DTYPES[setting.dtype]
        generators = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
        with torch.random.fork_rng(**generators):
            torch.manual_seed(setting.seed)
            # Made on the device: a host would draw hundreds of millions of numbers for seconds.
            self.layers = [_layer(setting).to(dtype) for _ in range(setting.layers)]
            shape = (setting.samples, setting.length, setting.d_model)
            self.x = torch.randn(shape, device=device).to(dtype).requires_grad_()  # as behind an embedding
            self.target = torch.randn(shape, device=device).to(dtype)
        self.names = dict(nn.ModuleList(self.layers).named_parameters())
        self.optimizer = torch.optim.AdamW(self.names.values(), lr=1e-4, fused=True)
        self.ways = {name: make(self.layers, setting) for name, make in makers.items()}

    def layers_run(self, name: str, turn: int) -> float:
        """How many layers a way runs in a turn; one that runs for half of the samples is half a layer."""
        way = self.ways[name]
        if way.runs_dropped:
            return float(self.setting.layers)
        return float(way.kept_branches(self.setting.plan(turn)).sum()) / 2 / self.setting.samples

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def loss(self, name: str) -> Tensor:
        return nn.functional.mse_loss(self.ways[name](self.x), self.target)

    def step(self, name: str) -> None:
        """One training step; the gradients are left for the next to remove."""
        self.loss(name).backward()
        self.optimizer.step()

    def seconds(self, name: str) -> float:
        """How long a step takes."""
        self.zero_grad()
        self.synchronise()
        start = time.perf_counter()
        self.step(name)
        self.synchronise()
        return time.perf_counter() - start

    def fill_optimizer(self) -> None:
        """Gives every weight its AdamW state, at a step that changes nothing."""
        for weight in self.names.values():
            weight.grad = torch.zeros_like(weight)
        (group,) = self.optimizer.param_groups
        rate, group["lr"] = group["lr"], 0.0
        self.optimizer.step()
        group["lr"] = rate
        self.zero_grad()

    def synchronise(self) -> None:
        if self.x.device.type != "cpu":
            torch.accelerator.synchronize(self.x.device)

    def check(self, name: str) -> None:
        """Raises unless output and all gradients of a way are those of its rule, without dropout.

        What they are says the pure PyTorch of ``reference``, in float64, on the first positions of all samples.

        Raises:
            Disagreement: they are not.
        """
        way, plan = self.ways[name], self.setting.plan(0)
        way.follow(plan)
        x, target = (tensor.detach()[:, :CORNER].clone() for tensor in (self.x, self.target))
        with _without_dropout(way), _exact_products():
            self.zero_grad()
            out = way(x.requires_grad_())
            out.backward(target)
        found = {"output": out.detach(), "gradient of x": x.grad}
        found |= {f"gradient of layer {weight}": of.grad for weight, of in self.names.items()}
        self.zero_grad()
        expected = self._expected(way, plan, x.detach().double(), target.double())
        for what, value in expected.items():
            got, zeros = found[what], way.runs_dropped and value is None
            if got is None or (value is None and not zeros):
                if got is not value:
                    raise Disagreement(f"{name}: {what} is {_kind(got)}, expected {_kind(value)}")
                continue
            error = float(got.double().norm() if value is None else (got.double() - value).norm() / value.norm())
            limit = 0.0 if value is None else TOLERANCES[self.setting.dtype]
            if not error <= limit:
                raise Disagreement(f"{name}: relative error of {what} is {error:.1e}, expected at most {limit:.0e}")

    def _expected(self, way: Way, plan: DropPlan, x: Tensor, target: Tensor) -> dict[str, Tensor | None]:
        exact = [copy.deepcopy(layer).double() for layer in self.layers]
        stack = TransformerStack.from_layers(exact, 0.0, seed=0)
        keep, scales = (
            way.kept_branches(plan).to(x.device),
            torch.full((2 * len(exact),), way.scale(plan), dtype=torch.float64),
        )
        x.requires_grad_()
        # Of nothing at all the result is x itself.
        out = transformer_stack(stack, x, keep=keep, scales=scales, parts=way.kept_parts(plan))[-1]
        (out * 1).backward(target)
        gradients = {f"gradient of layer {name}": of.grad for name, of in nn.ModuleList(exact).named_parameters()}
        return {"output": out.detach(), "gradient of x": x.grad, **gradients}


def _layer(setting: Setting) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        setting.d_model,
        setting.nhead,
        setting.dim_feedforward,
        setting.dropout,
        "gelu",
        batch_first=True,
        norm_first=True,
        device=setting.device,
    )
    # As models are trained today: with dropout of attention weights there is no flash attention on a CPU.
    layer.self_attn.dropout = 0.0
    layer.dropout.p = 0.0
    return layer


@contextmanager
def _without_dropout(way: Way) -> Iterator[None]:
    modules = [module for root in way.modules for module in root.modules()]
    dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
    ours = [(module, module.dropout) for module in modules if isinstance(module, TransformerLayer)]
    for dropout in dropouts:
        dropout.eval()
    for layer, _ in ours:
        layer.dropout = 0.0
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train()
        for layer, rate in ours:
            layer.dropout = rate


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products of float32 in float32: with TF32 they are off by more than the tolerance."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _kind(value: Tensor | None) -> str:
    return "none" if value is None else "a tensor"
