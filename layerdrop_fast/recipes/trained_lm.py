"""The language models that ``layerdrop-fast train lm`` and the demo leave behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.recipes.checkpoint import DamagedError, load_checkpoint, load_weights
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.training import DENSE, ModelSize, Training


def load_lm(path: Path | str, *, device: torch.device | str = "cpu") -> TransformerLM:
    """A trained model from its file, or what ``layerdrop-fast prune`` left of it, in evaluation mode, drop rates 0.

        model = load_lm("out/lm/model.safetensors")
        small = prune.extract(model, prune.every_other(16, kept=8))

    Args:
        path: ``model.safetensors``, or its folder; of the demo ``dense.safetensors`` or ``layerdrop.safetensors``.

    Raises:
        RecipeError: it cannot be read, is damaged, or holds no model of this version's.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        tensors, record = load_checkpoint(path)
    except DamagedError:
        raise RecipeError(f"{path} is damaged, or not what train or the demo wrote, or prune left of it") from None
    if isinstance(record, dict) and "step" in record:
        raise RecipeError(f"{path} is a run that is not finished, expected one that is: its command goes on with it")
    settings = record.get("settings") if isinstance(record, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    names = [field.name for field in dataclasses.fields(ModelSize)]
    if missing := [name for name in names if name not in settings]:
        raise RecipeError(
            f"{path} does not tell the {', '.join(missing)} of its model, expected a file of this version"
        )
    size = {name: settings[name] for name in names}
    cutoffs = None if size["cutoffs"] is None else tuple(size["cutoffs"])
    with torch.random.fork_rng(devices=[]):
        model = Training(ModelSize(**{**size, "cutoffs": cutoffs}), DENSE, steps=1).drawn()
    load_weights(path, model, tensors)
    return model.to(device).eval()
