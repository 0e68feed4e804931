"""Heads and chunks that are dropped: the results of masks, at the price of what is kept."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerdrop_fast import DropSchedule, TransformerStack, decreasing, draw_plan, linear, set_step, uniform
from layerdrop_fast.memory import predicted_bytes, saved_bytes
from layerdrop_fast.plan import SAMPLINGS
from layerdrop_fast.prune import extract, skip_layers
from layerdrop_fast.reference.transformer_stack import transformer_stack
from tests.nn.transformer import BATCH, LENGTH, SOURCE, WIDTH, assert_same, key_of, results, stack, tensor

HALF = {"head": 0.5, "ffn_chunk": 0.5}
TARGETS = {
    "head": {"head": 0.5},
    "ffn_chunk": {"ffn_chunk": 0.5},
    "both": HALF,
    "layers too": {"layer": 0.4, "head": 0.4, "ffn_chunk": 0.6},
    "branches too": {"branch": 0.4, "head": 0.6, "ffn_chunk": 0.4},
}
KINDS = {
    "plain": {},
    "grouped, rotary": {"nhead": 6, "num_kv_heads": 3, "rope_theta": 100.0},
    "swiglu, rmsnorm": {"activation": "swiglu", "norm": "rmsnorm", "bias": False},
    "cross-attention": {"cross_attention": True},
    "post-norm": {"norm_first": False},
    "layer scale": {"layer_scale": 0.7},
    "recompute": {"recompute": "qkv"},
    "dropout": {"dropout": 0.3, "activation_dropout": 0.4},
    "dropout, swiglu": {"activation": "swiglu", "activation_dropout": 0.4, "scale": "inverse"},
    "inverse": {"scale": "inverse"},
    "bounded": {"max_kept": 1},
}


def parted(schedule, layers=4, **keywords):
    return stack(layers, **({"nhead": 4, "ffn_chunks": 5, "schedule": schedule} | keywords))


def masks_of(model, plan):
    """What the reference takes: kept branches, and the factors of their parts."""
    branches, per_unit = model._branches, model._branches // model.units_per_layer
    units = len(model.layers) * model.units_per_layer
    keep = plan.keep[:units].repeat_interleave(per_unit, dim=0).expand(-1, BATCH).clone()
    density = 1 - np.repeat(model.schedule(plan.step), branches)
    scales = torch.from_numpy(1 / density if model.scale == "inverse" else np.ones_like(density))
    rest, parts = plan.keep[units:, 0].double(), {}
    for part, schedule in model.parts.schedules.items():
        for number, layer in enumerate(model.layers):
            ffn = layer.num_branches - 1
            for branch in [ffn] if part == "ffn_chunk" else range(ffn):
                total = model.parts.ffn_chunks if part == "ffn_chunk" else layer.self_attn.num_kv_heads
                kept, rest = rest[:total], rest[total:]
                factor = 1 / (1 - schedule(plan.step)[number]) if model.scale == "inverse" else 1.0
                parts[number * branches + branch] = kept * factor
                if not kept.any():
                    keep[number * branches + branch] = False
    assert not len(rest)
    return {"keep": keep, "scales": scales, "parts": parts}


def reference(model, **keywords):
    return lambda *inputs: transformer_stack(model, *inputs, **keywords)[-1]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_masks(kind, targets):
    model = parted(TARGETS[targets], **KINDS[kind])
    x, memory = tensor(BATCH, LENGTH, WIDTH), tensor(BATCH, SOURCE, WIDTH, seed=2)
    given = [x, memory] if "cross_attention" in KINDS[kind] else [x]
    ran = set()
    for _ in range(4):
        plan = model.plan()
        masks = masks_of(model, plan)
        ran |= {tuple(part.tolist()) for part in masks["parts"].values()}
        leaves = [leaf.clone().requires_grad_() for leaf in given]
        wanted = results(reference(model, key=key_of(model, plan), **masks), model, *leaves)
        assert_same(results(model, model, *leaves), wanted)
    assert len(ran) > 4


def test_masks_of_single_heads_go_with_their_heads():
    model = parted({"head": 0.5}, num_kv_heads=2)
    added = tensor(BATCH, 4, LENGTH, LENGTH, seed=5)
    x = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
    for _ in range(3):
        masks = masks_of(model, model.plan())
        wanted = results(reference(model, added=added, **masks), model, x)
        assert_same(results(lambda x: model(x, attn_mask=added), model, x), wanted)


def test_packed_rows_have_the_results_of_padded_ones():
    lengths = [3, 7, 1, 5]
    ends = torch.tensor([0, *np.cumsum(lengths)])
    for n in range(3):
        padded, packed = parted(HALF), parted(HALF)
        padded.counters.forwards = packed.counters.forwards = n
        x = tensor(4, 7, WIDTH)
        mask = torch.arange(7) >= torch.tensor(lengths)[:, None]
        whole = padded(x, key_padding_mask=mask, is_causal=True)
        rows = packed(x[~mask][None], cu_seqlens=ends, is_causal=True)
        torch.testing.assert_close(rows[0], whole[~mask])


def test_in_evaluation_everything_runs():
    model, whole = parted(HALF).eval(), stack(nhead=4).eval()
    x = tensor(BATCH, LENGTH, WIDTH)
    assert torch.equal(model(x), whole(x))


@pytest.mark.parametrize("target", ["head", "ffn_chunk"])
def test_a_target_alone_takes_the_schedule(target):
    model = parted(DropSchedule(4, linear(0.6)), target=target)
    assert model.schedule(0).tolist() == [0.0] * 4
    assert model.parts.schedules[target](0).tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6])
    per_layer = 4 if target == "head" else 5
    assert len(model.plan().kept_counts) == 4 + 4 * per_layer


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decisions_about_layers_are_those_without_parts(sampling):
    alone, model = stack(schedule=0.5, sampling=sampling), parted({"layer": 0.5, "head": 0.5}, sampling=sampling)
    for n in range(20):
        assert model.plan(n).kept_counts[:4] == alone.plan(n).kept_counts


def test_systematic_sampling_fixes_the_number_of_each_kind():
    model = parted({"layer": 0.25, "head": 0.5, "ffn_chunk": 0.4}, sampling="systematic")
    kept = np.array([model.plan(n).kept_counts for n in range(300)])
    assert (kept[:, :4].sum(1) == 3).all()
    assert (kept[:, 4:20].sum(1) == 8).all()
    assert (kept[:, 20:].sum(1) == 12).all()
    assert kept.mean(0) == pytest.approx(1 - model.rates(0), abs=0.15)  # 5 standard errors
    drawn = draw_plan(np.full(16, 0.5), seed=model.counters.seed, step=7, stream=1 << 60, sampling="systematic")
    assert model.plan(7).kept_counts[4:20] == drawn.kept_counts
    # 4 heads of layer 0 and 4 chunks of layer 0 are decided apart: their places follow different words.
    assert abs(np.corrcoef(kept[:, 4], kept[:, 20])[0, 1]) < 0.3


def test_parts_are_kept_at_their_rates():
    model = parted({"head": 0.3, "ffn_chunk": 0.6})
    kept = np.array([model.plan(n).kept_counts for n in range(2000)])
    assert kept[:, :4].all()
    assert kept[:, 4:20].mean(0) == pytest.approx(np.full(16, 0.7), abs=0.05)
    assert kept[:, 20:].mean(0) == pytest.approx(np.full(20, 0.4), abs=0.05)


def products(model, x):
    """Floating-point operations of a step's products with weights."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


