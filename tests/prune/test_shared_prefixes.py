"""Shared prefixes: what is the same as without them, and what is refused."""

from itertools import combinations

import pytest
import torch
from torch import nn

from layerdrop_fast import KVCache, TransformerStack
from layerdrop_fast.prune import extract, search
from layerdrop_fast.prune.shared_prefixes import SharedPrefixes
from tests.prune.blocks import blocks
from tests.prune.test_search import BATCHES, LISTS, Model, evaluate


class Loop(nn.Module):
    """A model whose own loop does something between its layers: ``between(model, x, place) -> x``."""

    def __init__(self, between, count=6, call=lambda model, layer, x: layer(x)):
        super().__init__()
        self.layers, self.between, self.call = nn.ModuleList(blocks(count)), between, call
        self.total, self.states, self.argument = 0.0, [], 0.0

    def forward(self, x):
        self.total, self.states = 0.0, []
        for place, layer in enumerate(self.layers):
            x = self.between(self, self.call(self, layer, x), place)
        return x + self.total


def summing(model, x, place):
    model.total = model.total + x
    return x


def summing_numbers(model, x, place):
    model.total = model.total + x.nan_to_num()
    return x


def summing_with_the_last_layer(model, x, place):
    """Not in the first three candidates, of which two are checked."""
    if model.layers[-1].calls > 0 and getattr(model.layers[-1], "last", False):
        model.total = model.total + x
    return x


@pytest.mark.parametrize("between", [summing, summing_numbers, summing_with_the_last_layer])
def test_models_that_read_states_between_layers_are_refused(between):
    model = Loop(between)
    model.layers[5].last = True
    model.layers[5].calls = 1
    with pytest.raises(ValueError, match=r"score .* with shared prefixes and .* with every layer run.*_prefixes=F"):
        search(model, evaluate, kept=4, layers="layers")
    found = search(model, evaluate, kept=4, layers="layers", share_prefixes=False)
    assert found.ranked[0].value == pytest.approx(evaluate(extract(model, {"layers": found.keep})))


def test_a_few_candidates_are_run_with_every_layer():
    model, calls = Model(LISTS["ModuleList"](9)), []

    def counting(model):
        calls.append(1)
        return evaluate(model)

    found = search(model, counting, kept=4, layers="layers")
    assert len(found.ranked) == 126
    assert len(calls) == 126 + 3  # 1, 2, 16 and, where there are as many, 128


@pytest.mark.parametrize("inference", [False, True])
def test_writing_into_a_state_is_refused(inference):
    def writing(model, x, place):
        x += 0.3
        return x

    def counted(model):
        with torch.inference_mode(inference):
            return evaluate(model)

    with pytest.raises(ValueError, match="what a layer of 'layers' returned was written into"):
        search(Loop(writing), counted, kept=3, layers="layers")


@pytest.mark.parametrize("when", ["behind the model", "before the next"])
def test_writing_into_a_state_that_is_held_is_refused(when):
    def keeping(model, x, place):
        model.states.append(x)
        return x

    def write(model):
        if model.states:
            model.states[1].zero_()

    def writing(model):
        if when == "before the next":
            write(model)
        value = evaluate(model)
        if when == "behind the model":
            write(model)
        return value

    with pytest.raises(ValueError, match="what a layer of 'layers' returned was written into"):
        search(Loop(keeping), writing, kept=3, layers="layers")


@pytest.mark.parametrize("method", ["greedy", "exhaustive"])
def test_models_that_scale_by_their_depth(method):
    def call(model, layer, x):
        return layer(x, 1.0 / len(model.layers)) / len(model.layers)

    model = Loop(lambda model, x, place: x, call=call)
    found = search(model, evaluate, kept=3, layers="layers", method=method)
    for row in found.ranked:
        assert row.value == pytest.approx(evaluate(extract(model, {"layers": row.keep})), rel=1e-6)


def test_states_are_not_shared_with_subsets_of_another_size():
    model = Loop(lambda model, x, place: x / len(model.layers))
    prefixes = SharedPrefixes(model, "layers", evaluate, 1 << 20)
    for keep in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 4), (0, 1)):
        assert prefixes(keep) == pytest.approx(evaluate(extract(model, {"layers": keep})), rel=1e-6)


