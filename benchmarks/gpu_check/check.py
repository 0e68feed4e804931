"""What a stage gets, and what becomes of its result."""

import functools
import importlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """What a stage checks does not hold."""


@dataclass
class Check:
    """One stage of one run."""

    file: Path
    dry: bool  # on the CPU in Triton's interpreter, at tiny sizes
    until: float  # time.monotonic() at which the stage is stopped
    provenance: dict[str, str]

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def save(self, result: dict[str, Any]) -> None:
        """Called again and again: what was saved last survives a stop."""
        write(self.file, {"provenance": self.provenance, "result": result})

    @functools.cached_property
    def device(self) -> Any:
        """The layerdrop_fast.triton.timing.Device, with the Triton kernels in the dispatcher."""
        use_the_kernels(self.dry)
        return importlib.import_module("layerdrop_fast.triton.timing").Device()


def use_the_kernels(dry: bool) -> None:
    """On a GPU they are in the dispatcher anyway; in a dry run they take the place of the C++ ones.

    TRITON_INTERPRET is read when Triton is imported: whoever starts the process sets it.
    """
    if dry:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise Failed("a dry run needs TRITON_INTERPRET=1")
        importlib.import_module("tests.triton.interpreter").prepare()
        importlib.import_module("layerdrop_fast.triton").register("CPU")


def write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)
