"""One captured graph of whole steps draws a new plan and new masks at each replay: the bits of eager steps."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.check import Check, Failed
from benchmarks.gpu_check.step import VARIANTS, Step

REPLAYS = 3
NAMES = ("keep", "rows", "slot", "kept", "key", "output")


def run(check: Check) -> dict[str, Any]:
    device, done = check.device, []
    # A dry run is content with one of the two ways of each.
    for variant, owned in zip(VARIANTS, (False, True), strict=True) if check.dry else product(VARIANTS, (False, True)):
        step = Step(device.device, *variant, tiny=check.dry)
        begin = step.counters.clone()
        with device.side_stream():
            eager = [[value.clone() for value in step.run(owned)] for _ in range(REPLAYS)]
        end = step.counters.clone()
        replay = device.capture(lambda step=step, owned=owned: step.run(owned))
        step.counters.copy_(begin)
        for number, expected in enumerate(eager):
            replay()
            device.synchronise()
            check_bits(f"{variant}, owned {owned}, replay {number}", replay.returned, expected)
        if not torch.equal(step.counters, end):
            raise Failed(f"counters: got {step.counters.tolist()}, expected {end.tolist()}")
        if len({str(keep.tolist()) for keep, *_ in eager}) < 2:
            raise Failed("the plans of all steps are equal")
        done.append(f"{variant}, {'owned stream' if owned else 'functional'}")
        check.save({"equal bits": done})
    return {
        "equal bits": done,
        "replays": REPLAYS,
        "captured": "a CUDA graph" if device.is_gpu else "nothing: called on the CPU",
    }


def check_bits(what: str, got: list[Tensor], expected: list[Tensor]) -> None:
    """Also of NaNs, of which there are none."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a, b):
            name = NAMES[i] if i < len(NAMES) else f"gradient {i - len(NAMES)}"
            raise Failed(f"{what}: {name} has other bits than eager's")
