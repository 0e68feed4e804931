"""Every way computes its rule, and one that does not is caught before anything is timed."""

import dataclasses

import pytest
import torch

from layerdrop_fast import LayerDropStack, TransformerLayer, TransformerStack
from layerdrop_fast.recipes.bench.contest import Contest, Disagreement
from layerdrop_fast.recipes.bench.measure import makers_of, measure
from layerdrop_fast.recipes.bench.our_ways import OursWay
from layerdrop_fast.recipes.bench.peers import Masked, Skip
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY, WAYS

TINY = Setting(layers=6, d_model=8, dim_feedforward=32, nhead=2, samples=5, length=4)


def setting(granularity="batch", **changes):
    return dataclasses.replace(TINY, granularity=granularity, **changes)


def contest(of, *ways):
    return Contest(of, {way: WAYS[way][1] for way in ways or BY_GRANULARITY[of.granularity]})


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("granularity", BY_GRANULARITY)
def test_every_way_computes_its_rule(granularity, p):
    of = contest(setting(granularity, p=p, dtype="float64"))
    for way in of.ways:
        of.check(way)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", BY_GRANULARITY)
def test_every_way_computes_its_rule_in_less_precision(granularity, dtype):
    of = contest(setting(granularity, dtype=dtype))
    for way in of.ways:
        of.check(way)


@pytest.mark.parametrize("keywords", [{"recompute": "qkv"}, {"max_kept": 1}])
def test_variants_of_ours_compute_it_too(keywords):
    of = Contest(setting(dtype="float64"), {"ours": lambda *given: OursWay(*given, **keywords)})
    of.check("ours")


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.85])
def test_who_runs_how_much_by_batch(p):
    of = contest(setting(p=p))
    for turn in range(3):
        kept = len(of.setting.plan(turn).layers)
        assert abs(kept - (1 - p) * 6) < 1
        run = {way: of.layers_run(way, turn) for way in of.ways}
        assert run == dict.fromkeys(run, kept) | {"dense": 6, "masked": 6, "discard": 6}


def test_who_runs_how_much_by_sample():
    of = contest(setting("sample", p=0.3))
    for turn in range(3):
        counts = of.setting.plan(turn).kept_counts
        run = {way: of.layers_run(way, turn) for way in of.ways}
        assert set(counts) <= {3, 4}
        # DINOv2's rule keeps floor(3.5) of each layer.
        assert run == dict.fromkeys(run, sum(counts) / 5) | {"dense": 6, "masked": 6, "subset": 6 * 3 / 5}


def test_what_the_limits_run():
    of = contest(setting("sample", p=0.3))
    plan = of.setting.plan(1)
    counts = plan.kept_counts
    whole, rest = divmod(sum(counts), 5)
    assert of.ways["limit"].kept(plan).sum(1).tolist() == [5] * whole + [rest] + [0] * (5 - whole)
    assert of.ways["narrow"].kept(plan).sum(1).tolist() == sorted(counts, reverse=True)


def test_subsets_are_those_of_the_plan_as_far_as_the_rule_allows():
    of = contest(setting("sample", p=0.4), "subset")
    plan = of.setting.plan(0)
    assert plan.kept_counts == [3] * 6
    assert torch.equal(of.ways["subset"].kept(plan), plan.keep)
    other = setting("sample", p=0.3).plan(0)
    kept = contest(setting("sample", p=0.3), "subset").ways["subset"].kept(other)
    assert kept.sum(1).tolist() == [3] * 6
    assert not (kept & ~other.keep)[other.keep.sum(1) >= 3].any()


def test_all_ways_share_the_weights_and_no_modules():
    of = contest(setting())
    modules = [id(module) for way in of.ways.values() for module in way.modules]
    assert len(set(modules)) == len(modules)
    weights = {id(weight) for weight in of.names.values()}
    for way in of.ways.values():
        assert {id(weight) for module in way.modules for weight in module.parameters()} == weights


def test_a_step_trains():
    of = contest(setting(), "ours")
    of.ways["ours"].follow(of.setting.plan(0))
    before = [weight.detach().clone() for weight in of.layers[of.setting.plan(0).layers[0]].parameters()]
    of.step("ours")
    after = of.layers[of.setting.plan(0).layers[0]].parameters()
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_filling_the_optimizer_changes_no_weight():
    of = contest(setting(), "dense")
    before = [weight.detach().clone() for weight in of.names.values()]
    of.fill_optimizer()
    assert all(torch.equal(old, new) for old, new in zip(before, of.names.values(), strict=True))
    assert len(of.optimizer.state) == len(of.names)
    assert all(weight.grad is None for weight in of.names.values())


