"""The command ``layerdrop-fast``: reads its arguments; what it runs stands in ``layerdrop_fast.recipes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from layerdrop_fast import __version__
from layerdrop_fast._checks import check_rate
from layerdrop_fast.nn.stack import GRANULARITIES
from layerdrop_fast.plan import SAMPLINGS
from layerdrop_fast.recipes import lm
from layerdrop_fast.recipes import prune as prune_files
from layerdrop_fast.recipes.bench import command
from layerdrop_fast.recipes.bench.measure import ROUNDS
from layerdrop_fast.recipes.bench.setting import DTYPES as STREAM_DTYPES
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.configurations import CONFIGURATIONS
from layerdrop_fast.recipes.demo import DENSE_STEPS, Options, run_demo
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.info import describe
from layerdrop_fast.recipes.run import device_of
from layerdrop_fast.recipes.training import Recipe, Stopped
from layerdrop_fast.recipes.words import WIKITEXT
from layerdrop_fast.schedule import Depth, alternating, linear, uniform

DEMO = """\
Trains two small language models that predict text byte by byte, one with LayerDrop (whole layers are skipped at random
while training) and one without, at the same amount of work. Then takes layers out of both, without retraining, and
shows how well each still predicts at every depth.

On two CPU cores it takes about five minutes. Nothing is downloaded: the text is the source code of Python's standard
library, or a file of yours. You can stop it at any time with Ctrl-C; the same command goes on where it stopped.

Results go to the folder out/demo: report.html (open it in a browser), the plots as PNG files, metrics.json, and the
trained models as safetensors files.
"""

TUNE = """\
Times each kernel of the row ops with tiles and warps next to those that the built-in rule gives, checks that results
agree, and writes what is faster to $XDG_CACHE_HOME/layerdrop_fast/<GPU>.json (~/.cache without XDG_CACHE_HOME). Every
process that starts later on this GPU uses it; remove the file to go back to the rule. A second run adds to the file.
"""
BENCH = """\
Measures one training step (forward, backward, AdamW) of a model of your sizes by every way to drop layers: dense,
masked as timm does, skipped as fairseq does, and so on, and ours; beside them the limit, a dense model of only the
layers that are kept. They take turns on the same weights and the same decisions, and nothing is timed before each has
shown that it computes what it should. Prints a table: time, tokens/s, what is held for backward, the peak, what
deciding costs.
"""
PRUNE = """\
Writes a checkpoint of the same network with fewer layers, ready to use without retraining if it was trained with
LayerDrop. The input is a .safetensors file, a folder as transformers saves it (config.json and shards included), or a
file of torch.save (.pt, .pth, .bin, .ckpt), of which EMA weights and the optimizer's state are cut too. Nothing in it
is executed, and it is not changed. What stays as it was, and of a folder what is left out, is printed.

    layerdrop-fast prune model.safetensors --kept 8 --out model-8.safetensors
    layerdrop-fast prune bart/ --layers model.decoder.layers --keep 0,2,4 --out bart-12-3/
"""
TRAIN = """\
Trains a language model with LayerDrop, then cuts it to every depth without retraining and shows what it is worth there.

    layerdrop-fast train lm --p 0.2
    layerdrop-fast train lm --text novels.txt --profile linear --p 0.6 --scale inverse --equal-work
    layerdrop-fast train lm --config wikitext-103-16 --dataset wikitext-103 --p 0.2

You can stop it at any time with Ctrl-C, or kill it; the same command goes on where it was. Results go to the folder
out/lm: model.safetensors, metrics.json, plots, and of words vocabulary.json.

