"""prune_heads, prune_ffn_chunks: smaller matrices that compute what the kept parts did."""

import copy

import pytest
import torch

from layerdrop_fast import TransformerStack
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.nn import KVCache
from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.prune import every_other, prune_ffn_chunks, prune_heads
from layerdrop_fast.reference.transformer_stack import transformer_stack

SHAPES = {
    "plain": {},
    "grouped": dict(num_kv_heads=2),
    "rotary": dict(rope_theta=100.0),
    "gated": dict(activation="swiglu", bias=False, norm="rmsnorm"),
    "post-norm": dict(norm_first=False),
    "cross": dict(cross_attention=True),
}


def made(shape, **keywords):
    torch.manual_seed(0)
    stack = TransformerStack(3, 16, 4, 24, dropout=0.0, schedule=0.0, **SHAPES[shape], **keywords).double()
    for weight in stack.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return stack.eval()


def expected(stack, x, memory, heads, chunks):
    """The reference, with the dropped parts multiplied by 0."""
    branches = stack._branches
    parts = {}
    for layer in range(3):
        for branch in range(branches):
            mask = chunks.get(layer) if branch == branches - 1 else heads.get(layer)
            if mask is not None:
                parts[layer * branches + branch] = torch.tensor(mask, dtype=torch.float64)
    keep = torch.ones(3 * branches, len(x), dtype=torch.bool)
    scales = torch.ones(3 * branches, dtype=torch.float64)
    return transformer_stack(stack, x, memory, keep=keep, scales=scales, parts=parts)[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_computes_what_it_did(shape):
    stack = made(shape)
    before = copy.deepcopy(stack.state_dict())
    x, memory = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    memory = memory if shape == "cross" else None
    kv = stack.layers[0].self_attn.num_kv_heads
    heads = {0: [0.0] * (kv - 1) + [1.0], 2: [1.0] + [0.0] * (kv - 1)}
    chunks = {layer: [1.0, 0.0, 0.0, 1.0] for layer in range(3)}
    smaller = prune_heads(stack, {0: [kv - 1], 2: [0]})
    smaller = prune_ffn_chunks(smaller, [0, 3], num_chunks=4)
    torch.testing.assert_close(smaller(x, memory), expected(stack, x, memory, heads, chunks), rtol=1e-9, atol=1e-9)
    assert smaller.layers[0].linear2.weight.shape == (16, 12)
    assert smaller.layers[0].dim_feedforward == 12
    attention = smaller.layers[2].self_attn
    assert (attention.num_kv_heads, attention.nhead) == (1, 4 // kv)
    assert attention.in_proj_weight.shape[0] == (4 // kv + 2) * 4
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items() if "weight" in name)


def test_it_trains_and_generates():
    torch.manual_seed(0)
    lm = TransformerLM(
        11, 16, 4, 2, 32, max_len=12, dropout=0.0, schedule={"layer": 0.2, "head": 0.3, "ffn_chunk": 0.3}
    )
    small = prune_ffn_chunks(prune_heads(lm, every_other(4, kept=2)), every_other(8, kept=4))
    assert small.stack.parts.schedules == {}
    assert list(lm.stack.parts.schedules) == ["head", "ffn_chunk"]
    tokens = torch.randint(11, (3, 8))
    small.train().loss(tokens[:, :-1], tokens[:, 1:]).backward()
    small.eval()
    torch.testing.assert_close(
        small.generate(tokens, 4, temperature=0.0), small.generate(tokens, 4, temperature=0.0, use_cache=False)
    )
    cache = KVCache(4)
    small.stack(torch.randn(1, 3, 16), is_causal=True, cache=cache)
    assert cache.length == 3


def test_copies_share_nothing_and_keep_what_is_frozen():
    stack = made("plain")
    stack.layers[1].linear1.weight.requires_grad_(False)
    small = prune_ffn_chunks(stack, [0], num_chunks=2)
    assert not small.layers[1].linear1.weight.requires_grad
    assert small.layers[0].linear1.weight.requires_grad
    pointers = {weight.data_ptr() for weight in stack.parameters()}
    assert not pointers & {weight.data_ptr() for weight in small.parameters()}


def test_pruned_layers_are_no_torch_layers():
    small = prune_heads(made("plain"), [0, 1])
    with pytest.raises(ValueError, match=r"'head_dim': 4.*'head_dim': 8"):
        small.layers[0].to_torch()
    assert isinstance(small.layers[0], TransformerLayer)


def test_a_layer_that_stands_twice_is_cut_once():
    stack = made("plain")
    stack.layers[1] = stack.layers[0]
    small = prune_heads(stack, [1, 3])
    assert small.layers[0] is small.layers[1]
    assert small.layers[0].self_attn.nhead == 2
    parts = {layer: [0.0, 1.0, 0.0, 1.0] for layer in range(3)}
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(small(x), expected(stack, x, None, parts, {}), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"layer 1 stands elsewhere too, where \[0\] are kept: got \[1\]"):
        prune_heads(stack, {0: [0], 1: [1]})


def test_weights_that_are_shared_or_computed_are_named():
    stack = made("plain")
    stack.layers[2].linear1.weight = stack.layers[0].linear1.weight
    with pytest.raises(ValueError, match=r"layer 0 shares linear1.weight with layer 2"):
        prune_ffn_chunks(stack, [0])
    stack = made("plain")
    torch.nn.utils.parametrizations.weight_norm(stack.layers[1].linear2)
    with pytest.raises(TypeError, match="layer 1: linear2 is parametrized"):
        prune_ffn_chunks(stack, [0])


@pytest.mark.parametrize("keep", [3, {0: None}])
def test_what_is_no_list_is_named(keep):
    with pytest.raises(TypeError, match=r"heads to keep of layer 0 are .* of type .*, expected a list of integers"):
        prune_heads(made("plain"), keep)


def test_lists_by_layer_come_in_a_mapping():
    with pytest.raises(TypeError, match=r"heads to keep are \[\[0\], \[1\]\], expected one .*, or \{layer: list\}"):
        prune_heads(made("plain"), [[0], [1]])


def test_chunks_are_those_of_training():
    stack = TransformerStack(2, 16, 4, 32, schedule={"ffn_chunk": 0.5}, ffn_chunks=4)
    small, same = prune_ffn_chunks(stack, [1, 3]), prune_ffn_chunks(stack, [1, 3], num_chunks=4)
    assert small.layers[0].linear1.weight.shape == (16, 16)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))


