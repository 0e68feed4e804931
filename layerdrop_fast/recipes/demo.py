"""The demo: train with and without LayerDrop at the same work, cut both to every depth, print and plot what is left.

Figure 2 of "Reducing Transformer Depth on Demand with Structured Dropout" (Fan, Grave, Joulin 2019) at small scale.
What is done is kept in the output folder after each stage, so that a stopped or killed run goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from layerdrop_fast._progress import stage
from layerdrop_fast._provenance import machine
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.recipes import report
from layerdrop_fast.recipes.bench.measure import Figures, figures_of, measure
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.table import table
from layerdrop_fast.recipes.bench.ways import WAYS
from layerdrop_fast.recipes.checkpoint import check_same_settings
from layerdrop_fast.recipes.evaluation import depth_curve
from layerdrop_fast.recipes.files import RecipeError, locked, read_bytes, write_atomically
from layerdrop_fast.recipes.run import device_of, environment_of, remove, reproducible, trained_in
from layerdrop_fast.recipes.stop_signal import StopSignal
from layerdrop_fast.recipes.text import Corpus, bigram_bits_per_byte, from_file, standard_library, validation_windows
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Stopped, Training
from layerdrop_fast.schedule import linear

# The best of the trials in docs/demo-recipe.md.
LAYERDROP = Recipe(linear(0.6), scale="inverse")
RECIPES = {"dense": DENSE, "layerdrop": LAYERDROP}

DENSE_STEPS = 1200

# The ways whose price is measured, at the defaults of Setting: the depth of the paper's largest language model.
PRICED = ("dense", "masked", "skip", "stack", "ours", "limit")
PRICE_ROUNDS = 3
EVALUATION_WINDOWS = 512
MAX_THREADS = 8  # matrices this small gain nothing from more


def default_steps(num_layers: int) -> int:
    """The dense model's steps: fewer beyond 16 layers, so that 40 layers take seven minutes and not twelve."""
    return round(DENSE_STEPS * min(1.0, math.sqrt(16 / num_layers)))


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    layers: int = 16
    text: Path | None = None
    out: Path = Path("out/demo")
    steps: int | None = None  # None: default_steps(layers)
    seed: int = 0
    device: str | None = None
    restart: bool = False
    price: bool = True