@pytest.mark.parametrize("targets", ["head", "ffn_chunk", "both"])
def test_products_and_saved_bytes_follow_what_is_kept(targets):
    """At width 64, where the norms' share is small: within 2 % of what a layer of that many heads and chunks takes."""
    model = TransformerStack(2, 64, 8, 256, dropout=0.0, schedule=TARGETS[targets], seed=3, dtype=torch.float32)
    x = tensor(4, 32, 64, dtype=torch.float32).requires_grad_()
    tokens, seen = 4 * 32, set()
    for _ in range(6):
        plan = model.plan()
        shares = [
            1.0 if part is None else len(part.kept) / part.total
            for part in model.parts.kept(model.layers, plan, 2, "none")
        ]
        attention, ffn = sum(shares[::2]), sum(shares[1::2])
        held = saved_bytes(model, x)
        model.counters.forwards -= 1  # the same plan once more
        assert held == pytest.approx(predicted_bytes(model, plan, x.shape), rel=0.03)
        ran = [share > 0 for share in shares]
        floor = 4 * tokens * 64 * (sum(ran) + 4 * attention + 4 * ffn)
        assert held == pytest.approx(floor, rel=0.03)
        assert products(model, x) == pytest.approx(3 * 2 * tokens * 64 * 64 * (4 * attention + 8 * ffn))
        seen.add(held)
    assert len(seen) > 3


