"""Any op on any small input against the reference; hypothesis prints the case that fails."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.eager import ACTIVATIONS, DTYPES, LAYOUTS, NAMES, Case, assert_agrees, parameters

FAMILIES = {
    "gather_norm": ["gather_norm", "gather_norm_bwd"],
    "scatter_residual": ["scatter_residual", "scatter_residual_", "scatter_residual_bwd"],
    "scatter_residual_gather_norm": [name for name in NAMES if name.startswith("scatter_residual_gather_norm")],
    "act": ["act", "act_bwd"],
}
MIDDLES = ((), (1,), (2,), (3,), (5,), (2, 2), (1, 3), (2, 1, 2), (0,))
SAMPLE, SPARE = 0, -1
# What a sample puts into rows.
ENTRIES = ((), (SAMPLE,), (SAMPLE,), (SPARE,), (SAMPLE, SPARE), (SPARE, SAMPLE))


def laid_out(parameter: str, value, layout: str):
    if not torch.is_tensor(value) or not value.is_floating_point() or layout == "contiguous":
        return value
    if layout == "one number":  # as the gradient of a sum
        expands = parameter.startswith("grad") and value.numel()
        return value[(slice(1),) * value.dim()].expand(value.shape) if expands else value
    return LAYOUTS[layout](value)


def subset(code: int, batch: int) -> tuple[int, ...] | None:
    """The rows with this number, a digit a sample; None beyond the last."""
    if code == len(ENTRIES) ** batch:
        return None
    entries = (ENTRIES[code // len(ENTRIES) ** sample % len(ENTRIES)] for sample in range(batch))
    return tuple(sample if entry == SAMPLE else SPARE for sample, each in enumerate(entries) for entry in each)


# Pairs of fields, since a draw takes as long as an op.
DTYPE_PAIRS = list(itertools.product(DTYPES, [None, *DTYPES]))
DROPOUT = list(itertools.product([0.0, 0.3, 0.9, 1.0, 1e-12], [None, 1.25, -0.5, 0.0]))
NORMS = list(itertools.product([False, True], [1e-5, 1e-2, 1.0]))
EXACT_NORMS = list(itertools.product([False, True], [1e-5, 1e-2, 0.0]))


@st.composite
def calls(draw, names: list[str]) -> tuple[str, Case, str]:
    """An op, a case, a layout of its arguments."""
    batch, width = draw(st.integers(0, 5)), draw(st.integers(1, 70))
    codes = st.integers(0, len(ENTRIES) ** batch)
    dtype, branch = draw(st.sampled_from(DTYPE_PAIRS))
    p, scale = draw(st.sampled_from(DROPOUT))
    rms, eps = draw(st.sampled_from(EXACT_NORMS if width > 8 else NORMS))  # of few channels the variance may be 0
    case = Case(
        (batch, *draw(st.sampled_from(MIDDLES)), width),
        dtype,
        branch,
        subset(draw(codes), batch),
        subset(draw(codes), batch),
        p,
        scale,
        rms,
        eps,
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.integers(0, 1000)),
    )
    return draw(st.sampled_from(names)), case, draw(st.sampled_from(["contiguous", "one number", *LAYOUTS]))


def fuzz(family: str, examples: int) -> None:
    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(calls(FAMILIES[family]))
    def agrees(call):
        name, case, layout = call
        arguments = [
            value if name.endswith("_") and i == 0 else laid_out(parameter, value, layout)
            for i, (parameter, value) in enumerate(zip(parameters(name), case.arguments(name), strict=True))
        ]
        assert_agrees(name, case, tuple(arguments), from_terms=True)

    agrees()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_call(family):
    fuzz(family, 100)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_thousand_calls(family):
    fuzz(family, 25_000)
