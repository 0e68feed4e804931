"""What subsets of layers score: each evaluated once, and kept in a file for the next run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from layerdrop_fast._files import replace_atomically
from layerdrop_fast._progress import stage
from layerdrop_fast.prune.shared_prefixes import Evaluate, SharedPrefixes
from layerdrop_fast.prune.skip_layers import skip_layers

Subset: TypeAlias = tuple[int, ...]
SECONDS_BETWEEN_SAVES = 10.0
SAME_SCORE = 1e-4  # relative; the order of sums may differ from run to run


class Scores:
    """Evaluates subsets of layers, and remembers.

    Args:
        model, name: the model and its list of layers.
        evaluate: called with the model at a smaller depth; returns a number, lower is better.
        share_prefixes, max_bytes: see ``search``.
        resume: a JSON file that holds what is known; None: nothing is kept.
        progress: show how far it is.

    Raises:
        ValueError: a file of another model or another ``evaluate``: it is as it was. OSError: it cannot be read or
            written.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        evaluate: Evaluate,
        *,
        share_prefixes: bool = True,
        max_bytes: int = 1 << 30,
        resume: Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.name, self.evaluate = model, name, evaluate
        self.prefixes = SharedPrefixes(model, name, evaluate, max_bytes) if share_prefixes else None
        self.resume, self.progress = resume, progress
        self.layers_asked = 0  # layers of all candidates
        self._known: dict[Subset, float] = {}
        if resume is not None and resume.exists():
            self._known = self._read(resume)

    @property
    def layers_run(self) -> int:
        """Layers that ran, counted once an evaluation."""
        return self.layers_asked if self.prefixes is None else self.prefixes.layers_run

    def of(self, subsets: Iterable[Sequence[int]], what: str = "evaluate") -> dict[Subset, float]:
        """The scores of these subsets, in ascending order of the subsets."""
        wanted = sorted({tuple(subset) for subset in subsets})
        missing = [subset for subset in wanted if subset not in self._known]
        saved = time.monotonic()
        shown = stage(what, len(missing)) if self.progress and missing else nullcontext(lambda done, note: None)
        try:
            with shown as show:
                for number, subset in enumerate(missing, 1):
                    self._known[subset] = value = self._score(subset)
                    show(number, f"{value:.4g}")
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()
        finally:
            if missing:
                self._save()
        return {subset: self._known[subset] for subset in wanted}

    def _score(self, subset: Subset) -> float:
        self.layers_asked += len(subset)
        if self.prefixes is not None:
            return self.prefixes(subset)
        with torch.no_grad(), skip_layers(self.model, {self.name: subset}):
            return float(self.evaluate(self.model))

    def _save(self) -> None:
        if self.resume is not None:
            scores = [[list(subset), value] for subset, value in self._known.items()]
            replace_atomically(self.resume, json.dumps({"list": self.name, "scores": scores}).encode())

    def _read(self, path: Path) -> dict[Subset, float]:
        try:
            content = json.loads(path.read_text())
            known = {tuple(map(int, subset)): float(value) for subset, value in content["scores"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no scores of a search ({error}): move it away") from error
        for subset, value in list(known.items())[:1]:
            now = self._score(subset)
            if not math.isclose(now, value, rel_tol=SAME_SCORE) and not (math.isnan(now) and math.isnan(value)):
                raise ValueError(
                    f"{path} holds {value:.6g} for the layers {list(subset)}, got {now:.6g}: it is of another model or "
                    "another evaluate; move it away, or give another file"
                )
        return known
