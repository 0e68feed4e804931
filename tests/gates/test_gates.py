"""The gates in a process of their own: here kernels are the interpreter's."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def gates(*options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gates", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)


def test_a_representative_set_keeps_to_the_gates():
    done = gates()
    assert done.returncode == 0, done.stdout + done.stderr
    compiled, of = re.findall(r"^(\d+) of (\d+) compiled kernels", done.stdout, flags=re.MULTILINE)[0]
    assert compiled == of
    assert int(of) > 80


def test_without_aligned_pointers_the_gates_are_red():
    done = gates("--unaligned")
    assert done.returncode == 1, done.stderr
    ops = set(re.findall(r"^(\w+), D 1024, bfloat16, sm_90, .* loads of 16 bytes", done.stdout, flags=re.MULTILINE))
    assert {"gather_norm", "scatter_residual_", "scatter_residual_gather_norm_bwd", "act", "norm_linear_bwd"} <= ops
    assert "stores of 16 bytes and more move 0 bytes" in done.stdout
