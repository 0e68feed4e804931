"""The launchers behind the dispatcher: eager, opcheck, torch.compile, and the tuner, which calls ops through it.

In a process of its own, since in the interpreter they take the CPU key, which elsewhere is the C++ kernels'.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.conftest import ON_GPU

SETUP = """
import torch
from torch._dynamo.decorators import mark_unbacked
from benchmarks.gpu_check.check import use_the_kernels
use_the_kernels(not torch.cuda.is_available())
from layerdrop_fast import ops
from layerdrop_fast.triton import KERNELS, launch, tune
from layerdrop_fast.triton.configurations import read_tuned
from layerdrop_fast.triton.row_work import RowWork
from layerdrop_fast.triton.timing import Device, check_agreement
device = Device()
launched = []
import sys
for module in {sys.modules[launcher.__module__] for launcher in KERNELS.values()}:
    def recorded(kernel, *others, real=module.launch, **arguments):
        launched.append(kernel.fn.__name__)
        real(kernel, *others, **arguments)
    module.launch = recorded
"""

OPCHECK = """
for op in KERNELS:
    given = RowWork(op, 2, 2, 16, torch.float32, kept=1).arguments(device.device)
    launched.clear()
    torch.library.opcheck(getattr(torch.ops.layerdrop_fast, op).default, given)
    assert launched, op
"""

COMPILE = """
key = ops.step_key(torch.tensor([1, 2, 3], device=device.device))
site = torch.tensor(256, dtype=torch.int32, device=device.device)
every = torch.arange(3, dtype=torch.int32, device=device.device)

def branch(x, y, rows, next_rows):
    xhat = ops.gather_norm(x, rows)
    x, after = ops.scatter_residual_gather_norm(x, y + xhat, rows, next_rows, dropout_p=0.2, key=key, site=site)
    return ops.scatter_residual(x, torch.tanh(after), next_rows, scale=0.5)

def results(function, rows, next_rows):
    torch.manual_seed(0)
    x, y = (torch.randn(n, 2, 16).to(device.device).requires_grad_() for n in (3, len(rows)))
    out = function(x, y, rows, next_rows)
    return [out, *torch.autograd.grad(out.square().sum(), [x, y])]

compiled = torch.compile(branch, fullgraph=True)
for rows, next_rows in ((every[:2], every[1:]), (every[:0], every[:1])):
    rows, next_rows = rows.clone(), next_rows.clone()
    expected = results(branch, rows, next_rows)
    for each in (rows, next_rows):
        mark_unbacked(each, 0)
    launched.clear()
    check_agreement(f"compiled, {len(rows)} rows", results(compiled, rows, next_rows), expected)
    assert "scatter_residual_gather_norm_bwd_kernel" in launched, launched
"""

TUNE = """
from pathlib import Path
file = Path(sys.argv[1])
options = tune.Options(["act", "norm_linear_bwd"], [48], [torch.float32], file, samples=2, positions=2, rounds=4)
found = list(tune.tune(options, device))
assert [one.key for one in found] == ["act 48 float32", "norm_linear_bwd 48 float32"]
assert all(one.tried > 1 for one in found), found
faster = {one.key: one.fastest for one in found if one.fastest != one.rule}
assert (read_tuned(file) if faster else {}) == faster
assert {"act_fwd_kernel", "norm_linear_bwd_kernel"} <= set(launched)
print(tune.HEADER, *(one.line() for one in found), sep="\\n")
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(OPCHECK, id="opcheck"),
        pytest.param(COMPILE, id="inductor"),
        pytest.param(TUNE, id="tune"),
    ],
)
def test_through_the_dispatcher(code, tmp_path):
    environment = os.environ if ON_GPU else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code, str(tmp_path / "tuned.json")],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
