"""What models say of their layers beside the lists, as transformers' do, is cut with them: for good or for a while."""

import copy
import re

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropStack
from layerdrop_fast.prune import extract, prune_config, prune_state_dict, pruning_curve, search, skip_layers
from tests.prune.blocks import blocks

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


class Config:
    def __init__(self, **values):
        vars(self).update(values)


def config_of(layers=6, **more):
    kinds = ["near", "far", "near", "far", "far", "near", "near"]
    return Config(num_hidden_layers=layers, layer_types=kinds[:layers], hidden_size=4, **more)


class Cache:
    def __init__(self):
        self.slots = {}

    def length(self):
        return self.slots[0].shape[1] if 0 in self.slots else 0


class Attention(nn.Module):
    """The sum of what it has seen so far, which a cache holds in the slot of its layer."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.linear = nn.Linear(4, 4)

    def forward(self, x, cache):
        past = [cache.slots[self.layer_idx]] if self.layer_idx in cache.slots else []
        cache.slots[self.layer_idx] = seen = torch.cat([*past, x], dim=1)
        return self.linear(seen).cumsum(1)[:, -x.shape[1] :]


class Layer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.attention = layer_idx, Attention(config, layer_idx)

    def forward(self, x, kind, position, cache):
        return x + torch.tanh(self.attention(x, cache) * (2.0 if kind == "far" else 1.0) + position)


class Inner(nn.Module):
    """The loop of a language model: positions by what slot 0 holds, the kind of each layer by its place."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        position = torch.arange(cache.length(), cache.length() + x.shape[1]).view(1, -1, 1) * 0.1
        for place, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            x = layer(x, self.config.layer_types[place], position, cache)
        return x


