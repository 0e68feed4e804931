"""Every kernel once, small, for a tool that looks at each memory access."""

import os
import sys

import torch

from benchmarks.gpu_check.check import use_the_kernels


def main() -> None:
    use_the_kernels(os.environ.get("TRITON_INTERPRET") == "1")
    from benchmarks.gpu_check.rooflines import OPS
    from benchmarks.gpu_check.step import VARIANTS, Step
    from layerdrop_fast.triton.row_work import RowWork
    from layerdrop_fast.triton.timing import Device

    device = Device()
    step = Step(device.device, *VARIANTS[0], tiny=not device.is_gpu)
    for owned in (False, True):
        step.run(owned)
    samples, positions = (4, 3) if device.is_gpu else (2, 1)
    # Rows that registers hold, and that they do not; an odd number of channels, half of the samples kept.
    for channels, dtype in ((99, torch.float32), (16387, torch.bfloat16)):
        for op in OPS:
            work = RowWork(op, samples, positions, channels, dtype, kept=samples // 2)
            getattr(torch.ops.layerdrop_fast, op)(*work.arguments(device.device))
    device.synchronise()


if __name__ == "__main__":
    sys.exit(main())
