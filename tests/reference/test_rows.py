import torch

from layerdrop_fast.reference.rows import put, take


def rows_of(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def test_take_and_put_against_a_loop():
    x = torch.arange(20.0).view(5, 2, 2)
    for rows in ([0, 2, 3], [4], [], [1, -1, 3, -1], [-1, -1, -1, -1, -1]):
        taken, replaced = torch.zeros(len(rows), 2, 2), x.clone()
        values = -1 - torch.arange(4.0 * len(rows)).view(-1, 2, 2)
        for k, row in enumerate(rows):
            if row >= 0:
                taken[k] = x[row]
                replaced[row] = values[k]
        assert torch.equal(take(x, rows_of(*rows)), taken)
        assert torch.equal(put(x, rows_of(*rows), values), replaced)


def test_all_rows():
    x, values = torch.zeros(3, 2), torch.ones(3, 2)
    assert take(x, None) is x
    assert put(x, None, values) is values
