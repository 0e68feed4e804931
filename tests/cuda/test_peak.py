"""The peak of a call, by the allocator's count."""

import pytest
import torch

from layerdrop_fast.recipes.bench.allocations import peak_of

MIB = 2**20


@pytest.mark.cuda
def test_the_peak_counts_what_the_call_holds_and_not_what_was_there():
    gpu = torch.device("cuda")

    def bytes_of(mib):
        return torch.empty(mib * MIB, dtype=torch.uint8, device=gpu)

    def call():
        first = bytes_of(3)
        del first
        return bytes_of(2)

    held = bytes_of(5)
    released = bytes_of(9)
    del released
    assert peak_of(call, gpu) == 3 * MIB
    del held
