"""What subsets of layers score: each evaluated once, and kept in a file for the next run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerdrop_fast._files import replace_atomically
from layerdrop_fast._progress import stage
from layerdrop_fast.nn.modes import evaluating
from layerdrop_fast.prune.fingerprints import of_weights
from layerdrop_fast.prune.lists import layers_of
from layerdrop_fast.prune.shared_prefixes import Evaluate, SharedPrefixes, number_from
from layerdrop_fast.prune.skip_layers import skip_layers
from layerdrop_fast.prune.subsets import Subset

SECONDS_BETWEEN_SAVES = 10.0
SAME_SCORE = 1e-4  # of the score, or of the largest one; the order of sums may differ from run to run


class Scores:
    """Evaluates subsets of layers in evaluation mode, and remembers. The model is left in the mode it was in.

    Args:
        model, name: the model and its list of layers.
        evaluate: called with the model at a smaller depth; returns a number, lower is better.
        share_prefixes, max_bytes: see ``search``.
        resume: a JSON file that holds what is known, of one process; None: nothing is kept.
        kind: what the file calls these scores, beside which it may hold others.
        progress: show how far it is.

    Raises:
        ValueError: a file of another list, depth, model or ``evaluate``: it is as it was. OSError: it cannot be read or
            written, which shows at once.
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
        kind: str = "scores",
        progress: bool = False,
    ) -> None:
        self.model, self.name, self.evaluate = model, name, evaluate
        self.prefixes = SharedPrefixes(model, name, evaluate, max_bytes) if share_prefixes else None
        self.resume, self.kind, self.progress = resume, kind, progress
        self.layers_asked = 0  # layers of all candidates
        self._known: dict[Subset, float] = {}
        self._content: dict[str, Any] = {}  # of the file
        if resume is not None:
            self._content = {"list": name, "depth": len(layers_of(model, name)), "weights": of_weights(model)}
            if resume.exists():
                self._read(resume)
            self._save()  # where that cannot be, nothing should run first

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

    def forget_states(self) -> None:
        """Frees the hidden states that are held for the next subset."""
        if self.prefixes is not None:
            self.prefixes.forget_states()

    def _score(self, subset: Subset) -> float:
        self.layers_asked += len(subset)
        with evaluating(self.model):
            if self.prefixes is not None:
                return self.prefixes(subset)
            with torch.no_grad(), skip_layers(self.model, {self.name: subset}):
                return number_from(self.evaluate, self.model)

    def _save(self) -> None:
        if self.resume is not None:
            self._content[self.kind] = [[list(subset), value] for subset, value in self._known.items()]
            replace_atomically(self.resume, json.dumps(self._content).encode())

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            found = {key: content[key] for key in self._content}
            known = {tuple(map(int, subset)): float(value) for subset, value in content.get(self.kind, [])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no scores of a search ({error!r}): move it away") from error
        for key, expected in self._content.items():
            if found[key] != expected:
                raise ValueError(
                    f"{path} holds scores of another model: {key} is {found[key]!r}, expected {expected!r}; move it "
                    "away, or give another file"
                )
        self._check(path, known)
        self._known, self._content = known, content

    def _check(self, path: Path, known: dict[Subset, float]) -> None:
        """The first, the middle and the last score are what they are now. What this takes is not counted."""
        subsets = list(known)
        largest = max((abs(value) for value in known.values() if math.isfinite(value)), default=0.0)
        for place in sorted({0, len(subsets) // 2, len(subsets) - 1} if subsets else ()):
            subset, value = subsets[place], known[subsets[place]]
            now = self._score(subset)
            same = math.isclose(now, value, rel_tol=SAME_SCORE, abs_tol=SAME_SCORE * largest)
            if not same and not (math.isnan(now) and math.isnan(value)):
                raise ValueError(
                    f"{path} holds {value:.6g} for the layers {list(subset)} ({self.kind}), got {now:.6g}: it is of "
                    "another model or another evaluate; move it away, or give another file"
                )
        self.layers_asked = 0
        if self.prefixes is not None:
            self.prefixes.forget_states()
            self.prefixes.layers_run = 0
