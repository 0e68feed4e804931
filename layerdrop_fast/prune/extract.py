"""Taking the smaller network out of a trained one."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from layerdrop_fast.nn.layer_drop_list import every_layer
from layerdrop_fast.prune.beside import changes_beside
from layerdrop_fast.prune.lists import Keep, checked_keep, cut, layers_of

Model = TypeVar("Model", bound=nn.Module)


def extract(model: Model, keep: Keep) -> Model:
    """A copy of ``model`` that has only the layers in ``keep``, renumbered from 0.

    The model itself is left as it is, and the layers that are not kept are not copied. Kept layers keep their drop
    rates, for finetuning with LayerDrop; the paper finetunes pruned networks without (evaluation drops nothing).

    What the model says of its layers follows: the ``layer_idx`` of each, and in the modules that hold a list, and in
    their ``config``, what ``prune_config`` cuts (``num_layers``, ``layer_types``, ...). Where it is not certain that
    such a number is of this list, it stays as it is: where another list beside it has as many layers, or where there
    are numbers for an encoder and a decoder and the list's name says neither.

        small = extract(model, every_other(16, kept=8))
        small = extract(model, {"encoder.layers": [0, 3], "decoder.layers": [0, 1, 5]})

    Args:
        model: a module that is or holds a LayerDropStack, a LayerDropModuleList, a ModuleList or a Sequential of
            layers.
        keep: 0-based indices, ascending, at least one; or such a list for each of several lists of layers, by their
            names in ``model.named_modules()``. Without a name, the model must hold exactly one LayerDropStack or
            LayerDropModuleList.

    Raises:
        ValueError: indices out of range, unsorted or repeated; a name that is no list of layers; one list under two
            names, or a list within another one; no single list where no name is given.

    Source: Fan, Grave, Joulin 2019 (arXiv 1909.11556), section 3.3.
    """
    wanted = checked_keep(model, keep)
    layers = [layer for name in wanted for layer in every_layer(layers_of(model, name))]
    kept = {id(layers_of(model, name)[index]) for name, indices in wanted.items() for index in indices}
    # What stands in the memo is taken as already copied.
    smaller = copy.deepcopy(model, {id(layer): layer for layer in layers if id(layer) not in kept})
    beside = changes_beside(smaller, wanted)
    for name, indices in wanted.items():
        cut(smaller.get_submodule(name), indices)
    uncopied = {id(layer) for layer in layers} - kept
    for name, module in smaller.named_modules():
        if id(module) in uncopied:
            raise ValueError(f"the layer {name!r} is used outside the lists that were cut, expected it to go with them")
    for change in beside:
        change.make()
    return smaller
