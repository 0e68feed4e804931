"""skip_layers and early_exit: what extract gives, for a while and without a copy."""

import pytest
import torch
from torch import nn

from layerdrop_fast import DropSchedule, LayerDropModuleList, LayerDropStack, TransformerStack, linear
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import early_exit, every_other, extract, skip_layers
from tests.prune.blocks import blocks, skipping

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def state_of(model):
    return {name: (id(module), len(list(module.children()))) for name, module in model.named_modules()}


@pytest.mark.parametrize("keep", [[0], [1, 3], every_other(6, kept=4), range(6)])
@pytest.mark.parametrize(
    "wrap", [lambda layers: LayerDropStack(layers, 0.2), lambda layers: LayerDropModuleList(0.2, layers)]
)
def test_within_the_block_only_these_layers_run_and_after_it_all(wrap, keep):
    layers = blocks(6)
    model = wrap(layers).eval()
    before, whole = state_of(model), model(X)
    with skip_layers(model, keep) as smaller:
        assert smaller is model
        assert torch.equal(model(X), skipping(layers, keep, X))
        assert [id(p) for p in model.parameters()] == [id(p) for index in keep for p in layers[index].parameters()]
    assert state_of(model) == before
    assert torch.equal(model(X), whole)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_all_layers_come_back_when_the_block_raises(error):
    model = nn.Sequential(LayerDropStack(blocks(5), [0.1, 0.2, 0.3, 0.4, 0.5], seed=3))
    before, schedule, statistics = state_of(model), model[0].schedule, model[0]._statistics
    seen = []

    def fails():
        seen.append(model[0].schedule(0).tolist())
        raise error

    with pytest.raises(error), skip_layers(model, [1, 2]):
        fails()
    assert seen == [[0.2, 0.3]]
    assert state_of(model) == before
    assert model[0].schedule is schedule
    assert model[0]._statistics is statistics


def test_it_is_what_extract_gives_also_when_trained():
    model = TransformerStack(5, 16, 2, 32, schedule=DropSchedule(5, linear(0.6)), scale="inverse", seed=1)
    small = extract(model, [0, 2, 3])
    x = torch.randn(2, 3, 16)
    for mode in (True, False):
        model.train(mode), small.train(mode)
        with skip_layers(model, [0, 2, 3]):
            got = model(x)
        assert torch.equal(got, small(x))


def test_blocks_within_blocks():
    layers = blocks(6)
    model = LayerDropStack(layers, 0.2).eval()
    with skip_layers(model, [0, 2, 4, 5]):
        with skip_layers(model, [1, 3]):
            assert torch.equal(model(X), skipping(layers, [2, 5], X))
        assert torch.equal(model(X), skipping(layers, [0, 2, 4, 5], X))
    assert len(model.layers) == 6


def test_several_lists_by_name():
    model = nn.ModuleDict({"encoder": LayerDropStack(blocks(4), 0.2), "decoder": nn.ModuleList(blocks(6))})
    with skip_layers(model, {"encoder.layers": [1], "decoder": [0, 5]}):
        assert (len(model["encoder"].layers), len(model["decoder"])) == (1, 2)
    assert (len(model["encoder"].layers), len(model["decoder"])) == (4, 6)


def test_wrong_layers_are_named_and_nothing_has_changed():
    model = nn.ModuleDict({"encoder": LayerDropStack(blocks(4), 0.2), "decoder": nn.ModuleList(blocks(6))})
    before = state_of(model)
    wrong = skip_layers(model, {"encoder": [1], "decoder": [6]})
    with pytest.raises(ValueError, match=r"of 'decoder' are \[6\], expected at least one of 0 to 5"), wrong:
        pass
    assert state_of(model) == before


