"""Generation: with a cache the same as without, and as the distribution says."""

import pytest
import torch

from layerdrop_fast import KVCache, prune
from layerdrop_fast.models import TransformerLM
from layerdrop_fast.models.generation import Sampler

VOCAB = 11
SHAPES = {
    "learned positions": {},
    "rotary": {"rope_theta": 100.0, "max_len": None},
    "grouped heads": {"num_kv_heads": 1},
    "RMSNorm, SwiGLU": {"norm": "rmsnorm", "activation": "swiglu"},
    "all of these": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "rope_theta": 10.0},
    "scaled in evaluation": {"schedule": 0.5, "scale": "eval"},
    "sample granularity": {"schedule": 0.5, "granularity": "sample", "target": "branch"},
}


def lm(**changes):
    torch.manual_seed(0)
    settings = {"max_len": 24, "seed": 3, "schedule": 0.2, "dropout": 0.1} | changes
    return TransformerLM(VOCAB, 16, 4, 4, 24, **settings).double()


def tokens(batch=3, length=7):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def assert_cached_equals_uncached(model, pieces):
    model.eval()
    read, cache = tokens(length=sum(pieces)), KVCache(sum(pieces))
    with torch.no_grad():
        expected = model(read)
        logits = [model(part, cache=cache) for part in read.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)
    assert cache.length == sum(pieces)


@pytest.mark.parametrize("pieces", [[5] + [1] * 7, [1] * 12, [4, 5, 1, 2]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_are_those_of_the_whole(shape, pieces):
    assert_cached_equals_uncached(lm(**SHAPES[shape]), pieces)


@pytest.mark.parametrize("shape", ["learned positions", "all of these"])
def test_cached_logits_of_a_cut_model(shape):
    assert_cached_equals_uncached(prune.extract(lm(**SHAPES[shape]), [0, 3]), [5, 2, 1, 1])


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_changes_no_token(shape, temperature):
    model = lm(**SHAPES[shape])
    options = {"temperature": temperature, "top_k": 7, "top_p": 0.9}
    cached, whole = (
        model.generate(tokens(), 17, generator=torch.Generator().manual_seed(2), use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert cached.shape == (3, 24)
    assert torch.equal(cached, whole)
    assert torch.equal(cached[:, :7], tokens())


def test_greedy_takes_the_likeliest():
    model = lm()
    out = model.generate(tokens(), 5, temperature=0)
    torch.testing.assert_close(model.eval()(out)[:, 6:-1].argmax(-1), out[:, 7:])


def test_torch_s_generator_is_the_default():
    model = lm()
    torch.manual_seed(1)
    first = model.generate(tokens(), 8)
    assert not torch.equal(model.generate(tokens(), 8), first)
    torch.manual_seed(1)
    assert torch.equal(model.generate(tokens(), 8), first)


def test_an_ended_sample_is_filled_up():
    model = lm()
    free = model.generate(tokens(), 12, temperature=0)[:, 7:]
    eos = int(free[0, 2])
    ends = [row.index(eos) if eos in row else 12 for row in free.tolist()]
    out = model.generate(tokens(), 12, temperature=0, eos=eos)[:, 7:]
    assert out.shape[1] == min(12, max(ends) + 1)
    for row, expected, end in zip(out, free, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: out.shape[1]][: end + 1])
        assert (row[end:] == eos).all()


def test_modes_counters_and_gradients_are_left_alone():
    model = lm().train()
    model.stack.layers[1].eval()
    modes = [module.training for module in model.modules()]
    out = model.generate(tokens(), 3)
    assert [module.training for module in model.modules()] == modes
    assert model.stack.counters.forwards == 0
    with pytest.raises(IndexError):
        model.generate(tokens() + VOCAB, 3)
    assert [module.training for module in model.modules()] == modes
    model(out).sum().backward()  # what was generated can be trained on


def test_evaluation_mode_is_on_while_it_runs():
    model, seen = lm(dropout=0.9).train(), []
    model.norm.register_forward_hook(lambda module, *_: seen.append(module.training or torch.is_grad_enabled()))
    model.generate(tokens(), 3)
    assert seen == [False] * 3


def test_no_new_tokens_and_no_samples():
    assert torch.equal(lm().generate(tokens(), 0), tokens())
    assert lm().generate(tokens(batch=0), 4, temperature=0).shape == (0, 11)


def test_a_cache_that_is_too_small_or_used_in_training_is_refused():
    model, cache = lm().eval(), KVCache(8)
    model(tokens(), cache=cache)
    with pytest.raises(ValueError, match="got 7 positions read and 2 new ones, expected at most 8"):
        model(tokens(length=2), cache=cache)
    with pytest.raises(ValueError, match="cache: got x of 2 samples, expected 3, as the cache has read"):
        model(tokens(2, 1), cache=cache)
    assert cache.length == 7
    with pytest.raises(ValueError, match=r"cache: got one while training, expected stack.eval\(\)"):
        model.train()(tokens(length=1), cache=cache)
    with pytest.raises(ValueError, match=r"\[3, 18\] behind 7 in the cache, expected \[B, S\] with S <= 17"):
        model.eval()(tokens(length=18), cache=cache)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        KVCache(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 18}, "7 tokens and max_new_tokens 18 are 25, expected at most max_len, 24"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must lie in \[0, 1\], got 1.5"),
        ({"eos": 11}, "eos is 11, expected a token from 0 to 10"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"tokens have shape \[4\], expected \[B, S\] with S >= 1"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"tokens have shape \[2, 0\], expected"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        lm().generate(**({"tokens": tokens(), "max_new_tokens": 4} | given))


LOGITS = torch.tensor([0.1, 0.4, 0.15, 0.05, 0.3]).log()


@pytest.mark.parametrize(
    ("options", "chances"),
    [
        ({}, [0.1, 0.4, 0.15, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0225, 0.0025, 0.09]),
        ({"top_k": 2}, [0, 0.4, 0, 0, 0.3]),
        ({"top_k": 9}, [0.1, 0.4, 0.15, 0.05, 0.3]),
        ({"top_p": 0.75}, [0, 0.4, 0.15, 0, 0.3]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0, 0.3]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(options, chances):
    draws = 20_000
    sampler = Sampler(**options, generator=torch.Generator().manual_seed(1))
    found = sampler(LOGITS.expand(draws, -1)).bincount(minlength=5) / draws
    expected = torch.tensor(chances, dtype=torch.float32)
    expected /= expected.sum()
    # Five standard deviations of the likeliest.
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * (0.25 / draws) ** 0.5)
    assert (found[expected == 0] == 0).all()


def test_of_equal_logits_exactly_k_stay():
    drawn = Sampler(top_k=2)(torch.zeros(1, 6).expand(500, -1))
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize(("prompt", "kind"), [([[1, 2]], "list"), (torch.ones(1, 2), "torch.float32")])
def test_a_prompt_of_another_kind_is_named(prompt, kind):
    with pytest.raises(TypeError, match=rf"tokens are of type {kind}, expected a tensor of int64 \[B, S\]"):
        lm().generate(prompt, 3)
