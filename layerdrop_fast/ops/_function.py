"""The autograd.Function that the ops derive from."""

import inspect

import torch


class Function(torch.autograd.Function):
    """An ``autograd.Function`` whose ``forward`` knows its own signature.

    With ``setup_context``, torch asks ``inspect`` for that signature in every call: 14 of 34 microseconds of ``apply``.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
