"""Tunes the kernels of a training step for this GPU, as far as the time reaches; the file lies with the records."""

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu_check.check import Check
from layerdrop_fast.triton import tune
from layerdrop_fast.triton.configurations import tuned_file

FIRST = ("scatter_residual_gather_norm", "scatter_residual_gather_norm_bwd", "act", "act_bwd")


def run(check: Check) -> dict[str, Any]:
    file = tuned_file(check.device.name or "interpreter", check.file.parent)
    options = tune.Options(FIRST, (4096, 2048, 1024), (torch.bfloat16,), file)
    if check.dry:
        options = tune.Options(FIRST[:1], (64,), (torch.float32,), file, samples=2, positions=1, rounds=1)
    result: dict[str, Any] = {"tuned": []}
    for found in tune.tune(options, check.device):
        result["tuned"].append({**asdict(found), "line": found.line()})
        check.save(result)
        if check.left() < 20:
            break
    return result
