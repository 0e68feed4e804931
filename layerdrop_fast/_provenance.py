"""What every figure that is kept carries: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from layerdrop_fast import __version__, _extension


def provenance(command: Sequence[str]) -> dict[str, str]:
    """What a number that is measured here and now was measured on, and by which command."""
    return {
        "command": " ".join(command),
        "machine": machine(torch.device("cpu")),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _driver(),
        "cuda or rocm": str(torch.version.cuda or torch.version.hip or "none"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": np.__version__,
        "layerdrop_fast": __version__,
        "cpp_extension": _extension.missing or f"built with {_extension.planner.compiler}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].strip() if names else name
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of the checkout that the package runs from, or that it runs from none."""
    folder = Path(__file__).parent
    if shutil.which("git") is None or not (folder.parent / ".git").exists():
        return "unknown: no repository"
    asked = [
        subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    if any(done.returncode for done in asked):
        return "unknown: git fails"
    head, changes = (done.stdout.strip() for done in asked)
    return f"{head}{' and changes' if changes else ''}"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(question, capture_output=True, text=True, check=False)
    return "unknown" if asked.returncode else asked.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