def test_a_branch_without_parts_does_not_run():
    model = parted({"head": 1.0})
    model(tensor(BATCH, LENGTH, WIDTH)).sum().backward()
    assert all(layer.self_attn.in_proj_weight.grad is None for layer in model.layers)
    assert all(layer.linear1.weight.grad is not None for layer in model.layers)
    model = parted({"head": 1.0, "ffn_chunk": 1.0})
    x = tensor(BATCH, LENGTH, WIDTH)
    out = model(x)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert model.stats().realized_rates.tolist() == [1.0] * 4


def test_statistics_tell_how_much_of_a_layer_ran():
    model = parted({"head": 0.5})
    shares = np.zeros(4)
    for n in range(10):
        kept = np.array(model.plan(n).kept_counts[4:]).reshape(4, 4).mean(1)
        shares += (kept + 1) / 2
        model(tensor(BATCH, LENGTH, WIDTH))
    assert model.stats().realized_rates == pytest.approx(1 - shares / 10)


def test_a_smaller_network_has_the_rates_of_its_layers():
    model = parted({"layer": 0.1, "head": [0.1, 0.2, 0.3, 0.4]})
    assert extract(model, [1, 3]).parts.schedules["head"](0).tolist() == [0.2, 0.4]
    with skip_layers(model, [0, 2]):
        assert model.parts.schedules["head"](0).tolist() == [0.1, 0.3]
        model(tensor(BATCH, LENGTH, WIDTH))
    assert model.parts.schedules["head"](0).tolist() == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(schedule={"heads": 0.5}), "target in schedule is 'heads', expected one of"),
        (dict(schedule={}), r"schedule has the targets \[\], expected some"),
        (dict(schedule={"layer": 0.1, "branch": 0.1}), "not both layer and branch"),
        (dict(schedule=HALF, granularity="sample"), "at granularity 'sample', expected \"batch\""),
        (dict(schedule=HALF, scale="eval"), 'scale is "eval", expected "none" or "inverse"'),
        (dict(schedule=HALF, ffn_chunks=3), "ffn_chunks is 3, expected a divisor of dim_feedforward, 20 in layer 0"),
        (dict(schedule=HALF, ffn_chunks=0), "ffn_chunks must be at least 1"),
        (dict(schedule={"head": 1.5}), r"\[0, 1\], got 1.5"),
        (dict(target="heads"), "target is 'heads'"),
    ],
)
def test_errors_name_both_sides(keywords, message):
    with pytest.raises(ValueError, match=message):
        parted(**({"schedule": 0.5} | keywords))


def test_compiled_layers_are_refused():
    model = parted(HALF)
    for layer in model.layers:
        layer.compile()
    with pytest.raises(ValueError, match="the layers are compiled, expected them eager"):
        model(tensor(BATCH, LENGTH, WIDTH))
    assert model.counters.forwards == 0


