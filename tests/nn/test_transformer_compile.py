"""torch.compile: one graph for all plans, the results of eager, and no byte more held for backward."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from layerdrop_fast import set_step
from layerdrop_fast.memory import saved_bytes
from tests.nn.transformer import BATCH, LENGTH, WIDTH, assert_same, next_plan, results, stack, tensor

X = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
KINDS = {
    "plain": {},
    "dropout, scale": {"dropout": 0.2, "activation_dropout": 0.1, "rope_theta": 10.0, "num_kv_heads": 1},
    "post-norm": {"norm_first": False, "dropout": 0.2},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_eps(model):
    """A norm's eps is a constant of a graph: layers share one only where theirs are equal."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    return model


def assert_equal_steps(compiled, eager, steps, zeros=False, **inputs):
    """``zeros``: dropped layers' gradients are zeros where eager has none."""
    for step in steps:
        set_step(compiled, step)
        set_step(eager, step)
        out, grads = results(partial(compiled, **inputs), compiled, X)
        expected = results(partial(eager, **inputs), eager, X)
        for index, want in enumerate(expected[1]):
            if zeros and want is None:
                assert not grads[index].any()
                grads[index] = None
        assert_same((out, grads), expected)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_share_graphs_whose_number_does_not_depend_on_depth_or_plan(kind, granularity):
    graphs = []
    for depth in (3, 6):
        torch._dynamo.reset()
        eager, compiled = (same_eps(stack(depth, granularity=granularity, **KINDS[kind])) for _ in range(2))
        counter = CompileCounterWithBackend("aot_eager")
        for layer in compiled.layers:
            layer.compile(backend=counter, fullgraph=True)
        assert_equal_steps(compiled, eager, range(8), is_causal=True)
        graphs.append(counter.frame_count)
    # At granularity "batch" the first kept layer has no branch before it, which makes a graph of its own.
    expected = 2 if granularity == "batch" and kind != "post-norm" else 1
    assert graphs == [expected, expected]


@pytest.mark.parametrize("scale", ["none", "inverse"])
def test_compiled_layers_are_one_graph_for_all_numbers_of_kept_samples(scale):
    compiled = same_eps(stack(3, granularity="sample", dropout=0.2, scale=scale, schedule=[0.3, 0.6, 0.5]))
    counter = CompileCounterWithBackend("aot_eager")
    for layer in compiled.layers:
        layer.compile(backend=counter, fullgraph=True)
    assert len(next_plan(compiled).layers) == 3
    seen = set()
    for step in range(150):
        seen |= {tuple(count for count in next_plan(compiled).kept_counts if count)}
        compiled(X).sum().backward()
        if step == 0:
            graphs = counter.frame_count
    # With scalars among its inputs torch calls the backend a second time for the same graph.
    assert counter.frame_count == graphs == (1 if scale == "none" else 2)
    assert len(seen) > 50


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_a_whole_stack_is_one_graph_for_a_thousand_plans(granularity):
    compiled = stack(2, granularity=granularity, dropout=0.2, schedule=[0.4, 0.9])
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(backend=counter)
    x = tensor(3, 2, WIDTH)
    seen = set()
    for step in range(1000):
        seen.add(tuple(next_plan(compiled, 3).kept_counts))
        compiled(x).sum().backward()
        if step == 0:
            graphs = counter.frame_count
    assert counter.frame_count == graphs == 1
    assert (0, 0) in seen
    assert {first for first, _ in seen} == set(range(4 if granularity == "sample" else 2))


@pytest.mark.parametrize(
    "keywords",
    [
        {"granularity": "batch", **KINDS["dropout, scale"]},
        {"granularity": "sample", "scale": "inverse", **KINDS["dropout, scale"]},
        {"granularity": "sample", "scale": "realized", "target": "branch", **KINDS["post-norm"]},
    ],
)
def test_a_whole_stack_equals_eager(keywords):
    eager, compiled = stack(3, **keywords), stack(3, **keywords)  # one may be dropped between two that are kept
    compiled.compile(backend="aot_eager")
    assert_equal_steps(compiled, eager, range(6), zeros=True, is_causal=True)
    assert compiled.counters.forwards == 6
    torch.testing.assert_close(compiled.eval()(X), eager.eval()(X))


@pytest.mark.parametrize(("recompute", "floor"), [(None, 10), ("qkv", 7)])
def test_inductor_equals_eager_and_holds_ten_units_of_what_is_kept(recompute, floor):
    """Seven, with recomputed heads."""
    keywords = {"granularity": "sample", "dropout": 0.1, "dim_feedforward": 4 * WIDTH, "recompute": recompute}
    eager, compiled = (stack(2, **keywords, dtype=torch.float32) for _ in range(2))
    compiled.compile()
    held = []
    for length in (16, 32):
        x = tensor(4, length, WIDTH, dtype=torch.float32).requires_grad_()
        for model in (eager, compiled):
            set_step(model, 0)
        ours, expected = (results(model, model, x) for model in (compiled, eager))
        torch.testing.assert_close(ours[0], expected[0])
        torch.testing.assert_close(ours[1][0], expected[1][0], rtol=1e-3, atol=1e-5)
        held.append([])
        for model in (eager, compiled):
            set_step(model, 0)
            held[-1].append(saved_bytes(model, x))
    (eager_16, compiled_16), (eager_32, compiled_32) = held
    kept = sum(eager.plan(0, batch_size=4).kept_counts)
    units = (compiled_32 - compiled_16) / (kept * 16 * WIDTH * 4)
    # Beside the ten: rstd of two norms, and a number for each head and token of attention.
    assert floor < units <= floor + 4 / WIDTH
    assert compiled_32 - compiled_16 <= 1.02 * (eager_32 - eager_16)


def test_a_compiled_model_runs_the_stack_outside_its_graphs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = stack(granularity="sample", dropout=0.2)

        def forward(self, x):
            return torch.tanh(self.stack(x * 2, is_causal=True))

    eager, compiled = Model(), Model()
    run = torch.compile(compiled, backend="aot_eager")
    for _ in range(4):
        assert_same(results(run, compiled, X), results(eager, eager, X))
    assert compiled.stack.counters.forwards == 4


def test_a_copy_of_a_compiled_stack_has_weights_of_its_own():
    compiled = stack(granularity="sample")
    compiled.compile(backend="aot_eager")
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.5)
    plain = stack(granularity="sample")
    plain.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(X), plain(X))


def test_bounded_pieces_are_not_compiled():
    with pytest.raises(ValueError, match="max_kept is 2, expected None"):
        stack(max_kept=2).compile()
