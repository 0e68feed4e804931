import pytest
import torch

from layerdrop_fast.triton.row_work import RowWork
from layerdrop_fast.triton.timing import Device, Disagreement, check_agreement, distance, spread


def test_results_that_differ_are_refused():
    ones = torch.ones(3, 4)
    assert distance(ones, ones) == 0
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.zeros(0), torch.zeros(0)) == 0
    check_agreement("equal", [ones], [ones])
    for wrong in (ones + 1e-4, ones * torch.nan, ones * torch.inf, ones[:2], ones.double(), torch.zeros(3, 4)):
        with pytest.raises(Disagreement, match="what, result 0: "):
            check_agreement("what", [wrong], [ones])
    with pytest.raises(Disagreement):
        check_agreement("what", [ones], [torch.zeros(3, 4)])
    one_row = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wrong = one_row.clone()
    wrong[7] = -wrong[7]
    with pytest.raises(Disagreement):
        check_agreement("one row of a thousand", [wrong], [one_row])


def test_ways_take_turns_and_a_replay_runs_again():
    device, calls = Device(), []
    replays = {name: device.capture(lambda name=name: calls.append(name)) for name in "abc"}
    begun = len(calls)
    seconds = device.in_turn(replays, 4)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(second > 0 for times in seconds.values() for second in times)
    if not device.is_gpu:  # a graph does not call
        assert "".join(calls[begun:]) == "bcacababcbca"


def test_spread():
    assert spread([3.0]) == {"median": 3.0, "quartile 1": 3.0, "quartile 3": 3.0}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "quartile 1": 1.5, "quartile 3": 4.5}


def test_work_grows_until_it_moves_enough():
    work = RowWork("scatter_residual_gather_norm", 4, 3, 64, torch.bfloat16, kept=2)
    bytes_of_x = 4 * 3 * 64 * 2
    assert work.moved() == 3 * bytes_of_x + 2 * 3 * 4
    assert work.grown(0) == work
    assert work.grown(work.moved() + 1).positions == 6
