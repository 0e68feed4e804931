"""A trained network at a smaller depth for a while, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from layerdrop_fast._checks import check_range
from layerdrop_fast.nn.stack import LayerDropStack
from layerdrop_fast.prune.beside import changes_beside
from layerdrop_fast.prune.lists import Keep, checked_keep, cut, layers_of, named_list, said

STATE = ("schedule", "parts", "_proven", "_statistics")  # of a stack, beside its layers
Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def skip_layers(model: Model, keep: Keep) -> Iterator[Model]:
    """Within the block, ``model`` has only the layers in ``keep``; after it, however that ends, all of them.

    What ``extract`` gives without copying a weight: the same layers, renumbered from 0; configs say the smaller number
    meanwhile, also to other models that share them. An optimizer, a state dict and ``parameters()`` within the block
    see these layers only. A step that is taken within the block trains them. Where ``train()`` or ``eval()`` within the
    block change the mode of a list, its other layers follow after it.

        with skip_layers(model, every_other(16, kept=8)) as smaller:
            loss = evaluate(smaller)

    Args:
        model, keep: as for ``extract``.

    Raises:
        ValueError: as ``extract``; the model is as it was.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3.
    """
    wanted = checked_keep(model, keep)
    beside = changes_beside(model, wanted)
    try:
        with only_layers(model, wanted):
            for change in beside:
                change.make()
            yield model
    finally:
        for change in beside:
            change.undo()


@contextmanager
def only_layers(model: nn.Module, wanted: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """``skip_layers`` with what stands beside the lists as it is."""
    lists = [layers_of(model, name) for name in wanted]
    before = [(layers, layers._modules, layers.training) for layers in lists]
    stacks = [vars(stack) for stack in map(model.get_submodule, wanted) if isinstance(stack, LayerDropStack)]
    states = [{name: stack[name] for name in STATE if name in stack} for stack in stacks]
    try:
        for name, indices in wanted.items():
            cut(model.get_submodule(name), indices)
        yield
    finally:
        for layers, modules, training in before:
            left = set(layers.children())
            vars(layers)["_modules"] = modules
            if layers.training != training:
                for layer in set(layers.children()) - left:
                    layer.train(layers.training)
        for stack, state in zip(stacks, states, strict=True):
            stack.update(state)


@contextmanager
def early_exit(model: Model, layer: int, layers: str | None = None) -> Iterator[Model]:
    """Within the block, ``model`` runs only its first ``layer`` layers; what comes after the last runs as before.

        with early_exit(model, 8) as draft:
            tokens = draft.generate(prompt, 4)

    Args:
        model: as for ``extract``.
        layer: how many layers run, 1 to L: the 0-based index of the first one that does not.
        layers: the name of the list of layers; None: the only one.

    Raises:
        ValueError: a number out of range; a name that is no list of layers. TypeError: a number of another kind.

    Source: Elhoushi et al. 2024 (arXiv 2404.16710).
    """
    name = named_list(model, layers)
    check_range(layer, "layer", 1, len(layers_of(model, name)), f", the layers of {said(model, name)}")
    with skip_layers(model, {name: range(layer)}) as smaller:
        yield smaller
