"""Where the time of a step goes, by kind of work, for several ways side by side.

    python -m benchmarks.profile_step --granularity sample --p 0.8 ours narrow limit

Medians over steps that take turns, in ms. A profiled step is some percent slower than others, in what is called often.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from layerdrop_fast.recipes.bench.contest import Contest
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.ways import BY_GRANULARITY, WAYS

# The first whose words an op's name contains.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("attention",),
    "optimizer": ("adamw", "Optimizer"),
    "row work, activation, norms": ("layerdrop_fast::", "gelu", "layer_norm", "index_add", "index_select", "index_put"),
    "masks": ("bernoulli", "dropout"),
    "copies, fills, sums": ("aten::copy_", "aten::cat", "aten::fill_", "aten::sum", "aten::add", "aten::mul"),
}
OTHER = "everything else"


def kind_of(op: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in op for part in parts):
            return kind
    return OTHER


def profiled(contest: Contest, way: str) -> dict[str, float]:
    """Milliseconds by kind of one step."""
    contest.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        contest.step(way)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="+", choices=list(WAYS))
    parser.add_argument("--granularity", choices=list(BY_GRANULARITY), default="batch")
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args(arguments)
    setting = Setting(layers=given.layers, p=given.p, granularity=given.granularity, dtype=given.dtype)
    contest = Contest(setting, {way: WAYS[way][1] for way in given.ways})
    contest.fill_optimizer()
    found = defaultdict(partial(defaultdict, list))
    for turn in range(1 + given.turns):
        for way in given.ways:
            contest.ways[way].follow(setting.plan(turn))
            for kind, milliseconds in profiled(contest, way).items():
                found[kind][way] += [milliseconds] if turn else []  # the first warms up
    print(f"{setting.title()}; ms a step, median of {given.turns}, {torch.get_num_threads()} threads\n")
    print(f"{'':<30}" + "".join(f"{way:>12}" for way in given.ways))
    for kind in (*KINDS, OTHER):
        print(f"{kind:<30}" + "".join(f"{median(found[kind][way] or [0.0]):>12.1f}" for way in given.ways))


if __name__ == "__main__":
    main()
