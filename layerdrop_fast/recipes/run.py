"""One training in a folder: resumed where it was stopped, kept where it is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerdrop_fast._progress import stage
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.recipes.checkpoint import check_same_settings, load_checkpoint, load_weights, save_checkpoint
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.text import Corpus, Tokens
from layerdrop_fast.recipes.training import Progress, Training, train


def trained_in(
    folder: Path,
    name: str,
    training: Training,
    text: Tokens,
    *,
    device: torch.device,
    environment: dict[str, Any],
    should_stop: Callable[[], bool],
    title: str,
) -> tuple[TransformerLM, dict[str, Any]]:
    """The trained model and its record: from ``name``.safetensors where it is finished, else trained, or trained on.

    Raises:
        RecipeError: what is in the folder is damaged or was made with other settings, or the training failed.
        Stopped: ``should_stop`` said so; the state is saved.
    """
    finished, unfinished = (folder / f"{name}{kind}.safetensors" for kind in ("", ".training"))
    settings = training.settings() | environment
    if finished.exists():
        tensors, record = load_checkpoint(finished)
        check_same_settings(finished, record.get("settings"), settings)
        model = training.model().to(device)
        load_weights(finished, model, tensors)
        remove(unfinished)
        print(f"{finished} is trained already.", flush=True)
        return model, record["result"]
    with stage(f"train {title}", training.steps) as show:
        trained = train(
            training,
            text,
            device=device,
            checkpoint=unfinished,
            environment=environment,
            on_resume=lambda step: print(f"Going on after step {step:,} of {training.steps:,}.", flush=True),
            on_step=lambda progress: show(progress.step, _note(progress)),
            should_stop=should_stop,
        )
    result = {
        "schedule": str(trained.model.stack.schedule),
        "parts": str(trained.model.stack.parts).removeprefix(", "),
        "scale": training.recipe.scale,
        "sampling": training.recipe.sampling,
        "steps": training.steps,
        "layers_run": trained.layers_run,
        "share_of_layers_run": trained.layers_run / (training.steps * training.size.num_layers),
        "share_of_flops_run": trained.share_run,
        "training_curve": trained.curve,
        "seconds": trained.seconds,
    }
    if trained.learned is not None:
        result["learned_rates"] = trained.learned.rates.tolist()
    save_checkpoint(finished, trained.model.state_dict(), {"settings": settings, "result": result})
    remove(unfinished)
    return trained.model, result


def environment_of(corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """What the results depend on besides the settings of a training."""
    from layerdrop_fast import __version__

    return {
        "text": corpus.name,
        "text_sha256": corpus.sha256,
        "device": device.type,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "layerdrop_fast": __version__,
    }


def device_of(name: str | None) -> torch.device:
    """The device to run on: the one that is asked for, or a GPU where there is one."""
    gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise RecipeError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda" and not gpu:
        raise RecipeError("--device is cuda, but torch finds no GPU here: leave it out, or see layerdrop-fast info")
    return torch.device(name or ("cuda" if gpu else "cpu"))


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot remove {path}: {error.strerror}") from error


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """The same bits in every run; leaves torch's number of threads and its choice of algorithms as they were."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _note(progress: Progress) -> str:
    return (
        f"loss {progress.bits:.2f}  {progress.tokens_per_second / 1000:.1f}k tokens/s  "
        f"{progress.kept:2.0f}/{progress.num_layers} layers"
    )
