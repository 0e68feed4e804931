"""Fingerprints: equal where tensors are, and otherwise not."""

import pytest
import torch
from torch import nn

from layerdrop_fast.prune.fingerprints import fingerprint, of_weights
from tests.prune.blocks import blocks
from tests.prune.test_search import Model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int64, torch.cfloat])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (7, 0)])
def test_fingerprints_are_of_shape_type_and_every_element(dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x) != fingerprint(x[None])
    assert fingerprint(x) != fingerprint(x.to(torch.complex128))
    for place in range(x.numel()):
        other = x.clone()
        other.view(-1)[place] = ~other.view(-1)[place] if dtype is torch.bool else other.view(-1)[place] + 1
        assert fingerprint(x) != fingerprint(other)


def test_fingerprints_know_signs_order_and_where_a_tensor_begins():
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)).double()
    assert fingerprint(x) != fingerprint(-x)
    assert fingerprint(x) != fingerprint(x.flip(0))
    assert fingerprint(x) != fingerprint(torch.cat([x[1 << 17 :], x[: 1 << 17]]))
    last = x.clone()
    last[-1] += 1
    assert fingerprint(x) != fingerprint(last)
    small = torch.arange(9, dtype=torch.uint8)
    assert fingerprint(small[1:]) == fingerprint(small[1:].clone())
    assert fingerprint(small.view(3, 3).t()) == fingerprint(small.view(3, 3).t().contiguous())


def test_fingerprints_of_a_tensor_that_was_written_to_are_not_known_any_more():
    x, seen = torch.zeros(3), {}
    first = fingerprint(x, seen)
    assert fingerprint(x, seen) == first
    x += 1
    assert fingerprint(x, seen) == fingerprint(torch.ones(3)) != first


def test_fingerprints_of_weights():
    first, again, other = (Model(nn.ModuleList(blocks(2, seed))) for seed in (0, 0, 1))
    again.load_state_dict(first.state_dict())
    assert of_weights(first) == of_weights(again) != of_weights(other)
    again.last.weight.data[0, -1] += 1e-3
    assert of_weights(first) != of_weights(again)


def test_fingerprints_of_distributed_tensors_are_of_this_ranks_part():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        first, other = nn.Linear(3, 2), nn.Linear(3, 2)
        for model in (first, other):
            torch.distributed.tensor.distribute_module(model, mesh)
        assert of_weights(first) == of_weights(first) != of_weights(other)
        assert fingerprint(first.weight) == fingerprint(first.weight.clone()) != fingerprint(other.weight)
    finally:
        torch.distributed.destroy_process_group()
