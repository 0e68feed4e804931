"""What may stand between a stack and its layers."""

from torch import nn
from torch.nn.modules import module as modules

from layerdrop_fast.nn.compiled import is_compiled
from layerdrop_fast.nn.transformer_layer import TransformerLayer


def is_enclosed(layer: nn.Module) -> bool:
    """Whether something may stand between the stack and the layer: a checkpoint, FSDP, a compiled region, a hook."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    hooked = bool(hooks) or modules._has_any_global_hook()
    return type(layer) is not TransformerLayer or hooked or "forward" in vars(layer) or is_compiled(layer)
