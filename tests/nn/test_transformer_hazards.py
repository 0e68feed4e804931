"""What happens between a forward and its backward, round a stack and to a stack: right, or an error, never wrong."""

import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import KVCache, TransformerStack, prune, set_step
from layerdrop_fast.memory import saved_bytes
from layerdrop_fast.nn.recompute import recomputed_in_backward
from tests.nn.transformer import BATCH, LENGTH, SOURCE, WIDTH, assert_same, next_plan, reference, results, stack, tensor

X = tensor(BATCH, LENGTH, WIDTH).requires_grad_()


def gradients(model, x=X, between=lambda: None, memory=None):
    """Of a forward and a backward with something between them."""
    model.zero_grad()
    set_step(model, 0)
    torch.manual_seed(0)
    out = model(x) if memory is None else model(x, memory)
    between()
    out.square().sum().backward()
    return [weight.grad for weight in model.parameters()]


def assert_equal(ours, expected):
    for got, want in zip(ours, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def frozen(model, name):
    for weight_name, weight in model.named_parameters():
        weight.requires_grad_(name not in weight_name)
    return model


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("recompute", [None, "qkv"])
@pytest.mark.parametrize("max_kept", [None, 1])
@pytest.mark.parametrize("trained", ["linear1", "in_proj_bias", "norm", ""])
def test_weights_that_are_not_trained(trained, max_kept, recompute, norm_first, granularity):
    keywords = {"granularity": granularity, "norm_first": norm_first, "recompute": recompute, "max_kept": max_kept}
    model = stack(**keywords, layer_scale=0.5)
    for name, weight in model.named_parameters():
        weight.requires_grad_(bool(trained) and trained in name)
    plan = next_plan(model)
    ours = results(model, model, X)
    assert_same(ours, results(lambda x: reference(model, x, plan=plan)[-1], model, X))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("view", ["transposed", "expanded", "slice", "without gradient"])
@pytest.mark.parametrize("kind", [{}, {"norm_first": False}, {"max_kept": 1}, {"recompute": "qkv"}])
def test_inputs_that_are_views(kind, view, granularity):
    views = {
        "transposed": lambda x: x.transpose(0, 1),
        "expanded": lambda x: x[:1].expand(LENGTH, -1, -1),
        "slice": lambda x: x[:, 1:4],
        "without gradient": lambda x: x.detach(),
    }
    model = stack(granularity=granularity, **kind)
    plan = next_plan(model, views[view](X).shape[0])
    ours = results(lambda x: model(views[view](x)), model, X)
    assert_same(ours, results(lambda x: reference(model, views[view](x), plan=plan)[-1], model, X))


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_kept": 1},
        {"norm_first": False},
        {"norm_first": False, "recompute": "qkv"},
        {"norm_first": False, "recompute": "qkv", "trained": "in_proj_bias"},
    ],
)
def test_an_input_that_is_written_before_backward_raises(keywords):
    keywords = dict(keywords)
    trained = keywords.pop("trained", None)
    model, x = stack(**keywords, schedule=0.0), X.detach().clone()
    if trained:
        frozen(model, "in_proj_weight")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, x, partial(x.mul_, 2))


def test_a_pre_norm_stack_does_not_need_its_input():
    model, x = stack(recompute="qkv"), X.detach().clone()
    expected = [None if g is None else g.clone() for g in gradients(model, x)]
    assert_equal(gradients(model, x, partial(x.mul_, 2)), expected)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_memory_that_is_written_before_backward_raises(granularity):
    """Also where the kept samples are gathered anew in backward."""
    model, memory = stack(cross_attention=True, granularity=granularity, schedule=0.4), tensor(BATCH, SOURCE, WIDTH)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, X, partial(memory.mul_, 2), memory)


@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "self_attn.in_proj_bias", "norm1.weight", "norm1.bias"])
def test_a_weight_that_is_written_before_its_heads_are_recomputed_raises(name):
    model = stack(1, schedule=0.0, recompute="qkv")
    frozen(model, name)
    weight = model.layers[0].get_parameter(name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, X.detach(), partial(weight.detach().mul_, 2))


