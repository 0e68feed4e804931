"""Memory for time: ours under ``max_kept`` and with recomputed products, fairseq's skip with and without activation
checkpoints, and what each holds over the course of a step."""

import dataclasses
from functools import lru_cache, partial

import pytest
from torch.utils.checkpoint import checkpoint

from benchmarks.replay import CLOCK, replay
from layerdrop_fast.recipes.bench.allocations import Course, course_of
from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.measure import Figures, measure_together
from layerdrop_fast.recipes.bench.our_ways import OursWay
from layerdrop_fast.recipes.bench.peer_ways import SkipWay
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import WAYS

THREADS = 2
ROUNDS = 5
BOUNDS = (15, 10, 5, 2, 1)
POINTS = 400  # of a drawn course
TINY = {"layers": 4, "d_model": 16, "dim_feedforward": 64, "nhead": 2, "samples": 2, "length": 4}


class Checkpointed(SkipWay):
    """fairseq's skip with torch's checkpoint round each kept layer."""

    def __call__(self, x):
        for layer in self.rule:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


MAKERS = {way: WAYS[way][1] for way in ("masked", "skip", "ours", "recompute", "limit")}
MAKERS |= {"skip, checkpoints": Checkpointed}
MAKERS |= {f"max_kept={bound}": partial(OursWay, max_kept=bound) for bound in BOUNDS}


@lru_cache(maxsize=1)
def measured(setting: Setting, **numbers: int) -> tuple[dict[str, Figures], dict[str, Course]]:
    contest = Contest(setting, MAKERS)
    (figures,) = measure_together([contest], **numbers)
    courses = {}
    for name, way in contest.ways.items():
        way.follow(setting.plan(0))
        contest.zero_grad()
        courses[name] = course_of(partial(contest.step, name), contest.x.device)
    return figures, courses


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("way", MAKERS)
def test_memory(benchmark, way):
    setting = dataclasses.replace(Setting(), **TINY if benchmark.disabled else {})
    figures, courses = measured(setting, **{"rounds": 1, "draws": 1} if benchmark.disabled else {"rounds": ROUNDS})
    benchmark.group = f"memory and time, {setting.title()}"
    benchmark.extra_info["figures"] = figures[way].record()
    benchmark.extra_info["course"] = dataclasses.asdict(courses[way].thinned(POINTS))
    replay(benchmark, figures[way].seconds)
