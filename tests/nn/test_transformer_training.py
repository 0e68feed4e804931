"""TransformerStack in training as people run it: accumulation, mixed precision, checkpointing, resume, long runs."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from layerdrop_fast import DropSchedule, LayerDropStack, TransformerLayer, decreasing, linear, set_step
from tests.nn import killed_training
from tests.nn.residual import Block
from tests.nn.transformer import BATCH, LENGTH, WIDTH, assert_same, next_plan, reference, results, stack, tensor
from tests.tolerances import assert_no_worse_than_eager

X = tensor(BATCH, LENGTH, WIDTH).requires_grad_()
GRANULARITIES = pytest.mark.parametrize("granularity", ["batch", "sample"])
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False])


@GRANULARITIES
def test_accumulated_gradients_are_the_sum_of_the_microbatches(granularity):
    keywords = {"granularity": granularity, "accumulation": 3, "dropout": 0.2, "schedule": DropSchedule(4, linear(0.9))}
    model = stack(**keywords)
    plans = [model.plan(n, batch_size=BATCH if granularity == "sample" else None) for n in range(3)]
    assert [(plan.step, plan.stream) for plan in plans] == [(0, 0), (0, 1), (0, 2)]
    for plan in plans:
        (reference(model, X, plan=plan)[-1] ** 2).sum().backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    for _ in range(3):
        (model(X) ** 2).sum().backward()
    for weight, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, want)
    assert model.counters.step == 1


def error_of(grads, exact):
    return torch.cat([(a - b).flatten() for a, b in zip(grads, exact, strict=True) if b is not None]).norm()


def in_autocast(function, dtype):
    def run(*args, **keywords):
        with torch.autocast("cpu", dtype):
            return function(*args, **keywords)

    return run


@GRANULARITIES
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("recompute", [None, "qkv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_eager(dtype, recompute, norm_first, granularity):
    keywords = {"granularity": granularity, "norm_first": norm_first, "dropout": 0.2, "recompute": recompute}
    exact_model = stack(**keywords)
    model = stack(dtype=torch.float32, **keywords)
    x = X.detach().float().requires_grad_()
    plan = next_plan(model)
    ours = results(in_autocast(model, dtype), model, x)
    eager = results(in_autocast(lambda x: reference(model, x, plan=plan)[-1], dtype), model, x)
    x64 = x.detach().double().requires_grad_()
    exact = results(lambda x: reference(exact_model, x, plan=plan)[-1], exact_model, x64)
    assert ours[0].dtype == torch.float32
    assert {grad.dtype for grad in ours[1] if grad is not None} == {torch.float32}
    assert_no_worse_than_eager(ours[0], eager[0], exact[0])
    # A single gradient's rounding is a matter of luck: all of them together.
    assert error_of(ours[1], exact[1]) <= 2 * error_of(eager[1], exact[1])


@GRANULARITIES
def test_grad_scaler(granularity):
    model, plain = (stack(dtype=torch.float32, granularity=granularity) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(3):
        scaler.scale(model(X.detach().float()).sum()).backward()
        scaler.step(optimizers[0])
        scaler.update()
        plain(X.detach().float()).sum().backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for ours, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, want)


def enclosed_stack(model, use_reentrant):
    return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)


def wrapped_layers(model, use_reentrant):
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    for number, layer in enumerate(model.layers):
        model.layers[number] = checkpoint_wrapper(layer, checkpoint_impl=kind)
    return model


class Checkpointed(TransformerLayer):
    """A layer that checkpoints itself."""

    use_reentrant = False

    def forward(self, *args, **keywords):
        def run(x, y):
            return super(Checkpointed, self).forward(x, *args[1:], y=y, **keywords)

        y = keywords.pop("y")
        return checkpoint(run, args[0], y, use_reentrant=self.use_reentrant)


def layers_that_checkpoint_themselves(model, use_reentrant):
    for layer in model.layers:
        layer.__class__ = Checkpointed
        layer.use_reentrant = use_reentrant
    return model


def layers_with_a_checkpoint_patched_on(model, use_reentrant):
    for layer in model.layers:
        layer.forward = patched(layer.forward, use_reentrant)
    return model


def patched(forward, use_reentrant):
    def run(x, memory, *, y, visit):
        return checkpoint(lambda x, y: forward(x, memory, y=y, visit=visit), x, y, use_reentrant=use_reentrant)

    return run


def wrapped_branches(model, use_reentrant):
    for layer in model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn)
    return model


@GRANULARITIES
@REENTRANT
@pytest.mark.parametrize(
    "enclose",
    [
        enclosed_stack,
        wrapped_layers,
        layers_that_checkpoint_themselves,
        layers_with_a_checkpoint_patched_on,
        wrapped_branches,
    ],
)
@pytest.mark.parametrize("kind", [{}, {"norm_first": False}, {"recompute": "qkv"}, {"max_kept": 1}])
def test_activation_checkpointing_is_right_wherever_it_stands(kind, enclose, use_reentrant, granularity):
    keywords = {"granularity": granularity, "dropout": 0.2, **kind}
    model, plain = stack(**keywords), stack(**keywords)
    run = enclose(model, use_reentrant)
    for _ in range(3):
        ours = results(run, model, X)
        assert_same(ours, results(plain, plain, X))
    assert model.counters.forwards == 3


@GRANULARITIES
def test_attention_dropout_survives_a_recompute(granularity):
    """Its masks come from torch's generator, which a checkpoint sets back."""
    keywords = {"granularity": granularity, "attention_dropout": 0.4, "schedule": 0.3}
    plain, bounded = stack(**keywords), stack(**keywords, max_kept=1)
    for seed in range(2):
        found = []
        for model in (plain, bounded, enclosed_stack(stack(**keywords), use_reentrant=False)):
            torch.manual_seed(seed)
            found.append(model(X).detach())
        assert torch.equal(found[0], found[1])
    torch.manual_seed(0)
    expected = results(lambda x: stack(**keywords)(x), plain, X)
    torch.manual_seed(0)
    out, (grad, *_) = results(enclosed_stack(stack(**keywords), use_reentrant=False), plain, X)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(grad, expected[1][0])


