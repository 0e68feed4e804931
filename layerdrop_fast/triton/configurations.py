"""Which tile and how many warps a kernel runs with: a pure function of (op, channels, dtype, arch).

The rule is one for all: a thread holds a few 16-byte vectors of each tensor, and a row of channels stays in registers
where it fits. ``tune.py`` measures its neighbours on a GPU and writes what won; that is preferred where it exists.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

OPS = (
    "gather_norm",
    "gather_norm_bwd",
    "scatter_residual",
    "scatter_residual_bwd",
    "scatter_residual_gather_norm",
    "scatter_residual_gather_norm_bwd",
    "act",
    "act_bwd",
    "norm_linear_bwd",
)
# These need whole rows of channels: up to so many bytes stay in registers, along wider rows programs go in parts.
_WHOLE_ROWS = tuple(op for op in OPS if op.endswith(("gather_norm", "gather_norm_bwd")))
_WIDEST, _PART, _TILE = 32768, 8192, 8192  # bytes of each tensor


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A tile of ``rows`` x ``block_d`` for ``num_warps`` warps."""

    rows: int
    block_d: int
    num_warps: int
    num_stages: int = 1
    fp_fusion: bool = False

    def fit(self, positions: int) -> "Configuration":
        """With no more rows than a sample has, and as many warps less."""
        rows = min(self.rows, triton.next_power_of_2(max(positions, 1)))
        return dataclasses.replace(self, rows=rows, num_warps=max(1, self.num_warps * rows // self.rows))


def configuration(op: str, channels: int, dtype: torch.dtype, arch: str) -> Configuration:
    """The rule.

    Args:
        op: one of OPS; forms in place have that of their op.
        channels: D, or F of the activations.
        dtype: of the stream.
        arch: "sm_90", "gfx942", ...
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    size = dtype.itemsize
    whole = max(triton.next_power_of_2(channels), 16)
    block_d = min(whole, 1024)
    if op in _WHOLE_ROWS:
        block_d = whole if whole * size <= _WIDEST else _PART // size
    rows = max(1, _TILE // (block_d * size))
    # A thread holds two 16-byte vectors of each tensor; of activations, which compute more, one.
    bytes_per_warp = (64 if arch.startswith("gfx") else 32) * (16 if op.startswith("act") else 32)
    if channels % 4:  # every element draws four words of its own
        bytes_per_warp //= 4
    most = 16 if arch.startswith("gfx") else 32
    num_warps = min(max(rows * block_d * size // bytes_per_warp, 1), most)
    return Configuration(rows, block_d, num_warps, fp_fusion=op.startswith("act"))


def chosen(op: str, channels: int, dtype: torch.dtype, device: torch.device) -> Configuration:
    """What was tuned for this GPU, else the rule."""
    gpu, arch = gpu_of(device)
    return _tuned(gpu).get(entry(op, channels, dtype)) or configuration(op, channels, dtype, arch)


@contextlib.contextmanager
def preferred(
    candidate: Configuration, op: str, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """``chosen`` is the candidate inside the block."""
    tuned, key = _tuned(gpu_of(device)[0]), entry(op, channels, dtype)
    before = tuned.get(key)
    tuned[key] = candidate
    try:
        yield
    finally:
        del tuned[key]
        if before is not None:
            tuned[key] = before


def gpu_of(device: torch.device) -> tuple[str, str]:
    """Name and architecture; the CPU stands for the interpreter and has no name."""
    return _gpu_at(device.index) if device.type == "cuda" else ("", "sm_90")


@functools.cache
def _gpu_at(index: int) -> tuple[str, str]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, arch_of(properties)


def arch_of(properties: "torch.cuda._CudaDeviceProperties") -> str:
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def entry(op: str, channels: int, dtype: torch.dtype) -> str:
    """A line of a file of tuned configurations."""
    return f"{op} {channels} {str(dtype).removeprefix('torch.')}"


def tuned_file(gpu: str, folder: Path | None = None) -> Path:
    """Where the tuned configurations of a GPU lie: ``$XDG_CACHE_HOME/layerdrop_fast``, or ``folder``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (folder or cache / "layerdrop_fast") / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


def read_tuned(path: Path) -> dict[str, Configuration]:
    """ValueError for a file that ``tune.py`` did not write."""
    try:
        return {key: Configuration(**fields) for key, fields in json.loads(path.read_text())["configurations"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected tuned configurations: {error}") from error


def write_tuned(path: Path, found: dict[str, Configuration], provenance: dict[str, str]) -> None:
    """Adds to what the file holds, in one move: whoever reads finds the old content or the new."""
    known = read_tuned(path) if path.exists() else {}
    runs = json.loads(path.read_text()).get("runs", []) if path.exists() else []
    content = {
        "runs": [*runs, {**provenance, "entries": sorted(found)}],
        "configurations": {key: dataclasses.asdict(config) for key, config in sorted({**known, **found}.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


@functools.cache
def _tuned(gpu: str) -> dict[str, Configuration]:
    """A user's own file before the package's."""
    if not gpu:
        return {}
    paths = (tuned_file(gpu), tuned_file(gpu, Path(__file__).parent / "tuned"))
    return next((read_tuned(path) for path in paths if path.exists()), {})
