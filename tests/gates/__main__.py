"""Compiles kernels for GPUs that are not there and says what they do not keep to.

python -m tests.gates           a representative set; also whether docs/kernels.md has its figures
python -m tests.gates --all     every kernel x configuration; rewrites the figures of docs/kernels.md
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from tests.gates.aot import Code
from tests.gates.gates import Gate, check, compiled_again, every, representative
from tests.gates.page import PAGE, compiler_of, filled, tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every kernel x configuration; rewrites docs/kernels.md")
    parser.add_argument("--unaligned", action="store_true", help="as if no pointer were aligned: has to fail")
    arguments = parser.parse_args()
    figures = list(representative())
    gates = list(dict.fromkeys([*figures, *every()])) if arguments.all else figures
    if arguments.unaligned:
        gates = [gate for gate in gates if (gate.arch, gate.channels, gate.activation) == ("sm_90", 1024, "gelu")]
    found, red = run(gates, aligned=not arguments.unaligned)
    print(f"{len(gates) - red} of {len(gates)} compiled kernels keep to the gates")
    again = compiled_again()
    print("\n".join(again or ["each kernel is compiled once for all plans"]))
    if red or again:
        return 1
    values, page = tables({gate: found[gate] for gate in figures}), PAGE.read_text()
    if arguments.all:
        PAGE.write_text(filled(page, values))
    elif values["compiler"] == compiler_of(page) and filled(page, values) != page:
        print(f"docs/{PAGE.name} has other figures: `make gates` writes them")
        return 1
    return 0


def run(gates: list[Gate], *, aligned: bool) -> tuple[dict[Gate, Code], int]:
    """What each kernel's code is, and how many are at fault; prints these, and how far it is."""
    found, red = {}, 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(check, aligned=aligned), gates, chunksize=4)
        for done, (gate, (code, faults)) in enumerate(zip(gates, results, strict=True), start=1):
            found[gate] = code
            red += bool(faults)
            for fault in faults:
                print(f"{gate}: {fault}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{done} of {len(gates)}", end="", file=sys.stderr)
    return found, red


if __name__ == "__main__":
    sys.exit(main())
