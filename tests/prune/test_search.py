"""Search on Valid: every method against brute force, and what sharing prefixes saves."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropModuleList, LayerDropStack, TransformerStack
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.prune import SearchResult, every_other, extract, pruning_curve, search
from layerdrop_fast.prune.scores import Scores
from layerdrop_fast.prune.shared_prefixes import SharedPrefixes
from tests.prune.blocks import blocks

BATCHES = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Model(nn.Module):
    """Something before and after the layers."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(4, 4), layers, nn.Linear(4, 1)

    def forward(self, x):
        x = self.first(x)
        if isinstance(self.layers, LayerDropStack):
            return self.last(self.layers(x))
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def evaluate(model):
    model.eval()
    return sum(model(x).square().mean().item() for x in BATCHES)


LISTS = {
    "stack": lambda count: LayerDropStack(blocks(count), 0.2),
    "LayerDropModuleList": lambda count: LayerDropModuleList(0.2, blocks(count)),
    "ModuleList": lambda count: nn.ModuleList(blocks(count)),
}


def brute_force(model, kept, name="layers"):
    depth = len(getattr(model.layers, "layers", model.layers))
    return {keep: evaluate(extract(model, {name: keep})) for keep in combinations(range(depth), kept)}


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_exhaustive_ranks_as_brute_force_does(kind, kept, share_prefixes):
    model = Model(LISTS[kind](6))
    found = search(model, evaluate, kept=kept, layers="layers", share_prefixes=share_prefixes)
    expected = brute_force(model, kept)
    assert {tuple(row.keep): row.value for row in found.ranked} == pytest.approx(expected, rel=1e-6)
    assert [row.value for row in found.ranked] == sorted(row.value for row in found.ranked)
    assert found.keep == found.ranked[0].keep
    assert found.every_other.keep == every_other(6, kept=kept)
    assert found.every_other.value == pytest.approx(expected[tuple(every_other(6, kept=kept))])


@pytest.mark.parametrize(("depth", "kept", "checks"), [(6, 1, 1), (6, 3, 3), (7, 4, 3), (6, 6, 1)])
def test_each_distinct_prefix_is_computed_once(depth, kept, checks):
    model = Model(LISTS["ModuleList"](depth))
    found = search(model, evaluate, kept=kept, layers="layers")
    subsets = list(combinations(range(depth), kept))
    prefixes = {subset[:length] for subset in subsets for length in range(1, kept + 1)}
    assert found.layers_run == len(prefixes) == math.comb(depth + 1, kept) - 1
    assert found.layers_asked == kept * len(subsets)
    assert sum(layer.calls for layer in model.layers) == (len(prefixes) + checks * kept) * len(BATCHES)


