"""Triton's interpreter with the hardware's bfloat16, and twice as fast.

The interpreter cuts float32 to bfloat16. GPUs round to the nearest, halves to even, and so does torch.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _cast_with_rounding(self, source, dst_type):
    pair = source.dtype.scalar, dst_type.scalar
    if pair == (tl.float32, tl.bfloat16):
        halves = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(halves.numpy().view(np.uint16), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        wide = torch.from_numpy(np.ascontiguousarray(source.data).view(np.int16)).view(torch.bfloat16).float()
        return TensorHandle(wide.numpy(), tl.float32)
    return _cast(self, source, dst_type)


_call = InterpretedFunction.__call__
_patched = set()


def _call_once_patched(self, *args, **kwargs):
    """A launch patches ``triton.language``; a call within a kernel patches what that function sees, and for good."""
    module = self.fn.__module__
    if not module.startswith("layerdrop_fast.") and module not in _patched:
        _patched.add(module)
        return _call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


def prepare() -> None:
    """Before kernels run."""
    InterpreterBuilder.cast_impl = _cast_with_rounding
    InterpretedFunction.__call__ = _call_once_patched
