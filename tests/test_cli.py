"""The command line: parses, explains itself, imports no more than it needs."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from layerdrop_fast import __version__, _extension, cli
from layerdrop_fast._library import op_names
from layerdrop_fast.recipes import info
from layerdrop_fast.recipes.training import Stopped


def given(monkeypatch, *arguments):
    """The options that the demo is called with."""
    seen = []
    monkeypatch.setattr(cli, "run_demo", seen.append)
    assert cli.main(["demo", *arguments]) == 0
    return seen[0]


def test_defaults_and_options(monkeypatch, tmp_path):
    assert given(monkeypatch) == cli.Options()
    options = given(
        monkeypatch,
        *("--layers", "40", "--text", "a.txt", "--out", str(tmp_path), "--steps", "7", "--seed", "3"),
        *("--device", "cpu", "--restart", "--no-price"),
    )
    assert (options.layers, str(options.text), options.out, options.steps) == (40, "a.txt", tmp_path, 7)
    assert (options.seed, options.device, options.restart, options.price) == (3, "cpu", True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--layers", "0"], "'0' is not a whole number from 1 to 1000"),
        (["demo", "--steps", "ten"], "'ten' is not a whole number"),
        (["demo", "--seed", "-1"], "'-1' is not a whole number"),
        ([], "COMMAND"),
        (["train"], "the following arguments are required: MODEL"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(Stopped(), 130), (KeyboardInterrupt(), 130)])
def test_ctrl_c_gives_the_shell_s_status(monkeypatch, error, status):
    def stop(_):
        raise error

    monkeypatch.setattr(cli, "run_demo", stop)
    assert cli.main(["demo"]) == status


def test_help_says_what_happens_how_long_it_takes_and_where_results_go(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("LayerDrop", "minutes", "Nothing is downloaded", "report.html", "Ctrl-C", "--layers", "--text FILE"):
        assert words in text


def info_rows():
    return dict(re.split(r"  +|(?<=demo's packages) ", line, maxsplit=1) for line in info.describe().splitlines())


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == info.describe() + "\n"
    rows = info_rows()
    assert rows["layerdrop_fast"] == __version__
    assert rows["torch"] == torch.__version__
    assert {"Python", "triton", "numpy", "GPU", "demo's packages"} <= set(rows)


@pytest.mark.skipif(_extension.missing is not None, reason="no C++ extension")
def test_info_says_who_computes_which_op():
    rows = info_rows()
    assert re.fullmatch(r"built by \S+ with torch \S+, uses (avx512|avx2|baseline)", rows["C++ extension"])
    assert rows["ops on CPU"] == f"own kernels for all {len(op_names())}"
    assert rows["CUDA kernels"] == (_extension.cuda_missing or "loaded")
    assert rows["Triton kernels"] == (_extension.triton_missing or "loaded")
    if _extension.cuda_missing and _extension.triton_missing:
        assert rows["ops on CUDA"] == f"no kernels of their own yet; plain PyTorch for all {len(op_names())}"
    elif not (_extension.cuda_missing or _extension.triton_missing):
        assert rows["ops on CUDA"] == f"own kernels for all {len(op_names())}"


def test_info_says_why_something_is_missing(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_extension, "missing", "no compiler")
    monkeypatch.setattr(info.metadata, "version", absent)
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    monkeypatch.setattr(info.torch.version, "cuda", None)
    rows = info_rows()
    assert rows["C++ extension"] == "missing (no compiler); plans are drawn in Python"
    assert rows["triton"] == "not installed"
    assert rows["GPU"] == f"none (torch {torch.__version__} is built without CUDA)"
    assert rows["demo's packages"] == "missing (matplotlib, rich, safetensors: pip install 'layerdrop_fast[demo]')"


def test_import_and_info_need_only_torch_and_numpy():
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'safetensors', 'triton'): sys.modules[name] = None\n"
        "import layerdrop_fast.cli\n"
        "sys.exit(layerdrop_fast.cli.main(['info']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "demo's packages" in run.stdout


def test_it_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "layerdrop_fast.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0
    assert "demo" in run.stdout
    assert "info" in run.stdout
