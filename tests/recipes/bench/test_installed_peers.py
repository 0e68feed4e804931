"""The restated rules beside the code that they restate, where it is installed: same seeds, same results.

    pip install --no-deps timm torchvision torchtune fairseq2    # fairseq: its source, unpacked onto PYTHONPATH
    python -m pytest -rs tests/recipes/bench/test_installed_peers.py

No library is imported as a whole: their packages need compiled code for another torch, or dozens of packages. The
definitions under test are taken out of the installed file and run as they stand.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.bench.peers import Masked, RunAndDiscard, SampleSkip, Skip
from tests.recipes.bench.counting import Counting

LIBRARIES = ("timm", "torchvision", "torchtune", "fairseq", "fairseq2")
if not any(map(importlib.util.find_spec, LIBRARIES)):
    pytest.skip(f"none of {', '.join(LIBRARIES)} is installed", allow_module_level=True)

RATES = [0.0, 0.1, 0.5, 0.9, 1.0]
SEEDS = range(10)


def installed(package, file, *names, **others):
    """Executes only the definitions ``names`` of an installed file, and its imports of torch and of Python's library.

    ``others`` stand for what the definitions take from elsewhere in their package.
    """
    found = importlib.util.find_spec(package)  # looks the package up, and does not import it
    if found is None:
        pytest.skip(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0], file)
    body = [node for node in ast.parse(path.read_text()).body if _is_wanted(node, names)]
    defined = [node.name for node in body if hasattr(node, "name")]
    assert sorted(defined) == sorted(names), f"{path}: found {defined}, expected {list(names)}"
    space = {"__name__": f"{package}_{path.stem}", **others}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space


def _is_wanted(node, names):
    if isinstance(node, ast.ImportFrom):
        modules = ["" if node.level else node.module]
    elif isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    else:
        return getattr(node, "name", None) in names
    return all(name.split(".")[0] in {"torch", "typing_extensions", *sys.stdlib_module_names} for name in modules)


def result(call, x, parameters):
    """The output, the gradients of its squares, bytes held for backward, and torch's generator's state afterwards."""
    inputs = x.clone().requires_grad_()
    saved = saved_bytes(call, inputs)
    for parameter in parameters:
        parameter.grad = None
    y = call(inputs)
    after = torch.get_rng_state()
    y.square().sum().backward()
    return [y.detach(), inputs.grad, torch.tensor(saved), *(p.grad for p in parameters), after]


def assert_same(ours, theirs, x, layers, seed):
    parameters = list(nn.ModuleList(layers).parameters())
    results = []
    for call in (ours, theirs):
        torch.manual_seed(seed)
        results.append(result(call, x, parameters))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        # No tolerance: the same operations on the same numbers.
        assert got is None or torch.equal(got, expected)


def in_turn(layers):
    def run(x):
        for layer in layers:
            x = layer(x)
        return x * 1  # a node of the graph even where nothing was kept

    return run


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_masked_is_timms_drop_path(p, training, dtype, scale_by_keep):
    theirs = installed("timm", "layers/drop.py", "drop_path", "DropPath")["DropPath"](p, scale_by_keep).train(training)
    ours, x, linear = Masked(p, "row", scale_by_keep).train(training), torch.randn(6, 3, 4).to(dtype), nn.Linear(4, 4)
    linear.to(dtype)
    for seed in SEEDS:
        assert_same(lambda x: x + ours(linear(x)), lambda x: x + theirs(linear(x)), x, [linear], seed)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_masked_is_torchvisions_stochastic_depth(p, training, mode):
    names = "stochastic_depth", "StochasticDepth"
    log = {"_log_api_usage_once": lambda caller: None}  # counts calls, where Meta runs it
    theirs = installed("torchvision", "ops/stochastic_depth.py", *names, **log)["StochasticDepth"](p, mode)
    ours, x, linear = Masked(p, mode).train(training), torch.randn(6, 3, 4), nn.Linear(4, 4)
    theirs.train(training)
    for seed in SEEDS:
        assert_same(lambda x: x + ours(linear(x)), lambda x: x + theirs(linear(x)), x, [linear], seed)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("training", [True, False])
def test_skip_is_fairseqs_list(p, training):
    layers, x = [Counting() for _ in range(8)], torch.randn(2, 3, 4)
    theirs = installed("fairseq", "modules/layer_drop.py", "LayerDropModuleList")["LayerDropModuleList"](p, layers)
    ours = Skip(p, layers).train(training)
    theirs.train(training)
    for seed in SEEDS:
        assert_same(in_turn(ours), in_turn(theirs), x, layers, seed)


class WithoutLayout(nn.Module):
    """fairseq2 calls its layers with a layout and a cache too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, layout, cache):
        return self.layer(x)


