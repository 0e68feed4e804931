from tests.ops.conftest import uninitialised_memory_is_nan  # noqa: F401  (integers get their largest value)
