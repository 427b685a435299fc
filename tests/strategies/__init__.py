"""The in-graph strategies against Lightning's own, step by step."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