def test_the_check_knows_no_tf32():
    of, seen = contest(setting(p=0.0), "dense"), []
    of.ways["dense"].modules[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        of.check("dense")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


# Broken ways.


def red(match, of=None, **changes):
    """Measuring ends before the first number."""
    of = of or setting(**changes)
    seen = []
    with pytest.raises(Disagreement, match=match):
        measure(of, tell=lambda done, total, what: seen.append(what))
    assert all(what.startswith("correctness") for what in seen)


def replace_run(monkeypatch, way, replacement):
    """Makes a way's stack run ``replacement(run, x, kept, stack)``, run(x, kept) being its own way."""
    kind = {"stack": LayerDropStack, "ours": TransformerStack}[way]
    original = kind._run

    def changed(stack, x, turn, *rest):
        # A TransformerStack's _run ends in that of its base class; the limit's stacks drop nothing.
        if type(stack) is not kind or not stack.schedule(0).any():
            return original(stack, x, turn, *rest)

        def run(x, kept):
            return original(stack, x, dataclasses.replace(turn, kept=kept), *rest)[0]

        return replacement(run, x, turn.kept, stack), []

    monkeypatch.setattr(kind, "_run", changed)


OURS = pytest.mark.parametrize("way", ["stack", "ours"])


@OURS
def test_another_layer_runs(way, monkeypatch):
    replace_run(monkeypatch, way, lambda run, x, kept, _: run(x, [*kept[1:], kept[0]]))
    red(f"{way}: relative error of output")


@OURS
def test_a_gradient_is_lost(way, monkeypatch):
    def detached(run, x, kept, stack):
        with torch.no_grad():
            first = run(x, kept[:1])
        return run(first + (x - x.detach()), kept[1:])

    replace_run(monkeypatch, way, detached)
    red(f"{way}: .*gradient")


@OURS
def test_dropped_layers_get_gradients(way, monkeypatch):
    def touches_all(run, x, kept, stack):
        return run(x, kept) + 0.0 * sum(weight.sum() for weight in stack.parameters())

    replace_run(monkeypatch, way, touches_all)
    red(f"{way}: gradient of layer .* is a tensor, expected none")


@OURS
def test_numbers_that_are_none(way, monkeypatch):
    replace_run(monkeypatch, way, lambda run, x, kept, _: run(x, kept) * float("nan"))
    red(f"{way}: relative error of output is nan")


def test_masks_are_not_scaled(monkeypatch):
    scaled = Masked.mask
    monkeypatch.setattr(Masked, "mask", lambda self, branch: scaled(self, branch).bool().to(branch.dtype))
    red("masked: relative error of output")


def test_masks_leak_into_dropped_layers(monkeypatch):
    forward = Masked.forward
    monkeypatch.setattr(Masked, "forward", lambda self, x: forward(self, x) + 1e-9 * (x - x.detach()))
    red("masked: relative error of gradient of layer .* expected at most 0")


def test_skip_skips_too_much(monkeypatch):
    every = Skip.__iter__
    monkeypatch.setattr(Skip, "__iter__", lambda self: iter(list(every(self))[1:]))
    red("skip: ")


def test_ours_keeps_its_dropout(monkeypatch):
    always = property(lambda layer: 0.1, lambda layer, rate: None)
    monkeypatch.setattr(TransformerLayer, "dropout", always, raising=False)
    red("ours: relative error of output")


def test_the_limit_runs_one_layer_too_few(monkeypatch):
    limit = WAYS["limit"][1]
    kept = limit.kept
    monkeypatch.setattr(limit, "counts", lambda self, plan: [5, 5] + [0] * 4)
    monkeypatch.setattr(limit, "kept", lambda self, plan: torch.arange(5) < torch.tensor([5, 5, 5, 0, 0, 0])[:, None])
    assert kept is not limit.kept
    red("limit: ")


def test_makers_of_a_granularity_are_all_its_ways():
    assert {name for names in BY_GRANULARITY.values() for name in names} == set(WAYS)
    for granularity, names in BY_GRANULARITY.items():
        assert tuple(makers_of(granularity)) == names
