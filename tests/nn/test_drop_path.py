"""DropPath and StochasticDepth by the peers' published rules, and stacks that take their place."""

import math

import pytest
import torch
from torch import nn

from layerdrop_fast import DropPath, LayerDropStack, StochasticDepth, drop_path, stochastic_depth
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.recipes.bench.peers import Masked
from tests.nn.residual import X

SHAPES = [(1,), (7, 3), (1, 5, 2), (63, 1, 4), (0, 3)]


class Residual(nn.Module):
    """x -> x + drop(f(x)), with any modules behind the branch."""

    def __init__(self, *drops):
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=torch.float64)
        self.drops = nn.Sequential(*drops)

    def forward(self, x):
        return x + self.drops(torch.tanh(self.linear(x)))


def foreign(name, **attributes):
    """A module as another library defines it."""

    def __init__(self):
        nn.Module.__init__(self)
        self.__dict__.update(attributes)

    return type(name, (nn.Module,), {"__init__": __init__, "forward": lambda self, x: x * math.nan})()


def stack_of(*drops, schedule="from_layers", granularity="sample", **keywords):
    """One layer for each tuple of modules."""
    torch.manual_seed(0)
    layers = [Residual(*each) for each in drops]
    return LayerDropStack(layers, schedule, granularity=granularity, seed=3, **keywords)