def test_the_fused_stack_starts_from_known_states_too(monkeypatch):
    torch.manual_seed(0)
    model = TransformerLM(11, 16, 2, 6, 32, max_len=9, dropout=0.0, schedule=0.2)
    tokens = torch.arange(16).view(4, 4) % 11
    ran = []
    run = TransformerStack._run_piece
    monkeypatch.setattr(
        TransformerStack, "_run_piece", lambda self, x, kept, *rest: ran.extend(kept) or run(self, x, kept, *rest)
    )

    def loss(model):
        logits = model.eval()(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    found = search(model, loss, kept=3)
    assert found.layers_run == math.comb(7, 3) - 1
    assert len(ran) == found.layers_run + 3 * 3  # three candidates are checked
    for row in found.ranked:
        assert row.value == pytest.approx(loss(extract(model, row.keep)), rel=1e-5)


@pytest.mark.parametrize("held", [0, 1, 2, 3, 100])
def test_held_states_stay_within_the_bound(held):
    """Whatever is held, the scores are the same."""
    model = Model(LISTS["ModuleList"](7))
    state = sum(x.nbytes for x in BATCHES)
    prefixes = SharedPrefixes(model, "layers", evaluate, held * state)
    expected, most, runs = brute_force(model, 4), 0, 0
    for keep in combinations(range(7), 4):
        assert prefixes(keep) == pytest.approx(expected[keep], rel=1e-6)
        most = max(most, sum(held.out.nbytes for outputs in prefixes._outputs.values() for held in outputs))
    assert most == min(held, 3) * state
    if held < 3:
        runs = sum(
            (4 - held) if length == 4 - held else 1 for length in range(4 - held, 5) for _ in _prefixes(7, 4, length)
        )
        assert prefixes.layers_run == runs


def _prefixes(depth, kept, length):
    return {subset[:length] for subset in combinations(range(depth), kept)}


def by_hand_greedy(model, kept):
    keep = tuple(range(6))
    while len(keep) > kept:
        smaller = [keep[:n] + keep[n + 1 :] for n in range(len(keep))]
        keep = min(smaller, key=lambda subset: evaluate(extract(model, {"layers": subset})))
    return list(keep)


def test_greedy_drops_what_is_missed_least_round_by_round():
    model = Model(LISTS["ModuleList"](6))
    assert search(model, evaluate, kept=2, method="greedy", layers="layers").keep == by_hand_greedy(model, 2)
    assert search(model, evaluate, kept=6, method="greedy", layers="layers").keep == list(range(6))


def test_a_beam_lies_between_greedy_and_exhaustive():
    values = {}
    for method, width in (("greedy", 1), ("beam", 1), ("beam", 3), ("beam", 100), ("exhaustive", 1)):
        found = search(
            Model(LISTS["ModuleList"](7)), evaluate_seeded, kept=3, method=method, width=width, layers="layers"
        )
        values[method, width] = found.ranked[0].value
    assert values["greedy", 1] == values["beam", 1] >= values["beam", 3] >= values["beam", 100]
    assert values["beam", 100] == values["exhaustive", 1]


def evaluate_seeded(model):
    """The same model each time: its first and last maps are drawn when it is made."""
    torch.manual_seed(1)
    nn.init.normal_(model.first.weight), nn.init.normal_(model.last.weight)
    return evaluate(model)


def test_random_subsets_are_different_and_follow_the_seed():
    model = Model(LISTS["ModuleList"](7))
    first, again, other = (
        search(model, evaluate, kept=3, method="random", trials=12, seed=seed, layers="layers") for seed in (1, 1, 2)
    )
    assert first == again
    assert len({tuple(row.keep) for row in first.ranked}) == 12
    assert {tuple(row.keep) for row in first.ranked} != {tuple(row.keep) for row in other.ranked}
    everything = search(model, evaluate, kept=3, method="random", trials=1000, layers="layers")
    assert len(everything.ranked) == math.comb(7, 3)


def test_no_number_ranks_last():
    for nothing in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"the best of 4 candidates scores {nothing}, expected a finite number"):
            search(
                Model(LISTS["ModuleList"](4)),
                lambda model, nothing=nothing: evaluate(model) * 0 + nothing,
                kept=1,
                layers="layers",
            )
    model = Model(LISTS["ModuleList"](4))
    values = dict(zip(combinations(model.layers, 2), [math.nan, 3.0, math.nan, 1.0, 2.0, 4.0], strict=True))
    found = search(model, lambda model: 0 * evaluate(model) + values[tuple(model.layers)], kept=2, layers="layers")
    assert [row.value for row in found.ranked[:4]] == [1.0, 2.0, 3.0, 4.0]


def test_progress_is_shown(capsys):
    search(Model(LISTS["ModuleList"](4)), evaluate, kept=2, layers="layers", progress=True)
    assert "2 of 4: 6/6" in capsys.readouterr().out


