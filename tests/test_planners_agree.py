"""The two host planners, C++ and Python, agree bit for bit; so do the ops on every key."""

import random

import numpy as np
import pytest
import torch

from layerdrop_fast import _extension, ops
from layerdrop_fast.reference import planner as reference
from layerdrop_fast.reference.draw_plan import draw_plan as reference_draw_plan
from layerdrop_fast.reference.philox import random_bits
from layerdrop_fast.reference.philox import step_key as reference_step_key

pytestmark = pytest.mark.skipif(_extension.missing is not None, reason=f"C++ extension {_extension.missing}")
compiled = _extension.planner


def random_request(rng):
    """Arguments of draw_keep, extremes included."""
    num_layers = rng.choice([0, 1, 2, 3, 4, 7, 40, 63, rng.randint(1, 200)])
    batch_size = rng.choice([None, None, 1, 2, 5, 16, rng.randint(1, 140)])
    extremes = [0.0, 1.0, 0.5, 2.0**-32, 2.0**-33, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 5e-324]
    rates = [rng.choice(extremes) if rng.random() < 0.3 else rng.random() for _ in range(num_layers)]
    words = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    counters = [rng.choice(words) if rng.random() < 0.5 else rng.getrandbits(64) for _ in range(3)]
    units = num_layers if batch_size is None else batch_size
    min_kept = rng.choice([0, 0, min(1, units), units, rng.randint(0, units)])
    return np.array(rates), batch_size, *counters, rng.random() < 0.5, min_kept


def test_both_planners_draw_the_same_bits():
    rng = random.Random(20190925)
    for _ in range(10_000):
        request = random_request(rng)
        keep, expected = compiled.draw_keep(*request), reference.draw_keep(*request)
        assert keep.dtype == expected.dtype == np.bool_
        assert np.array_equal(keep, expected), request


def test_both_planners_compact_alike():
    rng = np.random.default_rng(0)
    for shape in [(1, 1), (3, 1), (1, 7), (5, 64), (40, 33)]:
        for density in (0.0, 0.5, 1.0):
            keep = rng.random(shape) < density
            assert compiled.kept_layers(keep) == reference.kept_layers(keep)
            for ours, theirs in zip(compiled.compact_rows(keep), reference.compact_rows(keep), strict=True):
                assert ours.dtype == theirs.dtype
                assert np.array_equal(ours, theirs)
            assert np.array_equal(compiled.compact_slot(keep), reference.compact_slot(keep))


@pytest.fixture
def widest_instruction_set_afterwards():
    yield
    compiled.use_instruction_set(compiled.instruction_sets()[0])


@pytest.mark.usefixtures("widest_instruction_set_afterwards")
@pytest.mark.parametrize("instruction_set", compiled.instruction_sets() if _extension.missing is None else [])
def test_every_instruction_set_draws_the_same_words(instruction_set):
    """Wide and plain paths against the reference, at both ends of the 40-bit block numbers."""
    compiled.use_instruction_set(instruction_set)
    key = torch.tensor([1, -2, 3, -4], dtype=torch.int32)
    for site in (0, 1, 300, 2**24 - 1):
        for first_block in (0, 5, 2**32 - 9, 2**40 - 24):
            words = compiled.fill_blocks([w % 2**32 for w in key.tolist()], site, first_block, 3)
            elements = 4 * first_block + torch.arange(96)
            expected = random_bits(key, torch.tensor(site, dtype=torch.int32), elements)
            assert words.tolist() == expected.tolist()


def test_large_draws_agree_across_the_chunks_of_the_fast_path():
    rates = np.linspace(0, 1, 37)
    for batch_size in (None, 1, 1023, 4096):
        for systematic in (False, True):
            request = (rates, batch_size, 2**64 - 1, 3, 4, systematic, 1)
            assert np.array_equal(compiled.draw_keep(*request), reference.draw_keep(*request))


def test_the_cpu_ops_are_the_compiled_ones_and_agree():
    rng = random.Random(5)
    for op in ("draw_plan", "step_key"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"layerdrop_fast::{op}", "CPU")
    for _ in range(300):
        rates, batch_size, *counters, systematic, min_kept = random_request(rng)
        words = torch.tensor([word - 2**64 if word >> 63 else word for word in counters])
        assert torch.equal(ops.step_key(words), reference_step_key(words))
        rates = torch.from_numpy(np.repeat(rates, 2))[::2]  # a view with gaps
        sampling = "systematic" if systematic else "bernoulli"
        ours = ops.draw_plan(words, rates, batch_size, sampling=sampling, min_kept=min_kept)
        for got, expected in zip(
            ours, reference_draw_plan(words, rates, batch_size, systematic, min_kept), strict=True
        ):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
