"""Instructions that not every x86-64 processor has stand only in the kernels that are compiled for them.

A template of the standard library that such a kernel's file instantiates, or its static initialiser, would otherwise
run on processors that cannot: the linker keeps one copy of a template for all files, and initialisers run at import.
The kernels are reached through their tables: what calls one by name skips the choice, and needs what it needs.
"""

import platform
import re
import shutil
import subprocess
from collections import defaultdict

import pytest

from layerdrop_fast import _extension

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
CALL = re.compile(r"^(?:\w+ )*(?:call|j\w+)q? +[0-9a-f]+ <(.+?)(?:\+0x[0-9a-f]+)?>")
# Every instruction of AVX and its successors is spelled with a v, or works on mask registers.
AVX = re.compile(r"^(?:\{\w+\} )?v|%[yz]mm")
AVX512 = re.compile(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b")
WIDTHS = ("avx512", "avx2", "baseline")


def compiled_for(symbol):
    """The namespace layerdrop_fast::avx512 or ::avx2 that a mangled name carries; baseline otherwise."""
    if symbol.startswith("_GLOBAL_"):
        return "baseline"  # a static initialiser runs wherever the extension is loaded
    return next((name for name in ("avx512", "avx2") if re.search(rf"(?<!\d){len(name)}{name}", symbol)), "baseline")


def needs_of(instruction):
    if match := CALL.match(instruction):
        return compiled_for(match[1])
    return "avx512" if AVX512.search(instruction) else "avx2" if AVX.search(instruction) else "baseline"


def required_instructions(disassembly):
    """For each function, the widest instruction set that it needs and the first instruction that needs it."""
    needed = {}
    symbol = None
    for line in disassembly.splitlines():
        if match := FUNCTION.match(line):
            symbol = match[1]
            needed[symbol] = ("baseline", "")
        elif symbol is not None and "\t" in line:
            instruction = line.split("\t", 1)[1].strip()
            needs = needs_of(instruction)
            if WIDTHS.index(needs) < WIDTHS.index(needed[symbol][0]):
                needed[symbol] = (needs, instruction)
    return needed


def leaks(disassembly):
    """Functions that need more than what they are compiled for, each with an instruction to show for it."""
    return [
        f"{symbol}: {instruction}"
        for symbol, (needs, instruction) in required_instructions(disassembly).items()
        if WIDTHS.index(needs) < WIDTHS.index(compiled_for(symbol))
    ]


def objdump(*arguments):
    command = ["objdump", *arguments, _extension.planner.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.skipif(_extension.missing is not None, reason=f"C++ extension {_extension.missing}")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump found")
def test_new_instructions_stay_in_their_namespaces():
    if "PyInit__C" not in objdump("-t"):
        pytest.skip("the extension is stripped: no names of functions")
    disassembly = objdump("-d", "--no-show-raw-insn")
    assert leaks(disassembly) == []

    # Not vacuous: the kernels are there, and use what they are compiled for.
    found = defaultdict(set)
    for symbol, (needs, _) in required_instructions(disassembly).items():
        found[compiled_for(symbol)].add(needs)
    assert "avx2" in found["avx2"]
    assert "avx512" in found["avx512"]


@pytest.mark.parametrize(
    ("symbol", "instruction", "leaks_out"),
    [
        ("_ZN14layerdrop_fast6avx51212_GLOBAL__N_13addEv", "vaddps %zmm0,%zmm1,%zmm2", False),
        ("_ZN14layerdrop_fast6avx51212_GLOBAL__N_13addEv.cold", "kmovw  %eax,%k1", False),
        ("_ZZN14layerdrop_fast4avx212_GLOBAL__N_13addEvENKUlvE_clEv.constprop.0", "vmovss (%rax),%xmm0", False),
        ("_ZN14layerdrop_fast4avx212_GLOBAL__N_13addEv", "vaddps %ymm0,%ymm17,%ymm2", True),
        ("_ZN14layerdrop_fast4avx212_GLOBAL__N_13addEv.part.0", "vpxor  %zmm0,%zmm1,%zmm2", True),
        ("_ZN14layerdrop_fast8baseline12_GLOBAL__N_13addEv", "vmovss (%rax),%xmm0", True),
        ("_ZN14layerdrop_fast8baseline12_GLOBAL__N_13addEv", "addps  %xmm0,%xmm1", False),
        ("_ZSt6__sortIPmEvT_S1_", "{vex} vpxor %xmm0,%xmm1,%xmm2", True),
        ("_GLOBAL__sub_I__ZN14layerdrop_fast6avx5126kTableE", "vmovaps %xmm0,(%rax)", True),
        ("_ZN14layerdrop_fast9use_avx512Ev", "vzeroupper", True),
        ("_GLOBAL__sub_I_avx512.cpp", "call   27c20 <_ZN14layerdrop_fast6avx5125scaleEv>", True),
        ("_ZN14layerdrop_fast4avx23addEv", "jmp    27c2a <_ZN14layerdrop_fast6avx5123addEv+0xa>", True),
        ("_ZN14layerdrop_fast4avx23addEv", "bnd jmp 27c2a <_ZN14layerdrop_fast4avx23addEv.cold>", False),
    ],
)
def test_a_leak_is_found(symbol, instruction, leaks_out):
    text = f"0000000000001120 <{symbol}>:\n    1120:\tpush   %rbp\n    1121:\t{instruction}\n    1125:\tret\n"
    assert leaks(text) == ([f"{symbol}: {instruction}"] if leaks_out else [])