@pytest.mark.parametrize("kind", ["number", "tensor", "keyword", "nested"])
@pytest.mark.parametrize("place", [0, 1])
def test_other_arguments_of_layers_that_do_not_run_are_refused(kind, place):
    class Taking(nn.Module):
        def forward(self, x, shift=None, *, by=None):
            return x + torch.tanh(x)

    def call(model, layer, x):
        shift = model.argument if layer.place == place else 0.0
        given = {
            "number": ((shift,), {}),
            "tensor": ((torch.tensor(shift),), {}),
            "keyword": ((), {"by": shift}),
            "nested": (([torch.zeros(2), {"shift": shift}],), {}),
        }[kind]
        return layer(x, *given[0], **given[1])

    model = Loop(lambda model, x, place: x, call=call)
    model.layers = nn.ModuleList(Taking() for _ in range(6))
    for number, layer in enumerate(model.layers):
        layer.place = number

    def changing(model):
        model.argument += 1.0
        return evaluate(model)

    with pytest.raises(ValueError, match=rf"layer {place} of 'layers' has other arguments beside x in call 0"):
        search(model, changing, kept=3, layers="layers")


def test_other_arguments_of_a_stack_are_refused():
    torch.manual_seed(0)
    stack, masks = TransformerStack(4, 8, 2, 16, dropout=0.0).eval(), [torch.zeros(3, 3)]
    x = torch.randn(2, 3, 8)

    def changing(stack):
        masks.append(masks[-1] + torch.randn(3, 3))
        return stack(x, attn_mask=masks[-1]).square().mean().item()

    prefixes = SharedPrefixes(stack, "", changing, 1 << 20)
    prefixes._next_check = 1e9
    prefixes((0, 1))
    with pytest.raises(
        ValueError, match="call 0 of the TransformerStack has other inputs than in the first evaluation"
    ):
        prefixes((1, 2))


def test_a_buffer_that_is_filled_again_is_other_inputs():
    buffer, numbers = torch.zeros(3, 4), iter(range(100))

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(blocks(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def filling(model):
        buffer.copy_(BATCHES[0] + next(numbers) // 2)  # each candidate its own: the first one is checked
        return model.eval()(buffer).mean().item()

    with pytest.raises(ValueError, match="has other inputs than in the first evaluation"):
        search(Direct(), filling, kept=2, layers="layers")


def test_layers_that_return_their_input_may_have_the_callers_buffer():
    model = Loop(lambda model, x, place: x)
    model.layers[0] = nn.Identity()
    buffer = torch.empty_like(BATCHES[0])

    def filling(model):
        total = 0.0
        for x in BATCHES:
            total += model.eval()(buffer.copy_(x)).square().mean().item()
        return total

    found = search(model, filling, kept=3, layers="layers")
    for row in found.ranked:
        assert row.value == pytest.approx(evaluate(extract(model, {"layers": row.keep})), rel=1e-6)


def test_layers_in_another_order_are_refused():
    class Reversed(Loop):
        def forward(self, x):
            for layer in list(self.layers)[::-1]:
                x = layer(x)
            return x

    with pytest.raises(ValueError, match="are called in another order than they stand in"):
        search(Reversed(None), evaluate, kept=3, layers="layers")


class Of(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x + 1)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda x: {"x": x}, "returns dict"),
        (lambda x: [x], "returns list"),
        (lambda x: ([x], None), "returns a tuple that starts with list"),
    ],
)
def test_what_layers_return_that_is_no_tensor_is_named(make, got):
    model = nn.ModuleDict({"layers": nn.ModuleList(Of(make) for _ in range(3))})
    with pytest.raises(TypeError, match=f"a layer of 'layers' {got}, expected a tensor or a tuple"):
        search(model, lambda model: model.eval()["layers"][0](BATCHES[0]), kept=2, layers="layers")


def test_what_layers_are_called_with_that_is_no_tensor_is_named():
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks(3))}).eval()
    with pytest.raises(TypeError, match="is called with dict, expected x, a tensor, as first argument"):
        search(model, lambda model: model["layers"][0]({"x": BATCHES[0]}), kept=2, layers="layers")
    with pytest.raises(TypeError, match=r"is called with only keywords \['x'\], expected x"):
        search(model, lambda model: model["layers"][0](x=BATCHES[0]), kept=2, layers="layers")


