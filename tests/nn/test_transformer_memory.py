"""What a TransformerStack holds for backward: ten units of what is kept, within its bound, as told before."""

import gc
import math
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from layerdrop_fast import TransformerStack, set_step
from layerdrop_fast.memory import predicted_bytes, saved_bytes
from tests.nn.live_storages import LiveStorages
from tests.nn.transformer import assert_same, results, tensor

BATCH, LENGTH, WIDTH = 8, 32, 64
X = tensor(BATCH, LENGTH, WIDTH, dtype=torch.float32).requires_grad_()
SOURCE = tensor(BATCH, 12, WIDTH, dtype=torch.float32, seed=2).requires_grad_()
UNIT = X.nbytes
KINDS = {
    "plain": {},
    "dropout": {"dropout": 0.1, "activation_dropout": 0.1},
    "recomputed": {"recompute": "qkv", "dropout": 0.1},
    "recomputed, rotary": {"recompute": "qkv", "rope_theta": 100.0},
    "grouped heads, SwiGLU, RMSNorm": {"num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"},
    "post-norm": {"norm_first": False},
    "post-norm, recomputed": {"norm_first": False, "recompute": "qkv"},
    "layer scale": {"layer_scale": 0.1},
    "branches": {"target": "branch"},
    "post-norm branches": {"target": "branch", "norm_first": False},
    "cross-attention": {"cross_attention": True},
}
GRANULARITIES = pytest.mark.parametrize("granularity", ["batch", "sample"])


def stack(layers=6, **keywords):
    return TransformerStack(layers, WIDTH, 4, 4 * WIDTH, **({"seed": 10, "schedule": 0.5, "dropout": 0.0} | keywords))


def inputs_of(model):
    return (X, SOURCE) if model.layers[0].multihead_attn is not None else (X,)


def plan_of(model):
    return model.plan(batch_size=BATCH if model.granularity == "sample" else None)


@GRANULARITIES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_steps_bytes_are_known_before_it(autocast, kind, granularity):
    model = stack(**KINDS[kind], granularity=granularity)
    for step in range(2):
        set_step(model, step)
        told = predicted_bytes(model, plan_of(model), X.shape, autocast=autocast, memory_length=12)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            held = saved_bytes(model, *inputs_of(model), exclude=inputs_of(model)[1:], is_causal=True)
        assert abs(held - told) <= 0.03 * told


@GRANULARITIES
@pytest.mark.parametrize(("dtype", "max_kept"), [(torch.float64, None), (torch.bfloat16, None), (torch.float32, 2)])
def test_prediction_of_other_dtypes_and_of_bounded_steps(dtype, max_kept, granularity):
    model = stack(granularity=granularity, schedule=0.2, max_kept=max_kept).to(dtype)
    x = X.detach().to(dtype).requires_grad_()
    told = predicted_bytes(model, plan_of(model), x.shape, dtype=dtype)
    assert abs(saved_bytes(model, x) - told) <= 0.03 * told


@pytest.mark.parametrize(("recompute", "units"), [(None, 10), ("qkv", 7)])
@pytest.mark.parametrize("p", [0.0, 0.5])
@GRANULARITIES
def test_a_kept_layer_holds_ten_units_and_seven_with_recomputed_heads(granularity, p, recompute, units):
    """Of tokens times width; beside them small numbers: 1 / std of two norms, a logarithm for each of four heads."""
    keywords = {"granularity": granularity, "sampling": "systematic", "schedule": p, "dropout": 0.1}
    held = saved_bytes(stack(**keywords, recompute=recompute), X)
    floor = units * 6 * (1 - p) * UNIT
    assert floor < held <= floor + 6 * (1 - p) * BATCH * LENGTH * 6 * 4 + 1024


@GRANULARITIES
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_a_dense_stack_of_the_kept_units(kind, granularity):
    """A dense stack's bytes for as many layers and samples as this plan keeps, within 2 %."""
    model = stack(**KINDS[kind] | {"target": "layer"}, granularity=granularity)
    kept = sum(plan_of(model).kept_counts) * (BATCH if granularity == "batch" else 1)
    without = inputs_of(model)
    held = saved_bytes(model, *without, exclude=without)
    dense = []
    for layers in (1, 2):
        one = stack(layers, **KINDS[kind] | {"target": "layer"}, schedule=0.0)
        dense.append(saved_bytes(one, *without, exclude=without))
    weights = 0
    if kind == "layer scale":  # its scaled matrices are held whatever the number of tokens
        weights = (WIDTH**2 + 4 * WIDTH**2) * 4
    a_layer = (dense[1] - dense[0] - weights) * kept / BATCH
    assert held <= 1.02 * a_layer + weights * len(plan_of(model).layers)


