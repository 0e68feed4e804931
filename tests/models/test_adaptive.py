"""Adaptive input and softmax, tied; sinusoidal positions; the paper's sizes."""

import math

import pytest
import torch
from torch.nn import functional as F

from layerdrop_fast.models import TransformerLM
from layerdrop_fast.models.adaptive import sinusoidal_positions
from layerdrop_fast.recipes.configurations import CONFIGURATIONS

CUTOFFS = (5, 12)
VOCAB = 20


def lm(**keywords):
    torch.manual_seed(0)
    settings = {"max_len": 9, "dropout": 0.0, "schedule": 0.0, "cutoffs": CUTOFFS, **keywords}
    return TransformerLM(VOCAB, 16, 2, 2, 32, **settings).double()


def test_embeddings_are_rows_of_the_softmax():
    model = lm()
    head, first = model.head, model.token_embedding.projection.weight
    expected = []
    for token in range(VOCAB):
        if token < 5:
            row = first @ head.head.weight[token]
        else:
            band = int(token >= 12)
            projection, rows = (part.weight for part in head.tail[band])
            row = rows[token - (5, 12)[band]] @ projection
        expected.append(4.0 * row)
    got = model.token_embedding(torch.arange(VOCAB).view(4, 5), head)
    torch.testing.assert_close(got.view(VOCAB, 16), torch.stack(expected))


def test_losses_are_those_of_the_log_probabilities():
    model = lm(schedule=0.3, seed=0)
    tokens = torch.randint(VOCAB, (3, 8))
    targets = torch.randint(VOCAB, (3, 8))
    model.eval()
    log_probabilities = model(tokens)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(3, 8, dtype=torch.float64))
    expected = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten(), reduction="none").view(3, 8).mean(1)
    torch.testing.assert_close(model.loss(tokens, targets, per_sample=True), expected)
    torch.testing.assert_close(model.loss(tokens, targets), expected.mean())


@pytest.mark.parametrize("cutoffs", [None, CUTOFFS])
def test_every_weight_learns(cutoffs):
    model = lm(cutoffs=cutoffs)
    tokens = torch.arange(VOCAB)[torch.randperm(VOCAB)].repeat(2).view(5, 8)
    model.loss(tokens, tokens.roll(1)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_it_generates():
    model = lm(positions="sinusoidal")
    prompt = torch.randint(VOCAB, (2, 4))
    with_cache, without = (model.generate(prompt, 5, temperature=0.0, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 9)


def test_sinusoids():
    table = sinusoidal_positions(50, 8).double()
    for position in (0, 1, 49):
        for channel in range(4):
            angle = position / 10000 ** (channel / 3)
            assert table[position, channel] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 4 + channel] == pytest.approx(math.cos(angle), abs=1e-5)
    assert sinusoidal_positions(3, 5)[:, 4].tolist() == [0.0] * 3
    assert sinusoidal_positions(2, 2)[1].tolist() == pytest.approx([math.sin(1), math.cos(1)])


def test_sinusoids_are_added_and_not_saved():
    model, without = lm(positions="sinusoidal"), lm(positions="sinusoidal")
    assert not any("sinusoid" in name or "position" in name for name in model.state_dict())
    without.sinusoids.zero_()
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    assert not torch.allclose(model.eval()(tokens)[0, 0], model(tokens)[0, 5])
    torch.testing.assert_close(without.eval()(tokens)[0, 0], without(tokens)[0, 5])


def test_without_a_final_norm():
    model = lm(final_norm=False).eval()
    tokens = torch.randint(VOCAB, (2, 6))
    stream = model._stream(tokens, None)
    torch.testing.assert_close(model(tokens), model.head.log_prob(stream.flatten(0, 1)).view(2, 6, VOCAB))
    assert not any(name.startswith("norm") for name in model.state_dict())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("wikitext-103-16", 246_933_504), ("wikitext-103-40", 423_352_320)],  # the former as the released model has it
)
def test_the_papers_models_have_its_parameters(name, parameters):
    with torch.device("meta"):
        model = CONFIGURATIONS[name].of(267_744).model()
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["wikitext-103-16", "wikitext-103-40"])
def test_the_papers_training_is_as_told(name):
    training = CONFIGURATIONS[name].of(267_735)
    assert training.batch * training.accumulation * training.size.context == 73_728
    assert (training.optimizer, training.momentum, training.clip, training.dtype) == ("nag", 0.99, 0.1, "bfloat16")
    assert (training.size.dropout, training.size.attention_dropout, training.size.activation_dropout) == (0.3, 0.1, 0.1)
    rates = [training.learning_rate_at(step) for step in (0, 7_999, 15_999, 16_000, 151_000, 285_999)]
    assert rates == pytest.approx([1 / 16_000, 0.5, 1.0, 1.0, 0.50005, 1e-4], rel=1e-4)


@pytest.mark.parametrize(("vocab_size", "cutoffs"), [(2_000, None), (2_001, (2_000,)), (10_001, (2_000, 10_000))])
def test_bands_that_a_vocabulary_does_not_reach_are_left_out(vocab_size, cutoffs):
    assert CONFIGURATIONS["words-16"].of(vocab_size).size.cutoffs == cutoffs


@pytest.mark.parametrize("cutoffs", [(), (5, 5), (7, 5), (5, 20)])
def test_bad_cutoffs_are_named(cutoffs):
    with pytest.raises(ValueError, match=r"cutoffs are \[.*\], expected some that ascend, below the vocabulary's 20"):
        lm(cutoffs=cutoffs)


@pytest.mark.parametrize("settings", [{}, {"positions": "sinusoidal"}, {"rope_theta": 100.0, "final_norm": False}])
def test_under_autocast_the_stream_stays_as_it_is(settings):
    model = lm(**settings).float()
    tokens = torch.randint(VOCAB, (3, 8))
    expected = model.loss(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens)
        assert model._stream(tokens, None).dtype == torch.float32
        assert model(tokens).isfinite().all()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("token", [-1, VOCAB, 5000])
def test_tokens_that_do_not_exist_are_refused(token):
    with pytest.raises(IndexError):
        lm()(torch.tensor([[1, token]]))


def test_too_many_bands_are_named():
    with pytest.raises(ValueError, match="3 cutoffs for d_model 16: expected d_model to be at least 64"):
        lm(cutoffs=(3, 5, 9))
    with pytest.raises(TypeError, match="cutoffs: got int, expected whole numbers"):
        lm(cutoffs=10)


def test_bad_positions_are_named():
    with pytest.raises(ValueError, match="positions is 'rotary'"):
        lm(positions="rotary")
