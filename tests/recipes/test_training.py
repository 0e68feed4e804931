"""Training: learns, spends what it says, and resumes to the same bits."""

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layerdrop_fast.recipes import training as module
from layerdrop_fast.recipes.checkpoint import load_checkpoint, save_checkpoint
from layerdrop_fast.recipes.evaluation import bits_per_token, depth_curve
from layerdrop_fast.recipes.files import RecipeError
from layerdrop_fast.recipes.text import validation_windows
from layerdrop_fast.recipes.training import DENSE, ModelSize, Recipe, Stopped, Training, train
from layerdrop_fast.schedule import linear, uniform

SIZE = ModelSize(num_layers=4, d_model=16, nhead=2, dim_feedforward=32, context=16)
DROPPING = Recipe(linear(0.6), scale="inverse")
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, dtype=np.uint8)


def short(recipe=DROPPING, steps=12, **changes):
    return Training(**{"size": SIZE, "recipe": recipe, "steps": steps, "batch": 4, **changes})


def bits_of(trained):
    return {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}


def assert_same(first, second):
    assert first.layers_run == second.layers_run
    assert first.curve == second.curve
    one, other = bits_of(first), bits_of(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class StopAfter:
    """Says stop when asked for the n-th time."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def every_step_saved(monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(module, "TRAINING_PER_SAVING", -1.0)


@pytest.mark.parametrize("recipe", [DENSE, DROPPING, Recipe(uniform(0.4), fade=True, sampling="systematic")])
def test_a_run_stopped_thrice_ends_with_the_same_bits(tmp_path, recipe):
    unbroken = train(short(recipe), TEXT)
    path = tmp_path / "x.safetensors"
    for steps in (1, 4, 3):
        with pytest.raises(Stopped):
            train(short(recipe), TEXT, checkpoint=path, should_stop=StopAfter(steps))
        torch.manual_seed(77)  # another process would stand elsewhere
    assert_same(train(short(recipe), TEXT, checkpoint=path), unbroken)
    assert_same(train(short(recipe), TEXT, checkpoint=path), unbroken)  # from the finished checkpoint


@pytest.mark.parametrize(
    "training",
    [
        short(Recipe(uniform(0.5), learned=True), 32),
        short(Recipe(uniform(0.5), learned=True, granularity="sample"), 32),
        short(Recipe(uniform(0.2), heads=0.4, chunks=0.5)),
        short(Recipe(uniform(0.2), target="branch", granularity="sample", scale="inverse", fade=True)),
        short(optimizer="nag", learning_rate=0.1, momentum=0.99, accumulation=3, clip=0.1),
        short(size=dataclasses.replace(SIZE, dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)),
        short(size=dataclasses.replace(SIZE, dropout=0.2)),
        short(size=dataclasses.replace(SIZE, attention_dropout=0.2)),
        short(size=dataclasses.replace(SIZE, cutoffs=(40, 110), positions="sinusoidal", final_norm=False)),
        short(dtype="bfloat16"),
    ],
    ids=[
        "learned",
        "learned by sample",
        "parts",
        "branches",
        "nag",
        "dropouts",
        "dropout",
        "of weights",
        "adaptive",
        "bfloat16",
    ],
)
def test_every_kind_of_training_goes_on_with_the_same_bits(tmp_path, training):
    unbroken = train(training, TEXT)
    path = tmp_path / "x.safetensors"
    with pytest.raises(Stopped):
        train(training, TEXT, checkpoint=path, should_stop=StopAfter(5))
    torch.manual_seed(77)
    resumed = train(training, TEXT, checkpoint=path)
    assert_same(resumed, unbroken)
    if unbroken.learned is not None:
        assert torch.equal(resumed.learned.rates, unbroken.learned.rates)
        assert unbroken.learned.rates.std() > 0


def test_microbatches_make_the_step_of_one_batch():
    alike = {"optimizer": "nag", "learning_rate": 0.05, "clip": 1e9}  # AdamW and clipping hide a gradient's size
    one, several = (train(short(DENSE, batch=batch, accumulation=12 // batch, **alike), TEXT) for batch in (12, 4))
    assert [bits for _, bits, _ in several.curve] == pytest.approx([bits for _, bits, _ in one.curve], rel=1e-4)
    assert several.layers_run == one.layers_run == 48


def test_the_optimizer_is_the_one_that_is_named():
    training = short(optimizer="nag", learning_rate=0.5, momentum=0.99)
    optimizer = module._optimizer(training.model(), None, training)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, 0.99, True, 0)
    assert len(group["params"]) == len(list(training.model().parameters()))


def test_adamw_decays_matrices_alone():
    training = short(weight_decay=0.3, momentum=0.8)
    optimizer = module._optimizer(training.model(), None, training)
    assert type(optimizer) is torch.optim.AdamW
    found = [
        (group["weight_decay"], group["betas"], {w.dim() > 1 for w in group["params"]})
        for group in optimizer.param_groups
    ]
    assert found == [(0.3, (0.8, 0.99), {True}), (0.0, (0.8, 0.99), {False})]


def test_gradients_are_clipped_at_the_bound():
    training = short(DENSE, 1, optimizer="nag", momentum=0.5, clip=0.01, warmup=4.0)
    before, after = training.model(), train(training, TEXT).model
    moved = [(a - b).detach().flatten() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    # Nesterov's first step is 1 + momentum times the gradient.
    assert torch.cat(moved).norm().item() == pytest.approx(training.learning_rate / 4 * 1.5 * 0.01, rel=1e-3)


def test_microbatches_of_a_step_are_one_step_of_the_schedule():
    trained = train(short(Recipe(uniform(0.5), fade=True), accumulation=3), TEXT)
    assert trained.model.stack.counters.step == 12
    assert trained.curve[-1][2] == 4, "nothing is dropped any more, and was in the steps before"
    assert trained.layers_run < 48


def test_bfloat16_is_used_and_near():
    one, other = ([bits for _, bits, _ in train(short(dtype=dtype), TEXT).curve] for dtype in ("float32", "bfloat16"))
    assert one != other
    assert one == pytest.approx(other, rel=0.02)


def test_a_recipe_names_what_it_drops():
    recipe = Recipe(uniform(0.2), target="branch", heads=0.3, chunks=0.4)
    assert {name: schedule.depth for name, schedule in recipe.schedule(4, 10).items()} == {
        "branch": uniform(0.2),
        "head": uniform(0.3),
        "ffn_chunk": uniform(0.4),
    }
    assert Recipe(linear(0.6)).schedule(4, 10)["layer"].depth == linear(0.6)


def test_everything_that_is_dropped_fades():
    for schedule in Recipe(uniform(0.2), fade=True, heads=0.3, chunks=0.4).schedule(4, 10).values():
        assert schedule(0).min() > 0
        assert not schedule(9).any()


def test_the_share_of_products_that_ran_follows_heads_and_chunks():
    """Of a layer with d = 16 and FFN 32: 4 d^2 in attention, half of it left; 4 d^2 in the FFN, a quarter left."""
    trained = train(short(Recipe(uniform(0.0), heads=0.5, chunks=0.75), steps=60), TEXT)
    assert trained.layers_run == 60 * 4
    assert trained.share_run == pytest.approx(0.5 * 0.5 + 0.5 * 0.25, abs=0.03)
    assert train(short(DENSE), TEXT).share_run == 1.0


def test_large_states_are_saved_less_often(tmp_path, monkeypatch):
    clock = [0.0]
    saved = []

    def save(state, path, settings):
        saved.append(state.step)
        clock[0] += 3.0

    def step(state, text):
        state.step += 1
        clock[0] += 1.0

    monkeypatch.setattr(module._State, "save", save)
    monkeypatch.setattr(module._State, "train_step", step)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    train(short(steps=400), TEXT, checkpoint=tmp_path / "x.safetensors")
    assert saved == [21, 172, 323, 400]  # 150 seconds of training for 3 of saving


def test_a_run_killed_in_a_step_goes_on_from_the_last_whole_one(tmp_path, monkeypatch, every_step_saved):
    unbroken = train(short(), TEXT)
    path = tmp_path / "x.safetensors"

    def killed(model, *_):
        raise SystemError("killed")

    def stop(progress):
        if progress.step == 7:
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed)

    with pytest.raises(SystemError):
        train(short(), TEXT, checkpoint=path, on_step=stop)
    monkeypatch.undo()
    assert_same(train(short(), TEXT, checkpoint=path), unbroken)


def test_a_checkpoint_of_other_settings_is_refused_and_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    train(short(), TEXT, checkpoint=path, environment={"text": "fox"})
    before = path.read_bytes()
    with pytest.raises(RecipeError, match=r"steps = 12, this call has steps = 13"):
        train(short(steps=13), TEXT, checkpoint=path, environment={"text": "fox"})
    with pytest.raises(RecipeError, match="text = fox, this call has text = dog"):
        train(short(), TEXT, checkpoint=path, environment={"text": "dog"})
    with pytest.raises(RecipeError, match="depth = "):
        train(short(Recipe(linear(0.5), scale="inverse")), TEXT, checkpoint=path, environment={"text": "fox"})
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    path = tmp_path / "x.safetensors"
    train(short(), TEXT, checkpoint=path)
    tensors, record = load_checkpoint(path)
    tensors["model.stack.layers.0.qkv.weight"] = tensors.pop("model.stack.layers.0.self_attn.in_proj_weight")
    save_checkpoint(path, tensors, record)
    before = path.read_bytes()
    with pytest.raises(RecipeError, match=r"qkv.weight: got \[48, 16\], expected none; 2 differ\): move it away"):
        train(short(), TEXT, checkpoint=path)
    assert path.read_bytes() == before


def test_the_seed_decides(tmp_path):
    first, second, other = (train(short(seed=seed), TEXT) for seed in (0, 0, 1))
    assert_same(first, second)
    assert first.curve != other.curve


def test_the_seed_decides_weights_drops_and_windows(monkeypatch):
    first, other = (short(seed=seed).model() for seed in (0, 1))
    assert not torch.equal(first.stack.layers[0].linear1.weight, other.stack.layers[0].linear1.weight)
    assert [first.stack.plan(n).layers for n in range(20)] != [other.stack.plan(n).layers for n in range(20)]
    asked, windows = [], module.batch_of_step
    monkeypatch.setattr(module, "batch_of_step", lambda text, **given: asked.append(given) or windows(text, **given))
    train(short(steps=3, seed=5), TEXT)
    assert [(given["seed"], given["step"]) for given in asked] == [(5, 0), (5, 1), (5, 2)]


def test_every_step_has_its_own_masks():
    size, text = dataclasses.replace(SIZE, attention_dropout=0.5), np.zeros(100, np.uint8)  # all windows are alike
    curve = train(short(DENSE, 3, size=size, learning_rate=0.0), text).curve
    assert len({bits for _, bits, _ in curve}) == 3


def test_the_model_learns_and_loses_less_by_a_cut_when_layers_were_dropped():
    scored = validation_windows(TEXT, count=32, length=17)
    before = bits_per_token(short().model(), scored)
    trained = train(short(steps=150, learning_rate=1e-2), TEXT)
    after = depth_curve(trained.model, scored)
    assert before > 7
    assert after[4] < 2
    assert list(after) == [4, 3, 2, 1]
    assert len(trained.model.stack.layers) == 4
    assert trained.curve[0][1] > 2 * trained.curve[-1][1]
    assert [step for step, _, _ in trained.curve] == list(range(2, 151, 2)), "spans of one length"


def test_equal_work_means_as_many_layers_run():
    for recipe in (DROPPING, Recipe(uniform(0.2)), Recipe(uniform(0.5), fade=True)):
        steps = recipe.steps_of_equal_work(16, 1000)
        schedule = recipe.schedule(16, steps)
        expected = sum(16 - schedule["layer"](step).sum() for step in range(steps))
        assert expected == pytest.approx(16_000, rel=2e-3)
    assert DENSE.steps_of_equal_work(16, 1000) == 1000
    with pytest.raises(ValueError, match=r"heads are dropped at rate 0\.2, chunks at 0\.0: expected neither"):
        Recipe(uniform(0.2), heads=0.2).steps_of_equal_work(16, 1000)


def test_layers_run_are_those_of_the_plans():
    trained = train(short(steps=20), TEXT)
    model = short(steps=20).model()
    assert trained.layers_run == sum(len(model.stack.plan(step).layers) for step in range(20))
    assert trained.model.stack.stats().layers_run == len(model.stack.plan(19).layers), "of the last step"
    assert trained.layers_run < 80


def test_progress_is_told_after_each_step():
    told = []
    curve = train(short(steps=5), TEXT, on_step=told.append).curve
    assert [progress.bits for progress in told] == pytest.approx([np.mean(curve[:n], 0)[1] for n in range(1, 6)])
    assert [progress.step for progress in told] == [1, 2, 3, 4, 5]
    assert all(progress.num_layers == 4 and 0 <= progress.kept <= 4 for progress in told)
    assert all(progress.bits > 0 and progress.tokens_per_second > 0 for progress in told)


def test_pauses_are_left_out_of_time_and_speed(tmp_path, monkeypatch):
    clock, windows, told, path = [0.0], module.batch_of_step, [], tmp_path / "x.safetensors"

    def a_second_long(*arguments, **keywords):
        clock[0] += 1.0
        return windows(*arguments, **keywords)

    monkeypatch.setattr(module, "batch_of_step", a_second_long)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(Stopped):
        train(short(), TEXT, checkpoint=path, should_stop=StopAfter(4))
    clock[0] += 100.0
    assert train(short(), TEXT, checkpoint=path, on_step=told.append).seconds == 12
    assert [progress.tokens_per_second for progress in told] == [4 * 16] * 8


def test_the_learning_rate_rises_then_falls():
    training = short(steps=200, learning_rate=1.0)
    rates = [training.learning_rate_at(step) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert 0.02 <= rates[-1] < 0.03


def test_a_loss_that_is_no_number_ends_the_run_without_saving_it(tmp_path, monkeypatch, every_step_saved):
    path = tmp_path / "x.safetensors"

    def poison(progress):
        if progress.step == 3:
            monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda x, _: x.sum() * math.nan)

    with pytest.raises(RecipeError, match="loss of step 3 is not finite"):
        train(short(), TEXT, checkpoint=path, on_step=poison)
    monkeypatch.undo()
    assert_same(train(short(), TEXT, checkpoint=path), train(short(), TEXT))


def test_scoring_is_mean_bits_of_the_predicted_bytes():
    model = short().model()
    scored = validation_windows(TEXT, count=70, length=17)
    tokens = torch.from_numpy(scored)
    with torch.no_grad():
        chances = model.eval()(tokens[:, :-1]).double().softmax(-1)
    picked = chances.gather(2, tokens[:, 1:, None])
    assert bits_per_token(model, scored) == pytest.approx(-picked.log2().mean().item(), rel=1e-6)
    assert len(scored) == 70  # more than one portion


def test_scoring_drops_no_layer():
    scored = validation_windows(TEXT, count=4, length=17)
    model = short(Recipe(uniform(0.9))).model().train()
    assert bits_per_token(model, scored) == bits_per_token(model.eval(), scored)


def test_a_cut_can_be_stopped_between_depths():
    model, scored = short().model(), validation_windows(TEXT, count=4, length=17)
    done = []
    with pytest.raises(Stopped):
        depth_curve(model, scored, on_depth=lambda depth, _: done.append(depth), should_stop=StopAfter(3))
    assert done == [4, 3]
