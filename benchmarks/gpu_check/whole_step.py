"""Whole training steps: none waits for the device, and a captured one has the bits of eager ones."""

from typing import Any

from benchmarks.gpu_check import graph, synchronisation
from benchmarks.gpu_check.check import Check


def run(check: Check) -> dict[str, Any]:
    return {"synchronisation": synchronisation.run(check), "graph": graph.run(check)}
