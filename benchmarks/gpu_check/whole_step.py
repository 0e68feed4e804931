"""Whole training steps: none waits for the device, and a captured one has the bits of eager ones."""

from typing import Any

from benchmarks.gpu_check import graph, graphed_step, synchronisation
from benchmarks.gpu_check.check import Check


def run(check: Check) -> dict[str, Any]:
    stages = {"synchronisation": synchronisation, "graph": graph, "graphed step": graphed_step}
    return {name: stage.run(check) for name, stage in stages.items()}