def test_bytes_saved_in_the_statistics_are_those_of_the_skipped_layers():
    model = stack(granularity="sample", dropout=0.1)
    dense = predicted_bytes(model, None, X.shape)
    saved = 0
    for _ in range(3):
        saved += dense - predicted_bytes(model, plan_of(model), X.shape)
        model(X)
    assert model.stats().bytes_saved == pytest.approx(saved, rel=1e-3)


def backward_peak(model):
    """The most bytes that live between the end of forward and that of backward, of what a step makes."""
    for _ in range(2):  # the second step finds its gradients in place
        model.zero_grad(set_to_none=False)
        X.grad = torch.zeros_like(X)
        set_step(model, 0)
        gc.collect()
        with LiveStorages() as live:
            out = model(X)
            live.reset()
            out.sum().backward()
        peak = live.peak
    return peak


@pytest.mark.parametrize("recompute", [None, "qkv"])
@pytest.mark.parametrize("max_kept", [1, 2, 3])
def test_the_peak_is_that_of_max_kept_layers_and_of_copies_of_the_stream(max_kept, recompute):
    """The peak in backward included: compared with a stack that has no more layers than the bound."""
    kept = 8
    bounded = backward_peak(stack(kept, schedule=0.0, max_kept=max_kept, dropout=0.1, recompute=recompute))
    small = backward_peak(stack(max_kept, schedule=0.0, dropout=0.1, recompute=recompute))
    copies = math.ceil((kept - max_kept) / max_kept)
    free = backward_peak(stack(kept, schedule=0.0, dropout=0.1))
    assert bounded <= small + (copies + 1) * UNIT
    assert bounded < 0.7 * free


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("target", ["layer", "branch"])
@GRANULARITIES
def test_bounded_steps_have_the_same_results(granularity, target, norm_first):
    keywords = {"granularity": granularity, "target": target, "norm_first": norm_first, "dropout": 0.2, "schedule": 0.3}
    for max_kept in (1, 2):
        expected, bounded = stack(**keywords).double(), stack(**keywords, max_kept=max_kept).double()
        bounded.load_state_dict(expected.state_dict())
        x = X.detach().double().requires_grad_()
        for _ in range(2):
            ours = results(partial(bounded, is_causal=True), bounded, x)
            assert_same(ours, results(partial(expected, is_causal=True), expected, x))


def test_the_gradients_of_query_key_and_value_are_put_together_once():
    """In the layout that the product reads: no copy of three units behind it."""
    model = TransformerStack(1, 32, 2, 64, dropout=0.0, schedule=0.0, seed=0)
    out = model(tensor(3, 5, 32, dtype=torch.float32).requires_grad_())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        out.sum().backward()
    heads = 3 * 5 * 3 * 32
    put = [event for event in profiler.events() if event.name in ("aten::cat", "aten::copy_")]
    whole = [event.name for event in put if math.prod((event.input_shapes or [[]])[0] or [0]) == heads]
    assert sum(event.name == "aten::cat" for event in put) == 1
    assert "aten::copy_" not in whole


def test_errors_name_both_sides():
    model = stack(granularity="sample")
    with pytest.raises(ValueError, match=r"shape: got \[8, 64\], expected \(B, S, D\)"):
        predicted_bytes(model, None, (8, 64))
    with pytest.raises(ValueError, match=r"shape: got \[8, 32, 65\], expected \(B, S, D\) with D = 64"):
        predicted_bytes(model, None, (8, 32, 65))
    with pytest.raises(TypeError, match="stack is a Sequential, expected a TransformerStack"):
        predicted_bytes(torch.nn.Sequential(model), None, X.shape)
    with pytest.raises(ValueError, match="expected one of 6 units and 5 samples"):
        predicted_bytes(model, model.plan(batch_size=8), (5, 32, 64))


def test_recomputed_heads_cost_a_twelfth_of_the_matrix_products():
    """3 D^2 of 12 D^2 numbers a token once more in 3 * 12 D^2, and nothing of attention itself."""
    flops = []
    for recompute in (None, "qkv"):
        model = stack(schedule=0.0, recompute=recompute)
        with FlopCounterMode(display=False) as counter:
            model(X).sum().backward()
        flops.append(counter.get_total_flops())
    products = 3 * 12 * 2 * WIDTH**2 * BATCH * LENGTH * 6
    assert flops[0] == products  # the counter knows no attention kernel of a CPU
    assert flops[1] - flops[0] == products / 12
