"""Checks of plain arguments: each returns the value, or raises an error that names what came and what was expected."""

import operator
from collections.abc import Iterable


def check_rate(value: float, name: str) -> float:
    """A number in [0, 1], as a float."""
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers
        raise TypeError(f"{name} must be a single number, got {value!r}") from None
    if not 0.0 <= number <= 1.0:  # also catches NaN
        raise ValueError(f"{name} must lie in [0, 1], got {number}")
    return number


def check_integer(value: int, name: str) -> int:
    """An integer of any kind, as Python's."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None


def check_count(value: int, name: str, minimum: int) -> int:
    """An integer of at least ``minimum``."""
    number = check_integer(value, name)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_range(value: int, name: str, lowest: int, highest: int, of: str = "") -> int:
    """An integer from ``lowest`` to ``highest``, which is ``of`` something."""
    number = check_count(value, name, lowest)
    if number > highest:
        raise ValueError(f"{name} is {number}, expected {lowest} to {highest}{of}")
    return number


def check_indices(value: Iterable[int], name: str, count: int) -> list[int]:
    """At least one of 0 to ``count - 1``, ascending, each once, as a list."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise TypeError(f"{name} are {value!r} of type {type(value).__name__}, expected a list of integers")
    indices = list(value)
    if masks := [index for index in indices if _is_bool(index)]:
        raise TypeError(f"{name} have {masks[0]}, expected integers, not a mask")
    indices = [check_integer(index, name) for index in indices]
    if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= count:
        raise ValueError(f"{name} are {indices}, expected at least one of 0 to {count - 1}, ascending, each once")
    return indices


def _is_bool(value: object) -> bool:
    """Python's, numpy's or an element of a tensor."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def check_word(value: int, name: str) -> int:
    """An integer in [0, 2**64): a seed, a step, a stream."""
    number = check_integer(value, name)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{name} is {number}, expected an integer in [0, 2**64)")
    return number


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    """One of several names."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {choices}")
    return value
