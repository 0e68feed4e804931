"""extract: the smaller network equals the large one with the other layers skipped."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from layerdrop_fast import DropSchedule, LayerDropModuleList, LayerDropStack, decreasing, linear
from layerdrop_fast.prune import every_other, extract, skip_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def blocks(count):
    return [Block() for _ in range(count)]


def skipping(layers, keep, x):
    for index in keep:
        x = layers[index](x)
    return x


X = torch.randn(3, 4)


@pytest.mark.parametrize("kept", [1, 3, 8, 16])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layers: LayerDropStack(layers, 0.2),
        lambda layers: LayerDropModuleList(0.2, layers),
        lambda layers: nn.Sequential(LayerDropStack(layers, 0.2)),
    ],
)
def test_any_depth(wrap, kept):
    layers = blocks(16)
    model = wrap(layers).eval()
    keep = every_other(16, kept=kept)
    small = extract(model, keep)
    assert torch.equal(small(X), skipping(layers, keep, X))
    assert sum(p.numel() for p in small.parameters()) == kept * 20
    assert sum(p.numel() for p in model.parameters()) == 16 * 20
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}


def test_layers_that_go_are_not_copied(monkeypatch):
    copies = []
    monkeypatch.setattr(Block, "__deepcopy__", lambda block, memo: copies.append(block) or Block(), raising=False)
    model = LayerDropStack(blocks(10), 0.2)
    extract(model, [1, 5])
    assert copies == [model.layers[1], model.layers[5]]


def test_a_stack_keeps_the_rates_of_its_layers_and_its_place_in_time():
    model = LayerDropStack(blocks(5), DropSchedule(5, linear(0.8), decreasing(9)), seed=3)
    model(X)
    small = extract(model, [0, 2, 4])
    assert small.schedule(0).tolist() == [0.0, 0.4, 0.8]
    assert small.schedule(4).tolist() == [0.0, 0.2, 0.4]
    assert (small.counters.seed, small.counters.forwards) == (3, 1)
    assert small.train()(X).shape == X.shape
    assert small.stats().realized_rates.shape == (3,)


def test_several_lists_by_name():
    model = nn.ModuleDict({"encoder": LayerDropStack(blocks(4), 0.2), "decoder": nn.ModuleList(blocks(6))})
    small = extract(model, {"encoder": [1], "decoder": [0, 5]})
    assert len(small["encoder"].layers) == 1
    assert torch.equal(small["decoder"][1](X), model["decoder"][5](X))
    assert list(small["decoder"].state_dict()) == [
        "0.linear.weight",
        "0.linear.bias",
        "1.linear.weight",
        "1.linear.bias",
    ]


def test_a_stack_by_the_name_of_its_inner_list():
    model = nn.ModuleDict({"encoder": LayerDropStack(blocks(6), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])})
    for name in ("encoder", "encoder.layers"):
        small = extract(model, {name: [4, 5]})["encoder"]
        assert small.schedule(0).tolist() == [0.5, 0.6]
        assert small(X).shape == X.shape
    beside = nn.ModuleDict({"enc": model["encoder"], "enclayers": nn.ModuleList(blocks(3))})
    small = extract(beside, {"enclayers": [2]})
    assert (len(small["enc"].layers), len(small["enclayers"])) == (6, 1)
    small = extract(model["encoder"], {"layers": [0]})
    assert small.schedule(0).tolist() == [0.1]


class Vision(nn.Module):
    """A list that is called itself, as timm's and torchvision's are."""

    def __init__(self, names):
        super().__init__()
        self.blocks = nn.Sequential(OrderedDict(zip(names, blocks(len(names)), strict=True)))

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.parametrize("names", [[str(n) for n in range(5)], [f"layer_{n}" for n in range(5)]])
def test_a_sequential_is_cut_where_it_is_named(names):
    model = Vision(names)
    small = extract(model, {"blocks": [1, 4]})
    assert torch.equal(small(X), skipping(list(model.blocks), [1, 4], X))
    fresh = Vision(names[:2])
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(X), small(X))
    with skip_layers(model, {"blocks": [1, 4]}):
        assert torch.equal(model(X), small(X))
    assert list(dict(model.blocks.named_children())) == names
    with pytest.raises(ValueError, match=r"holds 0 LayerDropStacks .*; found 'blocks'$"):
        extract(model, [1])


@pytest.mark.parametrize("mask", [[False, True], torch.tensor([False, True]), np.array([False, True])])
def test_a_mask_is_no_list_of_layers(mask):
    with pytest.raises(TypeError, match=r"layers to keep of the LayerDropStack have .*False.*, not a mask"):
        extract(LayerDropStack(blocks(2), 0.2), mask)
    assert len(extract(LayerDropStack(blocks(2), 0.2), torch.tensor([1])).layers) == 1


def test_a_layer_used_elsewhere_would_be_shared():
    model = nn.ModuleDict({"stack": LayerDropStack(blocks(4), 0.2)})
    model["last"] = model["stack"].layers[3]
    with pytest.raises(ValueError, match="the layer 'last' is used outside the lists that were cut"):
        extract(model, [0, 1])
    assert extract(model, [0, 3])["last"] is not model["last"]


def test_a_layer_that_stands_twice():
    shared = Block()
    model = LayerDropStack([shared, Block(), shared], 0.2).eval()
    small = extract(model, [0, 1])
    assert torch.equal(small(X), skipping(model.layers, [0, 1], X))


def test_lists_that_must_be_named_are_told():
    model = nn.ModuleDict({"encoder": nn.ModuleList(blocks(2)), "other": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"holds 0 LayerDropStacks .*layers=name or \{name: keep\}; found 'encoder'"):
        extract(model, [0])
    with pytest.raises(ValueError, match="found none"):
        extract(nn.Linear(2, 2), [0])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 4], r"of the LayerDropStack are \[0, 4\], expected at least one of 0 to 3, ascending"),
        ([1, 0], r"are \[1, 0\], expected"),
        ([1, 1], r"are \[1, 1\], expected"),
        ([], r"are \[\], expected"),
        ([-1], r"are \[-1\], expected at least one of 0 to"),
        ({"layers.0": [0]}, r"'layers.0' is a Block, expected a LayerDropStack or a list of layers"),
        ({"nowhere": [0]}, r"LayerDropStack has no module 'nowhere'; found the lists of layers '', 'layers'"),
    ],
)
def test_errors_name_both_sides(keep, message):
    model = LayerDropStack(blocks(4), 0.2)
    with pytest.raises(ValueError, match=message):
        extract(model, keep)
    assert len(model.layers) == 4


def test_an_ambiguous_model():
    with pytest.raises(ValueError, match=r"holds 2 LayerDropStacks and LayerDropModuleLists \['0', '1'\], expected 1"):
        extract(nn.Sequential(LayerDropStack(blocks(2), 0.2), LayerDropModuleList(0.2, blocks(2))), [0])
    with pytest.raises(ValueError, match=r"holds 0 LayerDropStacks"):
        extract(nn.Linear(2, 2), [0])
