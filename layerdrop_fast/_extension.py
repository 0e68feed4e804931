"""Loads the compiled extension where there is one, and remembers why not where there is none.

``planner`` draws the decisions on the host: the C++ module, or its twin in Python.
"""

from importlib import import_module
from types import ModuleType

planner: ModuleType
missing: str | None = None  # why there is no compiled extension; None where there is one

try:
    # Loading it also registers the C++ kernels of the ops.
    planner = import_module("layerdrop_fast._C")
except ModuleNotFoundError:
    missing = (
        "not built: no C++ compiler or no Python.h was found at installation, or LAYERDROP_FAST_BUILD=none was set"
    )
except ImportError as error:  # built for another Python, or for a newer torch
    missing = f"built, but does not load: {error}"

if missing is not None:
    planner = import_module("layerdrop_fast.reference.planner")
