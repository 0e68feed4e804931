"""The distribution of plans.

Every test states its error rate: the probability, over the choice of the fixed seed, that a correct planner fails it.
A test that makes m comparisons bounds each by ``ERROR / m`` (Bonferroni). The normal approximation of counts holds: no
test expects fewer than a few hundred of anything it counts.
"""

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
import torch

from layerdrop_fast import _extension, draw_plan
from layerdrop_fast.reference import draw_plan as reference_module
from layerdrop_fast.reference.draw_plan import systematic_units

ERROR = 1e-6  # a test

# The plans are the same on both planners, bit for bit, so their statistics need to be seen once.
pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=f"C++ extension {_extension.missing}")

few_and_many = pytest.mark.parametrize("draws", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])


def bound(comparisons):
    """How many standard deviations none of so many counts exceeds, but for ERROR."""
    return NormalDist().inv_cdf(1 - ERROR / comparisons / 2)


def assert_mean(samples, expected, variance):
    """Columns of ``samples`` [N, ...] have mean ``expected`` and, draw by draw, at most ``variance``."""
    deviation = np.abs(samples.mean(axis=0) - expected)
    limit = bound(deviation.size) * np.sqrt(variance / len(samples))
    assert (deviation <= limit).all(), f"off by {np.max(deviation / np.maximum(limit, 1e-300)):.2f} of the limit"


def keeps(draws, rates, batch_size=None, sampling="bernoulli", seed=1, **keywords):
    """bool [draws, L, B] of consecutive steps."""
    rates = np.asarray(rates, dtype=np.float64)
    draw = _extension.planner.draw_keep
    stream = keywords.get("stream", 0)
    return np.stack([draw(rates, batch_size, seed, t, stream, sampling == "systematic", 0) for t in range(draws)])


RATES = np.array([0.05, 0.2, 0.35, 0.5, 0.5, 0.8, 0.9, 0.6])


@few_and_many
@pytest.mark.parametrize(("sampling", "batch_size"), [("bernoulli", None), ("bernoulli", 3), ("systematic", None),
                                                      ("systematic", 1), ("systematic", 3)])  # fmt: skip
def test_marginals(sampling, batch_size, draws):
    """Every unit is kept with its own probability, also by systematic sampling with unequal rates and at B = 1."""
    kept = keeps(draws, RATES, batch_size, sampling)
    density = (1 - RATES)[:, None]
    assert_mean(kept, np.broadcast_to(density, kept.shape[1:]), density * (1 - density))


@few_and_many
def test_bernoulli_decisions_are_independent(draws):
    """Products of centred decisions have mean 0 and variance 1, over layers, samples, steps, streams and seeds."""
    first = keeps(draws, RATES, 2)
    density = (1 - RATES)[:, None]
    standard = lambda kept: (kept - density) / np.sqrt(density * (1 - density))  # noqa: E731
    centred = standard(first)
    # Skewed decisions make heavy products: the smallest variance's fourth moment is 1/(0.05 * 0.95) - 3 = 18.
    units = centred.reshape(draws, -1)
    pairs = np.array(list(combinations(range(units.shape[1]), 2)))
    assert_mean(units[:, pairs[:, 0]] * units[:, pairs[:, 1]], 0, 1)  # layers and samples
    assert_mean(units[1:] * units[:-1], 0, 1)  # steps
    assert_mean(centred * standard(keeps(draws, RATES, 2, stream=1)), 0, 1)
    assert_mean(centred * standard(keeps(draws, RATES, 2, stream=1 << 32)), 0, 1)  # another rank
    assert_mean(centred * standard(keeps(draws, RATES, 2, seed=2)), 0, 1)


@few_and_many
@pytest.mark.parametrize("batch_size", [None, 5])
def test_systematic_draws_are_independent_of_each_other(batch_size, draws):
    """Steps and streams; at sample granularity layers too, so that no sample is dropped from all layers at once."""
    first = keeps(draws, RATES, batch_size, "systematic")
    density = (1 - RATES)[:, None]
    standard = lambda kept: (kept - density) / np.sqrt(density * (1 - density))  # noqa: E731
    centred = standard(first)
    assert_mean(centred[1:] * centred[:-1], 0, 1)
    assert_mean(centred * standard(keeps(draws, RATES, batch_size, "systematic", stream=1)), 0, 1)
    if batch_size is not None:
        pairs = np.array(list(combinations(range(len(RATES)), 2)))
        assert_mean(centred[:, pairs[:, 0]] * centred[:, pairs[:, 1]], 0, 1)


