"""GraphedStep: losses, weights and states of eager steps, with shapes that no plan changes and nothing read back."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import (
    DropSchedule,
    GraphedStep,
    decreasing,
    increasing,
    linear,
    per_layer,
    set_step,
    uniform,
)
from layerdrop_fast.nn.fixed import Spare
from layerdrop_fast.ops import _checks
from tests.graphed import (
    BATCH,
    LAYERS,
    LENGTH,
    SOURCE,
    WIDTH,
    Eager,
    Model,
    adamw,
    assert_same,
    batch,
    compare,
    loss,
    sgd,
)

EXACT = {"rtol": 0, "atol": 0}
# A spare row adds zeros to sums, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"dropout": 0.2, "activation_dropout": 0.1},
        {"scale": "inverse", "schedule": [0.0, 0.9, 0.3, 0.5, 1.0, 0.2], "norm": "rmsnorm", "activation": "swiglu"},
        {"recompute": "qkv", "rope_theta": 10.0, "dropout": 0.1, "layer_scale": 0.5, "bias": False},
    ],
)
def test_batch_granularity_has_the_bits_of_eager(keywords, optimizer_of):
    assert compare(Model(**keywords), optimizer_of, **EXACT).captures == 1


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
@pytest.mark.parametrize("target", ["layer", "branch"])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"dropout": 0.2, "activation_dropout": 0.1, "scale": "realized"},
        {"scale": "inverse", "schedule": [0.0, 0.9, 0.3, 0.5, 1.0, 0.95]},
        {"recompute": "qkv", "rope_theta": 10.0},
    ],
)
def test_sample_granularity_equals_eager(keywords, target, optimizer_of):
    compare(Model(granularity="sample", target=target, **keywords), optimizer_of, **CLOSE)


def decoder_loss(model, x, memory, padding, bias, positions, memory_padding):
    masks = {"attn_mask": bias, "key_padding_mask": padding, "memory_key_padding_mask": memory_padding}
    return model(x, memory, position_ids=positions, **masks).square().mean()


def decoder_batch(number):
    source = torch.Generator().manual_seed(number)
    x, memory = (torch.randn(BATCH, n, WIDTH, generator=source, dtype=torch.float64) for n in (LENGTH, SOURCE))
    bias = torch.randn(BATCH, LENGTH, LENGTH, generator=source, dtype=torch.float64)
    positions = torch.randint(0, 99, (BATCH, LENGTH), generator=source)
    padding, memory_padding = (
        torch.arange(n) >= torch.randint(1, n, (BATCH, 1), generator=source) for n in (LENGTH, SOURCE)
    )
    return x, memory, padding, bias, positions, memory_padding


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_memory_masks_and_positions_are_inputs(granularity):
    model = Model(granularity=granularity, cross_attention=True, rope_theta=10.0, dropout=0.1)
    compare(model, loss=decoder_loss, batch=decoder_batch, **CLOSE)


@pytest.mark.parametrize("boolean", [True, False])
def test_spare_rows_read_nothing(boolean):
    # One of three samples is kept, and it is not the first, which has values that reach every weight if they are read.
    model = Model(1, granularity="sample", schedule=0.5, cross_attention=True)
    while model.stack.plan(batch_size=3).rows(0).tolist() not in ([1], [2]):
        model.stack.counters.forwards += 1
    x, memory, _, bias, _, _ = (value[:3] for value in decoder_batch(0))
    memory[0], bias[0] = math.inf, -math.inf

    def loss(model, x, memory, bias):
        return model(x, memory, attn_mask=bias.isinf() if boolean else bias).square().mean()

    eager = Eager(model, loss=loss)
    step = GraphedStep(model, loss, adamw, x, memory, bias)
    torch.testing.assert_close(step(x, memory, bias), eager(x, memory, bias))
    assert_same(step, model, eager, **CLOSE)


def test_spare_rows_attend_to_all():
    mask = torch.zeros(3, 1, 1, 4, dtype=torch.bool)
    chosen = Spare(mask).of(torch.tensor([1, -1], dtype=torch.int32)).mask
    assert chosen.squeeze().tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
def test_a_dropped_layer_does_not_move(optimizer_of, granularity):
    model = Model(granularity=granularity, schedule=0.85)
    step = GraphedStep(model, loss, optimizer_of, *batch(0))
    moved = 0
    for number in range(8):
        kept = model.stack.plan(batch_size=BATCH if granularity == "sample" else None).layers
        before = copy.deepcopy(
            [
                (layer.state_dict(), step.optimizers[i].state_dict()["state"])
                for i, layer in enumerate(model.stack.layers)
            ]
        )
        step(*batch(number))
        for i, (layer, (weights, states)) in enumerate(zip(model.stack.layers, before, strict=True)):
            same = all(torch.equal(weights[name], weight) for name, weight in layer.state_dict().items())
            now = step.optimizers[i].state_dict()["state"]
            same_state = all(torch.equal(states[n][name], value) for n in now for name, value in now[n].items())
            assert same == same_state == (i not in kept)
            moved += not same
    assert 0 < moved < 8 * LAYERS


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_warm_up_changes_nothing(granularity):
    model = Model(granularity=granularity, attention_dropout=0.1)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    step = GraphedStep(model, loss, adamw, *batch(0))
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(value.any() for o in step.optimizers for state in o.state.values() for value in state.values())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_eager_steps_and_resumed_ones_go_on(granularity):
    model = Model(granularity=granularity, dropout=0.1)
    eager = Eager(model)
    step = GraphedStep(model, loss, adamw, *batch(0))
    for number in range(2):
        step(*batch(number)), eager(*batch(number))
    for each in (model, eager.model):  # a forward whose step is not taken
        loss(each, *batch(7))
    twin = Model(granularity=granularity, dropout=0.1, seed=8)
    twin.load_state_dict(model.state_dict())
    resumed = GraphedStep(twin, loss, adamw, *batch(0))
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    for number in range(2, 5):
        if number == 3:
            for each in (twin, eager.model):
                set_step(each, 11)
        torch.testing.assert_close(resumed(*batch(number)), eager(*batch(number)), **CLOSE)
    for got, want in zip(twin.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert twin.stack.counters.forwards == 13
    assert resumed.captures == 2


@pytest.mark.parametrize(
    ("granularity", "time", "ahead", "captures"),
    [
        ("batch", increasing(6), 0, 2),
        ("sample", increasing(6), 0, 2),
        ("batch", decreasing(6), 0, 2),
        ("sample", decreasing(6), 0, 5),
        ("batch", decreasing(6), 6, 1),
        ("sample", decreasing(6), 6, 1),
    ],
)
def test_schedules_over_time(granularity, time, ahead, captures):
    schedule = DropSchedule(LAYERS, linear(0.6), time)
    model = Model(granularity=granularity, schedule=schedule, scale="inverse")
    assert compare(model, steps=7, ahead=ahead, **CLOSE).captures == captures


def test_a_step_in_which_everything_is_dropped():
    compare(Model(schedule=0.95), steps=3, **EXACT)
    compare(Model(schedule=1.0), steps=2, **EXACT)
    compare(Model(schedule=1.0, granularity="sample"), steps=2, **EXACT)


def test_clipping_is_that_of_the_layers_that_ran():
    model = Model()
    eager = Eager(model)
    step = GraphedStep(model, loss, adamw, *batch(0), clip_norm=0.05)
    for number in range(3):
        value = eager.loss(eager.model, *batch(number))
        value.backward()
        assert nn.utils.clip_grad_norm_(eager.model.parameters(), 0.05) > 0.05
        for optimizer in eager.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step(*batch(number))
        assert_same(step, model, eager, **CLOSE)


def test_gradients_that_share_memory():
    class Embedded(Model):
        def __init__(self):
            super().__init__()
            self.tables = nn.ParameterList(torch.ones(5, 7, WIDTH, dtype=torch.float64) for _ in range(2))

        def forward(self, x, **masks):
            return super().forward(x, **masks) + (self.tables[0] + self.tables[1]).sum(-1, keepdim=True)

    compare(Embedded(), sgd, **CLOSE)  # the tables' gradient is one tensor, expanded
    model = Embedded()
    clipped = GraphedStep(model, loss, sgd, *batch(0), clip_norm=1e-3)
    before = [table.detach().clone() for table in model.tables]
    clipped(*batch(0))
    moved = [table - old for table, old in zip(model.tables, before, strict=True)]
    assert torch.equal(moved[0], moved[1])


def test_a_checkpoint_round_the_stack():
    class Checkpointed(Model):
        def forward(self, x, **masks):
            return self.end(checkpoint(lambda h: self.stack(h, **masks), self.begin(x), use_reentrant=False))

    for granularity in ("batch", "sample"):
        compare(Checkpointed(granularity=granularity, dropout=0.2), **CLOSE)


def test_autocast_sees_the_weights_of_each_step():
    model, twin = Model(dtype=torch.float32), Model(dtype=torch.float32)
    eager = Eager(twin)
    inputs = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        step = GraphedStep(model, loss, adamw, *inputs)
        losses = [step(*inputs).item() for _ in range(4)]
    for value in losses:
        with torch.autocast("cpu", torch.bfloat16):
            expected = eager.loss(eager.model, *inputs)
        expected.backward()
        for optimizer in eager.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert value == pytest.approx(expected.item(), rel=1e-5)


class NothingRead(TorchDispatchMode):
    """Raises where a value is read, or decides a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "unique",
        ):
            raise AssertionError(f"{func} reads values")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer_of", [adamw, sgd])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_no_value_is_read(granularity, optimizer_of, monkeypatch):
    model = Model(granularity=granularity, dropout=0.2, scale="inverse", cross_attention=True, rope_theta=10.0)
    inputs = decoder_batch(0)
    step = GraphedStep(model, decoder_loss, optimizer_of, *inputs, clip_norm=1.0)
    monkeypatch.setattr(_checks, "readable", lambda value: False)  # as on a GPU
    with NothingRead():
        with pytest.raises(AssertionError, match="reads values"):
            inputs[0].sum().item()
        step(*inputs)
    assert step.captures == 1


def test_the_example_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "graphs.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(compile(example, "graphs.md", "exec"), names)
    assert names["stack"].counters.forwards == 3


def test_slots_cost_a_copy_of_the_kept_weights():
    for schedule, slots in ((0.5, 3), (0.45, 4), (per_layer([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3), (uniform(0.99), 1)):
        schedule = DropSchedule(LAYERS, schedule) if callable(schedule) else schedule
        model = Model(schedule=schedule)
        step = GraphedStep(model, loss, adamw, *batch(0))
        assert step.bytes_of_slots == slots * sum(w.nbytes for w in model.stack.layers[0].parameters())