def same_numbers(ours, peer, x):
    torch.manual_seed(5)
    got = ours(x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = peer(x)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_the_same_seed_drops_what_the_peers_drop(p, dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    for mode in ("row", "batch"):
        same_numbers(StochasticDepth(p, mode), Masked(p, mode), x)
        same_numbers(lambda x, mode=mode: stochastic_depth(x, p, mode), Masked(p, mode), x)
    for scale in (True, False):
        same_numbers(DropPath(p, scale), Masked(p, "row", scale), x)
        same_numbers(lambda x, scale=scale: drop_path(x, p, True, scale), Masked(p, "row", scale), x)


def test_whole_samples_are_dropped_at_their_rate():
    x = torch.ones(4000, 3, 2)
    out = DropPath(0.3)(x)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, kept[:, None, None] / 0.7 * x)
    # Five standard errors.
    assert abs(kept.double().mean() - 0.7) < 5 * (0.21 / 4000) ** 0.5
    batches = torch.stack([StochasticDepth(0.3, "batch")(x[:2]) for _ in range(4000)])
    assert torch.equal(batches[:, :1].expand_as(batches), batches)
    assert abs((batches[:, 0, 0, 0] > 0).double().mean() - 0.7) < 5 * (0.21 / 4000) ** 0.5


def test_nothing_is_drawn_where_nothing_is_dropped():
    state = torch.get_rng_state()
    for module in (
        DropPath(0.5).eval(),
        StochasticDepth(0.5, "row").eval(),
        DropPath(0.0),
        StochasticDepth(0, "batch"),
    ):
        assert module(X) is X
    assert drop_path(X, 0.5) is X
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("module", [DropPath(0.4), DropPath(0.4, False), StochasticDepth(0.4, "batch"), DropPath(1.0)])
def test_gradients(module):
    def seeded(x):
        torch.manual_seed(2)
        return module(x)

    assert torch.autograd.gradcheck(seeded, (X[:3].clone().requires_grad_(),))


@pytest.mark.parametrize(("module", "numbers"), [(DropPath(0.4), 4), (StochasticDepth(0.4, "batch"), 1)])
def test_saved_are_one_number_a_sample(module, numbers):
    assert saved_bytes(module, X.clone().requires_grad_()) == 8 * numbers


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DropPath(1.5), ValueError, r"drop_prob must lie in \[0, 1\], got 1.5"),
        (lambda: drop_path(X, -0.1), ValueError, r"drop_prob must lie in \[0, 1\], got -0.1"),
        (lambda: StochasticDepth(math.nan, "row"), ValueError, r"p must lie in \[0, 1\], got nan"),
        (lambda: StochasticDepth("a", "row"), TypeError, "p must be a single number, got 'a'|p must be a number"),
        (lambda: StochasticDepth(0.1, "rows"), ValueError, r"mode is 'rows', expected one of \('batch', 'row'\)"),
        (lambda: stochastic_depth(X, 0.1, "x", False), ValueError, r"mode is 'x', expected one of"),
    ],
)
def test_errors_name_both_sides(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_reprs_say_the_rate():
    assert repr(DropPath(0.25)) == "DropPath(drop_prob=0.250)"
    assert repr(StochasticDepth(0.25, "row")) == "StochasticDepth(p=0.25, mode='row')"


def test_a_stack_takes_the_rates_and_leaves_identities():
    shared = DropPath(0.3)
    model = stack_of(
        (DropPath(0.1), nn.Tanh(), DropPath(0.1)),
        (),
        (nn.Identity(),),
        (foreign("DropPath", drop_prob=0.2),),
        (foreign("StochasticDepth", p=0.4, mode="row"),),
        (foreign("SwinDropPath", drop_prob=0.5),),
        (foreign("DropPath", drop_prob=None),),
        (shared, shared),
        (nn.Sequential(shared),),
        (DropPath(1.0),),
    )
    assert model.schedule(0).tolist() == [0.1, 0, 0, 0.2, 0.4, 0.5, 0, 0.3, 0.3, 1]
    assert model.scale == "inverse"
    kinds = {type(module) for layer in model.layers for module in layer.drops.modules()}
    assert kinds == {nn.Identity, nn.Sequential, nn.Tanh}
    assert [len(layer.drops) for layer in model.layers] == [3, 0, 1, 1, 1, 1, 1, 2, 1, 1]
    assert not model(X).isnan().any()


def test_a_layer_may_itself_be_one():
    model = LayerDropStack([DropPath(0.3), nn.Tanh()], "from_layers", granularity="sample")
    assert [type(layer) for layer in model.layers] == [nn.Identity, nn.Tanh]
    assert model.schedule(0).tolist() == [0.3, 0]


def test_layers_that_share_a_part_or_are_the_same():
    part = nn.Sequential(DropPath(0.3))
    layers = [Residual(part), Residual(part), Residual(DropPath(0.2))]
    model = LayerDropStack([*layers, layers[2]], "from_layers", granularity="sample")
    assert model.schedule(0).tolist() == [0.3, 0.3, 0.2, 0.2]
    assert not [module for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize(
    ("drops", "keywords", "scale"),
    [
        ([(DropPath(0.3),), (DropPath(0.2),)], {}, "inverse"),
        ([(DropPath(0.3, False),), (DropPath(0.2, False),)], {}, "none"),
        # At rate 0 there is nothing to scale.
        ([(DropPath(0.3, False),), (DropPath(0.0, True),)], {}, "none"),
        ([(StochasticDepth(0.3, "batch"),), (StochasticDepth(0.0, "row"),)], dict(granularity="batch"), "inverse"),
        ([(DropPath(0.0),)], dict(granularity="batch"), "inverse"),
        ([(DropPath(0.3),), (DropPath(0.2, False),)], dict(scale="realized"), "realized"),
        ([(DropPath(0.3),)], dict(scale="none"), "none"),
        ([()], dict(schedule=0.3), "none"),
    ],
)
def test_the_scale_is_what_the_modules_did(drops, keywords, scale):
    assert stack_of(*drops, **keywords).scale == scale


@pytest.mark.parametrize(
    ("drops", "keywords", "message"),
    [
        (
            [(DropPath(0.3),), (DropPath(0.1), DropPath(0.2))],
            {},
            r"layer 1 holds drop rates \[0.1, 0.2\], expected one",
        ),
        ([(DropPath(0.3), DropPath(0.0))], {}, r"layer 0 holds drop rates \[0.3, 0.0\], expected one"),
        ([(DropPath(0.3),), (nn.Tanh(),)], dict(granularity="batch"), "is 'batch', but layer 0's DropPath.*'sample'"),
        (
            [(), (DropPath(0.3), StochasticDepth(0.3, "batch"))],
            {},
            "is 'sample', but layer 1's StochasticDepth of mode 'batch' decides for each batch, expected 'batch'",
        ),
        ([(DropPath(0.3),), (DropPath(0.3, False),)], {}, "scale_by_keep=True and some False, expected one"),
        ([(DropPath(0.1),), (foreign("DropPath", drop_prob=2.0),)], {}, r"layer 1: drop_prob must lie in .*got 2.0"),
        (
            [(DropPath(0.0),), (DropPath(0.3),)],
            dict(schedule=0.1),
            "layer 1's DropPath with rate 0.3: expected schedule",
        ),
        ([(DropPath(0.3),)], dict(schedule="layers"), r"schedule is 'layers', expected one of \('from_layers',\)"),
    ],
)
def test_what_a_stack_cannot_take_stays_as_it_is(drops, keywords, message):
    layers = [Residual(*each) for each in drops]
    before = [list(layer.modules()) for layer in layers]
    keywords = dict(schedule="from_layers", granularity="sample") | keywords
    with pytest.raises(ValueError, match=message):
        LayerDropStack(layers, **keywords)
    assert [list(layer.modules()) for layer in layers] == before


def test_no_rates_to_take():
    with pytest.raises(ValueError, match="none of the 2 layers holds a DropPath or StochasticDepth, expected at least"):
        stack_of((), (nn.Identity(),))


def test_rates_of_zero_may_stay_beside_a_schedule():
    assert stack_of((DropPath(0.0),), schedule=0.5).schedule(0).tolist() == [0.5]


def test_skipping_has_the_mean_and_variance_of_masking():
    """Two layers' output over many plans and masks; both draw samples independently, so both moments agree."""
    rates, draws = (0.3, 0.6), 3000
    masked = nn.Sequential(*(Residual(DropPath(p)) for p in rates))
    skipping = stack_of(*((DropPath(p),) for p in rates))
    skipping.load_state_dict({f"layers.{name}": weight for name, weight in masked.state_dict().items()})
    x = X[:1, :1].expand(50, 1, 8)
    with torch.no_grad():
        outs = [torch.cat([model(x)[:, 0] for _ in range(draws // 50)]) for model in (masked, skipping)]
    error = ((outs[0].var(0) + outs[1].var(0)) / draws).sqrt()
    assert ((outs[0].mean(0) - outs[1].mean(0)).abs() < 5 * error).all()
    squares = [(out - outs[0].mean(0)).square() for out in outs]
    error = ((squares[0].var(0) + squares[1].var(0)) / draws).sqrt()
    assert ((squares[0].mean(0) - squares[1].mean(0)).abs() < 5 * error).all()
    assert (outs[0].var(0) > 0.01).all()