@few_and_many
def test_layers_draw_their_starts_and_permutations_apart(draws):
    """With one start for all layers their counts would rise and fall together; with one permutation, samples that are
    rarely kept together in one layer would rarely be in any."""
    batch_size, rates = 5, np.array([0.05, 0.35, 0.5, 0.5, 0.9])
    kept = keeps(draws, rates, batch_size, "systematic")
    layers = np.array(list(combinations(range(len(rates)), 2)))
    expected = (1 - rates) * batch_size
    share = expected % 1  # of draws in which a layer keeps one more

    counts = (kept.sum(axis=2) - expected) / np.sqrt(share * (1 - share))
    assert_mean(counts[:, layers[:, 0]] * counts[:, layers[:, 1]], 0, 1)

    pairs_of = [
        (1 - s) * math.comb(int(e), 2) + s * math.comb(int(e) + 1, 2) for e, s in zip(expected, share, strict=True)
    ]
    inclusion = np.array(pairs_of) / math.comb(batch_size, 2)
    for a, b in ((0, 1), (1, 2), (0, 4)):
        together = (kept[:, :, a] & kept[:, :, b]) - inclusion
        varied = layers[inclusion[layers].min(axis=1) > 0]
        variance = (inclusion * (1 - inclusion))[varied].prod(axis=1)
        assert_mean(together[:, varied[:, 0]] * together[:, varied[:, 1]], 0, variance)


@few_and_many
def test_a_samples_depth_is_binomial(draws):
    """With systematic sampling over samples, the number of layers that a sample passes is binomial: layers draw their
    permutations apart. Mean and variance of the squared deviation, error rate as above."""
    layers, rho, batch_size = 12, 0.75, 4
    kept = keeps(draws, [1 - rho] * layers, batch_size, "systematic")
    depth = kept.sum(axis=1)  # [N, B]
    variance = layers * rho * (1 - rho)
    fourth = variance * (1 + 3 * (layers - 2) * rho * (1 - rho))  # fourth central moment of a binomial
    assert_mean(depth, layers * rho, variance)
    assert_mean((depth - layers * rho) ** 2, variance, fourth - variance**2)


@few_and_many
def test_systematic_counts_take_at_most_two_values(draws):
    over_layers = keeps(draws, RATES, None, "systematic").sum(axis=(1, 2))
    expected = (1 - RATES).sum()
    assert set(np.unique(over_layers)) == {math.floor(expected), math.ceil(expected)}
    over_samples = keeps(draws, RATES, 5, "systematic").sum(axis=2)
    for layer, rate in enumerate(RATES):
        expected = round((1 - rate) * 5, 9)
        assert set(np.unique(over_samples[:, layer])) <= {math.floor(expected), math.ceil(expected)}


@few_and_many
@pytest.mark.parametrize("batch_size", [None, 6])
def test_units_of_equal_rate_are_exchangeable(batch_size, draws):
    """Every pair is kept together equally often, and by the known rate; neighbours are no exception."""
    units, rho = 6, 0.4  # 2.4 kept: 2 with probability 0.6, 3 with 0.4
    rates = [1 - rho] * (units if batch_size is None else 1)
    kept = keeps(draws, rates, batch_size, "systematic").reshape(draws, units)
    pairs = np.array(list(combinations(range(units), 2)))
    together = kept[:, pairs[:, 0]] & kept[:, pairs[:, 1]]
    inclusion = (0.6 * math.comb(2, 2) + 0.4 * math.comb(3, 2)) / math.comb(units, 2)
    assert_mean(together, inclusion, inclusion * (1 - inclusion))
    assert together.any(axis=0).all()


def test_pairs_of_unequal_rates_are_kept_together():
    """Wherever two units are kept, every pair can be: pair inclusion is above 0 for each."""
    kept = keeps(20_000, RATES, None, "systematic")[:, :, 0]
    together = kept.T.astype(int) @ kept
    assert together.min() > 0


def test_systematic_marginals_are_exact(monkeypatch):
    """For a given order, a unit is kept for exactly t of the 2**32 starts: those in the arc [begin, begin + t).

    Seen at both ends of every arc and at random starts; no statistics.
    """
    rng = np.random.default_rng(3)
    for _ in range(50):
        units = int(rng.integers(1, 9))
        thresholds = torch.from_numpy(rng.integers(0, 2**32, units, endpoint=True))
        thresholds[rng.random(units) < 0.2] = 2**32
        order = torch.from_numpy(rng.permutation(units))
        begins = torch.empty_like(thresholds)
        begins[order] = thresholds[order].cumsum(0) - thresholds[order]
        ends = begins + thresholds
        starts = torch.cat([begins, begins - 1, ends, ends - 1, torch.from_numpy(rng.integers(0, 2**32, 20))]) % 2**32

        sort_keys = torch.argsort(order)[None]
        for start in starts:
            bits = {reference_module.SITE_PERMUTATION: sort_keys, reference_module.SITE_START: start.view(1, 1)}
            monkeypatch.setattr(reference_module, "unit_bits", lambda _key, site, _shape, bits=bits: bits[site])
            keep, _ = systematic_units(torch.zeros(4), thresholds[None])
            assert torch.equal(keep[0], (start - begins) % 2**32 < thresholds)


@few_and_many
def test_min_kept_raises_the_expected_number_by_what_the_docs_say(draws):
    """E[kept] grows by E[max(0, m - K)]; for m = 1 by the probability that everything is dropped."""
    rates = np.array([0.6, 0.7, 0.8])
    kept = [len(draw_plan(rates, seed=4, step=step, min_kept=1).layers) for step in range(draws)]
    assert min(kept) == 1
    assert_mean(np.array(kept)[:, None], (1 - rates).sum() + rates.prod(), (rates * (1 - rates)).sum())
