import pytest
import torch

from layerdrop_fast.reference.dropout import dropout, keep_mask

ZERO_KEY, ZERO_SITE = torch.zeros(4, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)


def philox_in_integers(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers, written from the paper."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        low, high = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (low >> 32) ^ c1 ^ k0, low & 0xFFFFFFFF, (high >> 32) ^ c3 ^ k1, high & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_random123_known_answer_fixes_the_mask():
    """Key 0, site 0, block 0 is the vector 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    assert philox_in_integers([0, 0], [0, 0, 0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for keep_probability, expected in {
        0.4: [True, False, False, False],  # 0x66666666
        0.5: [True, False, False, False],
        0.7: [True, False, False, True],
        0.8: [True, False, True, True],
        0.9: [True, True, True, True],
    }.items():
        mask = keep_mask(torch.Size([1, 4]), None, 1 - keep_probability, ZERO_KEY, ZERO_SITE)
        assert mask[0].tolist() == expected


def test_threshold_is_exact():
    """The first element's u32 is 0x6627E8D5: kept by a threshold one above it, not by its own value."""
    for threshold, kept in ((0x6627E8D5, False), (0x6627E8D6, True)):
        mask = keep_mask(torch.Size([1, 1]), None, 1 - threshold / 2**32, ZERO_KEY, ZERO_SITE)
        assert mask.item() == kept


@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7), (3, 5, 2, 3)])
def test_element_numbers_are_those_of_the_full_tensor(shape):
    key, site, rows, p = [0x12345678, 0xFEDCBA98, 7, 0x80000001], 0xABCDEF, [0, 2**20, 2**31 - 1], 0.37
    per_sample = torch.Size(shape[1:]).numel()
    expected = []
    for row in rows:
        for inner in range(per_sample):
            element = row * per_sample + inner
            block = element // 4
            counter = [block & 0xFFFFFFFF, (block >> 32) << 24 | site, *key[2:]]
            expected.append(philox_in_integers(key[:2], counter)[element % 4] < round((1 - p) * 2**32))
    mask = keep_mask(
        torch.Size(shape),
        torch.tensor(rows, dtype=torch.int32),
        p,
        torch.tensor(key).to(torch.int32),
        torch.tensor(site, dtype=torch.int32),
    )
    assert mask.shape == shape
    assert mask.flatten().tolist() == expected


def test_exact_at_both_ends():
    shape = torch.Size([64, 1000])
    assert keep_mask(shape, None, 0.0, ZERO_KEY, ZERO_SITE).all()
    assert not keep_mask(shape, None, 1.0, ZERO_KEY, ZERO_SITE).any()


def test_keeps_the_stated_share_and_its_mean():
    values = torch.ones(250, 1000, dtype=torch.float64)
    dropped = dropout(values, None, 0.3, ZERO_KEY, ZERO_SITE)
    assert abs((dropped == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / values.numel()) ** 0.5
    assert (dropped[dropped != 0] == 1 / 0.7).all()


def test_sites_and_keys_differ():
    shape = torch.Size([4, 1000])
    mask = keep_mask(shape, None, 0.5, ZERO_KEY, ZERO_SITE)
    for lane in range(4):
        key = ZERO_KEY.clone()
        key[lane] = 1
        agreement = (keep_mask(shape, None, 0.5, key, ZERO_SITE) == mask).double().mean()
        assert 0.45 < agreement < 0.55
    site = torch.tensor(1, dtype=torch.int32)
    assert 0.45 < (keep_mask(shape, None, 0.5, ZERO_KEY, site) == mask).double().mean() < 0.55