@GRANULARITIES
def test_evaluation_in_the_middle_of_a_run_changes_nothing(granularity):
    model, unbroken = (stack(granularity=granularity, dropout=0.2) for _ in range(2))
    for step in range(4):
        assert torch.equal(model(X), unbroken(X))
        model.eval()
        if step % 2:
            with torch.inference_mode():
                model(X)
        else:
            model(X).sum().backward()
        model.train()
        with torch.no_grad():
            assert torch.equal(model(X), unbroken(X))
    with torch.inference_mode():
        inferred = model(X)
    assert torch.equal(inferred, unbroken(X))


@GRANULARITIES
def test_retained_graphs_give_the_same_gradients_again(granularity):
    model = stack(granularity=granularity, dropout=0.2, recompute="qkv")
    out = model(X)
    first = torch.autograd.grad(out.sum(), [X], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), [X])[0], first)


@GRANULARITIES
@pytest.mark.parametrize("kind", [{}, {"dropout": 0.1}, {"norm_first": False}])
def test_200_steps_of_training_have_the_losses_of_the_pure_pytorch_stack(kind, granularity):
    schedule = DropSchedule(4, linear(0.8), decreasing(200))
    keywords = {"granularity": granularity, "scale": "inverse", "schedule": schedule, **kind}
    ours, theirs = stack(**keywords), stack(**keywords)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1) for model in (ours, theirs)]
    target, curve = tensor(BATCH, LENGTH, WIDTH, seed=5), []
    for step in range(200):
        set_step(theirs, step)
        plan, losses = next_plan(theirs), []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            x = X.detach()
            out = model(x) if model is ours else reference(theirs, x, plan=plan)[-1]
            losses.append(((out - target) ** 2).mean())
            optimizer.zero_grad(set_to_none=True)
            losses[-1].backward()
            optimizer.step()
        assert abs(losses[0] - losses[1]) <= 1e-9 * losses[1]
        curve.append(losses[0].item())
    assert sum(curve[-20:]) < 0.8 * sum(curve[:20])


class Linear(Block):
    def forward(self, x):
        return x + self.linear(x)


@pytest.mark.parametrize("sampling", ["bernoulli", "systematic"])
def test_under_inverse_scale_the_mean_over_plans_of_a_linear_stack_is_the_dense_stack(sampling):
    """Per sample, where layers are independent: 4,000 plans of 5 samples, within 5 standard errors in each element."""
    torch.manual_seed(0)
    layers = [Linear() for _ in range(3)]
    model = LayerDropStack(layers, [0.2, 0.5, 0.4], granularity="sample", sampling=sampling, scale="inverse", seed=1)
    x = tensor(1, 2, 8).expand(5, 2, 8)
    with torch.no_grad():
        found = torch.stack([model(x).mean(0) for _ in range(4000)])
        exact = model.eval()(x)[0]
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / 4000**0.5).all()
    assert (found.std(0) / 4000**0.5 < 0.02 * exact.abs().max()).all()


@GRANULARITIES
def test_killed_and_resumed_equals_unbroken(tmp_path, granularity):
    """Killed by a signal in the middle of an accumulation and of a schedule, with dropout and Adam's moments."""
    run = [sys.executable, "-m", "tests.nn.killed_training", granularity]
    killed = subprocess.run([*run, str(tmp_path / "broken"), "11"], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "broken" / "result.pt").exists()
    subprocess.run([*run, str(tmp_path / "broken")], check=True)
    subprocess.run([*run, str(tmp_path / "unbroken")], check=True)
    results = [torch.load(tmp_path / name / "result.pt") for name in ("broken", "unbroken")]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert len(results[0]["losses"]) == killed_training.FORWARDS
