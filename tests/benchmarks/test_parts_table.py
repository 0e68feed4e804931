"""The table of heads, chunks and branches in docs/performance.md is what was measured."""

import json
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/xeon-2core/Linux-CPython-3.11-64bit/0001_parts.json"


def test_the_page_has_the_shares_of_time_and_bytes():
    figures = [run["extra_info"]["figures"] for run in json.loads(RESULTS.read_text())["benchmarks"]]
    by = {(found["setting"]["p"], found["way"]): found for found in figures}
    ways = list(dict.fromkeys(found["way"] for found in figures))
    page = (ROOT / "docs/performance.md").read_text()
    assert f"| kept | {' | '.join(ways)} |\n" in page
    for p in (0.25, 0.5, 0.75):
        cells = []
        for way in ways:
            whole, found = by[0.0, way], by[p, way]
            times = (*quantiles(found["seconds"], n=4, method="inclusive")[::2], median(found["seconds"]))
            low, high, middle = (seconds / median(whole["seconds"]) for seconds in times)
            cells.append(f"{middle:.2f} ({low:.2f}..{high:.2f}), {found['saved_bytes'] / whole['saved_bytes']:.2f}")
        assert f"| {1 - p:g} | {' | '.join(cells)} |\n" in page
