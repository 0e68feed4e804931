"""Any op on any small input: the shared strategies, with the Triton kernels."""

import pytest

from tests.ops.test_fuzz import FAMILIES, fuzz


@pytest.mark.parametrize("family", FAMILIES)
def test_any_call(family, request):
    fuzz(family, 1000 if "all" in request.node.callspec.id else 50)
