"""The rule, and the file of tuned configurations that goes before it."""

import json

import pytest
import torch
import triton

from layerdrop_fast.triton import configurations
from layerdrop_fast.triton.configurations import (
    OPS,
    Configuration,
    chosen,
    configuration,
    entry,
    preferred,
    read_tuned,
    tuned_file,
    write_tuned,
)
from layerdrop_fast.triton.tune import MOST_THREADS, candidates
from tests.ops.eager import DTYPES

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
EVERY_WIDTH = [*range(1, 70), *(2**k + more for k in range(7, 17) for more in (-1, 0, 1) if 2**k + more <= 2**16)]
CPU = torch.device("cpu")
TUNED = Configuration(rows=3, block_d=64, num_warps=2)


def is_power_of_two(n):
    return n & (n - 1) == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_the_rule_and_its_neighbours_can_be_launched(op, arch):
    lanes = 64 if arch.startswith("gfx") else 32
    for dtype in DTYPES:
        for channels in EVERY_WIDTH:
            rule, *others = candidates(op, channels, dtype, arch)
            assert rule == configuration(op, channels, dtype, arch)
            assert len({rule, *others}) == 1 + len(others)
            for config in (rule, *others):
                assert all(map(is_power_of_two, (config.rows, config.block_d, config.num_warps)))
                assert config.block_d >= 16
                assert 1 <= config.num_warps * lanes <= MOST_THREADS
            if "gather_norm" in op and triton.next_power_of_2(channels) * dtype.itemsize <= 32768:
                assert rule.block_d >= channels  # whole rows stay in registers
            one = rule.fit(1)
            assert (one.rows, one.block_d) == (1, rule.block_d)
            assert 1 <= one.num_warps <= rule.num_warps


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op: got 'gather', expected one of gather_norm, "):
        configuration("gather", 64, torch.float32, "sm_90")


def test_a_file_is_written_read_added_to_and_refused(tmp_path):
    path = tmp_path / "folder" / "gpu.json"
    write_tuned(path, {"act 64 float32": TUNED}, {"gpu": "one"})
    other = Configuration(1, 128, 4, num_stages=2, fp_fusion=True)
    write_tuned(path, {"act 128 bfloat16": other}, {"gpu": "two"})
    assert read_tuned(path) == {"act 64 float32": TUNED, "act 128 bfloat16": other}
    assert [run["gpu"] for run in json.loads(path.read_text())["runs"]] == ["one", "two"]
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    for content in ("", "{}", '{"configurations": {"act": {"rows": 1}}}', '{"configurations": {"act": 1}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"gpu\.json: expected tuned configurations"):
            read_tuned(path)


def test_the_user_s_file_of_this_gpu_is_preferred(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configurations, "gpu_of", lambda device: ("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(configurations, "_tuned", configurations._tuned.__wrapped__)  # without its cache
    arguments = "act", 64, torch.float32
    rule = configuration(*arguments, "sm_90")
    assert chosen(*arguments, CPU) == rule
    write_tuned(tuned_file("NVIDIA A100"), {entry(*arguments): TUNED}, {})
    assert chosen(*arguments, CPU) == rule
    write_tuned(tuned_file("NVIDIA H200"), {entry(*arguments): TUNED}, {})
    assert tuned_file("NVIDIA H200") == tmp_path / "layerdrop_fast" / "NVIDIA-H200.json"
    assert chosen(*arguments, CPU) == TUNED
    assert chosen("act", 65, torch.float32, CPU) == configuration("act", 65, torch.float32, "sm_90")


def test_a_candidate_is_preferred_inside_its_block_only():
    arguments = "act", 64, torch.float32
    before = chosen(*arguments, CPU)
    with preferred(TUNED, *arguments, CPU):
        assert chosen(*arguments, CPU) == TUNED
        with preferred(before, *arguments, CPU):
            assert chosen(*arguments, CPU) == before
        assert chosen(*arguments, CPU) == TUNED
    assert chosen(*arguments, CPU) == before