def test_early_exit_runs_the_first_layers_and_the_head():
    model = TransformerLM(11, 16, 2, 5, 32, max_len=9, schedule=0.2).eval()
    tokens = torch.arange(8).view(2, 4)
    small = extract(model, [0, 1])
    with early_exit(model, 2) as draft:
        assert torch.equal(draft(tokens), small(tokens))
        assert torch.equal(draft.generate(tokens, 3, temperature=0), small.generate(tokens, 3, temperature=0))
    with early_exit(model, 5):
        whole = model(tokens)
    assert torch.equal(model(tokens), whole)


@pytest.mark.parametrize(("layer", "error"), [(0, ValueError), (6, ValueError), (1.5, TypeError)])
def test_early_exit_names_both_sides(layer, error):
    model = LayerDropStack(blocks(5), 0.2)
    with pytest.raises(error, match=r"layer (is|must be)"), early_exit(model, layer):
        pass
    with pytest.raises(ValueError, match="has no module 'nowhere'"), early_exit(model, 1, layers="nowhere"):
        pass


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(blocks(3))


@pytest.mark.parametrize("take", [lambda model, keep: skip_layers(model, keep).__enter__(), extract])
def test_lists_within_or_twice_the_same_are_refused_and_nothing_has_changed(take):
    stack = LayerDropStack(blocks(4), 0.2)
    model = nn.ModuleDict({"layers": nn.ModuleList(Outer() for _ in range(3)), "e": stack, "again": stack})
    before = state_of(model)
    for keep, message in (
        ({"layers": [1, 2], "layers.1.inner": [0]}, "'layers' and 'layers.1.inner' are a list and one of its layers'"),
        ({"layers.1.inner": [0], "layers": [1, 2]}, "'layers' and 'layers.1.inner' are a list and one of its layers'"),
        ({"e": [1], "e.layers": [0, 2]}, "'e.layers' and 'e' are the same list of layers"),
        ({"e": [1, 2], "again": [1]}, "'again' and 'e' are the same list of layers"),
    ):
        with pytest.raises(ValueError, match=message):
            take(model, keep)
        assert state_of(model) == before
    with skip_layers(model, {"layers.0.inner": [0], "layers.1.inner": [1, 2]}):
        assert [len(layer.inner) for layer in model["layers"]] == [1, 2, 3]


def test_a_mode_that_changes_within_the_block_is_that_of_every_layer():
    model = nn.ModuleDict({"encoder": LayerDropStack(blocks(4), 0.2), "decoder": nn.ModuleList(blocks(3))}).train()
    model["decoder"][0].eval()
    with skip_layers(model, {"encoder": [1, 2], "decoder": [1]}):
        pass
    assert not model["decoder"][0].training  # as it was
    with skip_layers(model, {"encoder": [1, 2], "decoder": [1]}):
        model.eval()
    assert not any(module.training for module in model.modules())
    with skip_layers(model, {"encoder": [1, 2], "decoder": [1]}), skip_layers(model, {"encoder": [0]}):
        model.train()
    assert all(module.training for module in model.modules())


def test_heads_and_chunks_that_are_dropped_are_as_before():
    """Their rates are of each layer: those of the layers that are left, and all of them afterwards."""
    rates = {"layer": 0.1, "head": [0.1, 0.2, 0.3, 0.4], "ffn_chunk": 0.5}
    stack = TransformerStack(4, 8, 2, 16, schedule=rates, ffn_chunks=2, dropout=0.0, seed=1)
    parts, whole = stack.parts, stack.rates(0).tolist()
    with skip_layers(stack, [1, 3]):
        assert len(stack.rates(0)) == len(whole) // 2
        stack(torch.randn(2, 3, 8))
    assert stack.parts is parts
    assert stack.rates(0).tolist() == whole
    stack(torch.randn(2, 3, 8))


def test_what_a_stack_knows_of_its_layers_is_as_before():
    stack = LayerDropStack(blocks(4), 0.2)
    stack._proven = {1, 3}
    with skip_layers(stack, [0, 1]):
        assert stack._proven == set()
        stack._proven.add(0)
    assert stack._proven == {1, 3}
