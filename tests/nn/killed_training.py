"""A small training that checkpoints after every microbatch, and kills itself where it is told to.

python -m tests.nn.killed_training batch FOLDER [FORWARD]
"""

import os
import signal
import sys
from pathlib import Path

import torch

from layerdrop_fast import DropSchedule, decreasing, linear
from tests.nn.transformer import BATCH, LENGTH, WIDTH, stack, tensor

FORWARDS, ACCUMULATION = 18, 3


def main(granularity: str, folder: Path, kill_at: int | None) -> None:
    folder.mkdir(exist_ok=True)
    model = stack(
        granularity=granularity,
        accumulation=ACCUMULATION,
        dropout=0.2,
        schedule=DropSchedule(4, linear(0.9), decreasing(6)),
        seed=5,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, path = [], folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
        for name, weight in model.named_parameters():
            weight.grad = saved["gradients"].get(name)
    while len(losses) < FORWARDS:
        n = len(losses)
        if n == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = (model(tensor(BATCH, LENGTH, WIDTH, seed=n)) ** 2).mean() / ACCUMULATION
        loss.backward()
        losses.append(loss.detach())
        if n % ACCUMULATION == ACCUMULATION - 1:
            optimizer.step()
            optimizer.zero_grad()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(state | {"gradients": gradients}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    torch.save({"losses": torch.stack(losses), **dict(model.named_parameters())}, folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
