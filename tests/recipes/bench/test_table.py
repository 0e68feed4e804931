"""The table of figures."""

import dataclasses

from layerdrop_fast.recipes.bench.measure import Compilation, Figures
from layerdrop_fast.recipes.bench.setting import Setting
from layerdrop_fast.recipes.bench.table import table, times

MIB = 2**20
SETTING = Setting(samples=10, length=100)
LIMIT = Figures("limit", SETTING, (1.0, 2.0, 1.5), (20.0, 20.0, 20.0), 400 * MIB, 430 * MIB, None, None)
SKIP = Figures("skip", SETTING, (1.5, 2.2, 1.8), (19.0, 20.0, 19.5), 720 * MIB, 730 * MIB, 172e-6, None)


def test_ratios_pair_the_steps_of_a_turn():
    assert times(SKIP, LIMIT) == 1.8 / 1.5
    assert times(LIMIT, LIMIT) == 1.0


def test_a_line_a_way():
    lines = table({"skip": SKIP, "limit": LIMIT}).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["skip", "19..20", "1800.0", "(1500.0..2200.0)", "1.20", "556", "720.0", "1.80", "730.0", "172.0"],
        ["limit", "20", "1500.0", "(1000.0..2000.0)", "1.00", "667", "400.0", "1.00", "430.0", "-"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == ""
    assert [line.split()[0] for line in lines[4:]] == ["skip", "limit"]
    assert "fairseq" in lines[4]


def test_without_a_limit_there_are_no_ratios():
    assert table({"skip": SKIP}).splitlines()[1].split()[4:8] == ["-", "556", "720.0", "-"]


def test_a_compiled_table_has_what_compiling_took():
    compiled = dataclasses.replace(SKIP, compilation=Compilation(12.34, 2))
    lines = table({"skip": compiled, "limit": LIMIT}).splitlines()
    assert lines[0].endswith("compiling, s  graphs")
    assert lines[1].split()[-2:] == ["12.3", "2"]
    assert lines[2].split()[-2:] == ["-", "-"]


def test_a_way_of_ones_own_has_no_note():
    assert table({"mine": SKIP}).splitlines()[2:] == []
