"""The language: one meaning for each operation on every kind of value, and what tracing makes of a rule."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
