"""The conformance matrix: every optimizer, in everything that trains models with it.

One test is one cell, run for each optimizer of the registry. Comparisons are exact where the arithmetic is the same,
and in float64 where only its order differs, so that no tolerance can hide a fault.
"""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
