"""What one training step costs: dense, masked, skipped as fairseq does, by our two stacks, and at the limit.

    rows = measure_price(p=0.5)
    print(format_price(rows))

All rules train the same weights on the same numbers, and in every measured step they keep the same layers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from layerdrop_fast._checks import check_count, check_rate
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.nn import LayerDropStack, TransformerLayer, TransformerStack, set_step
from layerdrop_fast.recipes.bench.peers import Masked, Skip

RULES = {
    "dense": "every layer runs",
    "masked": "timm's DropPath, torchvision's StochasticDepth: all runs, each branch is multiplied by a mask",
    "skip": "fairseq's LayerDropModuleList: a comparison a layer, inside the loop",
    "stack": "LayerDropStack over the same layers: one plan a step",
    "ours": "TransformerStack, the same plan: one pass a branch; neither the stream, masks nor GELU outputs are saved",
    "limit": "a dense TransformerStack of only the layers that the others keep",
}

# Largest relative error, in the Euclidean norm, between two rules that compute the same in float32. The rounding of
# some hundred layers is far smaller; a wrong scale, layer or gradient is far larger.
TOLERANCE = 1e-4

REPEATS = 3

# One draw takes microseconds: the median needs many.
DRAWS = 200


@dataclass(frozen=True)
class PriceRow:
    """What a step costs by one rule. Ratios are medians over pairs of steps that were measured side by side."""

    name: str  # a key of RULES
    layers_run: tuple[int, ...]  # in each measured step
    step_s: float  # forward, backward and AdamW, median, seconds
    step_s_range: tuple[float, float]  # fastest and slowest
    step_to_dense: float  # step time / that of "dense"
    step_to_skip: float  # step time / that of "skip"
    activation_bytes: int  # held for backward, parameters left out; of the first measured step
    decision_s: float  # drawing the decisions of a step alone, median, seconds


def measure_price(
    *,
    layers: int = 40,
    d_model: int = 256,
    dim_feedforward: int = 1024,
    nhead: int = 4,
    batch: tuple[int, int] = (16, 128),
    p: float = 0.5,
    repeats: int = REPEATS,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[PriceRow]:
    """Measures one training step by every rule of ``RULES``, in that order.

    The model is ``layers`` of torch's pre-norm TransformerEncoderLayer with dropout 0.1 behind both branches; a step
    is forward, mean squared error, backward and fused AdamW. The rules take turns (A B C D E F A B ...), each turn with
    a plan of its own. The plans are drawn by systematic sampling: steps differ by at most one kept layer, so that the
    spread is the machine's. The decisions are timed as what the peers draw, independent ones.

    Nothing is timed before outputs and all gradients agree, without dropout: stack and ours with skip, and masked with
    skip whose branches are scaled by 1 / (1 - p).

    Args:
        layers, d_model, dim_feedforward, nhead: the model.
        batch: (B, S), samples and positions.
        p: drop rate of every layer, in [0, 1].
        repeats: measured steps of each rule.
        device: where the model runs.
        seed: of weights, data, dropout and plans; torch's generators are left as they were.
        progress: called as (done, total, what comes next).

    Raises:
        ValueError, TypeError: a number out of range, or of another kind.
        RuntimeError: two rules that should agree do not.
    """
    sizes = {"layers": layers, "nhead": nhead, "B": batch[0], "S": batch[1], "repeats": repeats}
    for name, value in (sizes | {"d_model": d_model, "dim_feedforward": dim_feedforward}).items():
        check_count(value, name, 1)
    if d_model % nhead:
        raise ValueError(f"d_model is {d_model}, expected a multiple of nhead, {nhead}")
    check_rate(p, "drop rate p")
    device = torch.device(device)
    generators = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**generators):
        torch.manual_seed(seed)
        blocks = [_layer(d_model, nhead, dim_feedforward).to(device) for _ in range(layers)]
        return _measure(_Contest(blocks, torch.randn(*batch, d_model, device=device), p, seed), repeats, progress)


def price_tasks(repeats: int = REPEATS) -> int:
    """How many tasks ``measure_price`` goes through: the ``total`` that it tells ``progress``."""
    return len(("correctness", "warm-up", "decisions")) + len(RULES) * (1 + repeats)


def format_price(rows: Sequence[PriceRow]) -> str:
    """A plain table of what ``measure_price`` returned; the ratio to dense (and to skip) stands behind each figure."""
    dense = next(row for row in rows if row.name == "dense")
    head = ("rule", "layers run", "step, s", "(range)", "/ dense", "/ skip", "saved, MiB", "/ dense", "decisions, µs")
    table = [head]
    for row in rows:
        fewest, most = min(row.layers_run), max(row.layers_run)
        fastest, slowest = row.step_s_range
        table.append(
            (
                row.name,
                f"{most}" if fewest == most else f"{fewest}..{most}",
                f"{row.step_s:.3f}",
                f"({fastest:.3f}..{slowest:.3f})",
                f"{row.step_to_dense:.2f}",
                f"{row.step_to_skip:.2f}",
                f"{row.activation_bytes / 2**20:.1f}",
                f"{row.activation_bytes / dense.activation_bytes:.2f}",
                f"{row.decision_s * 1e6:.1f}" if row.decision_s else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    # The names stand on the left.
    lines = [cells[0].ljust(widths[0]) + line[widths[0] :] for cells, line in zip(table, lines, strict=True)]
    notes = [f"{row.name.ljust(widths[0])}  {RULES[row.name]}" for row in rows]
    return "\n".join([*lines, "", *notes])


def _layer(d_model: int, nhead: int, dim_feedforward: int) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        d_model, nhead, dim_feedforward, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
    )
    # As models are trained today: with dropout of attention weights there is no flash attention on a CPU.
    layer.self_attn.dropout = 0.0
    layer.dropout.p = 0.0
    return layer


class _Contest:
    """All rules on one set of weights, made to keep the layers of one plan."""

    def __init__(self, layers: list[nn.TransformerEncoderLayer], x: Tensor, p: float, seed: int) -> None:
        self.p = p
        self.x = x.requires_grad_()  # as behind an embedding
        self.target = torch.randn_like(x)
        self.layers = layers
        self.masks: list[Masked] = []
        self.masked = [self._with_masks(layer) for layer in layers]
        self.skip = Skip(p, layers)
        self.stack = LayerDropStack(layers, p, sampling="systematic", seed=seed)
        self.ours = TransformerStack.from_layers(layers, schedule=p, sampling="systematic", seed=seed)
        self.parameters = dict(nn.ModuleList(layers).named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4, fused=True)
        self.run: dict[str, Callable[[Tensor], Tensor]] = {
            "dense": partial(_in_turn, layers),
            "masked": partial(_in_turn, self.masked),
            "skip": partial(_in_turn, self.skip),
            "stack": self.stack,
            "ours": self.ours,
        }

    def _with_masks(self, layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
        # The memo makes the copy share the layer's parameters.
        layer = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
        masks = Masked(self.p, "batch"), Masked(self.p, "batch")
        layer.dropout1 = nn.Sequential(layer.dropout1, masks[0])  # type: ignore[assignment]
        layer.dropout2 = nn.Sequential(layer.dropout2, masks[1])  # type: ignore[assignment]
        self.masks += masks
        return layer

    def kept(self, turn: int) -> list[int]:
        return self.stack.plan(turn).layers

    def prepare(self, turn: int) -> None:
        """Makes every rule keep the layers of plan number ``turn``."""
        kept = self.kept(turn)
        set_step(self.stack, turn)
        set_step(self.ours, turn)
        self.skip.keep(kept)
        for index, mask in enumerate(self.masks):
            mask.outcome = index // 2 in kept
        left = [self.ours.layers[index] for index in kept]
        self.run["limit"] = TransformerStack.from_layers(left, schedule=0.0, seed=0) if left else torch.clone

    def loss(self, rule: str) -> Tensor:
        return nn.functional.mse_loss(self.run[rule](self.x), self.target)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def step(self, rule: str) -> float:
        """Seconds of one training step."""
        self.zero_grad()
        _synchronize(self.x.device)
        start = time.perf_counter()
        self.loss(rule).backward()
        self.optimizer.step()
        _synchronize(self.x.device)
        return time.perf_counter() - start

    def gradients(self, rule: str) -> dict[str, Tensor | None]:
        """The output and all gradients of the prepared plan, without dropout."""
        self.zero_grad()
        output = self.run[rule](self.x)
        nn.functional.mse_loss(output, self.target, reduction="sum").backward()
        weights = {f"gradient of layer {name}": weight.grad for name, weight in self.parameters.items()}
        return {"output": output.detach(), "gradient of x": self.x.grad, **weights}


def _measure(contest: _Contest, repeats: int, progress: Callable[[int, int, str], None] | None) -> list[PriceRow]:
    memory: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in RULES}
    decisions: dict[str, float] = {}

    def measure_memory(name: str) -> None:
        contest.prepare(0)
        memory[name] = saved_bytes(contest.run[name], contest.x)

    def measure_step(name: str, turn: int) -> None:
        contest.prepare(turn)
        seconds[name].append(contest.step(name))

    tasks: list[tuple[str, Callable[[], object]]] = [("correctness", lambda: _gate(contest))]
    tasks += [(f"activation memory, {name}", partial(measure_memory, name)) for name in RULES]
    # A dense step gives every weight its AdamW state.
    tasks += [("warm-up", lambda: contest.step("dense"))]
    for turn in range(repeats):
        tasks += [(f"step {turn + 1} of {repeats}, {name}", partial(measure_step, name, turn)) for name in RULES]
    tasks += [("decisions", lambda: decisions.update(_decision_seconds(contest)))]
    for done, (what, task) in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks), what)
        task()
    if progress is not None:
        progress(len(tasks), len(tasks), "done")

    everything = (len(contest.layers),) * repeats
    kept = tuple(len(contest.kept(turn)) for turn in range(repeats))
    return [
        PriceRow(
            name=name,
            layers_run=everything if name in ("dense", "masked") else kept,
            step_s=median(seconds[name]),
            step_s_range=(min(seconds[name]), max(seconds[name])),
            step_to_dense=_ratio(seconds[name], seconds["dense"]),
            step_to_skip=_ratio(seconds[name], seconds["skip"]),
            activation_bytes=memory[name],
            decision_s=decisions.get(name, 0.0),
        )
        for name in RULES
    ]


def _gate(contest: _Contest) -> None:
    """Raises unless the rules compute the same, on a corner of the batch."""
    x, target = contest.x, contest.target
    contest.x = x.detach()[:2, :16].clone().requires_grad_()
    contest.target = target[:2, :16]
    dropouts = [m for m in nn.ModuleList([*contest.layers, *contest.masked]).modules() if isinstance(m, nn.Dropout)]
    fused = [layer for layer in contest.ours.layers if isinstance(layer, TransformerLayer)]
    rates = [layer.dropout for layer in fused]
    for dropout in dropouts:
        dropout.eval()
    for layer in fused:
        layer.dropout = 0.0
    contest.prepare(0)
    skip, masked = contest.gradients("skip"), contest.gradients("masked")
    for rule in ("stack", "ours"):
        _agree(rule, contest.gradients(rule), "skip", skip)
    with _branches_scaled(contest.layers, 1 / (1 - contest.p) if contest.p < 1 else 1.0):
        scaled = contest.gradients("skip")
    # The gradients of dropped layers are zeros where the others have none.
    zeros = {name: torch.zeros_like(value) for name, value in masked.items() if value is not None}
    _agree("masked", masked, "skip", {name: zeros[name] if value is None else value for name, value in scaled.items()})
    for dropout in dropouts:
        dropout.train()
    for layer, rate in zip(fused, rates, strict=True):
        layer.dropout = rate
    contest.x, contest.target = x, target


def _agree(rule: str, values: dict[str, Tensor | None], other: str, expected: dict[str, Tensor | None]) -> None:
    for name, reference in expected.items():
        value = values[name]
        if value is None or reference is None:
            difference = None if value is reference else "one of them is None"
        else:
            error = float((value - reference).norm() / reference.norm().clamp_min(torch.finfo(value.dtype).tiny))
            difference = None if error <= TOLERANCE else f"relative error {error:.1e}, expected at most {TOLERANCE:.0e}"
        if difference is not None:
            raise RuntimeError(f"no price: {rule} and {other} do not compute the same {name} ({difference})")


@contextmanager
def _branches_scaled(layers: Iterable[nn.TransformerEncoderLayer], factor: float) -> Iterator[None]:
    """Multiplies what every branch adds to the stream by ``factor``."""
    ends = [end for layer in layers for end in (layer.dropout1, layer.dropout2)]
    hooks = [end.register_forward_hook(lambda module, inputs, output: output * factor) for end in ends]
    yield
    for hook in hooks:
        hook.remove()


def _decision_seconds(contest: _Contest) -> dict[str, float]:
    """The median time that each rule takes to draw the decisions of one step, and nothing else."""
    stack = LayerDropStack(contest.layers, contest.p, seed=0)
    ours = TransformerStack.from_layers(contest.ours.layers, schedule=contest.p, seed=0)
    branch = contest.x.detach()
    contest.skip.keep(None)
    for mask in contest.masks:
        mask.outcome = None
    draws: dict[str, Callable[[int], object]] = {
        "masked": lambda turn: [mask.mask(branch) for mask in contest.masks],
        "skip": lambda turn: list(contest.skip),
        "stack": lambda turn: stack.plan(turn).layers,
        "ours": lambda turn: ours.plan(turn).layers,
    }
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for turn in range(DRAWS):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw(turn)
            _synchronize(branch.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def _in_turn(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _ratio(seconds: list[float], others: list[float]) -> float:
    return median(a / b for a, b in zip(seconds, others, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
