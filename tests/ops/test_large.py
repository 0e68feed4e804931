"""Streams of more than 2^31 elements: addresses, and the numbers of dropout's elements.

All is 0 but for the last position of the last two samples, so that memory is only taken for what an op writes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from layerdrop_fast.reference.philox import random_bits
from tests.ops.eager import (
    KEY,
    KINDS,
    NAMES,
    REFERENCE,
    RESULTS,
    SITE,
    has_cpu_kernel,
    listed,
    op,
    parameters,
    rows_of,
    same_bits,
    tensor,
)

WIDTH, GIB = 1024, 2**30
SHAPES = {
    "many samples": ((2**21 + 3, 1, WIDTH), torch.bfloat16),
    "many positions": ((1, 2**21 + 3, WIDTH), torch.float16),
}
# A power of 2 times anything is exact: it may stand before or after a scale and a rounding.
DROPOUT_P, MULTIPLIER, SCALE = 0.5, 2, 1.25


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of 2 bytes that take no memory until they are written, unlike those of torch."""
    return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(dtype)


class Large:
    """The arguments of an op, and ``small``, those of the same op on the last positions alone, without dropout.

    There y has been dropped out beforehand; gradients of y, and activations, are to be dropped out afterwards.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        batch = shape[0]
        some = batch > 3 and not name.startswith("act")
        self.samples = [1, batch - 2, batch - 1] if some else [*range(batch)][-3:]
        rows = {"rows": [1, batch - 1], "next_rows": [batch - 2, batch - 1]} if some else {}
        if name.startswith("gather_norm"):
            rows["rows"] = rows.get("next_rows")
        self.rows = {kind: rows.get(key) for kind, key in (("B", ""), ("K", "rows"), ("N", "next_rows"))}
        self.arguments, self.small = [], []
        for i, parameter in enumerate(parameters(name)):
            large, small = self._argument(parameter, rows.get(parameter), i)
            self.arguments.append(large)
            self.small.append(small)

    def pick(self, kind: str) -> list[int]:
        """The places in a tensor of this kind that belong to the samples."""
        rows = self.rows[kind]
        return self.samples if rows is None else [*range(len(rows))]

    def last_positions(self, value: torch.Tensor, kind: str) -> torch.Tensor:
        return value[self.pick(kind), -1:]

    def dropped_out(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` [K, 1, D], of the last positions, with the mask of their elements in the large tensor."""
        rows = torch.tensor(self.rows["K"] or self.samples)
        first = (rows * self.shape[1] + self.shape[1] - 1) * WIDTH
        assert first[-1] > 2**31
        kept = random_bits(KEY, SITE, first[:, None] + torch.arange(WIDTH)) < 2**31
        return torch.where(kept[:, None], values * MULTIPLIER, 0)

    def _argument(self, parameter: str, rows: list[int] | None, seed: int) -> tuple:
        """The large one and the small one."""
        if parameter in KINDS:
            return self._tensors(parameter, KINDS[parameter], seed)
        if parameter in ("rows", "next_rows"):
            return rows and rows_of(*rows), rows and rows_of(*(self.samples.index(row) for row in rows))
        same = {"scale": torch.tensor(SCALE), "rms": False, "eps": 1e-5, "activation": "relu", "dtype": self.dtype}
        large = {"key": KEY, "site": SITE, "dropout_p": DROPOUT_P, "batch_size": self.shape[0]}
        small = {"key": None, "site": None, "dropout_p": 0.0, "batch_size": len(self.samples)}
        return (same | large)[parameter], (same | small)[parameter]

    def _tensors(self, parameter: str, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.shape[0] if self.rows[kind] is None else len(self.rows[kind])
        if parameter == "rstd":
            return torch.full((length, self.shape[1]), 0.5), torch.full((len(self.pick(kind)), 1), 0.5)
        large = lazy_zeros((length, *self.shape[1:]), self.dtype)
        large[-2:, -1] = tensor(min(2, length), WIDTH, dtype=self.dtype, seed=seed)
        small = self.last_positions(large, kind)
        return large, self.dropped_out(small.float()) if parameter == "y" else small


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_more_than_2_to_31_elements(name, shape):
    if not has_cpu_kernel(name):
        pytest.skip("the reference copies the stream several times")
    if available_memory() < 12 * GIB:
        pytest.skip("less than 12 GiB of memory are free")
    call = Large(name, *SHAPES[shape])
    in_place = name.endswith("_")
    expected = call.small[:in_place] + listed(REFERENCE[name](*call.small))
    found = call.arguments[:in_place] + listed(op(name)(*call.arguments))
    for got, want, kind in zip(found, expected, RESULTS[name], strict=True):
        if kind == "K":
            want = call.dropped_out(want)
        last = call.last_positions(got, kind)
        if "norm" in name:  # sums of 1024 terms in another order
            torch.testing.assert_close(last, want, rtol=2**-7, atol=2**-7)
        else:
            assert same_bits(last, want)
        assert want[-1].any()
        if got.dim() == 3:
            assert got.count_nonzero() == want.count_nonzero()