@pytest.mark.parametrize("kind", [{"activation_dropout": 0.5, "dropout": 0.3}, {"attention_dropout": 0.5}])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_evaluation_mode_before_backward_changes_nothing(granularity, kind):
    """Pieces that are recomputed are those of the forward."""
    model = stack(max_kept=2, schedule=0.0, granularity=granularity, **kind)
    expected = [gradient.clone() for gradient in gradients(model)]
    assert_equal(gradients(model, X, model.eval), expected)


def test_layers_in_evaluation_mode_have_no_dropout():
    model = stack(schedule=0.0, dropout=0.4, activation_dropout=0.3, attention_dropout=0.2)
    model.layers[1].eval()
    expected = [gradient.clone() for gradient in gradients(model)]
    layer = model.layers[1]
    layer.dropout = layer.activation_dropout = layer.self_attn.dropout = 0.0
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("kind", [{}, {"recompute": "qkv"}, {"norm_first": False, "recompute": "qkv"}])
def test_functional_call_differentiates_what_it_is_given(kind):
    model = stack(schedule=0.0, **kind)
    given = {name: (weight * 1.5 + 0.1).detach().requires_grad_() for name, weight in model.named_parameters()}
    set_step(model, 0)
    torch.func.functional_call(model, given, (X,)).square().sum().backward()
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **given})
    assert_equal([weight.grad for weight in given.values()], gradients(other))


def test_torch_func():
    model = stack(schedule=0.0)
    weights = dict(model.named_parameters())
    got = torch.func.grad(lambda w: torch.func.functional_call(model, w, (X,)).square().sum())(weights)
    assert_equal(got.values(), gradients(model))