class InPlace(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Telling(nn.Module):
    def forward(self, x):
        return x + 1, x


class Tuple(nn.Module):
    def forward(self, x):
        return x + 1, None


class OfTuples(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def test_layers_whose_results_cannot_be_shared_are_refused():
    for layer, message in ((InPlace, "writes into its input"), (Telling, "returns more than x")):
        model = OfTuples(layer() for _ in range(3))
        with pytest.raises(ValueError, match=message):
            search(model, evaluate, kept=2, layers="layers")
        assert search(model, evaluate, kept=2, layers="layers", share_prefixes=False).ranked[0].keep == [0, 1]
    shared = Tuple()
    with pytest.raises(ValueError, match="stands twice"):
        search(OfTuples([shared, shared]), evaluate, kept=2, layers="layers")


def test_layers_that_return_tuples():
    found = search(OfTuples(Tuple() for _ in range(4)), evaluate, kept=3, layers="layers")
    assert len({row.value for row in found.ranked}) == 1
    assert found.ranked[0].value == pytest.approx(sum((x + 3).square().mean().item() for x in BATCHES))


def test_an_evaluate_that_changes_its_mind_is_refused():
    model, calls = Model(LISTS["ModuleList"](4)), []

    def other_inputs(model):
        calls.append(1)
        return model.eval()(BATCHES[0] + len(calls)).mean().item()

    def more_calls(model):
        calls.append(1)
        return sum(model.eval()(x).mean().item() for x in BATCHES[: len(calls)])

    def fewer_calls(model):
        calls.append(1)
        return sum(model.eval()(x).mean().item() for x in BATCHES[: 4 - len(calls)])

    for wrong, message in (
        (other_inputs, "call 0 of 'layers' has other inputs than in the first evaluation"),
        (more_calls, "call 1 of 'layers' has other inputs than in the first evaluation"),
        (fewer_calls, r"were called \[2, 2\] times, expected 3 times each"),
    ):
        calls.clear()
        prefixes = SharedPrefixes(model, "layers", wrong, 1 << 20)
        prefixes._next_check = math.inf
        prefixes((0, 1))
        with pytest.raises(ValueError, match=message):
            prefixes((0, 2))
        calls.clear()
        with pytest.raises(ValueError, match=r"the layers \[0, 1\] of 'layers' score .* and .* with every layer run"):
            search(model, wrong, kept=2, layers="layers")
    with pytest.raises(ValueError, match=r"is in training mode, expected evaluate to call model.eval\(\)"):
        search(model, lambda model: model.train()(BATCHES[0]).mean().item(), kept=2, layers="layers")
    with pytest.raises(ValueError, match="evaluate called no layer of 'layers', expected it to call the model"):
        search(model, lambda model: 1.0, kept=2, layers="layers")
    for nothing, named in ((None, "a NoneType None"), (torch.ones(2), r"a Tensor of shape \[2\]"), ("x", "a str 'x'")):
        for share in (True, False):
            with pytest.raises(TypeError, match=f"evaluate returned {named}, expected a number"):
                search(model, lambda model, it=nothing: it, kept=2, layers="layers", share_prefixes=share)
    assert "forward" not in vars(model.layers[0])


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_models_are_evaluated_in_evaluation_mode_and_left_as_they_were(share_prefixes):
    model = LayerDropStack(blocks(4), 0.5)
    model.layers[2].eval()
    seen = []

    def value(model):
        seen.append(any(module.training for module in model.modules()))
        return model(BATCHES[0]).mean().item()

    first, again = (search(model, value, kept=2, share_prefixes=share_prefixes) for _ in range(2))
    assert first.ranked == again.ranked
    assert pruning_curve(model, value) == pruning_curve(model, value)
    assert not any(seen)
    assert [layer.training for layer in model.layers] == [True, True, False, True]
    assert model.training


def test_stacks_that_return_more_than_x_are_refused():
    with pytest.raises(ValueError, match="has hidden_states=True"):
        search(LayerDropStack(blocks(3), 0.2, hidden_states=True), evaluate, kept=1)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (dict(kept=0), ValueError, "kept must be at least 1, got 0"),
        (dict(kept=5), ValueError, "kept is 5, expected 1 to 4, the layers of 'layers'"),
        (dict(kept=1.5), TypeError, "kept must be an integer"),
        (dict(kept=2, method="best"), ValueError, "method is 'best', expected one of"),
        (dict(kept=2, width=0), ValueError, "width must be at least 1"),
        (dict(kept=2, layers="nowhere"), ValueError, "has no module 'nowhere'"),
        (dict(kept=2, max_bytes=-1), ValueError, "max_bytes must be at least 0"),
    ],
)
def test_errors_name_both_sides(keywords, error, message):
    with pytest.raises(error, match=message):
        search(Model(LISTS["ModuleList"](4)), evaluate, **{"layers": "layers", **keywords})


def test_too_many_subsets_are_refused_before_anything_runs():
    model = Model(LISTS["ModuleList"](40))
    with pytest.raises(ValueError, match="20 of 40 layers are 137,846,528,820 subsets, expected at most 1,000,000"):
        search(model, evaluate, kept=20, layers="layers")
    assert not any(layer.calls for layer in model.layers)


def test_the_model_is_left_as_it_was():
    model = Model(LISTS["stack"](5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    assert isinstance(search(model, evaluate, kept=2, layers="layers"), SearchResult)
    assert "forward" not in vars(model.layers)
    assert len(model.layers.layers) == 5
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(share_prefixes):
    model = Model(LISTS["ModuleList"](5)).train()
    model.last.eval(), model.layers[3].linear.eval()
    before = {name: module.training for name, module in model.named_modules()}
    grad = []

    def noting(model):
        grad.append(torch.is_grad_enabled())
        return evaluate(model)

    search(model, noting, kept=2, layers="layers", share_prefixes=share_prefixes)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(grad)


def test_the_states_of_the_search_are_freed_before_the_held_out_split_is_judged(monkeypatch):
    known, of = [], Scores.of
    monkeypatch.setattr(Scores, "of", lambda self, *given: known.append(self) or of(self, *given))
    held = []

    def other(model):
        held.append(sum(map(len, known[0].prefixes._outputs.values())))
        return evaluate(model)

    search(Model(LISTS["ModuleList"](5)), evaluate, kept=3, layers="layers", held_out=other)
    assert held
    assert not any(held)
