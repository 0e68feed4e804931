"""What a ``GraphedStep`` can capture, and what it must refuse."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerdrop_fast import _extension
from layerdrop_fast.nn import distributed
from layerdrop_fast.nn.layer_drop_list import LayerDropModuleList
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.nn.transformer_layer import TransformerLayer
from layerdrop_fast.nn.transformer_stack import TransformerStack


def graphable_stack(model: nn.Module) -> TransformerStack:
    """The one stack in ``model``.

    Raises:
        ValueError: there is not exactly one, or it has a setting that cannot be captured.
    """
    stacks = [part for part in model.modules() if isinstance(part, LayerDropStack | LayerDropModuleList)]
    if len(stacks) != 1 or not isinstance(stacks[0], TransformerStack):
        raise ValueError(f"model: got {[type(part).__name__ for part in stacks]}, expected one TransformerStack")
    stack = stacks[0]
    if next(stack.parameters()).is_cuda and _extension.cuda_missing is not None:
        raise ValueError(
            f"GraphedStep: on a GPU the plan is drawn by a CUDA kernel, and these {_extension.cuda_missing}"
        )
    settings = {
        "sampling": (stack.sampling, "systematic"),
        "accumulation": (stack.counters.accumulation, 1),
        "hidden_states": (stack.hidden_states, False),
        "max_kept": (stack.max_kept, None),
        "norm_first": (all(layer.norm_first for layer in stack.layers), True),
        "rates of": (list(stack.parts.schedules), []),
        "ranks": (distributed.several_ranks(), False),
    }
    if stack.granularity == "batch":
        settings["target"] = (stack.target, "layer")
    for name, (got, expected) in settings.items():
        if got != expected:
            where = ' at granularity "batch"' if name == "target" else ""
            raise ValueError(f"GraphedStep: {name} is {got!r}, expected {expected!r}{where}")
    if not stack.training:
        raise ValueError("GraphedStep: the stack is in evaluation, expected model.train()")
    _check_layers(stack)
    _check_sharing(model, stack)
    return stack


def _check_layers(stack: TransformerStack) -> None:
    for number, layer in enumerate(stack.layers):
        plain = type(layer) is TransformerLayer and not any(
            hasattr(part, "parametrizations") for part in layer.modules()
        )
        if not plain or layer._compiled_call_impl is not None or stack._compiled is not None:
            raise ValueError(f"GraphedStep: layer {number} is wrapped, parametrised or compiled, expected it plain")
        if stack.granularity != "batch":
            continue
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            raise ValueError(f'GraphedStep: layer {number} has hooks, expected none at granularity "batch"')
        first, settings = _settings(stack.layers[0]), _settings(layer)
        for name, value in settings.items():
            if first.get(name) != value:
                raise ValueError(
                    f"GraphedStep: {name} of layer {number} is {value!r}, expected {first.get(name)!r} as of layer 0 "
                    'at granularity "batch"'
                )


def _settings(layer: nn.Module) -> dict[str, Any]:
    """What two layers have to share for one to run with the other's weights."""
    found: dict[str, Any] = {}
    for path, part in layer.named_modules():
        found |= {f"{path}.{name}".lstrip("."): v for name, v in vars(part).items() if not name.startswith("_")}
    for name, weight in layer.named_parameters():
        found[name] = (list(weight.shape), weight.dtype, weight.device, weight.requires_grad)
    return found


def _check_sharing(model: nn.Module, stack: TransformerStack) -> None:
    """Every parameter of a layer must be that layer's alone: it has an optimizer, and maybe a place, of its own."""
    known: dict[int, str] = {}
    inside = {id(weight) for weight in stack.layers.parameters()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in known and id(weight) in inside:
            raise ValueError(f"GraphedStep: {name} is {known[id(weight)]} too, expected layers that share no parameter")
        known[id(weight)] = name


def units_of(stack: TransformerStack) -> list[list[nn.Parameter]]:
    """The parameters of each unit of a plan that are trained: of a layer or, for target "branch", of one branch."""
    units: list[list[nn.Parameter]] = [[] for _ in range(len(stack.layers) * stack.units_per_layer)]
    for number, layer in enumerate(stack.layers):
        for name, weight in layer.named_parameters():
            branch = branch_of(name, layer.num_branches) if stack.units_per_layer > 1 else 0  # type: ignore[arg-type]
            if weight.requires_grad:
                units[number * stack.units_per_layer + branch].append(weight)
    return units


def branch_of(name: str, num_branches: int) -> int:
    """The branch of a TransformerLayer that a parameter belongs to."""
    part = name.split(".")[0]
    numbered = part.startswith(("norm", "layer_scale"))
    return int(part[-1]) - 1 if numbered else {"self_attn": 0, "multihead_attn": 1}.get(part, num_branches - 1)
