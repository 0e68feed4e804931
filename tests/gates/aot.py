"""Kernels compiled ahead of time, without a GPU, exactly as launchers launch them, and what the machine code says."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from layerdrop_fast.triton import configurations

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it would be launched with."""

    kernel: Any
    arguments: dict[str, Any]
    arch: str

    @property
    def threads(self) -> int:
        return int(self.arguments["num_warps"]) * (64 if self.arch.startswith("gfx") else 32)


def launch_of(call: Callable[[], Any], arch: str) -> Launch:
    """The one launch of an op on such a GPU; its tensors are on the meta device."""
    found: list[Launch] = []

    def record(kernel: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        found.append(Launch(kernel, arguments, arch))

    gpu = mock.patch.object(configurations, "gpu_of", return_value=("", arch))
    with gpu, mock.patch.object(JITFunction, "run", record):
        call()
    (launch,) = found
    return launch


@dataclass(frozen=True)
class Code:
    """What a compiled kernel takes, and the bytes a thread moves by accesses of 16 bytes and more."""

    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def specialised(launch: Launch) -> tuple[Any, ...]:
    """Options, signature, constants and attributes for which Triton would compile a kernel at this launch."""
    backend = make_backend(target(launch.arch))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    given = {**launch.arguments, "debug": False, "instrumentation_mode": ""}
    if launch.arch.startswith("gfx"):  # where torch is not AMD's, the launcher thinks of NVIDIA
        given.pop("maxnreg")
    bound, specialization, options = bind(**given)
    return tuple(launch.kernel._pack_args(backend, given, bound, specialization, options))


def compiled(launch: Launch, *, aligned: bool = True) -> Code:
    """``aligned``: pointers are multiples of 16 bytes, as torch allocates."""
    options, signature, constants, attributes = specialised(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes if aligned else {})
    found = triton.compile(source, target=target(launch.arch), options=options.__dict__)
    return _amd_code(found) if launch.arch.startswith("gfx") else _nvidia_code(found)


def _nvidia_code(found: Any) -> Code:
    usage, assembly = (_nvidia_tool(*command, found.asm["cubin"]) for command in (USAGE, DISASSEMBLE))
    (resources,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return Code(
        registers=int(resources[0]),
        spills=int(resources[1]) + len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared=found.metadata.shared,
        wide_loads=sum(int(bits) // 8 for bits in re.findall(r"\bLDG\.E\S*\.(128|256)\b", assembly)),
        wide_stores=sum(int(bits) // 8 for bits in re.findall(r"\bSTG\.E\S*\.(128|256)\b", assembly)),
    )


USAGE, DISASSEMBLE = ("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")


def _nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _amd_code(found: Any) -> Code:
    assembly = found.asm["amdgcn"]

    def number(name: str) -> int:
        (value,) = re.findall(rf"^\s*\.{name}:\s*(\d+)", assembly, flags=re.MULTILINE)
        return int(value)

    def wide(access: str) -> int:
        return 16 * len(re.findall(rf"\b(?:global|buffer)_{access}_dwordx4\b", assembly))

    return Code(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size"),
        shared=found.metadata.shared,
        wide_loads=wide("load"),
        wide_stores=wide("store"),
    )