class Language(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Inner(config)

    def forward(self, x, cache=None):
        return self.model(x, cache)


NAME = "model.layers"


def made(depth=6):
    torch.manual_seed(0)
    return Language(config_of(depth)).eval()


def loaded(model, keep):
    """What the cut checkpoint gives: a new network of the cut config, with the cut weights."""
    config = Config(**prune_config(vars(model.config), {NAME: keep}, {NAME: len(model.model.layers)}))
    small = Language(config).eval()
    small.load_state_dict(prune_state_dict(model.state_dict(), {NAME: keep}))
    return small


def told(model):
    """All that a model says of its layers."""
    configs = {id(module.config): vars(module.config) for module in model.modules() if hasattr(module, "config")}
    numbers = [(name, module.layer_idx) for name, module in model.named_modules() if hasattr(module, "layer_idx")]
    return copy.deepcopy(list(configs.values())), numbers


def token_by_token(model):
    cache = Cache()
    return torch.cat([model(X[:, place : place + 1], cache) for place in range(X.shape[1])], dim=1)


KEEPS = [[0, 3, 5], [1, 3, 5], [5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_cut_network_is_what_the_cut_checkpoint_gives(keep):
    model = made()
    whole, before, expected = model(X), told(model), loaded(model, keep)
    small = extract(model, {NAME: keep})
    assert told(small) == told(expected)
    with skip_layers(model, {NAME: keep}):
        assert told(model) == told(expected)
        assert torch.equal(model(X), expected(X))
    for network in (small, model):
        assert torch.equal(network(X), expected(X) if network is small else whole)
    assert told(model) == before


@pytest.mark.parametrize("keep", KEEPS)
def test_a_cache_has_a_slot_for_each_layer_that_is_left(keep):
    model = made()
    small = extract(model, {NAME: keep})
    torch.testing.assert_close(token_by_token(small), small(X))
    with skip_layers(model, {NAME: keep}):
        torch.testing.assert_close(token_by_token(model), small(X))
    torch.testing.assert_close(token_by_token(model), model(X))


def test_layers_are_measured_as_the_cut_checkpoint_runs_them():
    model = made(5)

    def evaluate(model):
        return model(X).square().mean().item()

    found = search(model, evaluate, kept=3, layers=NAME)
    assert found.layers_run < found.layers_asked
    assert {tuple(row.keep): row.value for row in found.ranked} == pytest.approx(
        {tuple(row.keep): evaluate(loaded(model, row.keep)) for row in found.ranked}, rel=1e-6
    )
    curve = pruning_curve(model, evaluate, layers=NAME, strategy=lambda depth, *, kept: range(depth - kept, depth))
    for kept, value in curve.items():
        assert value == pytest.approx(evaluate(loaded(model, list(range(5 - kept, 5)))), rel=1e-6)


def test_the_layers_of_a_stack_have_slots_of_their_own_while_prefixes_are_shared():
    torch.manual_seed(0)
    stack = LayerDropStack((Layer(None, index) for index in range(5)), 0.2)

    def evaluate(stack):
        return stack(X, "near", 0.0, Cache()).square().mean().item()

    found = search(stack, evaluate, kept=3)
    assert found.layers_run < found.layers_asked
    for row in found.ranked:
        assert row.value == pytest.approx(evaluate(extract(stack, row.keep).eval()), rel=1e-6)


def test_blocks_within_blocks_and_errors_leave_all_as_it_was():
    model = made()
    before, innermost = told(model), told(extract(model, {NAME: [2, 5]}))

    def fails():
        with skip_layers(model, {NAME: [1, 2, 4, 5]}):
            within = told(model)
            with skip_layers(model, {NAME: [1, 3]}):
                assert told(model) == innermost
            assert told(model) == within
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert told(model) == before


def test_what_is_set_within_the_block_and_is_no_number_of_layers_stays():
    model = made()
    with skip_layers(model, {NAME: [1]}):
        model.config.use_cache = True
    assert model.config.use_cache is True
    assert model.config.num_hidden_layers == 6


def test_a_layer_index_that_is_not_the_layers_number_stays():
    model = made()
    model.model.layers[4].attention.layer_idx = 77
    model.model.layers[1].attention.layer_idx = True
    small = extract(model, {NAME: [1, 4]}).model.layers
    assert [layer.layer_idx for layer in small] == [0, 1]
    assert small[0].attention.layer_idx is True
    assert small[1].attention.layer_idx == 77


def test_a_layer_that_stands_twice_has_one_index():
    model = made()
    model.model.layers[4] = model.model.layers[2]  # whose index is 2
    with skip_layers(model, {NAME: [1, 2, 4]}):
        assert [layer.layer_idx for layer in model.model.layers] == [0, 1, 1]
    assert model.model.layers[2].layer_idx == 2


def test_torchs_transformer_counts_its_layers():
    model = nn.Transformer(8, 2, 3, 3, 8, batch_first=True)
    small = extract(model, {"encoder.layers": [1], "decoder.layers": [0, 2]})
    assert (small.encoder.num_layers, small.decoder.num_layers) == (1, 2)
    with skip_layers(model, {"decoder.layers": [2]}):
        assert (model.encoder.num_layers, model.decoder.num_layers) == (3, 1)
    assert (model.encoder.num_layers, model.decoder.num_layers) == (3, 3)


class Half(nn.Module):
    def __init__(self, depth, config=None):
        super().__init__()
        self.layers = nn.ModuleList(blocks(depth))
        if config is not None:
            self.config = config


class Pair(nn.Module):
    """Two lists, and a config for both."""

    def __init__(self, config, first, second, names=("encoder", "decoder"), own=None):
        super().__init__()
        self.config = config
        self.add_module(names[0], Half(first, own))
        self.add_module(names[1], Half(second))


def left(model, keep):
    """The configs' attributes after extract and within skip_layers, which are the same."""
    before = told(model)
    small = extract(model, keep)
    with skip_layers(model, keep):
        assert told(model) == told(small)
    assert told(model) == before
    return vars(small.config)


BART = dict(encoder_layers=6, decoder_layers=6)


@pytest.mark.parametrize(
    ("config", "keep", "expected"),
    [
        (BART, {"encoder.layers": [1]}, dict(encoder_layers=1, decoder_layers=6)),
        (BART, {"decoder.layers": [1]}, dict(encoder_layers=6, decoder_layers=1)),
        (BART, {"decoder.layers": [1, 2], "encoder.layers": [1]}, dict(encoder_layers=1, decoder_layers=2)),
        (
            dict(num_layers=6, is_encoder_decoder=True),
            {"decoder.layers": [1, 2], "encoder.layers": [0]},
            dict(num_layers=1, num_decoder_layers=2, is_encoder_decoder=True),
        ),
        (
            dict(num_layers=6, is_encoder_decoder=True),
            {"decoder.layers": [1, 2]},
            dict(num_layers=6, num_decoder_layers=2, is_encoder_decoder=True),
        ),
        (dict(num_hidden_layers=6), {"decoder.layers": [1]}, dict(num_hidden_layers=6)),  # whose number is it?
        (
            dict(encoder_layers=6, num_layers=6),
            {"encoder.layers": [0, 1], "decoder.layers": [0]},
            dict(encoder_layers=6, num_layers=6),
        ),
    ],
)
def test_each_side_has_its_number(config, keep, expected):
    assert left(Pair(Config(**config), 6, 6), keep) == expected


def test_numbers_that_may_be_of_another_list_stay():
    names = ("text", "image")
    for config in (dict(n_layer=6), BART):
        assert left(Pair(Config(**config), 6, 6, names), {"text.layers": [1]}) == config
    assert left(Pair(Config(n_layer=6), 6, 4, names), {"text.layers": [1]}) == dict(n_layer=1)
    assert left(Pair(Config(n_layer=6), 6, 4, names), {"image.layers": [1]}) == dict(n_layer=6)
    # 4 of 6 are as many as the other list has.
    keep = {"text.layers": [0, 1, 2, 3], "image.layers": [3]}
    assert left(Pair(Config(n_layer=6), 6, 4, names), keep) == dict(n_layer=4)
    model = Pair(Config(n_layer=6), 6, 1, names)
    model.head = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    assert left(model, {"text.layers": [1]}) == dict(n_layer=6)
    model.head = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.ReLU())
    assert left(model, {"text.layers": [1]}) == dict(n_layer=1)


def test_a_half_alone_does_not_say_which_half_it_is():
    assert left(Half(6, Config(**BART)), {"layers": [1]}) == BART


def test_lists_in_the_layers_are_not_meant():
    model = Half(3, Config(n_layer=3))
    for layer in model.layers:
        layer.experts = nn.ModuleList(blocks(3))
    assert left(model, {"layers": [1]}) == dict(n_layer=1)


def test_a_config_is_of_the_innermost_module_that_has_it():
    config = Config(n_layer=6)
    model = Pair(config, 6, 6, ("text", "image"), own=config)
    assert left(model, {"text.layers": [1, 2]}) == dict(n_layer=2)
    assert left(model, {"image.layers": [1, 2]}) == dict(n_layer=6)


def test_modules_on_the_way_to_the_list_count_too_and_kinds_may_be_a_tuple():
    model = nn.ModuleDict({"body": nn.ModuleDict({"h": nn.ModuleList(blocks(3))})})
    model.n_layer, model["body"].depth, model["body"]["h"].num_layers = 3, 3, 3
    model["body"].num_layers, model["body"].layer_types = 3, (1, "b", None)
    small = extract(model, {"body.h": [0, 2]})
    assert (small.n_layer, small["body"].num_layers, small["body"].layer_types) == (2, 2, (1, None))
    assert (model.n_layer, model["body"].num_layers, model["body"].layer_types) == (3, 3, (1, "b", None))


def test_stacks_have_a_config_above_them_and_compiled_models_one_within():
    model = nn.ModuleDict({"stack": LayerDropStack(blocks(4), 0.2)})
    model.config = Config(n_layer=4)
    for name in ("stack", "stack.layers"):
        assert extract(model, {name: [0, 2]}).config.n_layer == 2
    compiled = torch.compile(model, backend="eager")
    for keep in ({"stack": [1]}, [1]):
        with skip_layers(compiled, keep):
            assert model.config.n_layer == 1
    assert model.config.n_layer == 4


@pytest.mark.parametrize("config", [None, "words", Config, {"n_layer": 4}, Config(other=4), Config(n_layer=True)])
def test_configs_that_say_nothing_of_layers_are_left(config):
    model = nn.ModuleDict({"stack": LayerDropStack(blocks(4), 0.2)})
    model.config = config
    before = re.sub("0x.*", "", str(config)), dict(getattr(config, "__dict__", {}))
    small = extract(model, [1])
    assert (re.sub("0x.*", "", str(small.config)), dict(getattr(small.config, "__dict__", {}))) == before
