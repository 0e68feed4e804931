"""Where the time of a step goes."""

import pytest

from benchmarks import profile_step
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import WAYS


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("layerdrop_fast::act_bwd", "row work, activation, norms"),
        ("aten::native_layer_norm_backward", "row work, activation, norms"),
        ("aten::bernoulli_", "masks"),
        ("aten::add_", "copies, fills, sums"),
        ("aten::view", "everything else"),
    ],
)
def test_ops_have_kinds(op, kind):
    assert profile_step.kind_of(op) == kind


def test_all_time_of_a_step_is_of_some_kind_and_masks_are_of_those_that_draw_them():
    setting = Setting(layers=2, d_model=16, dim_feedforward=64, nhead=2, samples=2, length=8)
    contest = Contest(setting, {way: WAYS[way][1] for way in ("skip", "ours")})
    found = {}
    for way in contest.ways:
        contest.ways[way].follow(setting.plan(0))
        found[way] = profile_step.profiled(contest, way)
        assert set(found[way]) <= {*profile_step.KINDS, profile_step.OTHER}
        assert all(found[way][kind] > 0 for kind in ("matrix products", "attention", "optimizer"))
    assert found["skip"]["masks"] > 0 == found["ours"]["masks"]


def test_the_table_has_a_line_a_kind_and_a_column_a_way(capsys):
    profile_step.main(["ours", "limit", "--layers", "2", "--turns", "1", "--p", "0.5"])
    title, _, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("2 layers, d 256")
    assert title.endswith("ms a step, median of 1, 1 threads")
    assert head.split() == ["ours", "limit"]
    assert [line[:30].strip() for line in lines] == [*profile_step.KINDS, profile_step.OTHER]
    assert all(len(line[30:].split()) == 2 for line in lines)
    assert float(lines[0].split()[-1]) > 0