@pytest.mark.parametrize("targets", [{"head": 0.5}, {"head": 0.5, "ffn_chunk": 0.5}], ids=["heads", "and chunks"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross-attention"])
def test_saved_bytes_are_those_predicted(kind, autocast, targets):
    keywords = {"nhead": 4, "ffn_chunks": 4, "schedule": targets}
    keywords |= {name: value for name, value in KINDS[kind].items() if name != "nhead"}
    if "num_kv_heads" in keywords:
        keywords["num_kv_heads"] = 2
    model = TransformerStack(3, 64, dim_feedforward=128, **({"dropout": 0.1, "seed": 1} | keywords))
    x, seen = torch.randn(4, 32, 64, requires_grad=True), set()
    for _ in range(8 if kind == "bounded" else 4):  # bounded, of one layer only
        expected = predicted_bytes(model, model.plan(), x.shape, autocast=autocast)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            assert saved_bytes(model, x) == pytest.approx(expected, rel=0.01)
        seen.add(expected)
    assert len(seen) > 2


@pytest.mark.parametrize("keywords", [{"norm_first": False}, {"max_kept": 1}, {"max_kept": 1, "norm_first": False}])
@pytest.mark.parametrize(
    "targets", [{"head": 0.7}, {"branch": 0.0, "head": 0.7}, {"head": 0.5, "ffn_chunk": 0.5}], ids=str
)
def test_saved_bytes_are_those_predicted_where_branches_keep_nothing(targets, keywords):
    model = TransformerStack(4, 64, 2, 128, 0.1, schedule=targets, ffn_chunks=2, seed=1, **keywords)
    x, nothing = torch.randn(4, 32, 64, requires_grad=True), 0
    for _ in range(20):
        plan = model.plan()
        kept = model.parts.kept(model.layers, plan, 4 * model.units_per_layer, "none")
        nothing += any(part is not None and not part.kept for part in kept)
        assert saved_bytes(model, x) == pytest.approx(predicted_bytes(model, plan, x.shape), rel=0.03)
    assert nothing > 3


def test_statistics_weigh_what_each_branch_has():
    """All heads dropped in every step: the attention's products and bytes, and half of the branches."""
    model = parted({"head": 1.0}, 2)
    whole = parted({"head": 0.0}, 2)
    x = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
    model(x), whole(x)
    stats = model.stats()
    attention = sum(layer.self_attn.in_proj_weight.numel() + WIDTH**2 for layer in model.layers)
    assert stats.flops_skipped == 6 * BATCH * LENGTH * attention
    assert stats.realized_rates.tolist() == [0.5, 0.5]
    assert (stats.layers_run, stats.layers_skipped) == (2, 0)
    difference = saved_bytes(whole, x) - saved_bytes(model, x)
    assert stats.bytes_saved == pytest.approx(difference, rel=0.01)


def test_statistics_of_branches_with_parts():
    model = parted({"branch": 0.5, "ffn_chunk": 0.4}, 3, seed=5)
    x, expected = tensor(BATCH, LENGTH, WIDTH), 0.0
    matrices = model.layers[0].linear1.weight.numel() + model.layers[0].linear2.weight.numel()
    for _ in range(5):
        plan = model.plan()
        parts = model.parts.kept(model.layers, plan, 6, "none")
        for unit in range(6):
            kept = bool(plan.keep[unit])
            share = kept * (1.0 if parts[unit] is None else len(parts[unit].kept) / parts[unit].total)
            expected += (1 - share) * (matrices if unit % 2 else 4 * WIDTH**2)
        model(x)
    assert model.stats().flops_skipped == pytest.approx(6 * BATCH * LENGTH * expected)


def test_rates_of_parts_have_their_time_multipliers():
    times = {"layer": 0.0, "head": DropSchedule(4, uniform(0.6), decreasing(11)), "ffn_chunk": 0.2}
    model = parted(times, scale="inverse", seed=3)
    assert model.rates(5)[4:20].tolist() == pytest.approx([0.3] * 16)
    set_step(model, 5)
    (part, *_) = (part for part in model.parts.kept(model.layers, model.plan(), 4, "inverse") if part.total == 4)
    assert part.scale == pytest.approx(1 / 0.7)
    x = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
    masks = masks_of(model, model.plan())
    assert_same(results(model, model, x), results(reference(model, **masks), model, x))
    small = extract(model, [0, 2])
    assert small.rates(5)[2:10].tolist() == pytest.approx([0.3] * 8)


def test_masks_of_memory_go_with_their_heads():
    model = parted({"head": 0.5}, num_kv_heads=2, cross_attention=True)
    x, memory = tensor(BATCH, LENGTH, WIDTH).requires_grad_(), tensor(BATCH, SOURCE, WIDTH, seed=2)
    added = tensor(BATCH, 4, LENGTH, SOURCE, seed=5)
    for _ in range(3):
        masks = masks_of(model, model.plan())
        wanted = results(lambda x: reference(model, memory_added=added, **masks)(x, memory), model, x)  # noqa: B023
        assert_same(results(lambda x: model(x, memory, memory_mask=added), model, x), wanted)


def test_a_list_of_layers_that_was_changed_is_named():
    model = parted({"head": 0.5})
    model.layers = model.layers[:2]
    model.schedule = DropSchedule.of(0.0, 2)
    model.reset_stats()
    with pytest.raises(ValueError, match=r"has 2 layers and a schedule of head for 4: set \.parts"):
        model(tensor(BATCH, LENGTH, WIDTH))


def test_what_is_dropped_is_told():
    model = parted({"branch": 0.1, "head": 0.5, "ffn_chunk": 0.25})
    for told in ("target='branch'", "uniform(p=0.1)", "head: DropSchedule", "uniform(p=0.5)", "ffn_chunks=5"):
        assert told in repr(model), told
    assert "head" not in parted({"layer": 0.1}).extra_repr()
