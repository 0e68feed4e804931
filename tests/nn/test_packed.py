"""Packed sequences: the results, gradients and masks of the padded batch, without its padding."""

from functools import partial

import pytest
import torch

from layerdrop_fast import KVCache, set_step
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.nn.packed import Packed
from tests.nn.transformer import WIDTH, assert_same, results, stack, tensor

LENGTHS = (3, 7, 1, 4)
ENDS = [0, 3, 10, 11, 15]
PADDED = tensor(4, 9, WIDTH)  # two more than the longest
VALID = torch.arange(9) < torch.tensor(LENGTHS)[:, None]

KINDS = {
    "plain": {},
    "dropout": {"dropout": 0.3, "activation_dropout": 0.2},
    "post-norm": {"norm_first": False, "dropout": 0.3},
    "rotary, grouped heads": {"rope_theta": 30.0, "num_kv_heads": 1, "recompute": "qkv"},
    "branches": {"target": "branch", "dropout": 0.3},
    "bounded": {"max_kept": 1, "dropout": 0.3},
}


def packed(model, x, **keywords):
    return model(x[VALID][None], cu_seqlens=torch.tensor(ENDS), max_seqlen=9, **keywords)[0]


def padded(model, x, **keywords):
    return model(x, key_padding_mask=~VALID, **keywords)[VALID]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_padded_batch(kind, granularity, is_causal):
    model, x = stack(granularity=granularity, **KINDS[kind]), PADDED.clone().requires_grad_()
    for step in range(3):
        found = []
        for function in (packed, padded):
            set_step(model, step)
            found.append(results(partial(function, model, is_causal=is_causal), model, x))
        assert_same(*found)


def test_evaluation_and_hidden_states():
    model = stack(granularity="sample", hidden_states=True)
    for mode in (True, False):
        set_step(model.train(mode), 0)
        out, states = model(PADDED[VALID][None], cu_seqlens=ENDS, max_seqlen=9)
        set_step(model, 0)
        _, expected = model(PADDED, key_padding_mask=~VALID)
        for ours, wanted in zip([out, *states], [expected[-1], *expected], strict=True):
            torch.testing.assert_close(ours[0], wanted[VALID])


def test_without_padding_there_is_nothing_to_pay_for_it():
    """Of the padded batch's 36 places 15 are tokens; attention holds its output twice, in sequences and joined."""
    model = stack(granularity="batch", schedule=0.0, dropout=0.1)
    full, kept = (saved_bytes(partial(f, model), PADDED.clone().requires_grad_()) for f in (padded, packed))
    units = 6 + 20 / WIDTH  # a hidden layer of 20
    assert full > 4 * 36 * units * WIDTH * 8
    assert kept < 4 * 15 * (units + 1) * WIDTH * 8 * 1.15


def test_empty_sequences_and_positions():
    packed = Packed([0, 0, 2, 2, 5], 5, 4)
    assert packed.positions(torch.device("cpu")).tolist() == [0, 1, 0, 1, 2]
    assert [array.tolist() for array in packed.tokens_of([1, 3])] == [[0, 1, 2, 3, 4], [4, 5, 12, 13, 14]]
    assert [array.tolist() for array in packed.tokens_of([0, 2])] == [[], []]
    model = stack(granularity="sample", dropout=0.2)
    x = tensor(1, 5, WIDTH)
    first = model(x, cu_seqlens=[0, 0, 2, 2, 5], max_seqlen=4)
    set_step(model, 0)
    assert torch.equal(model(x, cu_seqlens=[0, 0, 2, 2, 5], max_seqlen=4), first)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_positions_of_packed_tokens(granularity):
    model = stack(granularity=granularity, rope_theta=10.0)
    positions = torch.arange(9) * torch.tensor([[1], [3], [2], [5]])
    for given in (positions[VALID], positions[VALID][None]):
        set_step(model, 0)
        ours = packed(model, PADDED, position_ids=given)
        set_step(model, 0)
        torch.testing.assert_close(ours, padded(model, PADDED, position_ids=positions))


def test_what_packed_rows_exclude():
    model = stack()
    with pytest.raises(ValueError, match=r"got x \[1, 15, 12\] and \['key_padding_mask'\], expected x \[1, N, D\]"):
        model(PADDED[VALID][None], cu_seqlens=ENDS, key_padding_mask=torch.zeros(1, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"and \['cache'\], expected x \[1, N, D\]"):
        model.eval()(PADDED[VALID][None], cu_seqlens=ENDS, cache=KVCache(15))
    with pytest.raises(ValueError, match="cu_seqlens: got a tensor on meta, expected one on the host"):
        Packed(torch.tensor(ENDS, device="meta"), 15, None)


def test_attention_dropout_of_packed_rows_and_places_beyond_32_bits():
    model, without = stack(schedule=0.0, attention_dropout=0.5), stack(schedule=0.0)
    found = [packed(m.train(mode), PADDED) for m in (model, without) for mode in (True, False)]
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    with pytest.raises(ValueError, match=r"2 sequences of 1073741824: expected less than 2\^31 places"):
        Packed([0, 1 << 30, 1 << 30], 1 << 30, None)
