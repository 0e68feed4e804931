"""LayerDropModuleList against fairseq's rule, restated from its documented behaviour."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from layerdrop_fast import LayerDropModuleList


class AddIndex(nn.Module):
    """x -> x + weight, so that a sum tells which layers ran."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.tensor(2.0**index))

    def forward(self, x, offset=0.0):
        return x + self.weight + offset


class AddIndexTuple(AddIndex):
    def forward(self, x, offset=0.0):
        return super().forward(x, offset), "attention", None


def layers(count, kind=AddIndex):
    return [kind(index) for index in range(count)]


def fairseq_keeps(count, p, training=True):
    """One uniform vector an iteration, in evaluation too; a float32 tensor compared with a Python number."""
    uniform = torch.empty(count).uniform_()
    return [index for index in range(count) if not training or uniform[index] > p]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_the_same_seed_keeps_the_layers_that_fairseq_keeps(p):
    ours = LayerDropModuleList(p, layers(24))
    for seed in range(50):
        torch.manual_seed(seed)
        kept = [[layer.index for layer in ours] for _ in range(3)]
        torch.manual_seed(seed)
        assert kept == [fairseq_keeps(24, p) for _ in range(3)]


def test_a_number_equal_to_p_in_float32_is_dropped(monkeypatch):
    """0.2 has no exact float32: compared as Python numbers, the float32 nearest to 0.2 would be above 0.2."""
    ours = LayerDropModuleList(0.2, layers(3))
    below, above = (torch.nextafter(torch.tensor(0.2), torch.tensor(end)) for end in (0.0, 1.0))
    draw = torch.stack([below, torch.tensor(0.2), above])
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor: tensor.copy_(draw))
    assert [layer.index for layer in ours] == fairseq_keeps(3, 0.2) == [2]


def test_evaluation_keeps_all_and_draws_as_many_numbers():
    ours = LayerDropModuleList(0.5, layers(7)).eval()
    torch.manual_seed(0)
    assert [layer.index for layer in ours] == list(range(7))
    ours_next = torch.rand(())
    torch.manual_seed(0)
    fairseq_keeps(7, 0.5, training=False)
    assert ours_next == torch.rand(())


def test_what_sees_every_layer_and_draws_nothing():
    modules = layers(6)
    ours = LayerDropModuleList(1.0, modules)
    state = torch.get_rng_state()
    assert list(ours) == []
    torch.set_rng_state(state)
    assert len(ours) == 6
    assert list(ours.children()) == modules
    assert [ours[index] for index in range(-1, 5)] == [modules[-1], *modules[:5]]
    assert list(ours.state_dict()) == [f"{index}.weight" for index in range(6)]
    assert repr(ours) == "LayerDropModuleList(p=1.0,\n  (0-5): 6 x AddIndex()\n)"
    assert modules[3] in ours
    assert nn.Identity() not in ours
    assert torch.equal(torch.get_rng_state(), state)


def test_slices_and_sums_keep_the_class_the_rate_and_every_layer():
    modules = layers(6)
    ours = LayerDropModuleList(1.0, modules)
    for part, expected in [
        (ours[1:4], modules[1:4]),
        (ours[::-2], modules[::-2]),
        (ours + ours[:1], [*modules, modules[0]]),
    ]:
        assert type(part) is LayerDropModuleList
        assert part.p == 1.0
        assert [part[index] for index in range(len(part))] == expected


def test_lists_that_drop_are_joined_whole():
    ours = LayerDropModuleList(1.0, layers(2))
    ours.extend(LayerDropModuleList(1.0, layers(3)))
    ours += LayerDropModuleList(1.0, layers(1))
    assert len(ours) == 6
    assert repr(LayerDropModuleList(0.5)) == "LayerDropModuleList(p=0.5)"


def test_the_list_can_be_edited():
    ours = LayerDropModuleList(0.5)
    for module in layers(4):
        ours.append(module)
    del ours[1]
    ours.insert(0, AddIndex(9))
    ours.extend(layers(1))
    ours[1] = AddIndex(7)
    assert ours.pop(2).index == 2
    assert [module.index for module in ours.eval()] == [9, 7, 3, 0]
    ours.p = 0.25
    assert ours.p == 0.25


def test_calling_runs_the_layers_of_one_iteration():
    ours = LayerDropModuleList(0.5, layers(12))
    for seed in range(20):
        torch.manual_seed(seed)
        out = ours(torch.zeros(2, 3))
        torch.manual_seed(seed)
        kept = fairseq_keeps(12, 0.5)
        assert torch.equal(out, torch.full((2, 3), float(sum(2**index for index in kept))))


def test_a_tuples_first_element_feeds_the_next_layer_and_arguments_repeat():
    ours = LayerDropModuleList(0.0, layers(3, AddIndexTuple))
    assert ours(torch.zeros(()), 10.0) == 7.0 + 30.0
    assert ours(torch.zeros(()), offset=100.0) == 7.0 + 300.0


def test_dropped_layers_get_no_gradient():
    ours = LayerDropModuleList(0.5, layers(12))
    torch.manual_seed(3)
    ours(torch.zeros(())).backward()
    torch.manual_seed(3)
    kept = fairseq_keeps(12, 0.5)
    assert [index for index in range(12) if ours[index].weight.grad is not None] == kept
    assert 0 < len(kept) < 12


def test_everything_dropped_is_the_identity():
    x = torch.randn(3, requires_grad=True)
    out = LayerDropModuleList(1.0, layers(4))(x)
    out.sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_drop_alike(copied):
    ours = LayerDropModuleList(0.3, layers(9))
    twin = copied(ours)
    torch.manual_seed(1)
    kept = [layer.index for layer in ours]
    torch.manual_seed(1)
    assert [layer.index for layer in twin] == kept
    assert twin[0].weight is not ours[0].weight


def test_saved_loaded_and_moved():
    ours = LayerDropModuleList(0.3, layers(3)).to(torch.float64)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    plain = nn.ModuleList(layers(3)).to(torch.float64)
    plain.load_state_dict(torch.load(file))  # a plain list's names
    ours.load_state_dict(plain.state_dict())
    assert ours[0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (1.5, ValueError, r"drop rate p must lie in \[0, 1\], got 1.5"),
        (float("nan"), ValueError, r"got nan"),
        ([AddIndex(0)], TypeError, r"drop rate p must be a number, got \[AddIndex\(\)\]"),
    ],
)
def test_errors_name_both_sides(p, error, message):
    with pytest.raises(error, match=message):
        LayerDropModuleList(p, layers(2))
    ours = LayerDropModuleList(0.5, layers(2))
    with pytest.raises(error, match=message):
        ours.p = p
    assert ours.p == 0.5