def test_masks_of_single_heads_fit_every_layer():
    stack = prune_heads(made("plain"), {1: [0, 1]})
    x, mask = torch.randn(2, 5, 16, dtype=torch.float64), torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    assert stack(x, attn_mask=mask[:, :1]).isfinite().all()
    with pytest.raises(ValueError, match="a mask of 4 heads for a layer of 2: expected one for all heads"):
        stack(x, attn_mask=mask)


def test_statistics_begin_anew():
    stack = made("plain").train()
    stack(torch.randn(2, 5, 16, dtype=torch.float64))
    assert prune_ffn_chunks(stack, [0]).stats().forwards == 0
    assert stack.stats().forwards == 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], r"heads to keep of layer 0 are \[\], expected at least one of 0 to 3, ascending"),
        ([1, 0], r"are \[1, 0\]"),
        ([1, 1], r"are \[1, 1\]"),
        ([4], r"are \[4\]"),
        ({3: [0]}, "layer 3: expected 0 to 2"),
    ],
)
def test_errors_name_both_sides(keep, message):
    with pytest.raises(ValueError, match=message):
        prune_heads(made("plain"), keep)


def test_errors_name_stacks_and_chunks():
    with pytest.raises(ValueError, match=r"num_chunks is 5, expected a divisor of 24 in layer 0"):
        prune_ffn_chunks(made("plain"), [0], num_chunks=5)
    with pytest.raises(ValueError, match=r"Linear holds 0 TransformerStacks \[\], expected 1"):
        prune_heads(torch.nn.Linear(2, 2), [0])
    with pytest.raises(ValueError, match=r"no TransformerStack 'x', expected one of \[''\]"):
        prune_heads(made("plain"), [0], stack="x")
