"""The host engine and the choice of an engine: without a compiler, with a broken one, with many processes at once."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