@pytest.mark.parametrize("kind", [{}, {"recompute": "qkv"}, {"norm_first": False}, {"granularity": "sample"}])
def test_a_second_derivative_raises(kind):
    model = stack(schedule=0.2, **kind)
    (grad,) = torch.autograd.grad(model(X).square().sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|is not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_layers(hook):
    model, plain, called = stack(schedule=0.3), stack(schedule=0.3), []
    for number, layer in enumerate(model.layers):
        getattr(layer, hook)(lambda *_, number=number: called.append(number))
    kept = model.plan().layers
    ours = results(model, model, X)
    assert called == kept[::-1]
    assert_same(ours, results(plain, plain, X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_compiled_stack_runs_its_own_layers(copied):
    model = stack(schedule=0.0)
    model.compile(backend="eager")
    model(X)
    twin = copied(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.5)
    set_step(model, 0)
    set_step(twin, 0)
    torch.testing.assert_close(twin(X), reference(twin, X)[-1])
    torch.testing.assert_close(model(X), reference(model, X)[-1])


def test_layers_cut_out_of_a_compiled_stack():
    model = stack(schedule=0.0)
    model.compile(backend="eager")
    small = prune.extract(model.eval(), [1, 3])
    torch.testing.assert_close(small(X), model.layers[3](model.layers[1](X)))


class Adapter(nn.Linear):
    """As LoRA's: a linear map that adds to what its weights do."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn.out_proj", "multihead_attn.out_proj"])
def test_an_adapter_is_not_ignored(name):
    model = stack(1, cross_attention=True, schedule=0.0)
    model.layers[0].set_submodule(name, Adapter(WIDTH, WIDTH, dtype=torch.float64))
    with pytest.raises(TypeError, match=f"^{name}: got a Adapter, expected an nn.Linear"):
        model(X, tensor(BATCH, SOURCE, WIDTH))


def test_parametrizations_are_trained():
    model = stack(1, schedule=0.0)
    for name in ("linear1", "linear2", "self_attn.out_proj"):
        nn.utils.parametrizations.weight_norm(model.layers[0].get_submodule(name))
    assert all(gradient is not None and gradient.any() for gradient in gradients(model)[1:])


def test_a_layer_that_stands_twice_in_a_stack():
    (layer,) = stack(1).layers
    for granularity in ("batch", "sample"):
        layer.dropout = layer.activation_dropout = 0.3
        model = TransformerStack.from_layers([layer] * 3, schedule=0.3, seed=3, granularity=granularity)
        plan = next_plan(model)
        ours = results(model, model, X)
        assert_same(ours, results(lambda x, m=model, p=plan: reference(m, x, plan=p)[-1], model, X))


def test_an_interrupted_forward_leaves_no_trace():
    keywords = {"schedule": 0.2, "dropout": 0.2}
    model, plain = stack(8, **keywords, max_kept=2, recompute="qkv"), stack(8, **keywords)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.layers[model.plan().layers[-1]].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    hook.remove()
    assert model.counters.forwards == 0
    assert_same(results(model, model, X), results(plain, plain, X))


def test_a_reentrant_checkpoint_of_more_than_the_stack_is_refused():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), stack())
    with pytest.raises(RuntimeError, match=r"0 of its forwards may be meant.* give a reentrant checkpoint nothing but"):
        checkpoint(model, X, use_reentrant=True).sum().backward()
    model.zero_grad()
    set_step(model, 0)
    checkpoint(model, X, use_reentrant=False).sum().backward()
    ours = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    set_step(model, 0)
    model(X).sum().backward()
    assert_equal(ours, [weight.grad for weight in model.parameters()])


def test_a_bound_counts_the_tokens_of_packed_sequences():
    """One sequence that nearly every token belongs to, kept by many layers, is held for one of them."""
    ends, x = [0, 60, 61, 62, 63], tensor(1, 63, WIDTH).requires_grad_()
    schedule = [0.5] * 8
    one = saved_bytes(stack(1, schedule=0.0, granularity="sample"), x, cu_seqlens=ends, exclude=[x])
    model = stack(8, schedule=schedule, granularity="sample", max_kept=1)
    for step in range(10):
        set_step(model, step)
        pieces = sum(0 in model.plan(batch_size=4).kept_samples(unit) for unit in range(8))
        assert saved_bytes(model, x, cu_seqlens=ends, exclude=[x]) <= 1.05 * one + 2 * pieces * x.nbytes


def test_a_cache_is_one_stacks_and_a_failed_prompt_is_not_in_it():
    model, other, cache = stack().eval(), stack().eval(), KVCache(10)
    hook = model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X, cache=cache)
    hook.remove()
    assert cache.length == 0
    with torch.no_grad():
        first = model(X[:2, :3], is_causal=True, cache=cache)
        with pytest.raises(ValueError, match="cache: got one that another stack has read into"):
            other(X[:2, 3:], cache=cache)
        with pytest.raises(ValueError, match="cache: got x of 5 samples, expected 2, as the cache has read"):
            model(X[:, 3:], cache=cache)
        rest = model(X[:2, 3:], is_causal=True, cache=cache)
        torch.testing.assert_close(torch.cat((first, rest), dim=1), model(X[:2], is_causal=True))


@pytest.mark.parametrize("kind", [{"rope_theta": 10.0}, {"norm_first": False, "num_kv_heads": 1}])
def test_a_cache_with_padding_reads_in_pieces_what_is_read_at_once(kind):
    """Masks are those of all positions, read and new; a layer twice in a stack has a place for each."""
    (layer,) = stack(1, **kind).layers
    model, cache = TransformerStack.from_layers([layer, layer]).eval(), KVCache(LENGTH)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, :2], padding[2, :1] = True, True
    found, end = [], 0
    with torch.no_grad():
        for length in (3, 1, 2, 1):
            start, end = end, end + length
            given = {"key_padding_mask": padding[:, :end], "is_causal": True}
            found.append(model(X[:, start:end], cache=cache, **given))
        whole = model(X, key_padding_mask=padding, is_causal=True)
    torch.testing.assert_close(torch.cat(found, dim=1)[~padding], whole[~padding])


META = {"device": "meta", "dtype": torch.bool}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected a tensor"),
        ({"memory": 3}, TypeError, "memory: got int, expected a tensor"),
        ({"attn_mask": [[0]]}, TypeError, "attn_mask: got list, expected a tensor"),
        ({"attn_mask": torch.zeros(7, 7).int()}, TypeError, "attn_mask: got torch.int32, expected bool .* or float"),
        ({"attn_mask": torch.zeros(7, 7, **META)}, ValueError, "attn_mask: got a tensor on meta, expected one on cpu"),
        ({"key_padding_mask": torch.zeros(5, 7).long()}, TypeError, "key_padding_mask: got torch.int64, expected bool"),
        ({"memory_mask": torch.zeros(7, 4)}, ValueError, "memory_mask, .*: got one without memory, expected none"),
        ({"position_ids": torch.zeros(7, **META)}, ValueError, "position_ids: got a tensor on meta, expected .* cpu"),
        ({"x": X[:1], "cu_seqlens": [0, 3.7, 7]}, TypeError, r"cu_seqlens: got \[0.0, 3.7, 7.0\], expected integers"),
        ({"x": X[:1], "cu_seqlens": [0, 7], "max_seqlen": 7.5}, TypeError, "max_seqlen must be an integer, got 7.5"),
        ({"cache": {}}, TypeError, "cache: got dict, expected a KVCache"),
    ],
)
def test_mistakes_are_named_and_count_nothing(given, error, message):
    model = stack(rope_theta=10.0)
    with pytest.raises(error, match=message):
        model(**({"x": X} | given))
    assert model.counters.forwards == 0


def test_mistakes_about_memory_name_its_masks():
    model = stack(cross_attention=True)
    with pytest.raises(ValueError, match=r"^memory_key_padding_mask: got \[5, 7\], expected \[5, 4\]"):
        model(X, tensor(BATCH, SOURCE, WIDTH), memory_key_padding_mask=torch.zeros(BATCH, LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_stream_keeps_its_dtype_and_rotary_tables_are_no_coarser_than_float32(norm_first, granularity):
    model = stack(granularity=granularity, norm_first=norm_first, dtype=torch.float32, rope_theta=10.0, schedule=0.3)
    for dtype in (torch.bfloat16, torch.float32):
        x = X.detach().to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == dtype
        assert model.layers[0].attention(x, None)[0].rotary[0].dtype == torch.float32
    assert model.layers[0].attention(X, None)[0].rotary[0].dtype == torch.float64


def test_a_stack_that_grew_after_a_forward_has_masks_for_its_new_layers():
    model, other = stack(2, dropout=0.3), stack(5, dropout=0.3, schedule=0.0)
    model(X)
    model.layers.extend(other.layers[2:])
    model.schedule = other.schedule
    model.reset_stats()
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.layers, other.layers, strict=True):
        theirs.norm1.eps, theirs.norm2.eps = ours.norm1.eps, ours.norm2.eps
    assert torch.equal(model(X), other(X))


def test_packed_sequences_that_fit_the_bound_are_not_recomputed():
    """Half the sequences of 8 layers are as many tokens as 4 layers have."""
    x, ends = tensor(1, 64, WIDTH).requires_grad_(), [0, 16, 32, 48, 64]
    keywords = {"granularity": "sample", "sampling": "systematic", "schedule": 0.5}
    held = [saved_bytes(stack(8, **keywords, max_kept=m), x, cu_seqlens=ends) for m in (None, 4)]
    assert held[0] == held[1]


def test_what_is_recomputed_is_made_once_and_let_go():
    made = []

    def compute(h):
        value = h * 2
        made.append(weakref.ref(value))
        return value

    with recomputed_in_backward(compute, X, enabled=True) as value:
        out = value * value
    del value
    assert made[0]() is None
    for backward in range(2):
        out.sum().backward(retain_graph=True)
        assert len(made) == 2 + backward
        assert made[-1]() is None