class _Demo:
    """One run of the demo: its options, its text, and ``metrics``, which is what metrics.json holds."""

    def __init__(self, options: Options, stop: StopSignal) -> None:
        self.options, self.stop, self.out = options, stop, options.out
        self.steps = options.steps or default_steps(options.layers)
        self.device = device_of(options.device)
        self.corpus: Corpus = from_file(options.text) if options.text else standard_library()
        length = ModelSize().context + 1
        self.scored = validation_windows(self.corpus.validation, count=EVALUATION_WINDOWS, length=length)
        if options.restart:  # only now that nothing is wrong with what is asked for
            for name in ("metrics.json", *(f"{m}{kind}.safetensors" for m in RECIPES for kind in ("", ".training"))):
                remove(self.out / name)
        self.metrics = self._earlier_metrics()

    def training(self, name: str) -> Training:
        size, recipe = ModelSize(num_layers=self.options.layers), RECIPES[name]
        steps = recipe.steps_of_equal_work(size.num_layers, self.steps)
        return Training(size, recipe, steps, seed=self.options.seed)

    def _earlier_metrics(self) -> dict[str, Any]:
        path = self.out / "metrics.json"
        settings: dict[str, Any] = {name: self.training(name).settings() for name in RECIPES}
        settings = {"layers": self.options.layers, "steps": self.steps, "seed": self.options.seed} | settings
        settings |= environment_of(self.corpus, self.device)
        if path.exists():
            try:
                metrics: dict[str, Any] = json.loads(read_bytes(path))
                stored, threads = metrics["settings"], int(metrics["threads"])
            except (ValueError, KeyError, TypeError):
                raise RecipeError(
                    f"{path} is damaged: move it away to measure again from the checkpoints, or give --restart"
                ) from None
            check_same_settings(path, stored, settings)
        else:
            threads = min(torch.get_num_threads(), MAX_THREADS)
            metrics = {"settings": settings, "threads": threads, "machine": machine(self.device)}
            metrics["seconds"] = {}
        # Sums are split by the number of threads, so a resumed run needs that of its beginning.
        torch.set_num_threads(threads)
        return metrics

    def save_metrics(self) -> None:
        write_atomically(self.out / "metrics.json", (json.dumps(self.metrics, indent=1) + "\n").encode())

    def begin(self) -> None:
        if "text" not in self.metrics:
            self.metrics["text"] = {
                "name": self.corpus.name,
                "train_bytes": len(self.corpus.train),
                "validation_bytes": len(self.corpus.validation),
                "scored_bytes": self.scored.shape[0] * (self.scored.shape[1] - 1),
                "bigram_bits_per_byte": bigram_bits_per_byte(self.corpus.train, self.scored),
            }
            self.metrics["models"] = {}
            self.save_metrics()

    def train_and_cut(self, name: str) -> None:
        """Trains one model, or takes up its training, then measures it at every depth."""
        model, entry = self._trained(name)
        if name in self.metrics["models"]:
            return
        begun = time.monotonic()
        with stage(f"cut {report.TITLES[name]}", self.options.layers) as show:
            curve = depth_curve(
                model,
                self.scored,
                on_depth=lambda depth, bits: show(
                    self.options.layers + 1 - depth, f"depth {depth}: {bits:.3f} bits/byte"
                ),
                should_stop=self.stop,
            )
        self.metrics["seconds"] |= {f"train {name}": entry.pop("seconds"), f"cut {name}": time.monotonic() - begun}
        entry["bits_per_byte"] = {str(depth): bits for depth, bits in curve.items()}
        self.metrics["models"][name] = entry
        self.save_metrics()

    def _trained(self, name: str) -> tuple[TransformerLM, dict[str, Any]]:
        return trained_in(
            self.out,
            name,
            self.training(name),
            self.corpus.train,
            device=self.device,
            environment=environment_of(self.corpus, self.device) | {"threads": self.metrics["threads"]},
            should_stop=self.stop,
            title=report.TITLES[name],
        )

    @property
    def priced(self) -> Setting:
        return Setting(device=self.device.type, seed=self.options.seed)

    def measure_price(self) -> None:
        if not self.options.price or self._prices() is not None:
            return

        def tell(done: int, total: int, what: str) -> None:
            if self.stop():
                raise Stopped
            show(100 * done // total, what)

        begun = time.monotonic()
        with stage("price of a step", 100) as show:
            figures = measure(self.priced, {name: WAYS[name][1] for name in PRICED}, rounds=PRICE_ROUNDS, tell=tell)
        self.metrics["price"] = [row.record() for row in figures.values()]
        self.metrics["seconds"]["price"] = time.monotonic() - begun
        self.save_metrics()

    def _prices(self) -> dict[str, Figures] | None:
        """The price of today's ways in today's setting; None where none was measured, or that of others."""
        records = self.metrics.get("price", [])
        if [record.get("way") for record in records] != list(PRICED):
            return None
        if any(record["setting"] != asdict(self.priced) for record in records):
            return None
        return {record["way"]: figures_of(record) for record in records}

    def price_table(self) -> str | None:
        figures = self._prices()
        return None if figures is None else f"One training step: {self.priced.title()}\n{table(figures)}"


def run_demo(options: Options) -> None:
    """Runs the demo, or takes it up where it was stopped, and prints what it found.

    Raises:
        RecipeError: something the user can mend; nothing that was saved is lost.
        Stopped: Ctrl-C; what was done is saved.
    """
    missing = [name for name in ("matplotlib", "rich", "safetensors") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"the demo needs {', '.join(missing)}: pip install 'layerdrop_fast[demo]'")
    with StopSignal() as stop, locked(options.out):
        with reproducible(device_of(options.device)):
            demo = _Demo(options, stop)
            demo.begin()
            print(report.introduction(demo.metrics), flush=True)
            for name in RECIPES:
                demo.train_and_cut(name)
            demo.measure_price()
            price = demo.price_table()
        for name, content in report.files(demo.metrics, price).items():
            write_atomically(options.out / name, content)
        print(report.summary(demo.metrics, price))
        print(f"\nReport: {options.out / 'report.html'}", flush=True)