"""
SIZES = {
    "layers": "depth",
    "d_model": "width of the stream",
    "dim_feedforward": "width of the hidden layer",
    "nhead": "heads",
    "samples": "samples in a batch",
    "length": "positions in a sample",
}
PROFILES: dict[str, Callable[[float], Depth]] = {"uniform": uniform, "linear": linear, "alternating": alternating}
DTYPES = ("bfloat16", "float16", "float32", "float64")


def _whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def _rate(text: str) -> float:
    try:
        return check_rate(float(text), "it")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,2,4") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerdrop-fast", description="LayerDrop: train a deep network once, use it at any depth."
    )
    parser.add_argument("--version", action="version", version=f"layerdrop_fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="see LayerDrop at work: train, cut to every depth, plot (about five minutes)",
        description=DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Options()
    demo.add_argument(
        "--layers",
        type=_whole_number(1, 1000),
        default=defaults.layers,
        metavar="N",
        help="depth (default: %(default)s)",
    )
    demo.add_argument("--text", type=Path, metavar="FILE", help="learn from this file instead")
    demo.add_argument(
        "--out", type=Path, default=defaults.out, metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    demo.add_argument(
        "--steps",
        type=_whole_number(1, 10_000_000),
        metavar="N",
        help="training steps of the model without LayerDrop; the one with it gets as many more as its skipped layers "
        f"save (default: {DENSE_STEPS}, fewer beyond 16 layers)",
    )
    demo.add_argument(
        "--seed", type=_whole_number(0, 2**63 - 1), default=0, metavar="N", help="another seed, other random numbers"
    )
    demo.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU where there is one)")
    demo.add_argument("--restart", action="store_true", help="forget an earlier run in the same folder")
    demo.add_argument("--no-price", action="store_true", help="leave out the table of what a training step costs")
    _add_train(commands)
    tune = commands.add_parser(
        "tune",
        help="measure the GPU kernels' configurations on this GPU (minutes; needs a GPU)",
        description=TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("--op", nargs="+", metavar="OP", help="only these ops (default: all)")
    tune.add_argument(
        "--channels",
        type=_whole_number(1, 1 << 20),
        nargs="+",
        default=(1024, 2048, 4096),
        metavar="D",
        help="widths of the stream, and of the activations (default: 1024 2048 4096)",
    )
    tune.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=("bfloat16", "float32"), help="(default: bfloat16 float32)"
    )
    tune.add_argument("--file", type=Path, metavar="FILE", help="write there instead")
    bench = commands.add_parser(
        "bench",
        help="what a training step of your sizes costs, by every way to drop layers (minutes)",
        description=BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step = Setting()
    for name, what in SIZES.items():
        bench.add_argument(
            f"--{name.replace('_', '-')}",
            type=_whole_number(1, 1 << 20),
            default=getattr(step, name),
            metavar="N",
            help=f"{what} (default: %(default)s)",
        )
    bench.add_argument("--p", type=_rate, default=step.p, metavar="P", help="drop rate (default: %(default)s)")
    bench.add_argument("--dropout", type=_rate, default=step.dropout, metavar="P", help="(default: %(default)s)")
    bench.add_argument("--granularity", choices=GRANULARITIES, default=step.granularity, help="(default: %(default)s)")
    bench.add_argument("--dtype", choices=tuple(STREAM_DTYPES), default=step.dtype, help="(default: %(default)s)")
    bench.add_argument("--compiled", action="store_true", help="each layer by torch.compile; also what compiling takes")
    bench.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU where there is one)")
    bench.add_argument("--ways", nargs="+", metavar="WAY", help="only these (default: all)")
    bench.add_argument(
        "--rounds",
        type=_whole_number(1, 1000),
        default=ROUNDS,
        metavar="N",
        help="steps of each (default: %(default)s)",
    )
    bench.add_argument("--threads", type=_whole_number(1, 4096), metavar="N", help="of the CPU (default: torch's)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write all figures there, as JSON")
    prune = commands.add_parser(
        "prune",
        help="cut a checkpoint to fewer layers",
        description=PRUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prune.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint, a file or folder")
    prune.add_argument("--out", type=Path, required=True, metavar="OUT", help="file or folder to write; must not exist")
    which = prune.add_mutually_exclusive_group(required=True)
    which.add_argument("--kept", type=_whole_number(1, 1 << 20), metavar="N", help="how many layers to keep")
    which.add_argument("--keep", type=_numbers, metavar="I,J,...", help="which layers to keep, counted from 0")
    prune.add_argument(
        "--strategy",
        choices=tuple(prune_files.STRATEGIES),
        help="which ones with --kept: at even distances (the default), the first or the last",
    )
    prune.add_argument(
        "--layers",
        action="append",
        metavar="PREFIX",
        help="the list of layers to cut, such as decoder.layers, where there are several; may be given again",
    )
    prune.add_argument(
        "--without-optimizer",
        dest="optimizer",
        action="store_false",
        help="leave the optimizer's state out, where it cannot be told which of it belongs to which layer",
    )
    commands.add_parser("info", help="versions, and which backends work here", description="Versions and backends.")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model with LayerDrop on a text, resumable")
    models = train.add_subparsers(dest="model", metavar="MODEL", required=True)
    listed = "\n".join(f"  {name:16s} {configuration.about}" for name, configuration in CONFIGURATIONS.items())
    lm = models.add_parser(
        "lm",
        help="a language model",
        description=f"{TRAIN}Configurations:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lm.add_argument("--config", choices=tuple(CONFIGURATIONS), default="bytes-16", help="(default: %(default)s)")
    source = lm.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="a text (default: Python's standard library)")
    source.add_argument("--dataset", choices=tuple(WIKITEXT), help="fetched by datasets, read word by word")
    lm.add_argument(
        "--out",
        type=Path,
        default=Path("out/lm"),
        metavar="DIR",
        help="folder of the results, new or of this run (%(default)s)",
    )
    lm.add_argument("--restart", action="store_true", help="forget an earlier run in the same folder")
    lm.add_argument(
        "--p",
        type=_rate,
        metavar="P",
        help="drop rate of layers or branches, the highest of a profile (0.2; of layers 0 with --heads or --chunks)",
    )
    lm.add_argument(
        "--profile", choices=tuple(PROFILES), default="uniform", help="how --p varies over depth (%(default)s)"
    )
    lm.add_argument("--fade", action="store_true", help="all rates fall to 0 over the run")
    lm.add_argument("--granularity", choices=GRANULARITIES, default="batch", help="(default: %(default)s)")
    lm.add_argument("--target", choices=("layer", "branch"), default="layer", help="(default: %(default)s)")
    lm.add_argument("--heads", type=_rate, default=0.0, metavar="P", help="drop rate of attention heads")
    lm.add_argument("--chunks", type=_rate, default=0.0, metavar="P", help="drop rate of feed-forward chunks")
    lm.add_argument("--sampling", choices=SAMPLINGS, default="bernoulli", help="(default: %(default)s)")
    lm.add_argument("--scale", choices=("none", "inverse"), default="none", help="residual scale (%(default)s)")
    lm.add_argument("--learned", action="store_true", help="learn a rate for each layer, with the mean of the profile")
    lm.add_argument("--equal-work", action="store_true", help="as many more steps as dropped layers save")
    for name, what in (
        ("steps", "training steps"),
        ("batch", "windows of a microbatch"),
        ("accumulation", "microbatches"),
    ):
        lm.add_argument(
            f"--{name}", type=_whole_number(1, 10_000_000), metavar="N", help=f"{what} (the configuration's)"
        )
    lm.add_argument("--seed", type=_whole_number(0, 2**31 - 1), metavar="N", help="(default: 0)")
    lm.add_argument("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: the configuration's)")
    lm.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU where there is one)")


def _train(options: argparse.Namespace) -> None:
    names = ("fade", "granularity", "target", "heads", "chunks", "sampling", "scale", "learned")
    otherwise = 0.0 if (options.heads or options.chunks) and options.target == "layer" else 0.2
    p = otherwise if options.p is None else options.p
    if options.granularity == "sample" and (options.heads or options.chunks):
        raise RecipeError("--heads and --chunks need --granularity batch: one smaller product is for the whole batch")
    if options.learned and not p:
        given = "given as 0" if options.p is not None else "0 with --heads or --chunks"
        raise RecipeError(f"--p is {given}, expected a mean rate above 0 with --learned")
    recipe = Recipe(PROFILES[options.profile](p), **{name: getattr(options, name) for name in names})
    changes = {name: getattr(options, name) for name in ("steps", "batch", "accumulation", "seed", "dtype")}
    lm.run(
        lm.Options(
            configuration=options.config,
            recipe=recipe,
            **{name: getattr(options, name) for name in ("text", "dataset", "out", "restart", "equal_work", "device")},
            changes={name: value for name, value in changes.items() if value is not None},
        )
    )


def _demo(options: argparse.Namespace) -> None:
    names = ("layers", "text", "out", "steps", "seed", "device", "restart")
    run_demo(Options(**{name: getattr(options, name) for name in names}, price=not options.no_price))


def _bench(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    names = (*SIZES, "p", "dropout", "granularity", "dtype", "compiled")
    chosen = {name: getattr(options, name) for name in names}
    try:
        setting = Setting(**chosen, device=device_of(options.device).type)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    command.run(command.Options(setting, options.ways, options.rounds, options.out))


def _prune(options: argparse.Namespace) -> None:
    names = ("source", "out", "kept", "keep", "strategy", "optimizer", "layers")
    prune_files.run(prune_files.Options(**{name: getattr(options, name) for name in names}))


def _tune(options: argparse.Namespace) -> None:
    if find_spec("triton") is None:
        raise RecipeError("tune needs Triton, which comes with torch's CUDA and ROCm builds")
    from layerdrop_fast.triton import tune
    from layerdrop_fast.triton.configurations import OPS

    if wrong := [op for op in options.op or () if op not in OPS]:
        raise RecipeError(f"no op {wrong[0]!r}, expected {', '.join(OPS)}")
    dtypes = [getattr(torch, name) for name in options.dtype]
    tune.run(tune.Options(options.op or OPS, options.channels, dtypes, options.file))


def _info(options: argparse.Namespace) -> None:
    print(describe())


COMMANDS = {"demo": _demo, "bench": _bench, "prune": _prune, "train": _train, "tune": _tune, "info": _info}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 2 for something to mend, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    resumes = options.command in ("demo", "train")
    same = "The same command" + (" without --restart" if getattr(options, "restart", False) else "")
    try:
        COMMANDS[options.command](options)
    except RecipeError as error:
        print(f"layerdrop-fast: {error}", file=sys.stderr)
        return 2
    except Stopped:
        saved = f", and saved. {same} goes on from here." if resumes else "."
        print(f"\nStopped{saved}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        saved = f" {same} goes on from the last checkpoint, if there is one." if resumes else ""
        print(f"\nStopped at once.{saved}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