@pytest.mark.parametrize("what", ["layers", "model", "stack"])
def test_nothing_is_compiled_anew_for_each_subset(what):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if what == "stack":
        torch.manual_seed(0)
        model, name = TransformerStack(4, 4, 2, 8, dropout=0.0), ""
        model.compile(backend=backend)
        compiled = model._compiled
    else:
        model, name = Model(LISTS["ModuleList"](4)), "layers"
        for module in model.layers if what == "layers" else [model]:
            module.compile(backend=backend)
        compiled = [module._compiled_call_impl for module in model.modules()]
    inputs = [x[None] if what == "stack" else x for x in BATCHES]
    found = search(
        model, lambda model: sum(model.eval()(x).square().mean().item() for x in inputs), kept=2, layers=name
    )
    assert len(found.ranked) == 6
    assert not graphs
    if what == "stack":
        assert model._compiled is compiled is not None
    else:
        assert [module._compiled_call_impl for module in model.modules()] == compiled


@pytest.mark.parametrize("what", ["the model", "what holds the list", "a stack", "a layer"])
def test_what_torch_compile_wraps_runs_uncompiled(what):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, name = Model(LISTS["stack" if what == "a stack" else "ModuleList"](4)).eval(), "layers"
    expected = {row.keep[0]: row.value for row in search(model, evaluate, kept=1, layers=name).ranked}
    if what == "the model":
        compiled = [torch.compile(model, backend=backend)] * 2
        pairs = [(compiled[0], "layers"), (compiled[1], "_orig_mod.layers")]
    elif what == "what holds the list":
        pairs = [(nn.Sequential(torch.compile(model, backend=backend)), "0.layers")]
    elif what == "a stack":
        pairs = [(torch.compile(model, backend=backend), None)]
    else:
        model.layers[2] = torch.compile(model.layers[2], backend=backend)
        pairs = [(model, "layers")]
    for outer, name in pairs:
        found = search(outer, evaluate, kept=1, layers=name)
        assert {row.keep[0]: row.value for row in found.ranked} == pytest.approx(expected)
        assert not graphs
        assert torch.equal(outer(BATCHES[0]), model(BATCHES[0]))
        assert graphs
        graphs.clear()
        torch._dynamo.reset()


@pytest.mark.parametrize("called", [True, False])
def test_a_sequential_shares_prefixes_too(called):
    class Of(Model):
        def forward(self, x):
            x = self.first(x)
            if called:
                return self.last(self.layers(x))
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    model = Of(nn.Sequential(*blocks(5)))
    found = search(model, evaluate, kept=3, layers="layers")
    assert (found.layers_run, found.layers_asked) == (19, 30)
    for row in found.ranked:
        assert row.value == pytest.approx(evaluate(extract(model, {"layers": row.keep})), rel=1e-6)


def test_a_stack_with_a_cache_is_refused():
    torch.manual_seed(0)
    stack = TransformerStack(3, 8, 2, 16, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="the TransformerStack is called with a cache, expected none"):
        search(stack, lambda stack: stack(x, cache=KVCache(8)).mean().item(), kept=2)


def test_an_evaluation_that_fails_leaves_nothing_known():
    model, calls = Model(LISTS["ModuleList"](4)), []

    def failing_once(model):
        calls.append(1)
        value = model.eval()(BATCHES[0]).mean().item()
        if len(calls) == 1:
            raise KeyboardInterrupt
        return value + evaluate(model)

    prefixes = SharedPrefixes(model, "layers", failing_once, 1 << 20)
    with pytest.raises(KeyboardInterrupt):
        prefixes((0, 1))
    for keep in combinations(range(4), 2):
        small = extract(model, {"layers": keep})
        assert prefixes(keep) == pytest.approx(small.eval()(BATCHES[0]).mean().item() + evaluate(small), rel=1e-5)


def test_small_scores_are_checked_too():
    with pytest.raises(ValueError, match="with every layer run"):
        search(Loop(summing_numbers), lambda model: 1e-9 * evaluate(model), kept=4, layers="layers")
