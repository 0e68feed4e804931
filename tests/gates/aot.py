"""Kernels compiled ahead of time, without a GPU, exactly as launchers launch them, and what the machine code says."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from layerdrop_fast.triton import configurations

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


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


def compiled(launch: Launch, *, aligned: bool = True) -> Code:
    """``aligned``: pointers are multiples of 16 bytes, as torch allocates."""
    given = dict(launch.arguments)
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif torch.is_tensor(value):
            signature[parameter.name] = TYPES[value.dtype]
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
    amd = launch.arch.startswith("gfx")
    target = GPUTarget("hip", launch.arch, 64) if amd else GPUTarget("cuda", int(launch.arch[3:]), 32)
    found = triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=target, options=options)
    return _amd_code(found) if amd else _nvidia_code(found)


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