def fairseq2_encoder(p, layers, generator=None):
    names = "TransformerEncoder", "StandardTransformerEncoder", "_record_drop_for_backward"
    others = {"AttentionBiasCache": lambda: None, "CPU": torch.device("cpu")}
    file = "models/transformer/encoder.py", *names, "_RecordDropForBackwardFunction"
    encoder = installed("fairseq2", *file, **others)["StandardTransformerEncoder"]
    encoder = encoder([WithoutLayout(layer) for layer in layers], layer_drop_p=p, generator=generator)

    def run(x):
        return encoder(x, None)

    run.encoder = encoder
    return run


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_run_and_discard_is_fairseq2s_encoder(p, training, private):
    generators = [torch.Generator().manual_seed(3) if private else None for _ in range(2)]
    layers, x = [Counting(end=nn.Tanh()) for _ in range(8)], torch.randn(2, 3, 4)
    ours, theirs = RunAndDiscard(p, layers, generators[0]), fairseq2_encoder(p, layers, generators[1])
    ours.train(training)
    theirs.encoder.train(training)
    for seed in SEEDS:
        assert_same(ours, theirs, x, layers, seed)
    calls = 2 * 2 * len(SEEDS)
    assert [layer.calls for layer in layers] == [calls] * 8


@pytest.mark.parametrize("p", [2.0**-24, 0.1, 0.5, 0.7])
@pytest.mark.parametrize("end", [-1, 0, 1])
@pytest.mark.parametrize("package", ["fairseq", "fairseq2"])
def test_numbers_next_to_p_are_compared_alike(monkeypatch, package, p, end):
    """Both compare float32 with Python's p, each in its way; drawn numbers almost never come so near."""
    layers, x = [Counting() for _ in range(2)], torch.randn(2, 3, 4)
    if package == "fairseq2":
        ours, theirs = RunAndDiscard(p, layers), fairseq2_encoder(p, layers)
    else:
        peer = installed("fairseq", "modules/layer_drop.py", "LayerDropModuleList")["LayerDropModuleList"]
        ours, theirs = in_turn(Skip(p, layers)), in_turn(peer(p, layers))
    number = torch.tensor(p)
    number = torch.nextafter(number, torch.tensor(float(end))) if end else number
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor.fill_(number))
    monkeypatch.setattr(torch, "rand", lambda count, **keywords: number.repeat(count))
    assert_same(ours, theirs, x, layers, 0)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("samples", [1, 2, 9])
def test_sample_skip_is_torchtunes_layer_dropout(p, training, seed, samples):
    theirs = installed("torchtune", "modules/layer_dropout.py", "LayerDropout")["LayerDropout"](p, seed=seed)
    ours, layer, x = SampleSkip(p, seed), Counting(), torch.randn(samples, 3, 4)
    ours.train(training)
    theirs.train(training)
    for _ in SEEDS:
        assert_same(lambda x: ours(layer, x), lambda x: theirs(layer, x), x, [layer], 0)
        assert ours.inferred == theirs.inferred
        assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
