"""A TransformerStack beside the pure-PyTorch one on the same plan."""

import torch
from torch import nn

from layerdrop_fast import TransformerStack, ops
from layerdrop_fast.reference.transformer_stack import transformer_stack

BATCH, LENGTH, WIDTH, HEADS, SOURCE = 5, 7, 12, 2, 4


def tensor(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stack(layers=4, *, dtype=torch.float64, **keywords):
    """A stack whose biases and norms differ from 0 and 1, and whose epsilons all differ."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 20, "dropout": 0.0, "dtype": dtype}
    model = TransformerStack(layers, **(sizes | {"seed": 10, "schedule": 0.5} | keywords))
    for number, layer in enumerate(model.layers):
        for name, weight in layer.named_parameters():
            if weight.dim() == 1 and "layer_scale" not in name:
                nn.init.normal_(weight, mean=0.5)
        for branch in range(layer.num_branches):
            getattr(layer, f"norm{branch + 1}").eps = 10.0 ** -(2 + number) * (branch + 1)
    return model


def key_of(model, plan, rank=0):
    seed = plan.seed - 2**64 if plan.seed >> 63 else plan.seed
    return ops.step_key(torch.tensor([seed, plan.step, rank << 32 | plan.stream & 0xFFFFFFFF]))


def expected_scales(model, plan, batch):
    """The residual scale of every branch."""
    per_unit = model.layers[0].num_branches // model.units_per_layer
    density = 1 - torch.from_numpy(model.schedule(plan.step)).repeat_interleave(model.units_per_layer)
    kept = torch.tensor(plan.kept_counts, dtype=torch.float64).clamp(min=1)
    scale = {"none": torch.ones_like(density), "inverse": 1 / density, "realized": batch / kept}[model.scale]
    return scale.repeat_interleave(per_unit)


def reference(model, x, memory=None, *, plan=None, **inputs):
    """The pure-PyTorch stack on a plan; None: in evaluation."""
    branches, units = model.layers[0].num_branches, model.units_per_layer
    batch = x.shape[0]
    if plan is None:
        keep, scales = torch.ones(len(model.layers) * branches, batch, dtype=torch.bool), None
        if model.scale == "eval":
            density = 1 - torch.from_numpy(model.schedule(model.counters.step))
            scales = density.repeat_interleave(branches)
        scales = torch.ones(len(keep), dtype=torch.float64) if scales is None else scales
    else:
        keep = plan.keep.repeat_interleave(branches // units, dim=0).expand(-1, batch)
        scales = expected_scales(model, plan, batch)
    key = None if plan is None else key_of(model, plan)
    return transformer_stack(model, x, memory, keep=keep, scales=scales, key=key, **inputs)


def next_plan(model, batch=BATCH):
    return model.plan(batch_size=batch if model.granularity == "sample" else None)


def results(function, model, *leaves):
    """The output, and the gradients of a loss by the leaves and all weights, None where there is none."""
    everything = [*leaves, *model.parameters()]
    for leaf in everything:
        leaf.grad = None
    out = function(*leaves)
    weights = tensor(*out.shape, seed=9, dtype=out.dtype)
    (out * weights).sum().backward()
    return out.detach().clone(), [None if leaf.grad is None else leaf.grad.clone() for leaf in everything]


def assert_same(ours, expected, **tolerance):
    tolerance = {"rtol": 1e-9, "atol": 1e-9} | tolerance
    torch.testing.assert_close(ours[0], expected[0], **tolerance)
    for got, want in zip(ours[1], expected[1], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, **tolerance)
